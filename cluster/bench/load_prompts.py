"""Requests for load: prompts of a data set, cut to the wanted lengths."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from cluster.bench.prompt_sets import load_prompt_set
from cluster.engine.target_config import load_tokenizer
from cluster.request import Request, SamplingParams


def take_prompts(source: str, target: str, *, count: int, num_tokens: int) -> list[tuple[int, ...]]:
    """So many prompts for the model in the folder ``target``, as ``PromptSource`` gives them.

    Raises:
        CheckpointError: the model has no tokenizer that can be read.
        DataError: as ``PromptSource``.
    """
    prompts = PromptSource(source, load_tokenizer(target), count=count, num_tokens=num_tokens)
    return [prompts.take() for _ in range(count)]


class PromptSource:
    """An endless row of prompts, each taken once before the first is taken again.

    Args:
        source: as ``load_prompt_set``; prompts of code have ``num_tokens``, those of a file at most
            so many.
        count: how many are wanted.

    Raises:
        DataError: the source cannot be read, or has nothing that fits.
    """

    def __init__(
        self, source: str, tokenizer: PreTrainedTokenizerBase, *, count: int, num_tokens: int
    ) -> None:
        loaded = load_prompt_set(
            source, tokenizer, count=count, num_tokens=num_tokens, max_tokens=num_tokens
        )
        self._prompts = loaded.prompts
        self._num_taken = 0

    def take(self, num_tokens: int | None = None) -> tuple[int, ...]:
        """The next prompt, cut to ``num_tokens`` where it is longer."""
        prompt = self._prompts[self._num_taken % len(self._prompts)]
        self._num_taken += 1
        return prompt[:num_tokens]

    def requests(
        self, max_tokens: Sequence[int], prompt_tokens: Sequence[int | None], temperature: float
    ) -> list[Request]:
        """One request for each of the lengths, none of which ends early.

        Args:
            max_tokens: output lengths.
            prompt_tokens: prompt lengths, ``None`` for whole prompts.
        """
        first = self._num_taken
        return [
            Request(
                request_id=f"load-{first + index}",
                prompt_token_ids=self.take(prompt),
                sampling=SamplingParams(
                    temperature=temperature, max_tokens=output, ignore_eos=True
                ),
            )
            for index, (output, prompt) in enumerate(zip(max_tokens, prompt_tokens, strict=True))
        ]
