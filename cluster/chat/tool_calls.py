"""Reading a model's answer: content, and calls of tools.

A call has the form of Hermes and Qwen templates, one or more of::

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field

BEGIN = "<tool_call>"
END = "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """One finished call; ``arguments`` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolCallReader:
    """Parts a choice's text, as it comes, into content and calls.

    Guarantees: content and calls come in order, and none of the text is lost: what begins as a call
    and is none, or is cut off, is content.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_behind_call = False  # directly: the line's end belongs to the call

    def push(self, text: str) -> list[str | ToolCall]:
        """What became certain with more text."""
        self._held += text
        found: list[str | ToolCall] = []
        while True:
            if self._is_behind_call and self._held:
                self._held = self._held.removeprefix("\n")
                self._is_behind_call = False
            start = self._held.find(BEGIN)
            if start < 0:
                kept = _partial_length(self._held, BEGIN)
                _add_content(found, self._held[: len(self._held) - kept])
                self._held = self._held[len(self._held) - kept :]
                return found
            _add_content(found, self._held[:start])
            self._held = self._held[start:]
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

    def finish(self) -> str:
        """What is left: content."""
        held, self._held = self._held, ""
        return held


class AnswerReader:
    """One choice's text, as it comes, as content and finished calls in their order.

    Args:
        reads_calls: unset: all is content.
    """

    def __init__(self, *, reads_calls: bool) -> None:
        self._reader = ToolCallReader() if reads_calls else None
        self.num_calls = 0

    def push(self, text: str, *, is_last: bool) -> list[str | ToolCall]:
        """What became certain with more text; all of it, with the last."""
        if self._reader is None:
            return [text] if text else []
        parts: list[str | ToolCall] = self._reader.push(text)
        if is_last:
            _add_content(parts, self._reader.finish())
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
    return ToolCall(str(name), json.dumps(arguments, ensure_ascii=False))
