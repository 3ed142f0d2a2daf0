"""Numeric proof that each layer's normal form is right, on one run of the captured graph.

The weight and bias gradient of a random projection of the outputs is recomputed from the captured (x, g) of
every use through the normal form, and compared with autograd's. It catches whatever a spelling could get wrong:
padding modes, dilation, transposition, ties, a use that was missed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.capture.captured import Captured, resolve
from fxcurv.capture.interpreter import Interpreter
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
        runs: list[_Runner] = []

        def run(part: Captured, inputs: Sequence[Any]) -> Any:
            runs.append(_Runner(part, detection, model))
            return runs[-1].run(*inputs)

        stitched = captured.stitched
        output = run(captured, leaves) if stitched is None else stitched(run, model, leaves)
        if any(all(run.graph is not part.graph for part in captured.graphs) for run in runs):
            return ["The forward takes another path when it is called again, so that nothing can be proved."]
        outputs = [t for t in _tensors(output) if t.requires_grad]
        columns = [torch.randn_like(t) for t in outputs]
        return _compare(runs, detection, dict(model.named_parameters()), outputs, columns)


class _Runner(Interpreter):
    """Runs the graph on the user's module and keeps x, aux and the gradient edge of y for every use."""

    def __init__(self, captured: Captured, detection: Detection, model: nn.Module) -> None:
        super().__init__(model, garbage_collect_values=True, graph=captured.graph)
        self.constants = captured.constants
        self.uses: dict[fx.Node, list[Use]] = {}
        for layer in detection.layers:
            for use in layer.uses:
                self.uses.setdefault(use.y, []).append(use)
        self.read: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}  # by node where it happens: (y, what is read)
        for uses in self.uses.values():
            for use in uses:
                for node in (use.x, *use.aux):
                    self.read.setdefault(_reader(use.y, node), []).append((use.y, node))
        self.kept: dict[tuple[fx.Node, fx.Node], Tensor] = {}
        self.edges: dict[fx.Node, Any] = {}
        self.sources: dict[fx.Node, set[int]] = {}  # of values of parameters alone: ids of these
        self.narrowest: dict[int, torch.dtype] = {}  # by id of a parameter: of the dtypes that it is cast to

    def fetch_attr(self, target: str) -> Any:
        """Constants of the front-end, then the user's tensors and modules."""
        return self.constants[target] if target in self.constants else resolve(self.module, target)

    def run_node(self, n: fx.Node) -> Any:
        """Copies what a use reads when its product reads it: an in-place operation may come before and after."""
        for y, node in self.read.get(n, ()):
            if node is not n:
                self.kept[y, node] = self.env[node].detach().clone()
        result = super().run_node(n)
        if n in self.uses:
            result = result.clone()  # no view: an in-place operation on a view would bypass the gradient edge
            self.edges[n] = torch.autograd.graph.get_gradient_edge(result) if result.requires_grad else None
        for y, node in self.read.get(n, ()):
            if node is n:
                self.kept[y, node] = result.detach().clone()
        self._follow_casts(n, result)
        return result

    def _follow_casts(self, n: fx.Node, result: Any) -> None:
        """A parameter that the forward casts has a gradient of the narrower dtype's precision."""
        inputs = n.all_input_nodes
        if n.op == "get_attr" and isinstance(result, nn.Parameter):
            self.sources[n] = {id(result)}
        elif inputs and isinstance(result, Tensor) and all(node in self.sources for node in inputs):
            self.sources[n] = set().union(*(self.sources[node] for node in inputs))
            if result.is_floating_point():
                for source in self.sources[n]:
                    self.narrowest[source] = _narrower(result.dtype, self.narrowest.get(source, result.dtype))


def _narrower(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _reader(y: fx.Node, node: fx.Node) -> fx.Node:
    """The operation of the product ``y`` (a bias added apart included) that reads ``node``, or ``node`` itself."""
    for reader in (y, *y.all_input_nodes):
        if node in reader.all_input_nodes:
            return reader
    return node


def _compare(
    runs: list[_Runner],
    detection: Detection,
    parameters: dict[str, nn.Parameter],
    outputs: list[Tensor],
    columns: list[Tensor],
) -> list[str]:
    names = list(dict.fromkeys(name for layer in detection.layers for name in layer.params))
    edges = {(k, node): edge for k, run in enumerate(runs) for node, edge in run.edges.items() if edge is not None}
    wanted = [*edges.values(), *(parameters[name] for name in names)]
    grads = torch.autograd.grad(outputs, wanted, columns, allow_unused=True) if outputs else [None] * len(wanted)
    at_output = dict(zip(edges, grads[: len(edges)], strict=True))
    expected = dict(zip(names, grads[len(edges) :], strict=True))
    problems = []
    for layer in detection.layers:
        found, bound = _recompute(layer, runs, at_output)
        for place, value in zip((layer.weight_place, layer.bias_place), found, strict=True):
            if place is not None:
                whole = expected[place.name]
                part = None if whole is None else place.of(whole)
                parameter = parameters[place.name]
                casts = [run.narrowest[id(parameter)] for run in runs if id(parameter) in run.narrowest]
                problem = _difference(value, part, bound, _narrower(parameter.dtype, *casts), place.of(parameter))
                if problem:
                    problems.append(f"Layer '{layer.name}' ({layer.kind}): the gradient of '{place.key}' {problem}.")
    return problems


def _recompute(
    layer: Layer, runs: list[_Runner], at_output: dict[tuple[int, fx.Node], Any]
) -> tuple[tuple[Tensor | None, Tensor | None], float]:
    """Weight and bias gradient summed over uses, and the sum of |x rows| |g rows| that bounds them."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    bound = 0.0
    for use, (k, runner) in itertools.product(layer.uses, enumerate(runs)):
        g = at_output.get((k, use.y))
        if g is None:
            continue
        x, aux = runner.kept[use.y, use.x], [runner.kept[use.y, node] for node in use.aux]
        if x.is_floating_point():
            x = x.to(g.dtype)
        part, shift = use.form.stored(use.form.product(x, g, *aux))
        weight = part if weight is None else weight + part
        bias = shift if bias is None else bias if shift is None else bias + shift
        x = x if x.layout is torch.strided else x.to_dense()
        size = x.numel() ** 0.5 if use.form.diagonal_input else x.double().norm().item() + x.shape[0] ** 0.5
        bound += size * g.double().norm().item()
    return (weight, bias), bound


def _difference(
    value: Tensor | None, expected: Tensor | None, bound: float, dtype: torch.dtype, parameter: Tensor
) -> str:
    """What is wrong with a recomputed gradient, "" if nothing."""
    if value is None and expected is None:
        return ""
    reference = torch.zeros_like(parameter) if expected is None else expected
    value = torch.zeros_like(reference) if value is None else value.reshape(reference.shape)
    scale = max(reference.double().norm().item(), CANCELLATION * bound)
    error = (value.double() - reference.double()).norm().item()
    if error <= TOLERANCE[_narrower(dtype, value.dtype)] * scale:
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
