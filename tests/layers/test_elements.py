"""Parameters used entry by entry: gradients, and every entry's whole block against one backward pass an example."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcurv.capture.proxies import IN_PLACE
from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons
from tests.methods import oracle

pytestmark = pytest.mark.usefixtures("float64")


def llama(m, x):
    wide = x.to(torch.float64)
    return m.w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.w.to(torch.float64))


def annotated(m, x):
    """LayerNorm as "The Annotated Transformer" writes it, shift first."""
    return m.w * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + m.b


def class_token(m, x):
    return torch.cat([m.w.expand(x.shape[0], -1, -1), x], 1) + m.b


def in_place_after(m, x):
    y = x * 2 + m.w
    return y.mul_(3).tanh()


# name: (forward, shapes of the parameters, shape of x, {parameter: (kind, entries, d_in)})
X = (5, 3, 4)
LAYERS = {
    "last axis": (lambda m, x: x * m.w, {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "from the left": (lambda m, x: m.w * x, {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "positions": (lambda m, x: torch.mul(x, m.w), {"w": (1, 3, 4)}, X, {"w": ("scale", 12, 1)}),
    "channels": (lambda m, x: x.mul(m.w), {"w": (3, 1)}, X, {"w": ("scale", 3, 1)}),
    "viewed": (lambda m, x: x * m.w.view(1, -1, 1), {"w": (3,)}, X, {"w": ("scale", 3, 1)}),
    "transposed": (lambda m, x: x * m.w.t(), {"w": (4, 3)}, X, {"w": ("scale", 12, 1)}),
    "split": (lambda m, x: x.unflatten(2, (2, 2)) * m.w.view(3, 2, 2), {"w": (3, 4)}, X, {"w": ("scale", 12, 1)}),
    "scalar": (lambda m, x: x * m.w, {"w": ()}, X, {"w": ("scale", 1, 1)}),
    "one number": (lambda m, x: x * m.w, {"w": (1,)}, X, {"w": ("scale", 1, 1)}),
    "scalar shift": (lambda m, x: x + m.w, {"w": ()}, X, {"w": ("shift", 1, 1)}),
    "doubled": (lambda m, x: x * (2 * m.w), {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "one plus": (gemma, {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "one minus": (lambda m, x: (1 - m.w) * x, {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "rms": (llama, {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "narrow data": (lambda m, x: x[..., :1] * m.w, {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "one position": (lambda m, x: x[:, :1] * m.w, {"w": (3, 4)}, X, {"w": ("scale", 12, 1)}),
    "expanded": (lambda m, x: x[..., :1] * m.w.expand(3, 4), {"w": (3, 1)}, X, {"w": ("scale", 3, 1)}),
    "twice": (lambda m, x: (x * m.w).tanh() * m.w, {"w": (4,)}, X, None),
    "temperature": (lambda m, x: x / m.w, {"w": ()}, X, {"w": ("scale", 1, 1)}),
    "divided": (lambda m, x: torch.div(x, 3 * m.w), {"w": (3, 1)}, X, {"w": ("scale", 3, 1)}),
    "scale and shift": (lambda m, x: x * m.w + m.b, {"w": (4,), "b": (4,)}, X, {"w": ("scale", 4, 2)}),
    "affine scalars": (lambda m, x: m.w * x + m.b, {"w": (), "b": ()}, X, {"w": ("scale", 1, 2)}),
    "affine channels": (lambda m, x: m.b[:, None] + x * m.w[:, None], {"w": (3,), "b": (3,)}, X, None),
    "affine 2d": (
        lambda m, x: x.relu() * m.w + m.b, {"w": (1, 3, 4), "b": (1, 3, 4)}, X, {"w": ("scale", 12, 2)},
    ),
    "addcmul": (lambda m, x: torch.addcmul(m.b, m.w, x), {"w": (1, 1, 4), "b": (1, 1, 4)}, X, {"w": ("scale", 4, 2)}),
    "addcmul of data": (
        lambda m, x: torch.addcmul(x.relu(), x, m.w, value=0.5), {"w": (4,)}, X, {"w": ("scale", 4, 1)},
    ),
    "addcmul shift": (lambda m, x: torch.addcmul(m.w, x, x), {"w": (4,)}, X, {"w": ("shift", 4, 1)}),
    "other axes": (
        lambda m, x: x * m.w + m.b, {"w": (4,), "b": (3, 1)}, X, {"w": ("scale", 4, 1), "b": ("shift", 3, 1)},
    ),
    "norm by hand": (annotated, {"w": (4,), "b": (4,)}, X, {"w": ("scale", 4, 1), "b": ("shift", 4, 1)}),
    "position": (lambda m, x: x + m.w, {"w": (1, 3, 4)}, X, {"w": ("shift", 12, 1)}),
    "position first": (lambda m, x: m.w + x, {"w": (3, 4)}, X, {"w": ("shift", 12, 1)}),
    "weighted": (lambda m, x: torch.add(x, m.w, alpha=0.5), {"w": (4,)}, X, {"w": ("shift", 4, 1)}),
    "subtracted": (lambda m, x: x - m.w, {"w": (4,)}, X, {"w": ("shift", 4, 1)}),
    "subtracted from": (lambda m, x: torch.sub(m.w, x, alpha=2), {"w": (4,)}, X, {"w": ("shift", 4, 1)}),
    "reversed": (lambda m, x: torch.rsub(m.w, x.tanh()), {"w": (4,)}, X, {"w": ("shift", 4, 1)}),
    "added in place": (lambda m, x: x.tanh().add_(m.w), {"w": (4,)}, X, {"w": ("shift", 4, 1)}),
    "changed later": (in_place_after, {"w": (4,)}, X, {"w": ("shift", 4, 1)}),
    "read twice": (lambda m, x: (lambda y: (y + m.w) * y.tanh())(x), {"w": (4,)}, X, {"w": ("shift", 4, 1)}),
    "position cut": (lambda m, x: x + m.w[:, : x.shape[1]], {"w": (1, 6, 4)}, X, {"w": ("shift", 24, 1)}),
    "position cut, unsqueezed": (
        lambda m, x: x + m.w[: x.size(1)].unsqueeze(0), {"w": (6, 4)}, X, {"w": ("shift", 24, 1)},
    ),
    "position narrowed": (
        lambda m, x: x + m.w.narrow(1, 0, x.size(1)), {"w": (1, 6, 4)}, X, {"w": ("shift", 24, 1)},
    ),
    "scale cut": (lambda m, x: x[:, :, :1] * m.w[: x.size(1)], {"w": (6, 4)}, X, {"w": ("scale", 24, 1)}),
    "repeated cut": (
        lambda m, x: torch.cat([x, m.w[:, : x.size(1)].expand(x.size(0), -1, -1)], 2), {"w": (1, 6, 4)}, X,
        {"w": ("shift", 24, 1)},
    ),
    "class token": (class_token, {"w": (1, 1, 4), "b": (1, 4, 4)}, X, {"w": ("shift", 4, 1), "b": ("shift", 16, 1)}),
    "prompt": (
        lambda m, x: torch.cat([x, m.w.unsqueeze(0).repeat(x.size(0), 1, 1)], 1), {"w": (2, 4)}, X,
        {"w": ("shift", 8, 1)},
    ),
    "stacked": (
        lambda m, x: torch.cat([m.w.repeat_interleave(x.shape[0], 0), x], 1), {"w": (1, 2, 4)}, X,
        {"w": ("shift", 8, 1)},
    ),
    "initial state": (
        lambda m, x: (m.w.expand(-1, x.shape[0], -1)[0] * x[:, 0] + x[:, 1]).tanh(), {"w": (2, 1, 4)}, X, None,
    ),
    "query": (
        lambda m, x: F.scaled_dot_product_attention(m.w.expand(x.shape[0], -1, -1), x, x), {"w": (1, 2, 4)}, X,
        {"w": ("shift", 8, 1)},
    ),
    "mask token": (lambda m, x: torch.where(x[..., :1] > 0, x, m.w), {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "mask token first": (
        lambda m, x: torch.where(x.sum((0, 2)).gt(0)[:, None], m.w, x), {"w": (4,)}, X, {"w": ("scale", 4, 1)},
    ),
    "mixed": (lambda m, x: x * (1 - (x > 0).double()) + m.w * (x > 0), {"w": (4,)}, X, {"w": ("scale", 4, 1)}),
    "slope": (lambda m, x: F.prelu(x, m.w), {"w": (3,)}, X, {"w": ("scale", 3, 1)}),
    "one slope": (lambda m, x: F.prelu(x, m.w), {"w": (1,)}, X, {"w": ("scale", 1, 1)}),
    "flat": (lambda m, x: x * m.w + m.b, {"w": (6,), "b": (6,)}, (5, 6), {"w": ("scale", 6, 2)}),
    "image": (lambda m, x: x * m.w, {"w": (3, 1, 1)}, (5, 3, 2, 2), {"w": ("scale", 3, 1)}),
}  # fmt: skip
PARTS = ("affine channels", "initial state")  # read through an index: see test_regions


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    forward, shapes, shape, _ = LAYERS[name]
    first, x = Fn(forward, **shapes), torch.randn(shape)
    if name in ("temperature", "divided"):
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.abs_().add_(0.5)
    width = first(x).flatten(1).shape[1]
    return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3)), x


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in PARTS])
def test_gradient(name, frontend):
    model, x = build(name)
    detection = assert_exact(model, x, frontend=frontend)
    expected = LAYERS[name][3]
    found = {layer.params[0][2:]: (layer.kind, layer.shape[0], layer.shape[2]) for layer in detection.layers[:-1]}
    if expected is not None:
        assert found == expected and not detection.uncovered
    assert all(layer.form.unitwise and layer.shape[1] == 1 for layer in detection.layers[:-1])


def blocks(model: nn.Module, names: list[str], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over examples of h h^T for every entry, (entries, d_in, d_in): one example in the network at a time."""
    total: torch.Tensor | float = 0.0
    parameters = [model.get_parameter(name) for name in names]
    for one, label in zip(x.split(1), y.split(1), strict=True):
        h = torch.autograd.grad(F.cross_entropy(model(one), label), parameters)
        h = torch.stack([part.flatten() for part in h], -1)
        total = total + h.unsqueeze(-1) * h.unsqueeze(-2) / len(x)
    return total


