"""order: never form a weight gradient that only serves to be multiplied from both sides.

A linear layer's gradient is the product of n rows, V = g^T x, and a Kronecker-factored direction is L V R. Where
n (o^2 + i^2) < o i (o + i) it takes less to multiply the rows by the sides first, (g L)^T (x R), and then the backward
pass need not compute V at all: the rows take its place as inputs of the program. Asked for by
``weight_gradients=False``, for between the backward pass and the step the weight's ``.grad`` is then empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from fxcurv.capture.captured import Captured, resolve
from fxcurv.capture.interpreter import Interpreter
from fxcurv.capture.state import preserved
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import STEP, Program, Role, infer, operand_types
from fxcurv.ir.types import Diag, Rows
from fxcurv.layers.keep import LINEAR, linear_arguments
from fxcurv.layers.layer import Layer
from fxcurv.passes.manager import Compilation, Pass, erase

SIDED: dict[Any, tuple[int | None, int]] = {
    OPS["kron_apply"]: (1, 2),
    OPS["rotate"]: (1, 2),
    OPS["right_apply"]: (None, 1),
}
"""Ops that multiply a gradient by sides, with the places of the left and right side among their operands."""


@dataclass(frozen=True)
class Order(Pass):
    """Lets rows take the place of weight gradients where that is cheaper for the example inputs."""

    name: ClassVar[str] = "order"
    needs: ClassVar[tuple[str, ...]] = ("program", "captured", "model")
    semantic: ClassVar[bool] = False  # inputs change, so random inputs cannot be compared

    def run(self, c: Compilation) -> int:
        assert c.program is not None and c.captured is not None and c.model is not None
        if c.options.get("weight_gradients", True):
            return 0
        call = c.options["call"]
        if not call.real:
            raise FxcurvError("weight_gradients=False weighs costs by the number of rows: pass example_inputs.")
        candidates = [layer for layer in c.layers if keepable(layer, c.model)] if c.captured.stitched is None else []
        counts = count_rows(c.captured, c.model, candidates, call.leaves)
        marked = len({name for name, p in c.model.named_parameters() if p.requires_grad}) > len(candidates)
        rewrites = 0
        for layer in candidates if marked else candidates[1:]:  # one stored gradient says when gradients are zeroed
            if worth(c.program, layer, counts.get(layer.name, 0)) and c.spend():
                put_rows(c.program, layer)
                rewrites += 1
        c.program.prune()
        return rewrites


def keepable(layer: Layer, model: nn.Module) -> bool:
    """Whether a layer is one plain linear product of a whole weight, so that the product can be replaced."""
    if len(layer.uses) != 1 or layer.region is not None or layer.bias_region is not None or layer.form.scale != 1.0:
        return False
    return linear_operands(layer.uses[0].y, model) is not None


def linear_operands(y: fx.Node, model: nn.Module) -> tuple[Any, str, str | None] | None:
    """(data, path of the weight, path of the bias) of a node that is ``nn.Linear`` or ``F.linear``, else ``None``."""
    if y.op == "call_module":
        module = resolve(model, str(y.target))
        hooks = any(v for k, v in vars(module).items() if k.endswith("_hooks"))
        if type(module) is not nn.Linear or hooks or len(y.args) != 1:
            return None
        return y.args[0], f"{y.target}.weight", None if module.bias is None else f"{y.target}.bias"
    if y.target not in LINEAR:
        return None
    x, weight, bias = linear_arguments(y)
    named = [n for n in (weight, bias) if n is not None]
    if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in named):
        return None
    return x, str(weight.target), None if bias is None else str(bias.target)  # type: ignore[union-attr]


def count_rows(captured: Captured, model: nn.Module, layers: Sequence[Layer], leaves: Sequence[Any]) -> dict[str, int]:
    """Rows that the example call sends through each layer."""
    if not layers:
        return {}
    counter = _Counter(captured, model, {layer.uses[0].y: layer.name for layer in layers})
    with preserved(model), torch.no_grad():
        counter.run(*leaves)
    return counter.counts


class _Counter(Interpreter):
    """Runs the captured graph and notes how many rows the products have."""

    def __init__(self, captured: Captured, model: nn.Module, names: dict[fx.Node, str]) -> None:
        super().__init__(model, garbage_collect_values=True, graph=captured.graph)
        self.constants, self.names, self.counts = captured.constants, names, {}  # type: ignore[var-annotated]

    def fetch_attr(self, target: str) -> Any:
        """Constants of the front-end, then the user's tensors and modules."""
        return self.constants[target] if target in self.constants else resolve(self.module, target)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.names and isinstance(result, Tensor):
            self.counts[self.names[n]] = result.shape[:-1].numel()
        return result


