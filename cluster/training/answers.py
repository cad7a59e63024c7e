"""Lets the target answer prompts through the serving engine, to disk, so that it can go on."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.engine.worker import ShardWorker
from cluster.errors import DataError
from cluster.models.checkpoint import target_digest, tokenizer_digest
from cluster.request import FinishReason, Request, SamplingParams
from cluster.training.config import TrainConfig
from cluster.training.dataset import Sequence as TokenSequence
from cluster.training.parallel import Worker
from cluster.training.progress import Progress
from cluster.training.prompts import render

_TOKENS_OF_PASS = 8  # for each running answer: one is its own, the others are for new prompts

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversation:
    """What the target is to answer: a prompt, and what the user says after each answer.

    ``messages`` are those that ``prompt_token_ids`` came from; a document's beginning has none.
    """

    prompt_token_ids: tuple[int, ...]
    messages: tuple[dict[str, str], ...] = ()
    later_turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Turn:
    """One answer to be made: turn ``number`` of conversation ``index``."""

    index: int
    number: int
    prompt_token_ids: tuple[int, ...]
    messages: tuple[dict[str, str], ...]

    @property
    def key(self) -> str:
        return f"{self.index}.{self.number}"


class AnswerFiles:
    """Answers of one target to one list of conversations under one sampling, on disk.

    Guarantees: an answer is written once it is finished, and never made twice; files of another
    target, other prompts or other sampling are never read (their names carry another digest).
    Each worker writes a file of its own and reads all.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, conversations: Sequence[Conversation]
    ) -> None:
        self._folder = folder
        self._conversations = conversations
        self.description = _describe(config, conversations)
        text = json.dumps(self.description, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._prefix = f"answers-{self.digest[:16]}"

    def read(self) -> dict[str, dict[str, Any]]:
        """The answers on disk by key (``conversation.turn``).

        A last line that a killed run left unfinished is left out.

        Raises:
            DataError: a line is broken otherwise.
        """
        answers: dict[str, dict[str, Any]] = {}
        for path in sorted(self._folder.glob(f"{self._prefix}.*.jsonl")):
            for answer in _read_lines(path):
                answers[answer["key"]] = answer
        return answers

    def append(self, rank: int, answers: Iterator[dict[str, Any]]) -> None:
        """Writes answers to worker ``rank``'s file as they come."""
        self._folder.mkdir(parents=True, exist_ok=True)
        header = self._folder / f"{self._prefix}.json"
        header.write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")
        path = self._folder / f"{self._prefix}.{rank}.jsonl"
        if path.exists():
            _drop_unfinished_line(path)
        with path.open("a", encoding="utf-8") as file:
            for answer in answers:
                file.write(json.dumps(answer) + "\n")
                file.flush()


def regenerate(
    config: TrainConfig,
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    worker: Worker,
) -> list[list[TokenSequence]]:
    """Every conversation's sequences (one a turn), each answered by the target.

    A turn whose prompt leaves no room for an answer is left out with those after it. What an
    interrupted run has made is not made again; workers share the rest.

    Raises:
        DataError: a file of answers is broken.
    """
    files = AnswerFiles(config.run_folder / "answers", config, conversations)
    done = files.read()
    own = range(worker.rank, len(conversations), worker.count)
    missing = [index for index in own if not _is_complete(index, conversations, done)]
    if missing:
        _logger.info("%d conversations to answer, %d answers found", len(missing), len(done))
        engine = _make_engine(config, worker)
        answering = _Answering(config, conversations, tokenizer, engine)
        with Progress("answers", len(missing), quiet=not worker.leads) as progress:
            files.append(worker.rank, answering.run(missing, done, progress))
        engine.close()
    worker.wait()
    done = files.read()
    return [_sequences(index, done) for index in range(len(conversations))]


class _Answering:
    """Runs conversations through an engine, turn after turn, many at once."""

    def __init__(
        self,
        config: TrainConfig,
        conversations: Sequence[Conversation],
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
    ) -> None:
        self._sampling = config.data.sampling
        self._length = config.data.sequence_length
        self._conversations = conversations
        self._tokenizer = tokenizer
        self._engine = engine

    def run(
        self, indices: list[int], done: dict[str, dict[str, Any]], progress: Progress
    ) -> Iterator[dict[str, Any]]:
        waiting = deque(indices)
        running: dict[str, tuple[_Turn, list[int]]] = {}
        while waiting or running:
            while waiting and len(running) < self._sampling.max_num_seqs:
                turn = self._resume(waiting.popleft(), done)
                if turn is not None:
                    self._engine.add_request(self._request(turn))
                    running[turn.key] = (turn, [])
            for output in self._engine.step():
                if output.error is not None:
                    raise output.error
                turn, answer = running[output.request_id]
                answer += output.token_ids
                if output.finish_reason is None:
                    continue
                del running[turn.key]
                following = self._next_turn(turn, answer)
                yield _record(turn, answer, output.finish_reason, following is None)
                if following is None:
                    progress.advance()
                else:
                    self._engine.add_request(self._request(following))
                    running[following.key] = (following, [])

    def _resume(self, index: int, done: dict[str, dict[str, Any]]) -> _Turn | None:
        """The first turn of a conversation that has no answer yet."""
        conversation = self._conversations[index]
        turn: _Turn | None = _Turn(index, 0, conversation.prompt_token_ids, conversation.messages)
        while turn is not None and turn.key in done:
            turn = self._next_turn(turn, done[turn.key]["answer_token_ids"])
        return turn

    def _next_turn(self, turn: _Turn, answer: list[int]) -> _Turn | None:
        later = self._conversations[turn.index].later_turns
        if turn.number == len(later):
            return None
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        messages = (
            *turn.messages,
            {"role": "assistant", "content": text},
            {"role": "user", "content": later[turn.number]},
        )
        prompt = tuple(render(self._tokenizer, messages))
        if len(prompt) >= self._length:
            return None
        return _Turn(turn.index, turn.number + 1, prompt, messages)

    def _request(self, turn: _Turn) -> Request:
        sampling = self._sampling
        room = self._length - len(turn.prompt_token_ids)
        return Request(
            request_id=turn.key,
            prompt_token_ids=turn.prompt_token_ids,
            sampling=SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=sampling.seed + turn.index,
                max_tokens=min(sampling.max_tokens, room),
            ),
            choice_index=turn.number,
        )


