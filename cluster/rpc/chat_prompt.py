"""A conversation on its way to the engine: its prompt, and what its tools ask of the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.chat.template import ChatFields
from cluster.chat.tool_calls import AnswerReader
from cluster.chat.tools import CustomTool, Tool, ToolChoice, ToolUse, tool_use
from cluster.errors import InvalidRequestError
from cluster.grammar import Grammar
from cluster.request import SamplingParams

if TYPE_CHECKING:
    from cluster.rpc.router import RouterServer


# Where in the tools' common grammar the compiler was, which no client has written.
_PLACE = re.compile(r"^at \d+\(\d+\): | \d+ \| .*")


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the engine needs it.

    Attributes:
        sampling: as asked for, with the template's stop strings and the tools' grammar.
        use: of tools; unset: the answer may hold no calls.
    """

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    use: ToolUse | None

    @classmethod
    async def of(
        cls,
        router: RouterServer,
        fields: ChatFields,
        sampling: SamplingParams,
        *,
        tools: Sequence[Tool | CustomTool] = (),
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        max_prompt_tokens: int | None = None,
    ) -> ChatPrompt:
        """Checks, renders and tokenises.

        Args:
            router: of the model that answers.
            tools: that may be called; ``sampling.grammar`` is then for answers without calls.
            max_prompt_tokens: the last ones of the prompt that are kept; unset: all.

        Raises:
            InvalidRequestError: it names ``messages``, ``tools``, ``tool_choice`` or another field
                of the template's, ``sampling.grammar``, or ``prompt`` where that is too long.
        """
        template = router.chat_template
        use = tool_use(tools, tool_choice, may_repeat=parallel_tool_calls)
        if use is not None:
            if not template.calls_tools(fields):
                raise InvalidRequestError(
                    "tools",
                    "the model's chat template has no tool calls in the form that is read here",
                )
            if sampling.grammar is not None:
                await router.check_grammar(sampling.grammar)  # by itself, for errors
                use = replace(use, content=sampling.grammar)
            sampling = replace(sampling, grammar=await _checked_grammar(router, use))
        sampling = replace(sampling, stop=(*sampling.stop, *template.stop(fields)))
        text = await template.render(fields, tools if use is not None else ())
        token_ids = await router.encoder.encode(
            text, add_special_tokens=False, max_tokens=max_prompt_tokens
        )
        return cls(token_ids, sampling, use)

    def reader(self, router: RouterServer) -> AnswerReader:
        """Of one choice of the answer, as ``router`` generates it."""
        if self.use is None:
            return AnswerReader()
        decode = router.tokenizer.backend_tokenizer.decode
        skips = self.sampling.skip_special_tokens
        ends = {end: decode([end], skip_special_tokens=skips) for end in router.eos_token_ids}
        return AnswerReader(self.use.reader(), ends)


async def _checked_grammar(router: RouterServer, use: ToolUse) -> Grammar:
    """What tools ask of the answer. Raises: InvalidRequestError: it tells which is wrong."""
    grammar = use.to_grammar()
    try:
        await router.check_grammar(grammar)
    except InvalidRequestError as error:
        for function in use.functions:
            alone = replace(use, functions=[function], must_call=True)
            try:
                await router.check_grammar(alone.to_grammar())
            except InvalidRequestError as found:
                why = _PLACE.sub("", found.message)
                raise InvalidRequestError("tools", f"'{function.name}': {why}") from None
        raise InvalidRequestError("tools", error.message) from None
    return grammar
