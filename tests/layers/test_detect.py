"""What detection makes of ties, repeated uses, frozen parameters, and of parameters that are in no layer."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcurv.capture import Captured
from fxcurv.layers.detect import detect
from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons

pytestmark = pytest.mark.usefixtures("float64")


class TwiceAndOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(self.a(torch.tanh(self.a(x))))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_module_called_twice(frontend):
    detection = assert_exact(TwiceAndOnce(), torch.randn(5, 3), frontend=frontend)
    assert [(layer.name, len(layer.uses)) for layer in detection.layers] == [("a", 2), ("b", 1)]
    assert "2 times" in detection.layers[0].note and not detection.layers[1].note
    assert not detection.uncovered


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_tied_modules_are_one_layer(frontend):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    (layer,) = assert_exact(model, torch.randn(5, 3), frontend=frontend).layers
    assert (layer.name, layer.params, len(layer.uses)) == ("0", ("0.weight", "0.bias"), 2)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_shared_weight_with_two_biases_keeps_the_weight(frontend):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    detection = assert_exact(model, torch.randn(5, 3), frontend=frontend)
    (layer,) = detection.layers
    assert (layer.bias, layer.shape) == (None, (1, 3, 3))
    assert set(reasons(detection)) == {"0.bias", "2.bias"}
    assert "'0.weight'" in reasons(detection)["2.bias"]


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_shared_bias_is_no_coordinate(frontend):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].bias = model[0].bias
    detection = assert_exact(model, torch.randn(5, 3), frontend=frontend)
    assert [layer.bias for layer in detection.layers] == [None, None]
    assert "several weights" in reasons(detection)["0.bias"]


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_transposed_tie_of_an_autoencoder(frontend):
    def forward(m, x):
        return F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w.t(), m.c)

    detection = assert_exact(Fn(forward, w=(4, 3), b=(4,), c=(3,)), torch.randn(5, 3), frontend=frontend)
    (layer,) = detection.layers
    assert [use.swapped for use in layer.uses] == [False, True]
    assert (layer.params, layer.shape) == (("w", "b"), (1, 4, 4))
    assert set(reasons(detection)) == {"c"}


def test_square_transposed_tie_is_not_taken_for_a_repeated_use():
    def forward(m, x):
        return torch.tanh(x @ m.w) @ m.w.T

    (layer,) = assert_exact(Fn(forward, w=(3, 3)), torch.randn(5, 3)).layers
    assert [use.swapped for use in layer.uses] == [False, True]


def test_scaled_uses_of_one_weight():
    (layer,) = assert_exact(Fn(lambda m, x: x @ m.w + x.tanh() @ (0.1 * m.w), w=(3, 4)), torch.randn(5, 3)).layers
    assert [use.form.scale for use in layer.uses] == [1.0, 0.1]


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_cast_weight(frontend):
    def forward(m, x):
        return F.linear(x.float(), m.w.to(torch.float32), m.b.float()).double()

    captured, detection = find(Fn(forward, w=(4, 3), b=(4,)), torch.randn(5, 3), frontend=frontend)
    assert detection.layers[0].params == ("w", "b")
    assert detection.layers[0].shape == (1, 4, 4)


# name: (forward, shapes, parameter, words of its reason)
UNCOVERED = {
    "scale of two": (lambda m, x: x * (m.q * m.p), {"q": (3,), "p": (3,)}, "p", "another parameter"),
    "joined": (lambda m, x: x @ torch.cat([m.p, m.p], 1), {"p": (3, 4)}, "p", "joined"),
    "product of two": (lambda m, x: x @ (m.q @ m.p), {"q": (3, 2), "p": (2, 4)}, "p", "another parameter"),
    "linear of two": (lambda m, x: x @ F.linear(m.q, m.p).t(), {"q": (2, 3), "p": (3, 3)}, "p", "another parameter"),
    "normalised": (lambda m, x: x @ F.normalize(m.p), {"p": (3, 4)}, "p", "normalize"),
    "unused": (lambda m, x: x @ m.q, {"q": (3, 4), "p": (3,)}, "p", "never used"),
    "detached": (lambda m, x: x @ m.q + m.p.detach(), {"q": (3, 4), "p": (4,)}, "p", "no gradient"),
    "returned": (lambda m, x: (x @ m.p, m.p), {"p": (3, 4)}, "p", "returned"),
    "also elementwise": (lambda m, x: x @ m.p + m.p.sum(), {"p": (3, 4)}, "p", "sum"),
    "scaled bias": (lambda m, x: F.linear(x, m.q, 2 * m.p), {"q": (4, 3), "p": (4,)}, "p", "multiplied by a number"),
    "split roles": (lambda m, x: torch.einsum("bi,iho->bho", x, m.p.view(3, 2, 2).movedim(1, 2).reshape(3, 2, 2)),
                    {"p": (3, 4)}, "p", "different roles"),
    "diagonal": (lambda m, x: torch.einsum("bi,ii->bi", x, m.p), {"p": (3, 3)}, "p", "diagonal"),
    "data of a product": (lambda m, x: F.linear(m.p * 1.0, x), {"p": (4, 3)}, "p", "not a parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOVERED)
def test_uncovered(name):
    function, shapes, parameter, words = UNCOVERED[name]
    model = Fn(function, **shapes)
    _, detection = find(model, torch.randn(4, 3))
    covered = {p for layer in detection.layers for p in layer.params}
    missing = reasons(detection)
    assert covered.isdisjoint(missing) and covered | set(missing) == set(shapes)
    assert words in missing[parameter]
    assert missing[parameter].endswith(".") and missing[parameter].startswith("It ")


def test_stop_names_the_chain_and_the_line():
    def forward(m, x):
        return x @ m.p.t().relu()

    (item,) = find(Fn(forward, p=(4, 3)), torch.randn(5, 3))[1].uncovered
    assert item.chain[0] == "p" and item.chain[-1].startswith("relu")
    assert len(item.chain) == 3
    assert item.source.startswith("test_detect.py:") and "relu()" in item.source


class Around(nn.Module):
    """A linear layer on the result of another module."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 2)

    def forward(self, x):
        out = self.inner(x) if not isinstance(self.inner, nn.MultiheadAttention) else self.inner(x, x, x)
        return self.head(out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: nn.LSTM(4, 4), "LSTM"),
        (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention"),
    ],
)
def test_module_that_stays_whole(make, word):
    """With a hook, which its parts would not run."""
    model = Around(make())
    model.inner.register_forward_hook(lambda module, inputs, output: None)
    _, detection = find(model, torch.randn(3, 5, 4))
    assert [layer.name for layer in detection.layers] == ["head"]
    assert set(reasons(detection)) == {f"inner.{name}" for name, _ in model.inner.named_parameters()}
    assert all(word in reason for reason in reasons(detection).values())


