"""Tools, and the grammar that makes a model call them well.

Arguments always follow the tool's schema, whether the model chooses to call or must.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.chat.fields import Fields
from cluster.chat.tool_calls import BEGIN, END
from cluster.engine.grammar import JSON_OPTIONS
from cluster.errors import InvalidRequestError
from cluster.grammar import Grammar, GrammarKind

MAX_TOOLS = 128
CUSTOM_INPUT = "input"  # the one argument of a custom tool

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class FunctionTool(Fields):
    """A function that may be called. Its schema is always enforced, whatever ``strict`` says."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: dict(_ANY_OBJECT))
    strict: bool = True


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
    syntax: Literal["regex"]


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
    def definition(self) -> FunctionTool:
        """What the model is told of."""
        custom = self.custom
        text = {"type": "string"}
        if isinstance(custom.format, GrammarFormat):
            text["pattern"] = f"^(?:{custom.format.grammar.definition})$"
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
    """

    functions: Sequence[FunctionTool]
    must_call: bool
    may_repeat: bool

    def to_grammar(self) -> Grammar:
        """What the answer may be."""
        call = f"call: {json.dumps(BEGIN)} body"
        if self.must_call:
            start = 'start: call ("\\n" call)*' if self.may_repeat else "start: call"
        else:
            # Lazy: text ends where a call begins, so that none can be written in another form.
            call = f"call: trigger body\ntrigger[lazy]: TEXT {json.dumps(BEGIN)}"
            call += "\nrest: TEXT\nTEXT: /(.|\\n)*/"
            start = "start: call* rest" if self.may_repeat else "start: call | rest"
        names = [f"body_{index}" for index in range(len(self.functions))]
        lines = [start, call, f"body: {' | '.join(names)}"]
        for name, function in zip(names, self.functions, strict=True):
            head = f'\n{{"name": {json.dumps(function.name)}, "arguments": '
            schema = json.dumps(function.parameters | {"x-guidance": JSON_OPTIONS})
            tail = "}\n" + END
            lines.append(f"{name}: {json.dumps(head)} %json {schema} {json.dumps(tail)}")
        return Grammar(GrammarKind.LARK, "\n".join(lines) + "\n")


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
    if isinstance(choice, NamedToolChoice | NamedCustomChoice):
        return ToolUse(_named(functions, [choice]), must_call=True, may_repeat=False)
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        functions = _named(functions, allowed.tools)
        return ToolUse(functions, must_call=allowed.mode == "required", may_repeat=may_repeat)
    return ToolUse(functions, must_call=choice == "required", may_repeat=may_repeat)


def _named(
    functions: Sequence[FunctionTool], choices: Sequence[NamedToolChoice | NamedCustomChoice]
) -> list[FunctionTool]:
    """The functions that are named. Raises: InvalidRequestError."""
    wanted = {choice.name for choice in choices}
    if unknown := wanted.difference(function.name for function in functions):
        raise InvalidRequestError("tool_choice", f"'{min(unknown)}' is none of the tools")
    return [function for function in functions if function.name in wanted]