def worth(program: Program, layer: Layer, rows: int) -> bool:
    """Whether the rows take fewer steps than the gradient; what else reads the gradient makes it needed anyway."""
    gradient = gradient_of(program, layer)
    if gradient is None or rows == 0:
        return False
    sided = [user for user in gradient.users if user.target in SIDED]
    if len(sided) != 1 or any(isinstance(t, Diag) for t in operand_types(sided[0])):
        return False
    o, i = layer.form.d_out, layer.form.d_in
    left = SIDED[sided[0].target][0] is not None
    saved = o * i * ((o if left else 0) + i) - rows * ((o**2 if left else 0) + i**2)
    return saved > (rows * o * i if len(gradient.users) > 1 else 0)


def gradient_of(program: Program, layer: Layer) -> fx.Node | None:
    """The normal-form gradient of a layer, if the program reads its stored gradients for nothing else."""
    stored = program.inputs("grad").get(Role("grad", layer.weight_key))
    readers = list(stored.users) if stored is not None else []
    if len(readers) != 1 or readers[0].target is not OPS["matricize"]:
        return None
    matrix = readers[0]
    if layer.bias_key is None:
        return matrix
    columns = [user for user in matrix.users if user.target is OPS["append_column"]]
    return columns[0] if len(columns) == len(matrix.users) == 1 else None


def put_rows(program: Program, layer: Layer) -> None:
    """Rewrite the program for one layer: inputs ``rows['fc.x']`` and ``rows['fc.dy']`` in place of its gradient."""
    gradient, form = gradient_of(program, layer), layer.form
    assert gradient is not None
    stored = program.inputs("grad")[Role("grad", layer.weight_key)]
    matrix = next(iter(stored.users))
    with program.graph.inserting_after(program.placeholders[-1]):
        dy = program.graph.placeholder(f"rows_{stored.name}_dy")
        x = program.graph.placeholder(f"rows_{stored.name}_x")
    for node, key, size in ((x, f"{layer.name}.x", form.inputs), (dy, f"{layer.name}.dy", form.d_out)):
        type_ = Rows((None, None, 1, size), stored.meta["type"].dtype)
        node.meta.update(role=Role("rows", key), type=type_, every=STEP, owner=stored.meta["owner"])
    sided = next(user for user in gradient.users if user.target in SIDED)
    left, right = SIDED[sided.target]
    bias = [gradient.args[1]] if layer.bias_key is not None else []
    sides = [] if left is None else [sided.args[left]]
    with program.graph.inserting_before(sided):
        new = program.graph.call_function(OPS["sides_rows"], (dy, x, bias, sides, sided.args[right]))
    _describe(new, sided)
    erase(program.graph, sided, new)
    with program.graph.inserting_before(matrix):
        product = program.graph.call_function(OPS["row_product"], (dy, x))
    _describe(product, matrix)
    erase(program.graph, matrix, product)


def _describe(node: fx.Node, like: fx.Node) -> None:
    node.meta.update(type=infer(node.target, operand_types(node)), every=like.meta["every"], owner=like.meta["owner"])