def _record(turn: _Turn, answer: list[int], reason: FinishReason, is_last: bool) -> dict[str, Any]:
    return {
        "key": turn.key,
        "prompt_token_ids": list(turn.prompt_token_ids),
        "answer_token_ids": answer,
        "finish_reason": reason.name.lower(),
        "last": is_last,
    }


def _is_complete(
    index: int, conversations: Sequence[Conversation], done: dict[str, dict[str, Any]]
) -> bool:
    turns = range(len(conversations[index].later_turns) + 1)
    return any(done[key]["last"] for number in turns if (key := f"{index}.{number}") in done)


def _sequences(index: int, done: dict[str, dict[str, Any]]) -> list[TokenSequence]:
    sequences = []
    number = 0
    while (answer := done.get(f"{index}.{number}")) is not None:
        prompt = answer["prompt_token_ids"]
        token_ids = array("i", [*prompt, *answer["answer_token_ids"]])
        sequences.append(TokenSequence(token_ids, len(prompt)))
        number += 1
    return sequences


def _make_engine(config: TrainConfig, worker: Worker) -> Engine:
    sampling = config.data.sampling
    cluster = ClusterConfig.parse(
        {
            "target": {
                "model": config.target.model,
                "dtype": config.target.dtype,
                "device": worker.device.type,
                "trust_remote_code": config.target.trust_remote_code,
                "num_threads": torch.get_num_threads(),
                "max_model_len": config.data.sequence_length + 1,
                "max_num_seqs": sampling.max_num_seqs,
                "max_num_batched_tokens": max(512, _TOKENS_OF_PASS * sampling.max_num_seqs),
                "kv_cache_memory_mb": sampling.kv_cache_memory_mb,
                "enforce_eager": True,
            }
        }
    )
    shard = ShardWorker(cluster, 0)
    shard.start("", 0, 0)
    return shard.build_engine(None)


def _describe(config: TrainConfig, conversations: Sequence[Conversation]) -> dict[str, Any]:
    sampling = config.data.sampling.model_dump(exclude={"max_num_seqs", "kv_cache_memory_mb"})
    prompts = hashlib.sha256()
    for conversation in conversations:
        prompts.update(
            json.dumps([conversation.prompt_token_ids, conversation.later_turns]).encode()
        )
    return {
        "target": target_digest(config.target.model),
        "tokenizer": tokenizer_digest(config.target.model),
        "dtype": config.target.dtype,
        "sampling": sampling,
        "sequence_length": config.data.sequence_length,
        "prompts": prompts.hexdigest(),
    }


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            answer = json.loads(line)
            answer["key"], answer["prompt_token_ids"], answer["answer_token_ids"], answer["last"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(str(path), number, f"is no answer: {error}") from None
        yield answer


def _drop_unfinished_line(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(content.rfind(b"\n") + 1)
