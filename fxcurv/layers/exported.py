"""Attention modules that ``torch.export`` has decomposed: their products are brought to (B, T, features).

The module computes in (T, B, features), and joins examples and positions in one axis for the output projection. Read as
it is, that would take positions for examples: without effect on a Kronecker factor's sums over rows, wrong for every
statistic that sums over the positions of an example first. Where a node comes from is in the exporter's own metadata.
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten
_SHAPED = (aten.view.default, aten.reshape.default)
_ORIGIN = "torch.nn.modules.activation.MultiheadAttention"


def turn_exported(graph: fx.Graph) -> None:
    """Bring the products of exported attention modules to (B, T, features); calling it again changes nothing.

    Their projections read (T, B, features) and the output projection (T * B, features), whatever the layout of the
    module's inputs. Values do not change.
    """
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in order:
        stack = node.meta.get("nn_module_stack") or {}
        if node.target is not aten.linear.default or _ORIGIN not in str(list(stack.values())[-1:]):
            continue
        users, x = list(node.users), node.args[0]
        joined = isinstance(x, fx.Node) and x.target in _SHAPED and len(x.args[1]) == 2  # type: ignore[arg-type]
        if joined:
            apart = len(users) == 1 and users[0].target in _SHAPED
            if not apart or any(order[size] > order[node] for size in users[0].all_input_nodes if size is not node):
                continue
        with graph.inserting_before(node):
            if joined:
                x = graph.call_function(aten.view.default, (x, users[0].args[1]))
            turned = graph.call_function(aten.transpose.int, (x, 0, 1))
            product = graph.call_function(aten.linear.default, (turned, *node.args[1:]))
            back = graph.call_function(aten.transpose.int, (product, 0, 1))
            back = graph.call_function(aten.contiguous.default, (back,))
        product.stack_trace = node.stack_trace
        if joined:
            users[0].replace_all_uses_with(back)
            graph.erase_node(users[0])
        else:
            node.replace_all_uses_with(back)
        graph.erase_node(node)
