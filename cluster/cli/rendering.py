"""Showing where each token of a text came from, in colour or with marks."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.request import TokenSource

_RESET = "\x1b[0m"
_COLOURS = {
    TokenSource.ACCEPTED: "\x1b[32m",  # green
    TokenSource.RECOVERED: "\x1b[31m",  # red
    TokenSource.BONUS: "\x1b[36m",  # cyan
    TokenSource.TARGET: "",
}
# Without colour each source has brackets of its own, of kinds that programs do not contain; the
# target's own tokens have none.
_MARKS = {
    TokenSource.ACCEPTED: ("\u00ab", "\u00bb"),
    TokenSource.RECOVERED: ("\u27e6", "\u27e7"),
    TokenSource.BONUS: ("\u2039", "\u203a"),
    TokenSource.TARGET: ("", ""),
}
_MEANINGS = {
    TokenSource.ACCEPTED: "accepted",
    TokenSource.RECOVERED: "recovered",
    TokenSource.BONUS: "bonus",
    TokenSource.TARGET: "target",
}


class TokenText:
    """Renders a stream's text token by token.

    Guarantees: what ``render`` and ``finish`` return, joined, is the text itself with colours or
    marks in it. Neighbours of one source share a pair of marks; marks never enclose a line break.
    """

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour
        self._source = TokenSource.TARGET
        self._open = TokenSource.TARGET

    def render(
        self, text: str, token_sources: Sequence[TokenSource], text_lengths: Sequence[int]
    ) -> str:
        """The rendered text of one chunk.

        Args:
            text: what became final with it.
            token_sources: one per token.
            text_lengths: characters of ``text`` that each token made final, in order; text behind
                them belongs to the token before.
        """
        rendered = []
        start = 0
        for source, length in zip(token_sources, text_lengths, strict=True):
            if length:
                self._source = source
                rendered.append(self._piece(text[start : start + length]))
            start += length
        return "".join(rendered) + self._piece(text[start:])

    def finish(self) -> str:
        """Closes what is open."""
        return self._switch(TokenSource.TARGET)

    def _piece(self, text: str) -> str:
        rendered = []
        for line in text.splitlines(keepends=True):
            content = line.rstrip("\r\n")
            if content:
                rendered += [self._switch(self._source), content]
            if content != line:
                rendered += [self._switch(TokenSource.TARGET), line[len(content) :]]
        return "".join(rendered)

    def _switch(self, source: TokenSource) -> str:
        if source is self._open:
            return ""
        closed, self._open = self._open, source
        if self._colour:
            return _RESET + _COLOURS[source]
        return _MARKS[closed][1] + _MARKS[source][0]


def legend(*, colour: bool) -> str:
    """One line that explains the colours or marks."""
    if colour:
        shown = [f"{_COLOURS[source]}{meaning}{_RESET}" for source, meaning in _MEANINGS.items()]
    else:
        shown = [meaning.join(_MARKS[source]) for source, meaning in _MEANINGS.items()]
    return "tokens: " + "  ".join(shown)
