"""Has linear layers of the same input computed together, in a compiled graph."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class JoinLinears(CustomGraphPass):
    """A pass of the compiler: ``linear`` of one input, side by side, become one ``linears``.

    Queries, keys and values are such layers, and the two halves of a gated MLP. Threads are then
    set to work once for them, and read their weights in one go.

    Args:
        namespace: of the operators.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph in place."""
        operators = getattr(torch.ops, self._namespace)
        linear = operators.linear.default
        by_input: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=linear):
            by_input.setdefault(node.args[0], []).append(node)
        for layer_input, nodes in by_input.items():
            if len(nodes) > 1:
                _join(graph, operators.linears.default, layer_input, nodes)
        graph.lint()

    def uuid(self) -> bytes:
        """Of this code, for the compiler's cache."""
        return get_hash_for_files((str(Path(__file__)),), self._namespace)


def _join(graph: fx.Graph, linears: Any, layer_input: fx.Node, nodes: list[fx.Node]) -> None:
    packed, biases, outputs = (
        list(column) for column in zip(*(n.args[1:] for n in nodes), strict=True)
    )
    # All but the input is known from the start, so the first one's place is early enough.
    with graph.inserting_before(nodes[0]):
        arguments = (layer_input, packed, biases, outputs)
        joint = graph.call_function(linears, arguments)
        joint.meta["val"] = [node.meta["val"] for node in nodes]
        for index, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (joint, index))
            part.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
