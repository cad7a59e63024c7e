"""The fields that a completion and a chat completion share."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cluster.chat.fields import NOT_SERVED, WITHOUT_EFFECT, Fields
from cluster.errors import InvalidRequestError
from cluster.grammar import JSON_OBJECT, Grammar, GrammarKind
from cluster.request import (
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKENS,
    Priority,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
)
from cluster.rpc.prompt import kept_tokens

# With the first error the rest is not looked at: of millions of them each would be told.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


def _at_most(most: int) -> BeforeValidator:
    """Refuses what has more entries before any of them is looked at."""

    def check(given: object) -> object:
        if isinstance(given, list | dict) and len(given) > most:
            raise ValueError(f"at most {most}, got {len(given)}")
        return given

    return BeforeValidator(check)


class StreamOptions(Fields):
    """What a stream carries beside its text."""

    include_usage: bool = Field(default=False, description="one more event at the end, with usage")
    continuous_usage_stats: bool = Field(default=False, description="usage on every event")
    include_obfuscation: bool = Field(
        default=False, description="events are padded, so that their lengths tell less of the text"
    )


class JsonSchemaFormat(Fields):
    """OpenAI's envelope of a schema. It is always enforced, whatever ``strict`` says."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = True


class ResponseFormat(Fields):
    """What the whole answer is."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def to_grammar(self) -> Grammar | None:
        """Raises: InvalidRequestError."""
        if self.type != "json_schema" and self.json_schema is not None:
            raise InvalidRequestError("response_format", "json_schema needs type: json_schema")
        if self.type == "json_schema":
            if self.json_schema is None:
                raise InvalidRequestError("response_format", "json_schema is missing")
            return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(self.json_schema.schema_))
        return JSON_OBJECT if self.type == "json_object" else None


class StructuredOutputs(Fields):
    """vLLM's way to ask for a grammar: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = Field(default=None, description="llguidance's form of Lark")

    def to_grammar(self) -> Grammar:
        """Raises: InvalidRequestError."""
        found: list[Grammar] = []
        if self.json_ is not None:
            source = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            found.append(Grammar(GrammarKind.JSON_SCHEMA, source))
        if self.json_object:
            found.append(JSON_OBJECT)
        if self.regex is not None:
            found.append(Grammar(GrammarKind.REGEX, self.regex))
        if self.choice is not None:
            if not self.choice:
                raise InvalidRequestError("structured_outputs", "choice must not be empty")
            alternatives = " | ".join(json.dumps(text) for text in self.choice)
            found.append(Grammar(GrammarKind.LARK, f"start: {alternatives}"))
        if self.grammar is not None:
            found.append(Grammar(GrammarKind.LARK, self.grammar))
        if len(found) != 1:
            raise InvalidRequestError(
                "structured_outputs", "needs one of json, json_object, regex, choice and grammar"
            )
        return found[0]


