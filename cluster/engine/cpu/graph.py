"""Compiles a function of tensors into one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cluster.engine.cpu.joint_linear import JoinLinears


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
        "post_grad_custom_post_pass": JoinLinears(),
    }
    with torch.inference_mode():
        compiled: Any = torch.compile(function, fullgraph=True, options=options)
        return compiled.aot_compile((examples, {}))
