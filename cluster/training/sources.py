"""The data that a configuration names, checked before anything long starts, as data sets."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from cluster.errors import ConfigError
from cluster.training.answers import Conversation, regenerate
from cluster.training.config import DataConfig, TrainConfig
from cluster.training.corpus import Document, TokenStream, load_documents
from cluster.training.dataset import Dataset, FixedSequences, Sequence, StreamSequences
from cluster.training.parallel import Worker
from cluster.training.prompts import Prompt, read_document, read_prompts, render

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """What is trained on, or what is held out; one of the three is filled."""

    documents: list[Document] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Everything that the data files hold. ``digest`` is SHA-256 (hex) over their contents."""

    training: Part
    heldout: Part
    digest: str


def read_source(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Source:
    """Reads, checks and tokenizes the data.

    Raises:
        DataError: a file is unreadable or empty, a line is broken, a prompt is too long.
        ConfigError: the files do not fit together, or are too few.
    """
    data = config.data
    kinds = {name.endswith(".jsonl") for name in (*data.files, *data.heldout_files)}
    if len(kinds) > 1:
        raise ConfigError("data.files", "are prompts (.jsonl) and documents; use one kind")
    if data.heldout_files and not data.files:
        raise ConfigError("data.files", "is required with data.heldout_files")
    if config.has_prompts:
        return _prompt_source(config, tokenizer)
    if data.files:
        documents = [read_document(path) for path in data.files]
        heldout = [read_document(path) for path in data.heldout_files]
        if not heldout:
            documents, heldout = _split(documents, data)
    else:
        documents, heldout = load_documents()
    digest = hashlib.sha256()
    for document in (*documents, *heldout):
        digest.update(hashlib.sha256(document.text.encode()).digest())
    parts = [
        Part(conversations=_continuations(group, config, tokenizer))
        if data.regenerate
        else Part(documents=group)
        for group in (documents, heldout)
    ]
    return Source(parts[0], parts[1], digest.hexdigest())


def build_datasets(
    config: TrainConfig, source: Source, tokenizer: PreTrainedTokenizerBase, worker: Worker
) -> tuple[Dataset, Dataset]:
    """``(training, held-out)``; lets the target answer first where that is configured.

    Raises:
        ConfigError: the data do not fill one sequence.
        DataError: a file of answers on disk is broken.
    """
    data = config.data
    if data.regenerate:
        training = source.training.conversations
        both = [*training, *source.heldout.conversations]
        answered = regenerate(config, both, tokenizer, worker)
        groups = (answered[: len(training)], answered[len(training) :])
        made = [[sequence for turns in group for sequence in turns] for group in groups]
        return _fixed(made[0], data), _fixed(made[1], data)
    if source.training.sequences:
        return _fixed(source.training.sequences, data), _fixed(source.heldout.sequences, data)
    streams = [
        _stream(group, config, tokenizer, shuffle)
        for group, shuffle in (
            (source.training.documents, True),
            (source.heldout.documents, False),
        )
    ]
    if config.features.mode == "compute":
        return StreamSequences(streams[0]), StreamSequences(streams[1])
    windows = [[Sequence(array("i", row.tolist())) for row in stream.epoch()] for stream in streams]
    return FixedSequences(windows[0], data.seed), FixedSequences(windows[1], data.seed)


def _prompt_source(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Source:
    data = config.data
    prompts = [prompt for path in data.files for prompt in read_prompts(path)]
    heldout = [prompt for path in data.heldout_files for prompt in read_prompts(path)]
    digest = hashlib.sha256()
    for path in (*data.files, *data.heldout_files):
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    if data.max_prompts is not None:
        prompts = prompts[: data.max_prompts]
    if not heldout:
        prompts, heldout = _split(prompts, data)
    parts = []
    for group in (prompts, heldout):
        conversations = [_conversation(prompt, config, tokenizer) for prompt in group]
        if data.regenerate:
            parts.append(Part(conversations=conversations))
        else:
            pairs = zip(group, conversations, strict=True)
            sequences = [_answered(prompt, made, config, tokenizer) for prompt, made in pairs]
            parts.append(Part(sequences=sequences))
    return Source(parts[0], parts[1], digest.hexdigest())


def _conversation(
    prompt: Prompt, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> Conversation:
    token_ids = tuple(render(tokenizer, prompt.messages))
    length = config.data.sequence_length
    if len(token_ids) >= length:
        raise prompt.error(
            f"the prompt has {len(token_ids)} tokens; data.sequence_length is {length} and must "
            "hold at least one token of the answer"
        )
    return Conversation(token_ids, prompt.messages, prompt.later_turns)


def _answered(
    prompt: Prompt,
    conversation: Conversation,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Sequence:
    if prompt.answer is None:
        raise prompt.error("has no answer; data.regenerate lets the target write one")
    answer = tokenizer(prompt.answer, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    token_ids = array("i", [*conversation.prompt_token_ids, *answer, *end])
    return Sequence(token_ids[: config.data.sequence_length], len(conversation.prompt_token_ids))


def _continuations(
    documents: list[Document], config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Conversation]:
    """The first ``prompt_tokens`` of each of the documents' windows, for the target to go on."""
    stream = _stream(documents, config, tokenizer, shuffle=True)
    limit = config.data.max_prompts or stream.windows_per_epoch
    count = min(limit, stream.windows_per_epoch)
    windows = (stream.window(index) for index in range(count))
    return [Conversation(tuple(w[: config.data.prompt_tokens].tolist())) for w in windows]


def _stream(
    documents: list[Document],
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    shuffle: bool,
) -> TokenStream:
    data = config.data
    try:
        return TokenStream(documents, tokenizer, data.sequence_length, data.seed, shuffle)
    except ValueError as error:
        raise ConfigError("data.sequence_length", str(error)) from None


def _fixed(sequences: list[Sequence], data: DataConfig) -> FixedSequences:
    order = np.random.default_rng(data.seed).permutation(len(sequences))
    return FixedSequences([sequences[index] for index in order], data.seed)


def _split(items: list[Item], data: DataConfig) -> tuple[list[Item], list[Item]]:
    """Takes the held-out part away, at least one, chosen by the seed."""
    if len(items) < 2:
        raise ConfigError(
            "data.heldout_files", "is required: one file or prompt cannot be learned and held out"
        )
    count = max(1, round(len(items) * data.heldout_fraction))
    order = np.random.default_rng(data.seed).permutation(len(items))
    chosen = set(order[:count].tolist())
    rest = [item for index, item in enumerate(items) if index not in chosen]
    return rest, [items[index] for index in sorted(chosen)]
