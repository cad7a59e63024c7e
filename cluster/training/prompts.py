"""Reads prompts and documents to learn from; what is broken is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cluster.errors import DataError
from cluster.training.corpus import Document

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered.

    ``messages`` end with the user's; ``later_turns`` are what the user says after each answer.
    ``answer`` is the text's own answer to ``messages``, where it has one.
    """

    file: str
    line: int
    messages: tuple[dict[str, str], ...]
    later_turns: tuple[str, ...] = ()
    answer: str | None = None

    def error(self, message: str) -> DataError:
        """An error that names where this prompt stands."""
        return DataError(self.file, self.line, message)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a JSONL file of prompts; blank lines are left out.

    A line is one object with ``turns`` (what the user says, one text a turn), ``prompt`` (a text,
    its ``answer`` beside it or not) or ``messages`` (``role`` and ``content`` each; a last one of
    the assistant is the answer).

    Raises:
        DataError: names the line that is broken, or the file if it is unreadable or empty.
    """
    prompts = [
        _parse_prompt(str(path), number, line)
        for number, line in enumerate(_read_text(path).split("\n"), start=1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(str(path), None, "is empty")
    return prompts


def read_document(path: str | Path) -> Document:
    """Reads a text file. Raises: DataError: it is unreadable, empty or not UTF-8."""
    text = _read_text(path)
    if not text.strip():
        raise DataError(str(path), None, "is empty")
    return Document(str(path), text)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation that the target is to go on with.

    By the tokenizer's chat template; without one, the messages' texts joined by line ends.
    """
    if tokenizer.chat_template is not None:
        rendered: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(rendered["input_ids"])
    text = "\n".join(message["content"] for message in messages)
    return list(tokenizer(text, verbose=False)["input_ids"])


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(str(path), None, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(str(path), None, f"is not UTF-8 at byte {error.start}") from None


def _parse_prompt(file: str, number: int, line: str) -> Prompt:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(file, number, f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(file, number, "must be a JSON object")
    if "turns" in values:
        first, *later = _texts(file, number, values["turns"])
        return Prompt(file, number, (_user(first),), tuple(later))
    if "prompt" in values:
        prompt = _text(file, number, "prompt", values["prompt"])
        answer = values.get("answer")
        if answer is not None:
            answer = _text(file, number, "answer", answer)
        return Prompt(file, number, (_user(prompt),), answer=answer)
    if "messages" in values:
        messages = tuple(_messages(file, number, values["messages"]))
        answer = None
        if messages[-1]["role"] == "assistant":
            *others, last = messages
            messages, answer = tuple(others), last["content"]
        if not messages or messages[-1]["role"] != "user":
            raise DataError(file, number, "messages: must end with the user's, or an answer to it")
        return Prompt(file, number, messages, answer=answer)
    raise DataError(file, number, "has none of the keys turns, prompt and messages")


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _text(file: str, number: int, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(file, number, f"{key}: must be a text that is not empty")
    return value


def _texts(file: str, number: int, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise DataError(file, number, "turns: must be a list that is not empty")
    return [_text(file, number, "turns", item) for item in value]


def _messages(file: str, number: int, value: Any) -> Iterator[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(file, number, "messages: must be a list that is not empty")
    for item in value:
        if not isinstance(item, dict) or item.get("role") not in _ROLES:
            raise DataError(file, number, f"messages: each needs a role of {', '.join(_ROLES)}")
        content = _text(file, number, "messages: content", item.get("content"))
        yield {"role": item["role"], "content": content}
