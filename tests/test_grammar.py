"""Grammars: matchers, the law of what they constrain, and an engine that serves some and others."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.engine.grammar import GrammarCompiler, GrammarMasks
from cluster.engine.loop import EngineLoop
from cluster.engine.vocabulary import Vocabulary
from cluster.errors import InvalidRequestError, ReplicaLostError, RequestCancelledError
from cluster.grammar import JSON_OBJECT, MAX_GRAMMAR_CHARS, Grammar, GrammarKind
from cluster.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
    TokenSource,
)
from cluster.rpc.convert import sampling_from_proto, sampling_to_proto
from cluster.v1 import common_pb2
from tests.engine_law import PROMPT, VOCAB_SIZE, save_pair
from tests.engine_tools import Completion, make_config, make_engine, run
from tests.law import exact_law, law_p_value, reference_next_token_law, shift_law
from tests.models import DRAFTER, TARGET
from tests.test_engine_loop import Answers

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["admin", "user"]},
    },
    "required": ["name", "age", "role"],
    "additionalProperties": False,
}
ROLE = {"properties": {"role": {"enum": ["admin", "user"]}}, "required": ["role"]}
ROLE_GRAMMAR = Grammar(
    GrammarKind.JSON_SCHEMA, json.dumps({"type": "object", "additionalProperties": False} | ROLE)
)
PERSON_GRAMMAR = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON))
DIGITS = Grammar(GrammarKind.REGEX, "[0-9]{3}-[0-9]{4}")
GREETING = Grammar(GrammarKind.LARK, 'start: ("hello" | "hi") " " NAME\nNAME: /[a-z]{3,6}/')
PLAIN = SpeculationParams(mode=SpeculationMode.OFF)


def regex(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerFast) -> GrammarCompiler:
    return GrammarCompiler(Vocabulary(tokenizer, 4096, (0,)), has_end=True)


# ---------------------------------------------------------------------------------------- matchers


def test_masks_of_a_block_are_those_of_its_tokens_one_by_one(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = '{"name": "Ada", "age": 36, "role": "admin"}'
    tokens = [*tokenizer.encode(text), 0]
    matcher, stepped = compiler.compile(PERSON_GRAMMAR), compiler.compile(PERSON_GRAMMAR)
    masks = GrammarMasks(1)
    for start in range(0, len(tokens), 3):
        block = tokens[start : start + 5]
        rows = masks.of([(matcher, block)], num_positions=6, vocab_size=4096)
        for offset, token_id in enumerate(tokens[start : start + 3]):
            (alone,) = masks.of([(stepped, ())], num_positions=1, vocab_size=4096)
            assert torch.equal(rows[offset], alone)
            assert bool(alone[token_id])
            assert 0 < int(alone.sum()) < 4096
            assert token_id == 0 or stepped.accept([token_id])
        assert matcher.accept(tokens[start : start + 3])
    assert int(alone.sum()) == 1  # nothing but the end may follow
    # Behind the end, where an output ignores it, anything.
    rows = masks.of([(stepped, [0, 5, 7])], num_positions=4, vocab_size=4096)
    assert bool(rows[1:].all())
    assert stepped.accept([0])
    for drafts in ([], [5, 7]):
        assert bool(masks.of([(stepped, drafts)], num_positions=3, vocab_size=4096).all())
    assert stepped.accept([5, 7])
    assert compiler.compile(PERSON_GRAMMAR).accept([*tokens, 5, 7])
    assert stepped.error is None


def test_behind_a_guess_that_is_not_allowed_nothing_is_held_back(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    matcher = compiler.compile(DIGITS)
    (wrong,) = tokenizer.encode("x")
    rows = GrammarMasks(1).of([(matcher, [wrong, wrong])], num_positions=3, vocab_size=4096)
    assert not bool(rows[0, wrong])
    assert bool(rows[1:].all())
    assert matcher.error is None
    assert matcher.accept(tokenizer.encode("123-4567"))
    assert not matcher.accept([wrong])
    assert matcher.error is not None


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (regex("(a"), "unclosed group"),
        (Grammar(GrammarKind.LARK, "start: nothing"), "nothing"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "not JSON"),
        (Grammar(GrammarKind.JSON_SCHEMA, "[" * 100_000), "not JSON"),
        (Grammar(GrammarKind.JSON_SCHEMA, "[1]"), "must be an object"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"type": "foo"}'), "foo"),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"uniqueItems": true}'), "uniqueItems"),
        (
            Grammar(GrammarKind.JSON_SCHEMA, '{"not": {}, "x-guidance": {"lenient": true}}'),
            "",
        ),
        (Grammar(GrammarKind.JSON_SCHEMA, '{"$ref": "http://127.0.0.1:9/x"}'), "127.0.0.1"),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    compiler: GrammarCompiler, grammar: Grammar, says: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(grammar)
    assert caught.value.field == "sampling.grammar"
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_a_grammar_needs_a_tokenizer_and_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    endless = GrammarCompiler(Vocabulary(tokenizer, 4096, ()), has_end=False)
    for bare in (GrammarCompiler(None, has_end=True), endless):
        with pytest.raises(InvalidRequestError):
            bare.compile(JSON_OBJECT)


def test_size_and_contradictions_are_checked_without_compiling() -> None:
    for params in (
        SamplingParams(grammar=regex("a" * (MAX_GRAMMAR_CHARS + 1))),
        SamplingParams(grammar=regex("")),
    ):
        with pytest.raises(InvalidRequestError):
            params.validate(100)


def test_every_kind_survives_the_wire() -> None:
    for grammar in (PERSON_GRAMMAR, DIGITS, GREETING, JSON_OBJECT):
        message = sampling_to_proto(SamplingParams(grammar=grammar))
        assert sampling_from_proto(message).grammar == grammar
    any_object = common_pb2.Grammar(json_object=common_pb2.Grammar.JsonObject())
    assert sampling_from_proto(common_pb2.SamplingParams(grammar=any_object)).grammar == JSON_OBJECT
    with pytest.raises(InvalidRequestError):
        sampling_from_proto(common_pb2.SamplingParams(grammar=common_pb2.Grammar()))


# --------------------------------------------------------------------------------------------- law

# Two tokens at a time: a or b and then any of a to d, or c and then d or e.
PAIRS = regex("([ab][a-d]|c[de]){4}")
FOLLOWERS = {0: range(4), 1: range(4), 2: range(3, 5)}
NUM_TOKENS = 4
NUM_SAMPLES = 800


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """a to e and the end of the text: as many tokens as the law tests' target has."""
    vocab = {letter: index for index, letter in enumerate("abcde")} | {"</s>": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def pairs(output: tuple[int, ...]) -> Collection[int]:
    """What ``PAIRS`` lets follow."""
    return range(3) if len(output) % 2 == 0 else FOLLOWERS[output[-1]]


# a to d, but neither b behind a nor d behind two c.
LETTERS: dict[str, Any] = {"allowed_token_ids": (0, 1, 2, 3), "bad_words": ("ab", "ccd")}


def letters(output: tuple[int, ...]) -> Collection[int]:
    """What ``LETTERS`` lets follow."""
    return {0, 1, 2, 3} - ({1} if output[-1:] == (0,) else {3} if output[-2:] == (2, 2) else set())


def constrained_law(
    target: str, params: SamplingParams, allowed: Callable[[tuple[int, ...]], Collection[int]]
) -> Any:
    from tests.engine_law import _logits_by_output

    logits = _logits_by_output(target)

    def next_token_law(output: tuple[int, ...]) -> Any:
        may_follow = allowed(output)
        scores = [
            score if index in may_follow else -1e9 for index, score in enumerate(logits[output])
        ]
        return reference_next_token_law(scores, params, prompt=PROMPT, output=output)

    law = exact_law(next_token_law, vocab_size=VOCAB_SIZE, num_tokens=2 + NUM_TOKENS)
    return law.sum(axis=(0, 1))


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("constraint", "allowed"),
    [
        pytest.param({"grammar": PAIRS}, pairs, id="grammar"),
        pytest.param(LETTERS, letters, id="tokens"),
    ],
)
@pytest.mark.parametrize(
    "is_coupled",
    [
        pytest.param(False, id="rejection"),
        pytest.param(True, id="coupled", marks=pytest.mark.slow),
    ],
)
def test_a_constrained_output_has_the_target_s_constrained_law(
    is_coupled: bool,
    constraint: dict[str, Any],
    allowed: Callable[[tuple[int, ...]], Collection[int]],
    tmp_path: Path,
) -> None:
    target, drafter = save_pair(tmp_path)
    letters_tokenizer().save_pretrained(target)
    config_file = Path(target) / "generation_config.json"
    config_file.write_text(json.dumps({"eos_token_id": VOCAB_SIZE - 1}))
    config = make_config(
        target,
        drafter,
        max_num_seqs=256,
        max_num_waiting=NUM_SAMPLES,
        page_size=4,
        max_model_len=16,
    )
    engine = make_engine(config)
    params = SamplingParams(
        temperature=0.8, presence_penalty=0.5, top_p=0.95, max_tokens=2 + NUM_TOKENS, **constraint
    )
    requests = [
        Request(
            request_id=str(number),
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(**{**vars(params), "seed": number if is_coupled else None}),
        )
        for number in range(NUM_SAMPLES)
    ]
    done = run(engine, requests)
    samples = np.array([done[str(number)].token_ids for number in range(NUM_SAMPLES)])
    sources = {source for completion in done.values() for source in completion.token_sources}
    assert {TokenSource.ACCEPTED, TokenSource.RECOVERED, TokenSource.BONUS} <= sources
    law = constrained_law(target, params, allowed)
    tokens = samples[:, 2:]
    assert law_p_value(tokens, law) > 1e-4
    for position in range(NUM_TOKENS):
        shifted = shift_law(tokens, law, position=position, total_variation=0.2)
        assert law_p_value(shifted, law) < 1e-4


