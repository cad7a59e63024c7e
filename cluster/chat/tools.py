"""Tools, and the grammar that makes a model call them well.

Arguments follow the tool's schema, whether the model chooses to call or must.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.chat.fields import Fields
from cluster.chat.tool_calls import (
    BEGIN,
    CUSTOM_INPUT,
    END,
    TEXT_END,
    ToolCallReader,
    text_head,
)
from cluster.engine.grammar import JSON_OPTIONS, LENIENT_JSON_OPTIONS, nested
from cluster.errors import InvalidRequestError
from cluster.grammar import Grammar, GrammarKind

MAX_TOOLS = 128

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class FunctionTool(Fields):
    """A function that may be called. Its schema is enforced, as a whole if it is ``strict``."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: dict(_ANY_OBJECT))
    strict: bool = Field(
        default=False,
        description="refuse a schema with keywords that cannot be enforced; else they are left to "
        "the model, and the rest of the schema is enforced",
    )


class Tool(Fields):
    """A function as a tool."""

    type: Literal["function"]
    function: FunctionTool

    @property
    def definition(self) -> FunctionTool:
        """What the model is told of."""
        return self.function


class TextFormat(Fields):
    """Any text."""

    type: Literal["text"]


class InputGrammar(Fields):
    """What a custom tool's input must be."""

    definition: str
    syntax: Literal["regex", "lark"]


class GrammarFormat(Fields):
    """Text that follows a grammar."""

    type: Literal["grammar"]
    grammar: InputGrammar


class CustomDefinition(Fields):
    """A tool whose input is a text."""

    name: str
    description: str | None = None
    format: Annotated[TextFormat | GrammarFormat, Field(discriminator="type")] | None = None


class CustomTool(Fields):
    """A custom tool, which the model sees as a function of one string."""

    type: Literal["custom"]
    custom: CustomDefinition

    @property
    def grammar(self) -> InputGrammar | None:
        """What its input must be, if not any text."""
        given = self.custom.format
        return given.grammar if isinstance(given, GrammarFormat) else None

    @property
    def definition(self) -> FunctionTool:
        """What the model is told of."""
        custom, grammar = self.custom, self.grammar
        text = {"type": "string"}
        if grammar is not None and grammar.syntax == "regex":
            text["pattern"] = f"^(?:{grammar.definition})$"
        elif grammar is not None:
            text["description"] = f"A text by this grammar in Lark:\n{grammar.definition}"
        parameters = {
            "type": "object",
            "properties": {CUSTOM_INPUT: text},
            "required": [CUSTOM_INPUT],
            "additionalProperties": False,
        }
        given: dict[str, Any] = {}
        if custom.description is not None:
            given["description"] = custom.description
        return FunctionTool(name=custom.name, parameters=parameters, **given)


AnyTool = Annotated[Tool | CustomTool, Field(discriminator="type")]


class NamedFunction(Fields):
    """Which function."""

    name: str


class NamedToolChoice(Fields):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction

    @property
    def name(self) -> str:
        """Of the tool."""
        return self.function.name


class NamedCustomChoice(Fields):
    """The custom tool that must be called."""

    type: Literal["custom"]
    custom: NamedFunction

    @property
    def name(self) -> str:
        """Of the tool."""
        return self.custom.name


