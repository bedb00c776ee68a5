"""A pass for torch.compile that lets layers which multiply the same x, as query, key and value do, share a launch.

In the compiler's graph it is plain to see that x is the same, and there is no state between calls to go stale:

    layer.compile(options={"post_grad_custom_pre_pass": GroupLaunches()})
"""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from rans_kernels.ops.rans_linear.grouped import MOST

SINGLE, GROUPED = torch.ops.rans_kernels.rans_linear.default, torch.ops.rans_kernels.rans_linear_grouped.default


class GroupLaunches(CustomGraphPass):
    """Joins up to three `rans_linear` of one x and one way of coding; results are the same to the bit."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        groups: dict[Any, list[Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=SINGLE):
            x, *arrays, bias, numbers, group_size = node.args
            fixed = all(array.op in ("placeholder", "get_attr") for array in (*arrays, bias) if array is not None)
            if fixed and group_size is None:
                # all that is no tensor, but for the rows and the size of the words, has to agree
                groups[x, bias is None, *numbers[1:-1]].append(node)
        for nodes in groups.values():
            for first in range(0, len(nodes), MOST):
                if len(part := nodes[first : first + MOST]) > 1:
                    join(graph, part)

    def __eq__(self, other: object) -> bool:
        # torch.compile compiles again for other options
        return isinstance(other, GroupLaunches)

    def __hash__(self) -> int:
        return hash(GroupLaunches)

    def uuid(self) -> Any:
        """Part of the key of the compiler's cache."""
        return get_hash_for_files((__file__,))


def join(graph: Graph, nodes: list[Node]) -> None:
    """One node for several products of the same x, where the first of them stands."""
    heads, words, offsets, tables, scales, biases = ([node.args[i] for node in nodes] for i in range(1, 7))
    numbers = [number for node in nodes for number in node.args[7]]  # type: ignore[union-attr]
    arguments = (nodes[0].args[0], heads, words, offsets, tables, scales, [b for b in biases if b is not None], numbers)
    with graph.inserting_before(nodes[0]):
        joined = graph.call_function(GROUPED, arguments)
        joined.meta["val"] = [node.meta["val"] for node in nodes]
        for i, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (joined, i))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
