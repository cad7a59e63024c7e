"""A conversation on its way to the engine: its prompt, and what its tools ask of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.chat.template import ChatFields, ChatTemplate
from cluster.chat.tools import CustomTool, Tool, ToolChoice, tool_use
from cluster.errors import InvalidRequestError
from cluster.request import SamplingParams
from cluster.rpc.prompt import PromptEncoder


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the engine needs it.

    Attributes:
        sampling: as asked for, with the template's stop strings and the tools' grammar.
        may_call: whether the answer may hold calls of tools.
    """

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    may_call: bool

    @classmethod
    async def of(
        cls,
        fields: ChatFields,
        sampling: SamplingParams,
        *,
        template: ChatTemplate,
        encoder: PromptEncoder,
        tools: Sequence[Tool | CustomTool] = (),
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
    ) -> ChatPrompt:
        """Checks, renders and tokenises.

        Raises:
            InvalidRequestError: it names ``messages``, ``tools``, ``tool_choice`` or another field
                of the template's, ``sampling.grammar``, or ``prompt`` where that is too long.
        """
        use = tool_use(tools, tool_choice, may_repeat=parallel_tool_calls)
        if use is not None:
            if sampling.grammar is not None:
                raise InvalidRequestError(
                    "sampling.grammar", "cannot go with tools that may be called"
                )
            if not template.calls_tools:
                raise InvalidRequestError(
                    "tools",
                    "the model's chat template has no tool calls in the form that is read here",
                )
            sampling = replace(sampling, grammar=use.to_grammar())
        if template.stop:
            sampling = replace(sampling, stop=(*sampling.stop, *template.stop))
        text = await template.render(fields, tools if use is not None else ())
        token_ids = await encoder.encode(text, add_special_tokens=False)
        return cls(token_ids, sampling, use is not None)