def test_subclass_with_its_own_forward_is_not_taken_for_its_parent():
    class Odd(nn.Linear):
        def forward(self, input):
            return F.linear(input, self.weight.exp(), self.bias)

    Odd.__module__ = "torch.nn.odd"  # so that the front-end keeps the module whole
    _, detection = find(Around(Odd(4, 4)), torch.randn(5, 4))
    assert "Odd" in reasons(detection)["inner.weight"]


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_frozen_bias_has_no_coordinate(frontend):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    detection = assert_exact(model, torch.randn(5, 3), frontend=frontend)
    assert [layer.shape for layer in detection.layers] == [(1, 4, 3), (1, 2, 5)]
    assert detection.layers[0].bias is None
    assert not detection.uncovered


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_frozen_weight_leaves_its_bias_as_a_shift(frontend):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    detection = assert_exact(model, torch.randn(5, 3), frontend=frontend)
    assert [(layer.name, layer.kind) for layer in detection.layers] == [("0.bias", "shift"), ("2", "linear")]
    assert not detection.uncovered


def test_frozen_layer_is_not_mentioned():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    _, detection = find(model, torch.randn(5, 3))
    assert [layer.name for layer in detection.layers] == ["2"] and not detection.uncovered


def test_low_rank_adapter_beside_a_frozen_weight():
    def forward(m, x):
        return F.linear(x, m.w, m.b) + (x @ m.down) @ m.up

    model = Fn(forward, frozen=("w", "b"), w=(4, 3), b=(4,), down=(3, 2), up=(2, 4))
    detection = assert_exact(model, torch.randn(5, 3))
    assert [layer.name for layer in detection.layers] == ["down", "up"] and not detection.uncovered


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_no_gradient_passes_a_no_grad_region(frontend):
    def forward(m, x):
        with torch.no_grad():
            target = x @ m.w.tanh()
        return x @ m.w - target

    (layer,) = assert_exact(Fn(forward, w=(3, 4)), torch.randn(5, 3), frontend=frontend).layers
    assert len(layer.uses) == 1


def test_complex_and_uninitialised_parameters():
    model = Fn(lambda m, x: (x.to(m.p.dtype) @ m.p).real, p=(3, 4))
    model.p = nn.Parameter(model.p.to(torch.complex128))
    _, detection = find(model, torch.randn(5, 3))
    assert "complex128" in reasons(detection)["p"]

    lazy = nn.Sequential(nn.LazyLinear(4))
    _, detection = _plain(lazy)
    assert "no shape yet" in reasons(detection)["0.weight"]


def _plain(model, **options):
    captured = Captured(fx.symbolic_trace(model).graph, "symbolic")
    return captured, detect(captured, model, **options)


def test_kinds():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    _, detection = _plain(model, kinds={"layer_norm"})
    assert [layer.kind for layer in detection.layers] == ["layer_norm"]
    assert "kind linear" in reasons(detection)["0.weight"] and "0.bias" in reasons(detection)


def test_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))
            self.block = nn.Sequential(nn.Linear(3, 3))
            self.block.table = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return self.block(x @ self.weight) @ self.block.table

    names = [layer.name for layer in assert_exact(Net(), torch.randn(5, 3)).layers]
    assert names == ["weight", "block.0", "block.table"]


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_position_embedding_of_a_constant_and_residual(frontend):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position, self.head = nn.Embedding(7, 3), nn.Embedding(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.token(x) + self.position(torch.arange(4, device=x.device))
            return h + self.head(h)

    detection = assert_exact(Net(), torch.randint(7, (5, 4)), frontend=frontend)
    assert [layer.kind for layer in detection.layers] == ["embedding", "embedding", "linear"]
    assert not detection.uncovered


def test_layers_on_constants():
    class Net(nn.Module):
        """A bias for every position, computed by layers from a constant table."""

        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(4, 2))
            self.first, self.second = nn.Linear(2, 5), nn.Linear(5, 3)

        def forward(self, x):
            return x + self.second(torch.tanh(self.first(self.table)))

    detection = assert_exact(Net(), torch.randn(5, 4, 3))
    assert [layer.name for layer in detection.layers] == ["first", "second"] and not detection.uncovered


def test_cost_is_linear():
    def seconds(count):
        layers = [nn.BatchNorm1d(2) if k % 2 else nn.Linear(2, 2) for k in range(count)]
        model = nn.Sequential(*layers).eval()
        captured = Captured(fx.symbolic_trace(model).graph, "symbolic")
        start = time.process_time()
        assert len(detect(captured, model).layers) == count
        return time.process_time() - start

    seconds(10)
    assert seconds(1000) < 1.0
