"""Eva, Eva-f and Eva-s against dense inverses of the curvature that they say they invert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from tests.methods.means import rows_of
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import Step, step, transform

pytestmark = pytest.mark.usefixtures("float64")

NETS: dict[str, Any] = {
    "linear": lambda: (mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,)), {"0": 1, "2": 1}),
    "conv": lambda: (convnet(2), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), {"0": 2, "2": 1, "5": 1}),
    "tokens": lambda: (Attention(), torch.randn(3, 4, 3), torch.randint(0, 3, (3, 4)), {"q": 1, "v": 1, "head": 1}),
}  # fmt: skip


def taken(kind: str, method: str, **options: Any) -> tuple[Step, dict[str, tuple[Tensor, Tensor]], dict[str, int]]:
    """A step on cross-entropy, and (mean input, mean output gradient of the mean loss), (groups, d), by layer."""
    torch.manual_seed(0)
    net, x, y, names = NETS[kind]()

    def user(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y)

    means = {name: tuple(r.mean(1) for r in rows_of(net, name, x, user, groups)) for name, groups in names.items()}
    options = {"rescale": "none", "damping": 0.02, **options}
    return step(net, method, x, user, **options), means, names  # type: ignore[return-value]


def solved(curvature: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """(C + damping I)^-1 v for vectors v, dense."""
    return torch.linalg.solve(curvature + damping * torch.eye(len(curvature)), gradient.flatten()).view_as(gradient)


def outer(v: Tensor) -> Tensor:
    return torch.outer(v, v)


@pytest.mark.parametrize("kind", NETS)
def test_direction_is_the_dense_solve(kind: str) -> None:
    """Check (1), on linear, grouped, strided and token layers: positions are averaged in both means."""
    result, means, names = taken(kind, "eva", damping=1e-6)
    for name, groups in names.items():
        gradient, direction = result.pair(name, groups)
        block = result.model.block(name).reshape(groups, *[gradient[0].numel()] * 2)
        for k, (a, g) in enumerate(zip(*means[name], strict=True)):
            torch.testing.assert_close(block[k], torch.kron(outer(g), outer(a)))
            torch.testing.assert_close(direction[k], solved(block[k], gradient[k], 1e-6), rtol=1e-6, atol=1e-6)
            assert (direction[k] * 1e-6 - gradient[k]).norm() > 1e-4 * gradient[k].norm()


@pytest.mark.parametrize("kind", NETS)
def test_without_output_gradients_the_direction_is_the_dense_solve(kind: str) -> None:
    result, means, names = taken(kind, "eva_f")
    for name, groups in names.items():
        gradient, direction = result.pair(name, groups)
        for k, a in enumerate(means[name][0]):
            expected = torch.linalg.solve(outer(a) + 0.02 * torch.eye(len(a)), gradient[k].T).T
            torch.testing.assert_close(direction[k], expected)


def test_one_example_is_the_damped_step_of_its_gradient() -> None:
    """Check (2): U = V / (damping + |a|^2 |g|^2)."""
    net, x, y = mlp(3, 4, 2), torch.randn(1, 3), torch.randn(1, 2)
    result = step(net, "eva", x, lambda f: (f - y).square().sum(), rescale="none", damping=0.1)
    for name in ("0", "2"):
        gradient, direction = result.pair(name)
        torch.testing.assert_close(direction, gradient / (0.1 + gradient.square().sum()))


def test_no_mean_gradient_leaves_the_gradient() -> None:
    """Check (3): opposite residuals, so that gbar = 0 while V is not."""
    net, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3)
    y = net(x).detach() + torch.tensor([[1.0], [-1.0]]) * torch.randn(2)
    result = step(net, "eva", x, lambda f: F.mse_loss(f, y), rescale="none", damping=0.25)
    gradient, direction = result.pair("0")
    assert gradient.norm() > 0.1
    torch.testing.assert_close(direction * 0.25, gradient)


def test_eva_f_is_foof_of_the_mean_input() -> None:
    """Check (4): where all inputs are equal, A is abar abar^T."""
    net, x, y = mlp(3, 4, 2), torch.randn(1, 3).expand(5, 3), torch.randn(5, 2)
    mine, theirs = (
        step(net, method, x, lambda f: F.mse_loss(f, y), damping=0.2, **options)
        for method, options in (("eva_f", {"rescale": "none"}), ("foof", {}))
    )
    for name, direction in theirs.direction.items():
        torch.testing.assert_close(mine.direction[name], direction)


@pytest.mark.parametrize("kind", NETS)
def test_eva_s_solves_with_the_outer_product_of_mode_means(kind: str) -> None:
    """Check (5), for weights of any number of axes; vectors keep their gradient."""
    result, _, _ = taken(kind, "eva_s")
    for name, gradient in result.gradient.items():
        if gradient.ndim < 2:
            torch.testing.assert_close(result.direction[name], gradient, rtol=0, atol=0)
            continue
        w = torch.ones(())
        for mode in range(gradient.ndim):
            others = [axis for axis in range(gradient.ndim) if axis != mode]
            w = w.unsqueeze(-1) * gradient.mean(others)
        torch.testing.assert_close(result.direction[name], solved(outer(w.flatten()), gradient, 0.02))


def test_eva_s_of_a_matrix_is_eva_with_its_row_and_column_means() -> None:
    result, _, _ = taken("linear", "eva_s", damping=1e-4)
    v = result.gradient["0.weight"]
    a, g = v.mean(0), v.mean(1)
    along = g @ v @ a / (1e-4 + a.square().sum() * g.square().sum())
    torch.testing.assert_close(result.direction["0.weight"], (v - along * torch.outer(g, a)) / 1e-4)


def test_axes_of_size_one_are_no_modes() -> None:
    net, x, y = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten()), torch.randn(4, 2, 1, 1), torch.randn(4, 3)
    result = step(net, "eva_s", x, lambda f: F.mse_loss(f, y), rescale="none", damping=0.02)
    v = result.gradient["0.weight"].flatten(1)
    w = torch.outer(v.mean(1), v.mean(0)).flatten()
    torch.testing.assert_close(result.direction["0.weight"].flatten(1), solved(outer(w), v, 0.02))


@pytest.mark.parametrize("method", ["eva", "eva_f"])
def test_vectors_follow_with_the_weight_of_the_old(method: str) -> None:
    """The first batch enters alone, the second and later ones with 1 - ema, as soon as that is more than 1 / k."""
    net = mlp(3, 4, 2)
    batches = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(4)]
    model = transform(net, method, batches[0][0], ema=0.3)
    expected: list[Tensor] = []
    for k, (x, y) in enumerate(batches):
        new = [rows.mean(1).squeeze(0) for rows in rows_of(net, "0", x, lambda f, y=y: F.mse_loss(f, y))]
        old = min(k / (k + 1), 0.3)
        expected = [(1 - old) * n + old * (expected[i] if k else 0.0) for i, n in enumerate(new)]
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        model.precondition_()
        states = model._engine.states
        torch.testing.assert_close(states.read("0.abar"), expected[0])
        assert ("0.gbar" in states.by_key) == (method == "eva")
        if method == "eva":
            torch.testing.assert_close(states.read("0.gbar"), expected[1])


@pytest.mark.parametrize("method", ["eva", "mkor"])
def test_a_summed_loss_has_the_curvature_of_its_mean(method: str) -> None:
    net, x, y = mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    options = {"ema": 0.5, "rescale": "none"}
    mean = step(net, method, x, lambda f: F.cross_entropy(f, y), loss="cross_entropy", **options)
    summed = step(
        net,
        method,
        x,
        lambda f: F.cross_entropy(f, y, reduction="sum"),
        loss=nn.CrossEntropyLoss(reduction="sum"),
        **options,
    )
    for name, direction in mean.direction.items():
        torch.testing.assert_close(summed.direction[name], direction)


def test_two_micro_batches_are_one_batch() -> None:
    net, x, y = mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    whole = step(net, "eva", x, lambda f: F.cross_entropy(f, y), loss="cross_entropy")
    model = transform(net, "eva", x, loss="cross_entropy")
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 6)):
        outputs = model(x[part])
        model.backward(F.cross_entropy(outputs, y[part], reduction="sum") / 6, outputs)
    model.precondition_()
    for name, direction in whole.direction.items():
        torch.testing.assert_close(model.get_parameter(name).grad, direction)


@pytest.mark.parametrize("method", ["eva", "eva_f", "eva_s"])
def test_lengths_of_steps(method: str) -> None:
    plain, _, names = taken("linear", method, damping=1e-3)
    pairs = [(plain.direction[n], plain.gradient[n]) for n in plain.gradient]
    dot = sum((u * v).sum() for u, v in pairs)
    clipped, _, _ = taken("linear", method, damping=1e-3, rescale="kl", kl_clip=1e-3, lr=0.5)
    nu = min(1.0, float((1e-3 / (0.25 * dot)).sqrt()))
    matched, _, _ = taken("linear", method, damping=1e-3, rescale="match")
    grafted, _, _ = taken("linear", method, damping=1e-3, rescale="graft")
    total = (sum(v.square().sum() for _, v in pairs) / sum(u.square().sum() for u, _ in pairs)).sqrt()
    assert nu < 1
    for name, direction in plain.direction.items():
        torch.testing.assert_close(clipped.direction[name], nu * direction)
        torch.testing.assert_close(matched.direction[name], total * direction)
        if method == "eva_s":
            scale = plain.gradient[name].norm() / direction.norm()
            torch.testing.assert_close(grafted.direction[name], scale * direction)
    if method != "eva_s":
        for name in names:
            gradient, direction = grafted.pair(name)
            torch.testing.assert_close(direction.norm(), gradient.norm())


def test_an_embedding_has_token_frequencies_for_its_mean_input() -> None:
    net = nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2))
    x, y = torch.tensor([[1, 2], [2, 6], [0, 2]]), torch.randn(3, 2)
    result = step(net, "eva", x, lambda f: F.mse_loss(f, y), rescale="none", damping=0.02)
    a = result.model._engine.states.read("0.abar")
    torch.testing.assert_close(a, torch.tensor([0.0, 1, 3, 0, 0, 0, 1]) / 5)
    table, direction = (part["0.weight"].T for part in (result.gradient, result.direction))
    g = table.sum(1) / 5
    torch.testing.assert_close(direction, solved(torch.kron(outer(g), outer(a)), table.contiguous(), 0.02))


def test_norm_layers_are_solved_unit_by_unit() -> None:
    net, x, y = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.randn(5, 3), torch.randn(5, 4)
    result = step(net, "eva", x, lambda f: F.mse_loss(f, y), rescale="none", damping=0.02)
    normed = F.layer_norm(net[0](x), (4,)).detach()
    g = 2 * (net(x) - y).detach() / y.numel()
    gradient, direction = result.pair("1", 4)
    for c in range(4):
        h = g[:, c].mean() * torch.stack([normed[:, c].mean(), torch.ones(())])
        torch.testing.assert_close(direction[c, 0], solved(outer(h), gradient[c, 0], 0.02))


class Branches(nn.Module):
    """A layer that only some calls reach."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.sometimes(self.always(x)) if both else self.always(x)


