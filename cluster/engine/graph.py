"""Compiles a function of tensors into one graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from cluster.engine.joint_linear import JoinLinears

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
EXAMPLE_TOKENS = 6  # of examples for ``compile_graph``


def try_to_compile(what: str, compile: Callable[[], _T]) -> _T | None:
    """What ``compile`` makes; ``None``, with a warning, where ``what`` cannot be compiled."""
    started_at = time.monotonic()
    try:
        compiled = compile()
    except Exception as error:  # whatever a compiler throws: it is not needed
        reason = str(error).strip().split("\n")[0]
        logger.warning("the %s cannot be compiled and runs layer by layer: %s", what, reason)
        return None
    logger.info("compiled the %s in %.0f s", what, time.monotonic() - started_at)
    return compiled


def compile_graph(function: Callable[..., Any], examples: tuple[torch.Tensor, ...]) -> Any:
    """One graph of ``function``, for arguments of whatever length from 2 on.

    Everything but the arguments is that of this moment: weights, hooks, attributes. Nothing is
    checked when it is called, and no Python of the function runs.

    Args:
        function: from tensors to tensors, or lists of them.
        examples: arguments; their first dimension may have another length later, the same for all.

    Returns:
        What is called in ``function``'s place.

    Raises:
        RuntimeError: it cannot be compiled (what else compilers raise is not known).
    """
    for example in examples:
        torch._dynamo.mark_dynamic(example, 0)
    options: dict[str, Any] = {
        # What guards would check again every time cannot change.
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        "size_asserts": False,
        "post_grad_custom_post_pass": JoinLinears(f"dspark_{examples[0].device.type}"),
    }
    with torch.inference_mode():
        compiled: Any = torch.compile(function, fullgraph=True, options=options)
        if examples[0].device.type == "cuda":  # what it costs to call does not count in graphs
            compiled(*examples)
            return compiled
        return compiled.aot_compile((examples, {}))
