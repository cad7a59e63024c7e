"""Conversations of ``cluster.v1`` as those of ``cluster.chat``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from cluster.chat.template import (
    CalledFunction,
    ChatFields,
    CustomInput,
    EarlierCall,
    EarlierCustomCall,
    Message,
)
from cluster.chat.text import check_text
from cluster.chat.tool_calls import CUSTOM_INPUT, ToolCall
from cluster.chat.tools import (
    AllowedTools,
    AllowedToolsChoice,
    CustomDefinition,
    CustomTool,
    FunctionTool,
    GrammarFormat,
    InputGrammar,
    NamedCustomChoice,
    NamedFunction,
    NamedToolChoice,
    Tool,
    ToolChoice,
)
from cluster.errors import InvalidRequestError
from cluster.v1 import chat_pb2

_ROLES: dict[int, str] = {
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
    chat_pb2.ROLE_TOOL: "tool",
}
_MODES: dict[int, Any] = {
    chat_pb2.ToolChoice.MODE_UNSPECIFIED: "auto",
    chat_pb2.ToolChoice.MODE_NONE: "none",
    chat_pb2.ToolChoice.MODE_AUTO: "auto",
    chat_pb2.ToolChoice.MODE_REQUIRED: "required",
}


def conversation_from_proto(message: chat_pb2.Conversation) -> ChatFields:
    """Reads all but the tools. Raises: InvalidRequestError, with fields as ``cluster.chat``'s."""
    given: dict[str, Any] = {
        name: getattr(message, name)
        for name in ("add_generation_prompt", "continue_final_message")
        if message.HasField(name)
    }
    if message.template_variables:
        given["chat_template_kwargs"] = _json_object(
            message.template_variables, "chat_template_kwargs"
        )
    if message.reasoning_effort:
        given["reasoning_effort"] = message.reasoning_effort
    if message.HasField("template"):
        given["chat_template"] = message.template
    try:
        return ChatFields(messages=[_message(entry) for entry in message.messages], **given)
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InvalidRequestError("messages", why) from None


def tools_from_proto(tools: Iterable[chat_pb2.Tool]) -> list[Tool | CustomTool]:
    """Reads tools.

    Raises:
        InvalidRequestError: parameters are not a JSON object, or an input is no text by a grammar.
    """
    return [
        CustomTool(type="custom", custom=_custom(tool))
        if tool.HasField("input")
        else Tool(type="function", function=_function(tool))
        for tool in tools
    ]


def call_to_proto(call: ToolCall, tools: Iterable[Tool | CustomTool]) -> chat_pb2.ToolCall:
    """Writes a finished call of one of ``tools``."""
    customs = {tool.custom.name for tool in tools if isinstance(tool, CustomTool)}
    if call.name in customs:
        text = json.loads(call.arguments)[CUSTOM_INPUT]
        return chat_pb2.ToolCall(id=call.id, name=call.name, input=text)
    return chat_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)


def tool_choice_from_proto(message: chat_pb2.ToolChoice) -> ToolChoice:
    """Reads a choice. Raises: InvalidRequestError: a mode of a later version."""
    mode = _MODES.get(message.mode)
    if mode is None:
        raise InvalidRequestError("tool_choice", f"unknown mode {message.mode}")
    if not message.names:
        return mode
    if mode == "none":
        raise InvalidRequestError("tool_choice", "names none of the tools and some")
    named: list[NamedToolChoice | NamedCustomChoice] = [
        NamedToolChoice(type="function", function=NamedFunction(name=name))
        for name in message.names
    ]
    return AllowedToolsChoice(
        type="allowed_tools", allowed_tools=AllowedTools(mode=mode, tools=named)
    )


def _message(message: chat_pb2.Message) -> Message:
    role: Any = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequestError("messages", f"unknown role {message.role}")
    given = {
        name: getattr(message, name)
        for name in ("content", "name", "tool_call_id", "reasoning_content")
        if message.HasField(name)
    }
    return Message(role=role, tool_calls=[_call(call) for call in message.tool_calls], **given)


def _call(call: chat_pb2.ToolCall) -> EarlierCall | EarlierCustomCall:
    if call.HasField("input"):
        custom = CustomInput(name=call.name, input=call.input)
        return EarlierCustomCall(id=call.id, type="custom", custom=custom)
    function = CalledFunction(name=call.name, arguments=call.arguments)
    return EarlierCall(id=call.id, function=function)


def _function(tool: chat_pb2.Tool) -> FunctionTool:
    given: dict[str, Any] = {}
    if tool.description:
        given["description"] = tool.description
    if tool.parameters:
        given["parameters"] = _json_object(tool.parameters, "tools")
    if tool.strict:
        given["strict"] = True
    return FunctionTool(name=tool.name, **given)


def _custom(tool: chat_pb2.Tool) -> CustomDefinition:
    if tool.parameters or tool.strict:
        raise InvalidRequestError("tools", "a custom tool has no parameters")
    syntax: Any = tool.input.WhichOneof("kind")
    if syntax not in (None, "regex", "lark"):
        raise InvalidRequestError("tools", f"the input of a custom tool cannot be {syntax}")
    wanted = None
    if syntax is not None:
        grammar = InputGrammar(syntax=syntax, definition=getattr(tool.input, syntax))
        wanted = GrammarFormat(type="grammar", grammar=grammar)
    return CustomDefinition(name=tool.name, description=tool.description or None, format=wanted)


def _json_object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(field, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(field, "is not a JSON object")
    check_text(value, field)
    return value
