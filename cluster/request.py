"""What a client asks for and what the engine answers, as plain frozen data.

Validation happens once, in ``SamplingParams.validate`` and ``Request.validate``; everything behind
the router's door may rely on it.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cluster.errors import ContextLengthError, InvalidRequestError
from cluster.grammar import Grammar

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 200_000  # in all of one prompt
MAX_CHOICES = 16
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256


class SpeculationMode(enum.Enum):
    """Whether a request may be speculated on."""

    AUTO = "auto"
    OFF = "off"


class Priority(enum.IntEnum):
    """Who may wait for whom (values as in ``cluster.v1.Priority``)."""

    INTERACTIVE = 1
    DEFAULT = 2
    BATCH = 3

    @property
    def patience_s(self) -> float:
        """Seconds by which a queue takes a request for younger than it is."""
        return _PATIENCE_S[self]


_PATIENCE_S = {Priority.INTERACTIVE: 0.0, Priority.DEFAULT: 5.0, Priority.BATCH: 60.0}


class TokenSource(enum.IntEnum):
    """Where an output token came from (values as in ``cluster.v1.TokenSource``)."""

    TARGET = 1
    ACCEPTED = 2
    RECOVERED = 3
    BONUS = 4


class FinishReason(enum.IntEnum):
    """Why a request ended (values as in ``cluster.v1.FinishReason``)."""

    STOP = 1
    LENGTH = 2


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen; the defaults are the server's.

    Attributes:
        temperature: >= 0; 0 is greedy.
        top_k: number of most likely tokens kept; 0 is off.
        top_p: nucleus mass kept, in (0, 1].
        min_p: tokens under ``min_p`` times the best probability are dropped, in [0, 1].
        seed: makes the output reproducible (coupled verification); any int64.
        stop_token_ids: at most 1,024 tokens that end the output (they are its last token).
        stop: strings that end the output (not part of the text).
        max_tokens: most output tokens, >= 0; with 0 the prompt alone is computed, and its
            log-probabilities where they are asked for.
        min_tokens: no end-of-sequence or stop token before so many output tokens.
        presence_penalty, frequency_penalty: in [-2, 2], over the output so far.
        repetition_penalty: in [0.01, 100], over prompt and output.
        logit_bias: token id -> added to its logit; at most 1,024.
        ignore_eos: go on behind the end-of-sequence token.
        logprobs: number of top log-probabilities per token (0..20), or ``None`` for none at all.
        prompt_logprobs: as ``logprobs``, of each prompt token but the first.
        skip_special_tokens: leave special tokens, as end-of-sequence, out of the text.
        include_stop_str_in_output: the text ends behind a stop string instead of in front of it.
        allowed_token_ids: the only tokens of an output, its end included; empty: all.
        bad_words: texts that no output holds as the tokenizer writes them.
        grammar: what the output must be, up to its end-of-sequence token. Where it allows nothing
            but that, ``min_tokens`` yields.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken without any chance."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on how often tokens occurred."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def ending_token_ids(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """Tokens that end the output behind ``min_tokens`` others, given the model's own."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos_token_ids)

    def validate(self, vocab_size: int) -> None:
        """Checks every field.

        Raises:
            InvalidRequestError: naming the first field that is out of range.
        """
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.top_k < 0:
            raise InvalidRequestError(
                "sampling.top_k", f"must be 0 (off) or more, got {self.top_k}"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidRequestError("sampling.seed", "must fit 64 bits")
        if self.max_tokens < 0:
            raise InvalidRequestError(
                "sampling.max_tokens", f"must be 0 or more, got {self.max_tokens}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidRequestError(
                "sampling.min_tokens",
                f"must be between 0 and max_tokens ({self.max_tokens}), got {self.min_tokens}",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_LOGPROBS:
                raise InvalidRequestError(
                    f"sampling.{name}", f"must be between 0 and {MAX_LOGPROBS}, got {value}"
                )
        _check_length("sampling.stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        _check_token_ids("sampling.stop_token_ids", self.stop_token_ids, vocab_size)
        _check_length("sampling.logit_bias", self.logit_bias, MAX_LOGIT_BIASES)
        _check_token_ids("sampling.logit_bias", self.logit_bias, vocab_size)
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequestError(
                    "sampling.logit_bias", f"bias of token {token_id} must be in [-100, 100]"
                )
        _check_length("sampling.allowed_token_ids", self.allowed_token_ids, vocab_size)
        _check_token_ids("sampling.allowed_token_ids", self.allowed_token_ids, vocab_size)
        _check_strings("sampling.stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)
        _check_strings("sampling.bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        if self.grammar is not None:
            self.grammar.validate()


@dataclass(frozen=True, kw_only=True)
class SpeculationParams:
    """Per-request speculation settings: mode, and a cap on draft tokens per round (or ``None``)."""

    mode: SpeculationMode = SpeculationMode.AUTO
    num_speculative_tokens: int | None = None

    @property
    def is_off(self) -> bool:
        """Whether this request must decode plainly."""
        return self.mode is SpeculationMode.OFF or self.num_speculative_tokens == 0

    def validate(self) -> None:
        """Checks the cap. Raises: InvalidRequestError."""
        if self.num_speculative_tokens is not None and self.num_speculative_tokens < 0:
            raise InvalidRequestError("speculation.num_speculative_tokens", "must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One serving unit: one prompt, one choice.

    Attributes:
        request_id: unique on the engine that runs it.
        prompt_token_ids: at least one token.
        resume_token_ids: output tokens that exist already (stateless retry); the answer goes on
            behind them, and they count as output for penalties, limits and seeds.
        choice_index: which of ``n`` choices this is; part of the coupled noise.
        deadline: ``time.monotonic()`` value of this process, or ``None``.
        attempt: raised by the client on each retry; older attempts are fenced by the router.
        priority: who may wait for whom.
        queue_deadline: ``time.monotonic()`` value of this process at which the request is refused
            if nothing of it was computed, or ``None``.
        traceparent: the place of the span that it runs in (``cluster.tracing``), or empty.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    resume_token_ids: tuple[int, ...] = ()
    choice_index: int = 0
    deadline: float | None = None
    attempt: int = 0
    arrival_time: float = field(default_factory=time.monotonic)
    priority: Priority = Priority.DEFAULT
    queue_deadline: float | None = None
    traceparent: str = ""

    @property
    def turn(self) -> float:
        """Queues are in this order, which nothing can stay at the end of: what comes later than
        the longest patience behind a request has a later turn."""
        return self.arrival_time + self.priority.patience_s

    def validate(
        self, *, vocab_size: int, max_model_len: int, eos_token_ids: Collection[int] = ()
    ) -> None:
        """Checks every field against the model; lengths first, as they bound what the rest costs.

        Args:
            eos_token_ids: tokens that end an output, unless the request ignores them.

        Raises:
            InvalidRequestError: naming the first field that cannot be served.
        """
        if not self.prompt_token_ids:
            raise InvalidRequestError("prompt", "must not be empty")
        room = max_model_len - len(self.prompt_token_ids)
        if room < min(self.sampling.max_tokens, 1):
            # In the words that gateways know, which then try a model with a longer context.
            raise ContextLengthError(
                "prompt",
                f"this model's maximum context length is {max_model_len} tokens, of which at least "
                "one is for the output unless max_tokens is 0; the prompt has "
                f"{len(self.prompt_token_ids)}",
            )
        if self.resume_token_ids and len(self.resume_token_ids) >= room:
            raise InvalidRequestError("resume_token_ids", "prompt and output fill the context")
        _check_token_ids("prompt.token_ids", self.prompt_token_ids, vocab_size)
        _check_token_ids("resume_token_ids", self.resume_token_ids, vocab_size)
        self.sampling.validate(vocab_size)
        num_top = self.sampling.prompt_logprobs
        if num_top is not None:
            num_asked = (num_top + 1) * len(self.prompt_token_ids)
            if num_asked > MAX_PROMPT_LOGPROBS:
                raise InvalidRequestError(
                    "sampling.prompt_logprobs",
                    f"asks for {num_asked} log-probabilities; at most {MAX_PROMPT_LOGPROBS}",
                )
        if self.resume_token_ids and len(self.resume_token_ids) >= self.sampling.max_tokens:
            raise InvalidRequestError(
                "resume_token_ids",
                f"already holds max_tokens ({self.sampling.max_tokens}) tokens or more",
            )
        could_end = self.resume_token_ids[self.sampling.min_tokens :]
        if not self.sampling.ending_token_ids(eos_token_ids).isdisjoint(could_end):
            raise InvalidRequestError(
                "resume_token_ids", "already holds an end-of-sequence or stop token"
            )
        self.speculation.validate()


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability (natural log, before temperature)."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class PositionLogprobs:
    """Log-probabilities of one output position: the chosen token and the top ones, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass
class SpeculationStats:
    """Counts of one request, or summed over a replica. Names as in vLLM's metrics."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_late_proposals: int = 0
    num_stale_proposals: int = 0
    num_malformed_proposals: int = 0

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Counts one target pass that produced output, with what it verified."""
        self.num_steps += 1
        if num_draft_tokens == 0:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        missing = num_accepted_tokens - len(self.num_accepted_tokens_per_pos)
        self.num_accepted_tokens_per_pos.extend([0] * max(missing, 0))
        for position in range(num_accepted_tokens):
            self.num_accepted_tokens_per_pos[position] += 1

    @property
    def acceptance_length(self) -> float:
        """Accepted + 1 per round that verified drafts; 1.0 when there was none."""
        if self.num_drafts == 0:
            return 1.0
        return 1.0 + self.num_accepted_tokens / self.num_drafts


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts of one finished request.

    Attributes:
        queue_s: seconds that it waited before anything was computed of it.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0
    queue_s: float = 0.0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """What one engine step changed for one request.

    Attributes:
        token_offset: index in the completion of the first of ``token_ids`` (resumed tokens count).
        token_ids, token_sources: the new tokens, possibly none on the last output.
        logprobs: one per token where asked for, else empty.
        prompt_logprobs: on the first output where asked for: one per prompt token but the first.
        finish_reason: set once, on the last output of a request that finished.
        usage: set with ``finish_reason``.
        error: set once instead, when the request ended without finishing.
    """

    request_id: str
    token_offset: int
    token_ids: tuple[int, ...] = ()
    token_sources: tuple[TokenSource, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing more follows for this request."""
        return self.finish_reason is not None or self.error is not None


def _check_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    within = low < value <= high if low_open else low <= value <= high
    if math.isnan(value) or not within:
        bracket = "(" if low_open else "["
        raise InvalidRequestError(
            f"sampling.{name}", f"must be in {bracket}{low:g}, {high:g}], got {value:g}"
        )


def _check_token_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    if not token_ids:
        return
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                name, f"token id {token_id} is outside the vocabulary of {vocab_size}"
            )


def _check_length(name: str, given: Collection[int], most: int) -> None:
    if len(given) > most:
        raise InvalidRequestError(name, f"at most {most}, got {len(given)}")


def _check_strings(name: str, strings: Collection[str], max_strings: int, max_chars: int) -> None:
    if len(strings) > max_strings:
        raise InvalidRequestError(name, f"at most {max_strings} strings")
    for string in strings:
        if not 1 <= len(string) <= max_chars:
            raise InvalidRequestError(name, f"each string must have 1 to {max_chars} characters")
