"""Reading a model's answer: content, and calls of tools.

A call has the form of Hermes and Qwen templates, one or more of::

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

A custom tool with a grammar in Lark is called with the text as it is, up to the answer's end, since
only that is something which no text can hold::

    <tool_call>
    {"name": "NAME"}
    TEXT

Models may close such a call as they do the others; that is no part of the text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BEGIN = "<tool_call>"
END = "</tool_call>"
CUSTOM_INPUT = "input"  # the one argument of a custom tool
TEXT_END = f"\n{END}"


def text_head(name: str) -> str:
    """What stands between ``BEGIN`` and the text that a tool is called with."""
    return f'\n{{"name": {json.dumps(name)}}}\n'


@dataclass(frozen=True)
class ToolCall:
    """One finished call; ``arguments`` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolCallReader:
    """Parts a choice's text, as it comes, into content and calls.

    Guarantees: content and calls come in order, and none of the text is lost: what begins as a call
    and is none, or is cut off, is content; but where all must be calls, one that is cut off is
    dropped.

    Args:
        text_tools: names of tools that are called with a text as it is.
        must_call: the answer is calls and nothing else.
        reads_text: calls may stand in text; if not, an answer that does not begin with one is
            content, whatever it holds.
    """

    def __init__(
        self,
        text_tools: Collection[str] = (),
        *,
        must_call: bool = False,
        reads_text: bool = True,
    ) -> None:
        self._must_call = must_call
        self._reads_text = reads_text
        self._heads = {BEGIN + text_head(name): name for name in text_tools}
        self._held = ""
        self._is_behind_call = False  # directly: the line's end belongs to the call
        self._is_content = False  # all of the rest

    def push(self, text: str) -> list[str | ToolCall]:
        """What became certain with more text."""
        self._held += text
        found: list[str | ToolCall] = []
        while True:
            if self._is_behind_call and self._held:
                self._held = self._held.removeprefix("\n")
                self._is_behind_call = False
            start = self._held.find(BEGIN)
            if start != 0 and not self._reads_text and not BEGIN.startswith(self._held):
                start, self._is_content = -1, True
            if start < 0 or self._is_content:
                kept = 0 if self._is_content else _partial_length(self._held, BEGIN)
                _add_content(found, self._held[: len(self._held) - kept])
                self._held = self._held[len(self._held) - kept :]
                return found
            _add_content(found, self._held[:start])
            self._held = self._held[start:]
            if self._text_head(self._held):
                return found
            end = self._held.find(END)
            if end < 0:
                return found
            call = _read_call(self._held[len(BEGIN) : end])
            end += len(END)
            if call is None:
                _add_content(found, self._held[:end])
            else:
                found.append(call)
                self._is_behind_call = True
            self._held = self._held[end:]

    def finish(self, end: str | None = None) -> list[str | ToolCall]:
        """What is left.

        Args:
            end: what the answer's end added to the text; unset: the answer is not whole.
        """
        held, self._held = self._held, ""
        head = self._text_head(held)
        found: list[str | ToolCall] = []
        if end is not None and head:
            text = held[len(head) :].removesuffix(end).removesuffix(TEXT_END)
            found.append(_call(self._heads[head], {CUSTOM_INPUT: text}))
            held = end
        elif end is None and self._must_call:
            held = ""
        _add_content(found, held)
        return found

    def _text_head(self, held: str) -> str:
        """The beginning of ``held`` that calls a tool with a text, or nothing."""
        return next((head for head in self._heads if held.startswith(head)), "")


class AnswerReader:
    """One choice's text, as it comes, as content and finished calls in their order.

    Args:
        calls: how to read calls; unset: all is content.
        ends: tokens of which one ends an answer that is whole, with what each adds to its text.
    """

    def __init__(
        self, calls: ToolCallReader | None = None, ends: Mapping[int, str] | None = None
    ) -> None:
        self._reader = calls
        self._ends = ends or {}
        self._last_token_id = -1
        self.num_calls = 0

    def push(self, text: str, token_ids: Sequence[int], *, is_last: bool) -> list[str | ToolCall]:
        """What became certain with more text and tokens; all of it, with the last."""
        if self._reader is None:
            return [text] if text else []
        if token_ids:
            self._last_token_id = token_ids[-1]
        parts = self._reader.push(text)
        if is_last:
            parts += self._reader.finish(self._ends.get(self._last_token_id))
        self.num_calls += sum(isinstance(part, ToolCall) for part in parts)
        return parts


def _add_content(found: list[str | ToolCall], text: str) -> None:
    if text:
        found.append(text)


def _partial_length(text: str, marker: str) -> int:
    """How much of the text's end could be the beginning of ``marker``."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _read_call(body: str) -> ToolCall | None:
    try:
        call = json.loads(body)
        name, arguments = call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError):
        return None
    return _call(str(name), arguments)


def _call(name: str, arguments: Any) -> ToolCall:
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