# ------------------------------------------------------------------------------------------ engine


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return make_config(TARGET, DRAFTER, max_model_len=256)


@pytest.fixture(scope="module")
def engine(config: ClusterConfig) -> Engine:
    return make_engine(config)


def request_of(
    request_id: str, tokenizer: PreTrainedTokenizerFast, grammar: Grammar | None, **changes: Any
) -> Request:
    fields = {"speculation": SpeculationParams(), "resume_token_ids": ()}
    fields |= {name: changes.pop(name) for name in fields if name in changes}
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(tokenizer.encode("def main(arguments):\n    ")),
        sampling=SamplingParams(**{"max_tokens": 96, "grammar": grammar, **changes}),
        **fields,  # type: ignore[arg-type]
    )


def text_of(completion: Completion, tokenizer: PreTrainedTokenizerFast) -> str:
    assert completion.error is None
    assert completion.finish_reason is FinishReason.STOP
    return str(tokenizer.decode(completion.token_ids, skip_special_tokens=True))


def test_outputs_follow_their_grammars_and_do_not_depend_on_speculation(
    engine: Engine, tokenizer: PreTrainedTokenizerFast
) -> None:
    kinds: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": {"seed": 5}}
    grammars = {"role": ROLE_GRAMMAR, "digits": DIGITS, "none": None}
    requests = [
        request_of(
            f"{kind}/{name}/{mode}",
            tokenizer,
            grammar,
            max_tokens=24,
            speculation=speculation,
            frequency_penalty=0.3,
            **fields,
        )
        for kind, fields in kinds.items()
        for name, grammar in grammars.items()
        for mode, speculation in {"on": SpeculationParams(), "off": PLAIN}.items()
    ]
    done = run(engine, requests)
    for kind in kinds:
        for name in grammars:
            on, off = done[f"{kind}/{name}/on"], done[f"{kind}/{name}/off"]
            assert on.token_ids == off.token_ids, (kind, name)
        role = json.loads(text_of(done[f"{kind}/role/on"], tokenizer))
        assert role["role"] in ("admin", "user")
        digits = text_of(done[f"{kind}/digits/on"], tokenizer)
        assert re.fullmatch("[0-9]{3}-[0-9]{4}", digits)
        usage = done[f"{kind}/digits/on"].usage
        assert usage is not None
        assert usage.speculation.num_drafts > 0


