"""``/tokenize`` and ``/detokenize``, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cluster.api.fields import TokenIds
from cluster.chat.fields import Fields
from cluster.chat.template import ChatFields, Message
from cluster.chat.tools import AnyTool
from cluster.errors import InvalidRequestError
from cluster.rpc.router import RouterServer

_OF_MESSAGES = (
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
)


class TokenizeRequest(ChatFields):
    """The body of ``/tokenize``: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(default_factory=list)
    tools: Annotated[list[AnyTool], Field(fail_fast=True)] = Field(
        default_factory=list, description="with messages, as a chat has them"
    )
    add_special_tokens: bool | None = Field(
        default=None, description="unset: with a prompt, and not with messages"
    )
    return_token_strs: bool = False


class DetokenizeRequest(Fields):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: TokenIds


async def tokenize(router: RouterServer, fields: TokenizeRequest) -> dict[str, Any]:
    """Raises: InvalidRequestError, ModelNotFoundError."""
    router.check_model(fields.model)
    if (fields.prompt is None) == (not fields.messages):
        raise InvalidRequestError("prompt", "either it or messages must be given")
    for name in _OF_MESSAGES if fields.prompt is not None else ():
        if getattr(fields, name) != TokenizeRequest.model_fields[name].get_default(
            call_default_factory=True
        ):
            raise InvalidRequestError(name, "needs messages")
    text = fields.prompt
    if text is None:
        text = await router.chat_template.render(fields, fields.tools)
    with_special = fields.add_special_tokens
    if with_special is None:
        with_special = fields.prompt is not None
    token_ids = await router.encoder.encode(
        text,
        add_special_tokens=with_special,
        field="messages" if fields.prompt is None else "prompt",
    )
    answer: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": router.max_model_len,
        "tokens": list(token_ids),
    }
    if fields.return_token_strs:
        answer["token_strs"] = router.encoder.strings(token_ids)
    return answer


def detokenize(router: RouterServer, fields: DetokenizeRequest) -> dict[str, Any]:
    """Raises: InvalidRequestError, ModelNotFoundError."""
    router.check_model(fields.model)
    return {"prompt": router.encoder.decode(fields.tokens, field="tokens")}