WHOLE = [name for name, case in LAYERS.items() if case[3] is not None and name != "mask token first"]


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_block_of_every_entry(name, frontend):
    model, x = build(name)
    y = torch.randint(0, 3, (len(x),))
    want = {}
    for parameter, (_, entries, d_in) in LAYERS[name][3].items():
        stored = [f"0.{parameter}"] + (["0.b"] if d_in == 2 else [])
        block = blocks(model, stored, x, y)
        if name == "transposed":  # groups are in the order in which the data meets them
            block = block.view(4, 3, 1, 1).transpose(0, 1).reshape(12, 1, 1)
        want[f"0.{parameter}"] = block.reshape(entries, d_in, d_in)
    step = oracle.step(
        model, "kfac", x, lambda out: F.cross_entropy(out, y), loss="cross_entropy", fisher="empirical",
        frontend=frontend, damping=0.1, proofs=True,
    )  # fmt: skip
    assert step.model.uncovered == () and step.model.report().frontend == frontend
    for layer, block in want.items():
        torch.testing.assert_close(step.factors(layer)["F"].view_as(block), block)
        row = next(row for row in step.model.report().rows if row.parameter == layer)
        assert row.status == "exact"
        if block.shape[1] == 1 and name != "transposed":
            solved = step.gradient[layer].flatten() / (block.flatten() + 0.1)
            torch.testing.assert_close(step.direction[layer].flatten(), solved)


