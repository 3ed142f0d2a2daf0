"""Numeric proof that each layer's normal form is right, on one run of the captured graph.

The weight and bias gradient of a random projection of the outputs is recomputed from the captured (x, g) of
every use through the normal form, and compared with autograd's. It catches whatever a spelling could get wrong:
padding modes, dilation, transposition, ties, a use that was missed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.capture.captured import Captured, resolve
from fxcurv.capture.state import preserved
from fxcurv.layers.layer import Detection, Layer, Use

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Where a gradient cancels to nothing (a bias before a batch norm) its error is measured against this part of |a| |g|.
CANCELLATION = 1e-2


def prove(captured: Captured, detection: Detection, model: nn.Module, leaves: Sequence[Any]) -> list[str]:
    """Sentences on layers whose recomputed gradient differs from autograd's; empty if all agree.

    leaves: values of the graph's placeholders. The relative error allowed is 1e-8 in float64, 1e-4 in float32 and
    in proportion below. Buffers, gradients, random state and mode of the model are left as they were.
    """
    if not detection.layers:
        return []
    with preserved(model), torch.enable_grad():
        runner = _Runner(captured, detection, model)
        outputs = [t for t in _tensors(runner.run(*leaves)) if t.requires_grad]
        columns = [torch.randn_like(t) for t in outputs]
        return _compare(runner, detection, dict(model.named_parameters()), outputs, columns)


class _Runner(fx.Interpreter):
    """Runs the graph on the user's module and keeps x, aux and the gradient edge of y for every use."""

    def __init__(self, captured: Captured, detection: Detection, model: nn.Module) -> None:
        super().__init__(model, garbage_collect_values=True, graph=captured.graph)
        self.constants = captured.constants
        self.uses: dict[fx.Node, list[Use]] = {}
        for layer in detection.layers:
            for use in layer.uses:
                self.uses.setdefault(use.y, []).append(use)
        self.read = {node for uses in self.uses.values() for use in uses for node in (use.x, *use.aux)}
        self.kept: dict[fx.Node, Tensor] = {}
        self.edges: dict[fx.Node, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        """Constants of the front-end, then the user's tensors and modules."""
        return self.constants[target] if target in self.constants else resolve(self.module, target)

    def run_node(self, n: fx.Node) -> Any:
        """Copies what a use reads before an in-place operation can change it."""
        result = super().run_node(n)
        if n in self.uses:
            result = result.clone()  # no view: an in-place operation on a view would bypass the gradient edge
            self.edges[n] = torch.autograd.graph.get_gradient_edge(result) if result.requires_grad else None
        if n in self.read:
            self.kept[n] = result.detach().clone()
        return result


def _compare(
    runner: _Runner,
    detection: Detection,
    parameters: dict[str, nn.Parameter],
    outputs: list[Tensor],
    columns: list[Tensor],
) -> list[str]:
    names = [name for layer in detection.layers for name in layer.params]
    edges = {node: edge for node, edge in runner.edges.items() if edge is not None}
    wanted = [*edges.values(), *(parameters[name] for name in names)]
    grads = torch.autograd.grad(outputs, wanted, columns, allow_unused=True) if outputs else [None] * len(wanted)
    at_output = dict(zip(edges, grads[: len(edges)], strict=True))
    expected = dict(zip(names, grads[len(edges) :], strict=True))
    problems = []
    for layer in detection.layers:
        found, bound = _recompute(layer, runner, at_output)
        for name, value in zip((layer.weight, layer.bias), found, strict=True):
            if name is not None:
                problem = _difference(value, expected[name], bound, parameters[name])
                if problem:
                    problems.append(f"Layer '{layer.name}' ({layer.kind}): the gradient of '{name}' {problem}.")
    return problems


def _recompute(
    layer: Layer, runner: _Runner, at_output: dict[fx.Node, Any]
) -> tuple[tuple[Tensor | None, Tensor | None], float]:
    """Weight and bias gradient summed over uses, and the sum of |x rows| |g rows| that bounds them."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    bound = 0.0
    for use in layer.uses:
        g = at_output.get(use.y)
        if g is None:
            continue
        x, aux = runner.kept[use.x], [runner.kept[node] for node in use.aux]
        if x.is_floating_point():
            x = x.to(g.dtype)
        part, shift = use.form.stored(use.form.product(x, g, *aux))
        weight = part if weight is None else weight + part
        bias = shift if bias is None else bias if shift is None else bias + shift
        size = x.numel() ** 0.5 if use.form.diagonal_input else x.double().norm().item() + x.shape[0] ** 0.5
        bound += size * g.double().norm().item()
    return (weight, bias), bound


def _difference(value: Tensor | None, expected: Tensor | None, bound: float, parameter: Tensor) -> str:
    """What is wrong with a recomputed gradient, "" if nothing."""
    if value is None and expected is None:
        return ""
    reference = torch.zeros_like(parameter) if expected is None else expected
    value = torch.zeros_like(reference) if value is None else value.reshape(reference.shape)
    scale = max(reference.double().norm().item(), CANCELLATION * bound)
    error = (value.double() - reference.double()).norm().item()
    lowest = min(parameter.dtype, value.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
    if error <= TOLERANCE[lowest] * scale:
        return ""
    if error != error:
        return "is not finite on the example inputs, so that nothing can be proved"
    return f"differs from autograd's by a relative error of {error / scale if scale else float('inf'):.1e}"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors inside nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, item.name) for item in dataclasses.fields(value)])