@pytest.mark.parametrize("method", ["eva", "eva_f", "mkor", "mkor_h"])
def test_a_layer_that_was_not_reached_keeps_its_state(method: str) -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    model = transform(Branches(), method, x, factor_every=1, ema=0.5)
    for both in (True, False):
        model.zero_grad()
        outputs = model(x, both)
        model.backward(F.mse_loss(outputs, y), outputs)
        model.precondition_()
        states = {k: v.clone() for k, v in model._engine.states.named().items() if not k.startswith("switch.")}
        if both:
            before = states
    changed = {key.split(".")[0] for key, value in states.items() if not torch.equal(value, before[key])}
    assert changed == {"always"}


@pytest.mark.parametrize("method", ["eva", "eva_f", "eva_s", "mkor", "mkor_h"])
@pytest.mark.parametrize("off", ["batch", "fuse", "defer", "share", "sink", "kernels"])
def test_no_pass_changes_a_step(method: str, off: str) -> None:
    def train(**options: Any) -> list[Tensor]:
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 6),
            *(layer for _ in range(4) for layer in (nn.Tanh(), nn.Linear(6, 6))),
        )  # fmt: skip
        x, y = torch.randn(5, 2, 3, 3), torch.randint(0, 6, (5,))
        model = fxcurv.transform(net, method, example_inputs=(x,), loss="cross_entropy", factor_every=2, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            outputs = model(x)
            model.backward(F.cross_entropy(outputs, y), outputs)
            model.precondition_()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    switched = {"backend": "reference"} if off == "kernels" else {"disable": (off,)}
    for mine, theirs in zip(train(**switched), train(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
