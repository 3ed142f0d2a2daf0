"""Independent check of a detection: each layer's gradient from its rows against autograd on the stored parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcurv.capture import Call, Captured, capture, propagate
from fxcurv.layers.detect import detect
from fxcurv.layers.layer import Detection

FRONTENDS = ("symbolic", "export")


class Fn(nn.Module):
    """A module with given parameters and forward: ``Fn(lambda m, x: x @ m.w, w=(3, 4))``."""

    def __init__(self, function: Any, frozen: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = [function]  # in a list: no method, nor a sub-module
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape), requires_grad=name not in frozen))

    def forward(self, *xs: Tensor) -> Any:
        return self.function[0](self, *xs)


def find(model: nn.Module, *xs: Tensor, frontend: str = "symbolic", shapes: bool = False) -> tuple[Captured, Detection]:
    """Capture and detect."""
    captured = capture(model, Call.of(model, xs), frontend)
    if shapes:
        propagate(captured, model, xs)
    return captured, detect(captured, model)


class _Recorder(fx.Interpreter):
    def __init__(self, captured: Captured, model: nn.Module, watch: set[fx.Node]) -> None:
        super().__init__(model, graph=captured.graph, garbage_collect_values=False)
        self.captured, self.watch, self.seen, self.zeros = captured, watch, {}, {}

    def fetch_attr(self, target: str) -> Any:
        return self.captured.constants[target] if target in self.captured.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.watch:
            # a zero added to the product: its gradient is the gradient of the product
            self.zeros[n] = torch.zeros_like(value).requires_grad_()
            value = value + self.zeros[n]
        self.seen[n] = value.detach().clone() if isinstance(value, Tensor) else value
        return value


def assert_exact(model: nn.Module, *xs: Tensor, frontend: str = "symbolic", shapes: bool = False) -> Detection:
    """Every detected layer's gradient, from explicit rows, equals autograd's; returns the detection."""
    captured, detection = find(model, *xs, frontend=frontend, shapes=shapes)
    assert detection.layers, detection.uncovered
    ys = {use.y for layer in detection.layers for use in layer.uses}
    buffers = [buffer.clone() for buffer in model.buffers()]
    recorder = _Recorder(captured, model, ys)
    out = recorder.run(*xs)
    outs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if t.requires_grad]
    params = dict(model.named_parameters())
    names = [name for layer in detection.layers for name in layer.params]
    nodes = list(recorder.zeros)
    loss = sum((t * torch.randn_like(t)).sum() for t in outs)
    grads = torch.autograd.grad(loss, [*(recorder.zeros[n] for n in nodes), *(params[n] for n in names)])
    at = dict(zip(nodes, grads, strict=False))
    expected = dict(zip(names, grads[len(nodes) :], strict=True))
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    for layer in detection.layers:
        total = 0
        weight = None if layer.weight is None else layer.weight_place.of(expected[layer.weight])
        bias = None if layer.bias is None else layer.bias_place.of(expected[layer.bias])
        for use in layer.uses:
            form = use.form
            a = form.rows_a(recorder.seen[use.x], *(recorder.seen[n] for n in use.aux))
            g = form.rows_g(at[use.y])
            assert a.shape[:3] == g.shape[:3] and a.shape[3] == form.d_in and g.shape[3] == form.d_out
            assert a.shape[2] == form.groups
            matrix = torch.einsum("bsgo,bsgi->goi", g, a.to(g.dtype))
            torch.testing.assert_close(
                form.product(recorder.seen[use.x], at[use.y], *(recorder.seen[n] for n in use.aux)), matrix
            )
            stored, column = form.stored(matrix)
            if use.swapped:  # the same numbers, transposed: bring them into the first use's orientation
                assert not form.bias
                matrix = layer.form.matrix(stored, None if layer.bias is None else torch.zeros_like(bias))
            total = total + matrix
        wanted = layer.form.matrix(weight, bias)
        back, column = layer.form.stored(wanted)
        back = back if weight is None else back.reshape(weight.shape)
        assert weight is None or torch.equal(back, weight)
        assert bias is None or torch.equal(column.view_as(bias), bias)
        if layer.weight is None:  # the form keeps the scale's coordinate, which has no parameter
            total = torch.cat([torch.zeros_like(total[..., :1]), total[..., 1:]], -1)
        torch.testing.assert_close(total, wanted, rtol=1e-9, atol=1e-9)
        assert layer.shape == tuple(wanted.shape)
    return detection


def reasons(detection: Detection) -> dict[str, str]:
    """Reason by parameter."""
    return {item.parameter: item.reason for item in detection.uncovered}
