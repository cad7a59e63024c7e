"""Messages as a prompt: the tokenizer's own chat template, or one that is configured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from transformers import PreTrainedTokenizerFast

from cluster.chat.fields import Fields
from cluster.chat.tool_calls import BEGIN, CUSTOM_INPUT
from cluster.chat.tools import CustomTool, Tool
from cluster.chat.variables import settable_variables
from cluster.errors import ConfigError, InvalidRequestError

# For a model without a template of its own, where it is asked for: ChatML, with Hermes' tools.
CHATML = """\
{%- if tools %}<|im_start|>system
{%- if messages[0].role == 'system' %}
{{ messages[0].content }}
{%- endif %}
You may call these functions:
<tools>
{%- for tool in tools %}
{{ tool.function | tojson }}
{%- endfor %}
</tools>
For each call answer with a JSON object with its name and arguments:
<tool_call>
{"name": NAME, "arguments": ARGUMENTS}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_CHATML_END = "<|im_end|>"
# Other ways of writing a call that begin with the same marker.
_OTHER_FORMS = ("<function=", "<arg_key>")


class TextPart(Fields):
    """A piece of a message's text."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"prompt_cache_breakpoint"})

    type: Literal["text"]
    text: str


class RefusalPart(Fields):
    """A piece of an earlier answer in which the model declined."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """What it said, which is what a template has to tell."""
        return self.refusal


def _check_is_text(part: Any) -> Any:
    """Refuses images, audio and files by what they are."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise ValueError(f"a part of type '{kind[:64]}' is not served: text only")
    return part


Part = Annotated[
    TextPart | RefusalPart, Field(discriminator="type"), BeforeValidator(_check_is_text)
]


class CalledFunction(Fields):
    """The function of an earlier call; ``arguments`` is JSON."""

    name: str
    arguments: str


class EarlierCall(Fields):
    """A call of an earlier answer."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class CustomInput(Fields):
    """The custom tool of an earlier call, and the text it was given."""

    name: str
    input: str


class EarlierCustomCall(Fields):
    """A call of a custom tool in an earlier answer."""

    id: str = ""
    type: Literal["custom"]
    custom: CustomInput


class Message(Fields):
    """One message of a conversation.

    ``developer`` is another name for ``system``, and ``function`` a former one for ``tool``.
    """

    not_served: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],)}  # of an answer

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[EarlierCall | EarlierCustomCall] = Field(default_factory=list)
    function_call: CalledFunction | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _holds_what_its_role_needs(self) -> Self:
        match self.role:
            case "assistant":
                said = (self.content, self.refusal, self.reasoning_content, self.function_call)
                if all(part is None for part in said) and not self.tool_calls:
                    raise ValueError("an assistant's message needs content or tool_calls")
            case "function" if self.name is None:
                raise ValueError("a function's message needs name")
            case "tool" if self.tool_call_id is None:
                raise ValueError("a tool's message needs tool_call_id")
        if self.role not in ("assistant", "function") and self.content is None:
            raise ValueError(f"a {self.role}'s message needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it. Raises: InvalidRequestError."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        if content is None:
            content = self.refusal
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": content}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        calls = list(self.tool_calls)
        if self.function_call is not None:
            calls.append(EarlierCall(function=self.function_call))
        if calls:
            message["tool_calls"] = [_call_for_template(call) for call in calls]
        return message


class ChatFields(Fields):
    """The part of a request that becomes the prompt."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    add_generation_prompt: bool = Field(
        default=True, description="end the prompt where an answer begins"
    )
    continue_final_message: bool = Field(
        default=False, description="go on with the last message; without add_generation_prompt"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables of the model's template"
    )
    reasoning_effort: str | None = Field(
        default=None, description="where the model's template knows it"
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="instead of the model's, where router.trust_request_chat_template allows it",
    )