class AllowedTools(Fields):
    """Those of the tools that may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[NamedToolChoice | NamedCustomChoice, Field(discriminator="type")]],
        Field(min_length=1),
    ]


class AllowedToolsChoice(Fields):
    """A choice from some of the tools; the model is told of all."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[
        NamedToolChoice | NamedCustomChoice | AllowedToolsChoice, Field(discriminator="type")
    ]
)


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools.

    Attributes:
        functions: those that may be called, at least one.
        must_call: the answer is calls and nothing else.
        may_repeat: more than one call.
        text_grammars: in Lark, by name, of those that are called with a text as it is.
        content: what an answer without calls is; unset: any text, before and behind calls too.
    """

    functions: Sequence[FunctionTool]
    must_call: bool
    may_repeat: bool
    text_grammars: Mapping[str, str] = field(default_factory=dict)
    content: Grammar | None = None

    def to_grammar(self) -> Grammar:
        """What the answer may be. Raises: InvalidRequestError: ``content`` is broken."""
        begin = json.dumps(BEGIN)
        lines = [self._start()]
        if self._has_text:
            # Lazy: text ends where a call begins, so that none can be written in another form.
            lines += ["rest: TEXT", "TEXT: /(.|\\n)*/", f"trigger[lazy]: TEXT {begin}"]
            begin = "trigger"
        elif self.content is not None and not self.must_call:
            lines.append(f"content: {nested(self.content)}")
        bodies: dict[str, list[str]] = {"call": [], "last": []}
        for index, function in enumerate(self.functions):
            kind, body = self._body(function)
            bodies[kind].append(f"body_{index}")
            lines.append(f"body_{index}: {body}")
        lines += [f"{kind}: {begin} ({' | '.join(n)})" for kind, n in bodies.items() if n]
        return Grammar(GrammarKind.LARK, "\n".join(lines) + "\n")

    def reader(self) -> ToolCallReader:
        """Of an answer."""
        return ToolCallReader(
            self.text_grammars, must_call=self.must_call, reads_text=self._has_text
        )

    @property
    def _has_text(self) -> bool:
        """Whether any text may stand before calls and behind them."""
        return not self.must_call and self.content is None

    def _start(self) -> str:
        """The first rule: behind a ``call`` there may be more, the ``last`` one ends the answer."""
        are_last = {function.name in self.text_grammars for function in self.functions}
        call, last = ["call"] * (False in are_last), ["last"] * (True in are_last)
        if call and self.may_repeat:
            if self._has_text:
                return f"start: call* ({' | '.join([*last, 'rest'])})"
            call = ['call ("\\n" call)*' + ' ("\\n" last)?' * len(last)]
        rest = [] if self.must_call else ["rest" if self.content is None else "content"]
        return f"start: {' | '.join(call + last + rest)}"

    def _body(self, function: FunctionTool) -> tuple[str, str]:
        """How the function is called, as ``_start`` names it, and what follows ``BEGIN``."""
        text_grammar = self.text_grammars.get(function.name)
        if text_grammar is not None:
            head, tail = json.dumps(text_head(function.name)), json.dumps(TEXT_END)
            return "last", f"{head} %lark {{\n{text_grammar}\n}} {tail}?"
        head = f'\n{{"name": {json.dumps(function.name)}, "arguments": '
        options = JSON_OPTIONS if function.strict else LENIENT_JSON_OPTIONS
        schema = json.dumps(function.parameters | {"x-guidance": options})
        tail = "}\n" + END
        return "call", f"{json.dumps(head)} %json {schema} {json.dumps(tail)}"


def tool_use(
    tools: Sequence[Tool | CustomTool], choice: ToolChoice | None, *, may_repeat: bool
) -> ToolUse | None:
    """What is asked for; ``None`` where no tool may be called.

    Args:
        choice: unset: ``auto`` where there are tools.

    Raises:
        InvalidRequestError: a tool cannot be, or is not there.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice", "needs tools")
        return None
    if choice == "none":
        return None
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError("tools", f"at most {MAX_TOOLS}")
    functions = [tool.definition for tool in tools]
    names = [function.name for function in functions]
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                "tools", f"'{name}' is no name: 1 to 64 letters, digits, _ and -"
            )
    if len(set(names)) < len(names):
        raise InvalidRequestError("tools", "two functions have the same name")
    must_call = choice == "required"
    if isinstance(choice, NamedToolChoice | NamedCustomChoice):
        functions = _named(functions, [choice])
        must_call, may_repeat = True, False
    elif isinstance(choice, AllowedToolsChoice):
        functions = _named(functions, choice.allowed_tools.tools)
        must_call = choice.allowed_tools.mode == "required"
    return ToolUse(functions, must_call, may_repeat, _text_grammars(tools))


def _text_grammars(tools: Sequence[Tool | CustomTool]) -> dict[str, str]:
    grammars = {tool.custom.name: tool.grammar for tool in tools if isinstance(tool, CustomTool)}
    return {name: g.definition for name, g in grammars.items() if g and g.syntax == "lark"}


def _named(
    functions: Sequence[FunctionTool], choices: Sequence[NamedToolChoice | NamedCustomChoice]
) -> list[FunctionTool]:
    """The functions that are named. Raises: InvalidRequestError."""
    wanted = {choice.name for choice in choices}
    if unknown := wanted.difference(function.name for function in functions):
        raise InvalidRequestError("tool_choice", f"'{min(unknown)}' is none of the tools")
    return [function for function in functions if function.name in wanted]
