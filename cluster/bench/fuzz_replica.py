"""What stands in for models where messages are fuzzed: a tokenizer, and answers of one token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.engine.load import EngineLoad
from cluster.request import (
    FinishReason,
    PositionLogprobs,
    Request,
    RequestOutput,
    TokenLogprob,
    TokenSource,
    Usage,
)
from cluster.routing.prefix_journal import PrefixJournal

_TOKEN_ID = 97
_CHOSEN = TokenLogprob(_TOKEN_ID, -0.5)


class ImmediateLoop:
    """An engine that answers every request at once, with one token."""

    def __init__(self, on_outputs: Callable[[Sequence[RequestOutput]], None]) -> None:
        self.prefix_journal = PrefixJournal(num_pages=0, page_size=4)
        self._on_outputs = on_outputs

    def submit(self, request: Request) -> None:
        self._on_outputs([immediate_output(request)])

    def cancel(self, request_id: str, error: Exception) -> None:
        """Nothing runs on."""

    def load(self) -> EngineLoad:
        return EngineLoad()


def immediate_output(request: Request) -> RequestOutput:
    """All that becomes of a request: one token, or none where none was asked for."""
    sampling = request.sampling
    num_tokens = min(sampling.max_tokens, 1)
    position = PositionLogprobs(_CHOSEN, top=(_CHOSEN,))
    num_prompt = len(request.prompt_token_ids)
    return RequestOutput(
        request_id=request.request_id,
        token_offset=len(request.resume_token_ids),
        token_ids=(_TOKEN_ID,) * num_tokens,
        token_sources=(TokenSource.TARGET,) * num_tokens,
        logprobs=(position,) * (0 if sampling.logprobs is None else num_tokens),
        prompt_logprobs=(position,) * (0 if sampling.prompt_logprobs is None else num_prompt - 1),
        finish_reason=FinishReason.LENGTH,
        usage=Usage(prompt_tokens=num_prompt, completion_tokens=num_tokens),
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
