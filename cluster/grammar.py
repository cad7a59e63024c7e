"""What an output must be, as plain data; ``cluster.engine.grammar`` compiles it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.errors import InvalidRequestError

MAX_GRAMMAR_CHARS = 256 * 1024


class GrammarKind(enum.Enum):
    """What a grammar is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True)
class Grammar:
    """What an output must be, as a whole: the end-of-sequence token comes only behind all of it.

    Attributes:
        source: a JSON schema, a regular expression (Rust's syntax, without look-around), or a
            grammar in llguidance's form of Lark.
    """

    kind: GrammarKind
    source: str

    def validate(self) -> None:
        """Checks what needs no compiling. Raises: InvalidRequestError."""
        if not 1 <= len(self.source) <= MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(
                "sampling.grammar",
                f"must have 1 to {MAX_GRAMMAR_CHARS} characters, has {len(self.source)}",
            )


# Any JSON object.
JSON_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