class ChatTemplate:
    """Renders conversations.

    Args:
        tokenizer: the target's.
        configured: ``chatml``, the text of a template, or ``None`` for the tokenizer's own.
        trusts_requests: those that come with requests are rendered: in transformers' sandbox, but
            in any time that they take.

    Raises:
        ConfigError: ``chatml`` is asked for, and the tokenizer has a template of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        configured: str | None = None,
        *,
        trusts_requests: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._trusts_requests = trusts_requests
        self._stop: tuple[str, ...] = ()
        own = tokenizer.chat_template
        if configured == "chatml":
            if own:
                raise ConfigError("router.chat_template", "the tokenizer has one of its own")
            self._template: str | dict[str, str] | None = CHATML
            self._stop = (_CHATML_END,)  # which the model need not know as a token
        else:
            self._template = configured or own

    @property
    def is_there(self) -> bool:
        """Whether conversations can be rendered at all."""
        return self._template is not None

    def stop(self, fields: ChatFields) -> tuple[str, ...]:
        """Strings that end an answer."""
        return self._stop if fields.chat_template is None else ()

    def calls_tools(self, fields: ChatFields) -> bool:
        """Whether the template tells of tools, and of calls in the form that is read here."""
        text = json.dumps(fields.chat_template or self._template)
        return BEGIN in text and "tools" in text and not any(form in text for form in _OTHER_FORMS)

    async def render(self, fields: ChatFields, tools: Sequence[Tool | CustomTool] = ()) -> str:
        """The prompt. Raises: InvalidRequestError."""
        if fields.chat_template is not None and not self._trusts_requests:
            raise InvalidRequestError(
                "chat_template", "is not served: router.trust_request_chat_template is not set"
            )
        template = fields.chat_template or self._template
        if template is None:
            raise InvalidRequestError(
                "messages",
                "the model has no chat template: use /v1/completions, or configure "
                "router.chat_template",
            )
        if fields.continue_final_message and fields.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message", "cannot go with add_generation_prompt: true"
            )
        messages = [message.for_template() for message in fields.messages]
        described = [
            {"type": "function", "function": tool.definition.model_dump(exclude_unset=True)}
            for tool in tools
        ]
        if isinstance(template, dict):
            template = self._tokenizer.get_chat_template(None, described or None)
        variables = _variables(fields, settable_variables(template))
        try:
            # In a thread, since a conversation may be long.
            return await asyncio.to_thread(
                self._tokenizer.apply_chat_template,
                messages,
                tools=described or None,
                chat_template=template,
                add_generation_prompt=fields.add_generation_prompt,
                continue_final_message=fields.continue_final_message,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # a template is a program, and can fail in every way
            field = "messages" if fields.chat_template is None else "chat_template"
            raise InvalidRequestError(field, f"the chat template refuses: {error}") from None


def read_template(configured: str | None) -> str | None:
    """The template that a configuration names: ``chatml``, or the text of a file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if configured in (None, "chatml"):
        return configured
    try:
        return Path(configured).read_text()
    except OSError as error:
        raise ConfigError(
            "router.chat_template", f"{configured} cannot be read: {error.strerror}"
        ) from None


def _variables(fields: ChatFields, settable: Collection[str]) -> dict[str, Any]:
    """What the template is told beside the conversation. Raises: InvalidRequestError."""
    variables = fields.chat_template_kwargs
    for name in variables:
        if name in ("messages", "tools", *ChatFields.model_fields):
            raise InvalidRequestError(
                "chat_template_kwargs", f"cannot hold '{name}', which is a field of its own"
            )
        if name not in settable:
            raise InvalidRequestError(
                "chat_template_kwargs", f"'{name}' is no variable of the model's chat template"
            )
    if fields.reasoning_effort is None:
        return variables
    if "reasoning_effort" not in settable:
        raise InvalidRequestError("reasoning_effort", "the model's chat template does not know it")
    return {**variables, "reasoning_effort": fields.reasoning_effort}


def _call_for_template(call: EarlierCall | EarlierCustomCall) -> dict[str, Any]:
    """Templates write arguments as JSON themselves."""
    if isinstance(call, EarlierCustomCall):
        given = {"name": call.custom.name, "arguments": {CUSTOM_INPUT: call.custom.input}}
        return {"id": call.id, "type": "function", "function": given}
    try:
        # Empty, as clients send it of a call that has none.
        arguments = json.loads(call.function.arguments.strip() or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            "messages", "the arguments of an earlier tool call are not JSON"
        ) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