class GenerationFields(Fields):
    """Fields of both kinds of completion. Ranges are checked by ``SamplingParams.validate``."""

    without_effect = WITHOUT_EFFECT
    not_served = NOT_SERVED

    model: str | None = Field(default=None, description="as /v1/models names it")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, description="choices, 1 to 16")
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(default=0, description="0 or -1: off")
    min_p: float = 0.0
    seed: int | None = Field(
        default=None, description="makes the output reproducible, with and without speculation"
    )
    stop: str | Texts = Field(default_factory=list)
    stop_token_ids: Annotated[TokenIds, _at_most(MAX_STOP_TOKENS)] = Field(default_factory=list)
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[str, float], _at_most(MAX_LOGIT_BIASES)] = Field(
        default_factory=dict, description="by token id"
    )
    prompt_logprobs: int | None = Field(
        default=None, description="top log-probabilities of a prompt token, 0 to 20"
    )
    skip_special_tokens: bool = Field(
        default=True, description="leave special tokens, as end-of-sequence, out of the text"
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="the text ends behind a stop string, not in front of it"
    )
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = Field(
        default=None, description="the only tokens of an answer, its end included"
    )
    bad_words: Texts = Field(
        default_factory=list,
        description="no answer holds these as the tokenizer writes them; at most 128",
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    speculation: Literal["auto", "off"] = Field(
        default="auto", description="off: this request decodes plainly"
    )
    num_speculative_tokens: int | None = Field(
        default=None, description="most draft tokens of a round of this request; 0 is as off"
    )
    priority: Literal["interactive", "default", "batch"] | int = Field(
        default="default",
        description="who waits for whom; as vLLM's number: below 0, 0 and above it",
    )
    timeout_seconds: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="the request ends with 504 behind that time"
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        description="keep only the last so many tokens of a prompt; -1: as many as leave room for "
        "max_tokens",
    )
    return_token_ids: bool = Field(
        default=False, description="each choice's tokens and its prompt's, as ids"
    )
    return_tokens_as_token_ids: bool = Field(
        default=False, description="tokens of log-probabilities are written 'token_id:ID'"
    )
    return_token_sources: bool = Field(
        default=False,
        description="where each token came from (target, accepted, recovered, bonus), and how many "
        "characters of text it made final",
    )
    return_speculation_stats: bool = Field(
        default=False, description="counts of drafts and acceptances in the usage"
    )

    def to_grammar(self) -> Grammar | None:
        """What the answer must be, if anything was asked. Raises: InvalidRequestError."""
        grammar = self.response_format.to_grammar() if self.response_format is not None else None
        if self.structured_outputs is None:
            return grammar
        if grammar is not None:
            raise InvalidRequestError("structured_outputs", "cannot go with response_format")
        return self.structured_outputs.to_grammar()

    def to_sampling(
        self,
        *,
        max_tokens: int,
        logprobs: int | None,
        grammar: Grammar | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The sampling parameters, not checked yet.

        Args:
            prompt_logprobs: that are needed whether the field asks for them or not.

        Raises:
            InvalidRequestError: a token of ``logit_bias`` is no number.
        """
        wanted = [n for n in (prompt_logprobs, self.prompt_logprobs) if n is not None]
        return SamplingParams(
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={_token_id(name): bias for name, bias in self.logit_bias.items()},
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=max(wanted, default=None),
            skip_special_tokens=self.skip_special_tokens,
            include_stop_str_in_output=self.include_stop_str_in_output,
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=tuple(self.bad_words),
            grammar=grammar,
        )

    def kept_tokens(self, sampling: SamplingParams, max_model_len: int) -> int | None:
        """How many of a prompt's last tokens are kept, if not all. Raises: InvalidRequestError."""
        return kept_tokens(
            self.truncate_prompt_tokens,
            max_tokens=sampling.max_tokens,
            max_model_len=max_model_len,
        )

    def to_speculation(self) -> SpeculationParams:
        """Whether and how far the request is speculated on."""
        return SpeculationParams(
            mode=SpeculationMode(self.speculation),
            num_speculative_tokens=self.num_speculative_tokens,
        )

    def to_priority(self) -> Priority:
        """Who waits for whom."""
        if isinstance(self.priority, str):
            return Priority[self.priority.upper()]
        if self.priority == 0:
            return Priority.DEFAULT
        return Priority.INTERACTIVE if self.priority < 0 else Priority.BATCH

    @property
    def grammar_field(self) -> str:
        """The field that a grammar came from, for errors."""
        return "structured_outputs" if self.structured_outputs is not None else "response_format"

    @property
    def pads_events(self) -> bool:
        """Whether a stream's lengths are to tell less of its text."""
        return self.stream_options is not None and self.stream_options.include_obfuscation

    def check_together(self) -> None:
        """Raises: InvalidRequestError."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "needs stream: true")


def _token_id(name: str) -> int:
    try:
        return int(name)
    except ValueError:
        raise InvalidRequestError("logit_bias", f"'{name}' is not a token id") from None
