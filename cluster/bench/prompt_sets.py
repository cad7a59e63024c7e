"""Prompts that drafters are measured on, by name or from a file."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cluster.errors import ConfigError, DataError
from cluster.training.corpus import TokenStream, load_documents
from cluster.training.prompts import read_prompts, render

TRAINING_CODE = "stdlib-training"
HELDOUT_CODE = "stdlib-heldout"
# Every second window of the held-out code, and the others.
FITTING_CODE = "stdlib-heldout-fit"
JUDGING_CODE = "stdlib-heldout-judge"
CODE_SETS = (TRAINING_CODE, HELDOUT_CODE, FITTING_CODE, JUDGING_CODE)


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one data set, as token ids; ``name`` is what figures call it."""

    name: str
    prompts: tuple[tuple[int, ...], ...]


def dataset_name(source: str) -> str:
    """What figures call the data set of ``source``: a set of code, or a file without its folder
    and ending."""
    return Path(source).stem


def check_prompt_source(source: str) -> None:
    """Reads a file of prompts and forgets it, so that a broken line costs no model's loading.

    Raises:
        DataError: names the file and the line.
    """
    if source not in CODE_SETS:
        read_prompts(source)


def load_prompt_set(
    source: str, tokenizer: PreTrainedTokenizerBase, *, count: int, num_tokens: int, max_tokens: int
) -> PromptSet:
    """Reads a data set.

    Args:
        source: one of ``CODE_SETS``, windows of the standard library's source at even distances;
            else a JSONL file of prompts (``cluster.training.prompts``), of which the first turns
            are taken, from the start.
        count: most prompts; they come in an order of their own.
        num_tokens: length of a window of code.
        max_tokens: a longer prompt of a file is left out, a longer window refused.

    Raises:
        DataError: naming file and line: it cannot be read, or there is nothing in it to use.
        ConfigError: windows of code that are too long.
    """
    if source in CODE_SETS:
        if num_tokens > max_tokens:
            message = f"is {num_tokens}; with such outputs the context has room for {max_tokens}"
            raise ConfigError("--prompt-tokens", message)
        documents = load_documents()[source != TRAINING_CODE]
        try:
            stream = TokenStream(documents, tokenizer, num_tokens, shuffle=False)
        except ValueError as error:
            raise ConfigError("--prompt-tokens", str(error)) from None
        windows = _windows(source, stream.windows_per_epoch)
        chosen = windows[:: max(1, len(windows) // count)][:count]
        return _mixed(source, [stream.window(index).tolist() for index in chosen])
    prompts: list[list[int]] = []
    for prompt in read_prompts(source):
        token_ids = render(tokenizer, prompt.messages)
        if 2 <= len(token_ids) <= max_tokens:
            prompts.append(token_ids)
        if len(prompts) == count:
            break
    if not prompts:
        raise DataError(source, None, f"has no prompt of 2 to {max_tokens} tokens")
    return _mixed(dataset_name(source), prompts)


def _windows(source: str, num_windows: int) -> range:
    """Which windows of its documents a set of code has."""
    if source == FITTING_CODE:
        return range(0, num_windows, 2)
    if source == JUDGING_CODE:
        return range(1, num_windows, 2)
    return range(num_windows)


def _mixed(name: str, prompts: list[list[int]]) -> PromptSet:
    """In an order that is always the same, and whose every beginning is a sample of all."""
    random.Random(0).shuffle(prompts)
    return PromptSet(name, tuple(map(tuple, prompts)))