@pytest.mark.parametrize("method", ["ekfac", "diag", "foof"])
@pytest.mark.parametrize("name", ["scale and shift", "position", "scalar", "class token", "slope", "doubled"])
def test_other_methods(name, method):
    model, x = build(name)
    y = torch.randint(0, 3, (len(x),))
    names = ["0.w", "0.b"] if name == "scale and shift" else ["0.w"]
    block = blocks(model, names, x, y)
    fisher = {} if method == "foof" else {"fisher": "empirical"}
    step = oracle.step(
        model, method, x, lambda out: F.cross_entropy(out, y), loss="cross_entropy", damping=0.1, proofs=True, **fisher
    )
    factors = step.factors("0.w")
    gradient = torch.stack([step.gradient[name].flatten() for name in names], -1)
    direction = torch.stack([step.direction[name].flatten() for name in names], -1)
    if method == "ekfac":
        torch.testing.assert_close(factors["F"].view_as(block), block)
        block = block + 0.1 * torch.eye(block.shape[-1])
    elif method == "diag":
        squares = block.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(factors["D"].view_as(squares), squares)
        block = torch.diag_embed(squares) + 0.1 * torch.eye(block.shape[-1])
    else:
        ones = {"scale and shift": x.flatten(0, 1), "scalar": x.reshape(-1, 1), "doubled": 2 * x.flatten(0, 1)}
        rows = ones.get(name, torch.ones(1, len(block)))
        if name == "slope":
            rows = x.clamp(max=0).transpose(1, 2).flatten(0, 1)
        rows = torch.stack([rows, torch.ones_like(rows)][: len(names)], -1)
        block = torch.einsum("ngi,ngj->gij", rows, rows) / len(rows)
        torch.testing.assert_close(factors["A"].view_as(block), block)
        block = block + 0.1 * torch.eye(block.shape[-1])
    torch.testing.assert_close(direction, torch.linalg.solve(block, gradient.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("name", ["affine 2d", "affine scalars", "transposed", "addcmul"])
def test_program_reads_and_writes_stored_shapes(name):
    """A compiled program is checked against the model by the shapes of its parameters."""
    model, x = build(name)
    program = oracle.transform(model, "kfac", x).program
    for kind in (program.inputs("grad"), program.outputs("update")):
        shapes = {role.key: node.meta["type"].shape for role, node in kind.items()}
        assert shapes == {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


def test_uses_of_one_scale_are_summed():
    model, x = build("twice")
    (layer, _) = assert_exact(model, x).layers
    assert len(layer.uses) == 2 and "2 times" in layer.note


def test_shift_of_a_read_product_keeps_its_own_example_axis():
    """A repeated state whose example axis is not the first."""
    form = Fn(lambda m, x: torch.cat([m.w.expand(-1, x.shape[1], -1), x]), w=(2, 1, 4))
    x = torch.randn(3, 5, 4)
    (layer,) = assert_exact(form, x).layers
    use = layer.uses[0]
    assert use.form.rows_g(torch.randn(2, 5, 4)).shape == (5, 1, 8, 1)
    g = torch.randn(2, 5, 4)
    wanted = g.transpose(0, 1).reshape(5, 8, 1)
    torch.testing.assert_close(use.form.example_gradients(g, g), wanted)


def test_parameter_on_the_example_axis_is_one_example():
    (layer,) = assert_exact(Fn(lambda m, x: x * m.w, w=(5, 1)), torch.randn(5, 3)).layers
    assert layer.form.rows_g(torch.randn(5, 3)).shape == (1, 3, 5, 1)


def test_data_of_one_example():
    (layer,) = assert_exact(Fn(lambda m, x: x * m.w, w=(3, 4)), torch.randn(1, 3, 4)).layers
    assert layer.form.rows_g(torch.randn(1, 3, 4)).shape == (1, 1, 12, 1)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_repeated_parameter_read_as_weight_and_as_data(frontend):
    """The repetition covers both: its gradient is the sum of theirs."""

    def forward(m, x):
        w = m.w.expand(x.shape[0], -1, -1)
        return torch.bmm(x, w) + w[:, :1].tanh().sum((1, 2), keepdim=True)

    detection = assert_exact(Fn(forward, w=(1, 4, 2)), torch.randn(5, 3, 4), frontend=frontend)
    (layer,) = detection.layers
    assert (layer.kind, layer.shape, len(layer.uses)) == ("shift", (8, 1, 1), 1) and not detection.uncovered


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_frozen_scale_leaves_its_shift(frontend):
    model = Fn(lambda m, x: x * m.w + m.b, frozen=("w",), w=(4,), b=(4,))
    (layer,) = assert_exact(model, torch.randn(5, 3, 4), frontend=frontend).layers
    assert (layer.kind, layer.params, layer.shape) == ("shift", ("b",), (4, 1, 1))


BIASES = {
    "linear": (lambda: nn.Linear(4, 6), (5, 3, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (5, 4, 4, 4)),
    "grouped": (lambda: nn.Conv1d(4, 6, 2, groups=2), (5, 4, 4)),
}


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("name", BIASES)
def test_bias_of_a_frozen_product_is_a_shift(name, frontend):
    make, shape = BIASES[name]
    model = nn.Sequential(make())
    model[0].weight.requires_grad_(False)
    detection = assert_exact(model, torch.randn(shape), frontend=frontend)
    (layer,) = detection.layers
    assert (layer.name, layer.kind, layer.shape) == ("0.bias", "shift", (6, 1, 1)) and not detection.uncovered


def test_bias_of_a_product_stays_its_coordinate():
    def forward(m, x):
        patches = F.conv2d(x, m.w).flatten(2).transpose(1, 2)
        return patches + m.position, F.conv2d(x, m.v) + m.b

    model = Fn(forward, w=(6, 2, 2, 2), v=(6, 2, 2, 2), b=(6, 1, 1), position=(1, 4, 6))
    layers = {layer.name: layer for layer in assert_exact(model, torch.randn(5, 2, 3, 3)).layers}
    assert {name: layer.params for name, layer in layers.items()} == {
        "w": ("w",), "v": ("v", "b"), "position": ("position",)
    }  # fmt: skip
    assert layers["position"].kind == "shift"


def test_backward_of_a_shift_keeps_no_data():
    (layer,) = assert_exact(Fn(lambda m, x: x + m.w, w=(4,)), torch.randn(5, 3, 4)).layers
    y = torch.randn(5, 3, 4)
    (kept,) = layer.form.kept(y)
    assert kept.shape == y.shape and kept.untyped_storage().nbytes() == y.element_size()


REFUSED = {
    "scaled in place": (lambda m, x: IN_PLACE["imul"](x.tanh(), m.w), {"w": (4,)}, "in place"),
    "mul_": (lambda m, x: x.tanh().mul_(m.w), {"w": (4,)}, "in place"),
    "over data": (lambda m, x: m.w / x, {"w": (4,)}, "divided by data"),
    "of two": (lambda m, x: x * (m.v * m.w), {"w": (4,), "v": (4,)}, "another parameter"),
    "sum of two": (lambda m, x: x + (m.v + m.w), {"w": (4,), "v": (4,)}, "another parameter"),
    "power": (lambda m, x: x * m.w.exp(), {"w": (4,)}, "exp"),
    "of a constant": (lambda m, x: x * (m.w + torch.arange(4)), {"w": (4,)}, "constant"),
    "of a size": (lambda m, x: x + m.w * torch.arange(x.shape[2]), {"w": (4,)}, "constant"),
    "computed factor": (lambda m, x: x.add(m.w, alpha=x.shape[0]), {"w": (4,)}, "graph computes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, shapes, words = REFUSED[name]
    _, detection = find(Fn(function, **shapes), torch.randn(5, 3, 4))
    assert not detection.layers
    assert words in reasons(detection)["w"]


class RMS(nn.Module):
    """As transformer libraries write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = RMS(width), nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.gamma, self.act = nn.Parameter(torch.rand(width)), nn.PReLU()

    def forward(self, x):
        return x + self.act(self.mlp(self.norm(x)).mul(self.gamma))


class Vision(nn.Module):
    """Patches, a class token, positions cut to the sequence, a mask token, layer scales and a temperature."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, width, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.mask = nn.Parameter(torch.randn(width))
        self.position = nn.Parameter(torch.randn(1, 9, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head, self.temperature = nn.Linear(width, 3, bias=False), nn.Parameter(torch.ones(()))

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.where(h[..., :1] > 0.5, self.mask, h)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1)
        h = h + self.position[:, : h.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(h[:, 0]) * self.temperature


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_every_parameter_of_a_transformer(frontend):
    model, x, y = Vision(), torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5,))
    detection = assert_exact(model, x, frontend=frontend)
    position = "position"  # whole, cut to the length that the data has; export knows the length and takes that part
    if frontend == "export":
        position = "position[0:5]"
        assert set(reasons(detection)) == {"position[:, 5:9]"}
    else:
        assert not detection.uncovered
    kinds = {layer.name: layer.kind for layer in detection.layers}
    assert [kinds[name] for name in ("token", position, "mask", "temperature", "blocks.0.act", "blocks.1.norm")] == [
        "shift", "shift", "scale", "scale", "scale", "scale",
    ]  # fmt: skip
    step = oracle.step(
        model, "kfac", x, lambda out: F.cross_entropy(out, y), loss="cross_entropy", fisher="empirical",
        frontend=frontend, damping=0.1, proofs=True,
    )  # fmt: skip
    for name in ("token", "mask", "temperature", "blocks.0.gamma", "blocks.0.act.weight", "blocks.1.norm.weight"):
        layer = name.removesuffix(".weight")
        block = blocks(model, [name], x, y)
        torch.testing.assert_close(step.factors(layer)["F"].view_as(block), block)
    cut = blocks(model, ["position"], x, y)
    assert cut[30:].abs().max() == 0
    torch.testing.assert_close(step.factors(position)["F"], cut if frontend == "symbolic" else cut[:30])
