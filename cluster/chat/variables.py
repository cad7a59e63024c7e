"""Which variables a chat template has, and which of them a request may set."""

from __future__ import annotations

import inspect
from functools import lru_cache

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerFast

# What is a field of its own, or an argument of transformers' that the template would not be told.
_RESERVED = frozenset(
    {
        "conversations",
        "messages",
        *inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters,
    }
) - {"documents", "kwargs"}


class _Generation(Extension):
    """The block in which templates for training mark an answer; its contents are the template's."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def settable_variables(template: str) -> frozenset[str]:
    """The variables that ``template`` asks for, but those that are not the client's to set; none
    where the template cannot be parsed."""
    environment = Environment(extensions=[LoopControlExtension, _Generation])
    try:
        found = meta.find_undeclared_variables(environment.parse(template))
    except (TemplateError, RecursionError):
        return frozenset()
    return frozenset(found) - _RESERVED
