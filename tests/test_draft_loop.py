"""The drafter's thread: what it takes in one turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from cluster.config import DrafterConfig
from cluster.engine.draft_block import BlockMethod
from cluster.engine.draft_client import DraftSampling, SessionKey
from cluster.engine.draft_engine import Addition, DraftEngine
from cluster.engine.draft_loop import MAX_ROWS_PER_TURN, DraftLoop, FeatureChunk
from cluster.engine.draft_method import DraftRows
from tests.draft_helpers import D, make_drafter, make_engine, round_of, sequence

GREEDY = DraftSampling(temperature=0.0)


class RecordingMethod(BlockMethod):
    """Notes how many rows of how many sessions each write took."""

    def __init__(self) -> None:
        config = DrafterConfig(kv_cache_memory_mb=1, page_size=4)
        super().__init__(
            make_drafter(max_positions=4096), config, 16, torch.Generator().manual_seed(1)
        )
        self.writes: list[list[int]] = []

    def write(self, rows: list[DraftRows]) -> None:
        self.writes.append([len(part) for part in rows])
        super().write(rows)


def a_chunk(name: str, rows: torch.Tensor, *, start: int = 0, is_first: bool = True):
    return FeatureChunk(
        session=SessionKey(name, 0),
        start=start,
        features=rows,
        token_ids=(0,) * (len(rows) + 1),
        sampling=GREEDY if is_first else None,
    )


def features(length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, D, generator=torch.Generator().manual_seed(seed))


def run_until_answered(
    loop: DraftLoop, chunks: list[tuple[str, FeatureChunk]]
) -> list[int | Exception]:
    """Queues everything before the thread starts, so that one turn sees it all."""
    answers: dict[int, int | Exception] = {}
    done = threading.Event()

    def answer(index: int) -> Callable[[int | Exception], None]:
        def take(value: int | Exception) -> None:
            answers[index] = value
            if len(answers) == len(chunks):
                done.set()

        return take

    for index, (replica_id, chunk) in enumerate(chunks):
        loop.submit_features(replica_id, chunk, answer(index))
    loop.start()
    assert done.wait(20)
    loop.stop()
    return [answers[index] for index in range(len(chunks))]


def test_small_chunks_of_many_sessions_share_a_turn_and_draft_as_if_alone():
    method = RecordingMethod()
    engine = DraftEngine(method, DrafterConfig(kv_cache_memory_mb=1, page_size=4))
    lengths = [5, 9, 3, 7]
    chunks = [
        ("ab"[index % 2], a_chunk(f"r{index}", features(length, index)))
        for index, length in enumerate(lengths)
    ]
    assert run_until_answered(DraftLoop(engine), chunks) == lengths
    assert [sorted(write) for write in method.writes] == [sorted(lengths)]
    for index, length in enumerate(lengths):
        replica, key = "ab"[index % 2], SessionKey(f"r{index}", 0)
        alone = make_engine(make_drafter(max_positions=4096))
        alone.open(replica, key, GREEDY)
        alone.append(replica, key, 0, features(length, index), (0,) * (length + 1))
        draft_round = round_of(sequence(key, length + 1))
        ((together,),) = engine.draft([(replica, draft_round)])
        ((expected,),) = alone.draft([(replica, draft_round)])
        assert together.proposal is not None
        assert expected.proposal is not None
        assert together.proposal.draft_token_ids == expected.proposal.draft_token_ids
    engine.check_integrity()


def test_a_turn_is_bounded_and_takes_one_chunk_of_a_session():
    method = RecordingMethod()
    engine = DraftEngine(method, DrafterConfig(kv_cache_memory_mb=1, page_size=4))
    half = MAX_ROWS_PER_TURN // 2
    chunks = [
        ("a", a_chunk("x", features(10, 0))),
        ("a", a_chunk("x", features(10, 1), start=10, is_first=False)),
        ("a", a_chunk("y", features(half, 2))),
        ("a", a_chunk("z", features(half, 3))),
        ("a", a_chunk("w", features(1, 4))),
    ]
    assert run_until_answered(DraftLoop(engine), chunks) == [10, 20, half, half, 1]
    assert method.writes == [[10], [10, half], [half, 1]]


def test_a_refused_chunk_harms_no_other_of_its_turn():
    engine = make_engine(make_drafter())
    engine.open("a", SessionKey("x", 0), DraftSampling(temperature=0.5))
    chunks = [
        ("a", a_chunk("x", features(4, 0))),  # opened with other sampling
        ("a", a_chunk("y", features(4, 1))),
        ("a", a_chunk("unknown", features(4, 1), is_first=False)),
    ]
    refused, taken, unknown = run_until_answered(DraftLoop(engine), chunks)
    assert isinstance(refused, Exception)
    assert (taken, unknown) == (4, 0)


def test_sessions_of_one_turn_do_not_take_each_others_pages():
    engine = make_engine(make_drafter(max_positions=8192), page_size=64)
    num_pages = engine._method.num_pages
    rows = (num_pages * 64 // 2) // 256 * 256  # two of them do not fit beside the padding page
    chunks = [("a", a_chunk("x", features(rows, 0))), ("a", a_chunk("y", features(rows + 256, 1)))]
    lengths = engine_lengths(engine, chunks)
    assert lengths == [rows, None]
    engine.check_integrity()


def engine_lengths(engine: DraftEngine, chunks: list[tuple[str, FeatureChunk]]):
    for replica_id, chunk in chunks:
        engine.open(replica_id, chunk.session, GREEDY)
    return engine.append_all(
        [
            Addition(replica_id, chunk.session, 0, chunk.features, chunk.token_ids)
            for replica_id, chunk in chunks
        ]
    )