def test_an_output_that_is_resumed_goes_on_in_its_grammar(
    engine: Engine, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = run(engine, [request_of("w", tokenizer, DIGITS, seed=3)])["w"]
    half = tuple(whole.token_ids[: len(whole.token_ids) // 2])
    rest = run(
        engine,
        [request_of("r", tokenizer, DIGITS, seed=3, resume_token_ids=half)],
    )["r"]
    assert [*half, *rest.token_ids] == whole.token_ids
    beyond = {"ignore_eos": True, "max_tokens": len(whole.token_ids) + 9, "seed": 3}
    longer = run(engine, [request_of("l", tokenizer, DIGITS, **beyond)])["l"].token_ids
    assert longer[: len(whole.token_ids)] == whole.token_ids
    held = tuple(longer[:-4])
    rest = run(engine, [request_of("b", tokenizer, DIGITS, resume_token_ids=held, **beyond)])["b"]
    assert [*held, *rest.token_ids] == longer
    with pytest.raises(InvalidRequestError) as caught:
        engine.add_request(request_of("x", tokenizer, GREETING, resume_token_ids=half))
    assert caught.value.field == "resume_token_ids"


def test_min_tokens_yields_where_only_an_end_is_allowed(
    engine: Engine, tokenizer: PreTrainedTokenizerFast
) -> None:
    grammars = {"fixed": DIGITS, "open": regex("[a-z]{1,30}")}
    requests = [
        request_of(f"{name}/{mode}", tokenizer, grammar, min_tokens=10, temperature=0.0, **fields)
        for name, grammar in grammars.items()
        for mode, fields in {"on": {}, "off": {"speculation": PLAIN}}.items()
    ]
    done = run(engine, requests)
    for mode in ("on", "off"):
        assert len(text_of(done[f"fixed/{mode}"], tokenizer)) == 8
        text = text_of(done[f"open/{mode}"], tokenizer)
        ids = done[f"open/{mode}"].token_ids
        assert len(ids) > 10 or len(text) == 30
    assert done["open/on"].token_ids == done["open/off"].token_ids


def test_a_grammar_that_fails_midway_ends_its_request_alone(
    engine: Engine, tokenizer: PreTrainedTokenizerFast
) -> None:
    bystander = request_of("by", tokenizer, DIGITS, seed=3)
    expected = run(engine, [bystander])["by"].token_ids
    victim = request_of("victim", tokenizer, regex("[a-z]{90}"), seed=4)
    matcher = engine.grammars.matcher(victim)
    assert matcher is not None
    engine.add_request(victim, matcher)
    engine.add_request(bystander)
    outputs, num_steps = [], 0
    while engine.has_work:
        outputs += engine.step()
        num_steps += 1
        if num_steps == 3:
            matcher.accept([0])  # as when a limit is reached
    (error,) = [o.error for o in outputs if o.error is not None]
    assert isinstance(error, InvalidRequestError)
    assert error.field == "sampling.grammar"
    tokens = [t for o in outputs if o.request_id == "by" for t in o.token_ids]
    assert tokens == expected
    engine.check()
    assert engine.load().kv_cache_usage == 0.0


def test_grammars_are_compiled_beside_the_engine(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers()
    go_on, threads = threading.Event(), set()
    compile_grammar = type(engine.grammars).compile

    def slow(self: GrammarCompiler, grammar: Grammar) -> Any:
        threads.add(threading.current_thread().name)
        if grammar is not DIGITS:
            go_on.wait(30)
        return compile_grammar(self, grammar)

    monkeypatch.setattr(type(engine.grammars), "compile", slow)
    loop = EngineLoop(engine, answers)
    loop.start()
    loop.submit(request_of("slow", tokenizer, GREETING))
    loop.submit(request_of("left", tokenizer, PERSON_GRAMMAR))
    loop.submit(request_of("bad", tokenizer, regex("(a")))
    loop.submit(request_of("plain", tokenizer, None, max_tokens=5))
    assert answers.last("plain").finish_reason is FinishReason.LENGTH  # nobody waited
    loop.cancel("left", RequestCancelledError("gone"))
    go_on.set()
    assert isinstance(answers.last("left").error, RequestCancelledError)
    assert isinstance(answers.last("bad").error, InvalidRequestError)
    assert answers.last("slow").finish_reason is FinishReason.STOP
    assert all(name.startswith("grammar") for name in threads)
    loop.stop()
    assert isinstance(ended(loop, answers, tokenizer).error, ReplicaLostError)


def ended(loop: EngineLoop, answers: Answers, tokenizer: PreTrainedTokenizerFast) -> RequestOutput:
    """What a request is answered with behind the engine's end."""
    loop.submit(request_of("late", tokenizer, DIGITS))
    loop.cancel("late", RequestCancelledError("gone"))
    return answers.last("late")


def test_a_hostile_grammar_is_bounded(compiler: GrammarCompiler) -> None:
    """Whatever it is, it is compiled or refused, and a mask comes, within seconds."""
    masks = GrammarMasks(1)
    for grammar in (
        regex("(a{1,10000}){1,10000}"),
        regex("(.*a.*b.*c.*d.*e.*){20}"),
        regex("(a|aa|aaa)*" * 200),
        Grammar(GrammarKind.LARK, 'start: start start | "a"'),
        Grammar(
            GrammarKind.JSON_SCHEMA,
            json.dumps(
                {
                    "properties": {
                        f"k{i}": {"enum": [f"{i}-{j}" for j in range(40)]} for i in range(90)
                    }
                }
            ),
        ),
    ):
        try:
            matcher = compiler.compile(grammar)
        except InvalidRequestError:
            continue
        masks.of([(matcher, ())], num_positions=1, vocab_size=4096)


def test_matchers_of_one_grammar_do_not_share_their_state(compiler: GrammarCompiler) -> None:
    first, second = compiler.compile(DIGITS), compiler.compile(DIGITS)
    assert isinstance(first._matcher, LLMatcher)
    assert first.accept([])
    assert second.accept([])
    masks = GrammarMasks(1)
    before = masks.of([(second, ())], num_positions=1, vocab_size=4096)
    first.accept([int(before[0].nonzero()[0])])
    assert torch.equal(before, masks.of([(second, ())], num_positions=1, vocab_size=4096))
