"""MKOR's inverses against dense ones of the factors that they stand for, and the switch of MKOR-H."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.runtime.module import CurvatureModule
from tests.methods.means import rows_of
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import step, stored, transform

pytestmark = pytest.mark.usefixtures("float64")

NETS: dict[str, Any] = {
    "linear": (lambda: mlp(4, 5, 3), (6, 4), (6,), {"0": 1, "2": 1}),
    "conv": (lambda: convnet(2), (4, 2, 5, 5), (4,), {"0": 2, "2": 1, "5": 1}),
    "tokens": (Attention, (3, 4, 3), (3, 4), {"q": 1, "v": 1, "head": 1}),
}
BIG = 1e9  # a limit that nothing reaches


def one(x: Tensor, inverse: Tensor, update: str, ema: float) -> Tensor:
    """The next inverse, densely; for "printed" its formula."""
    eye = torch.eye(len(x))
    if update == "exact":
        return torch.linalg.inv(ema * torch.linalg.inv(inverse) + (1 - ema) * torch.outer(x, x))
    if update == "package":
        return torch.linalg.inv(torch.linalg.inv(ema * inverse + (1 - ema) * eye) + torch.outer(x, x))
    u = inverse @ x
    return ema * inverse + (1 - ema) / (ema**2 * (1 + ema * (1 - ema) * x @ u)) * torch.outer(u, u)


def read(model: CurvatureModule, key: str, groups: int = 1) -> Tensor:
    value = model._engine.states.read(key)
    return value if groups > 1 else value.unsqueeze(0)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("update", ["exact", "printed", "package"])
def test_inverses_are_those_of_running_sums(kind: str, update: str) -> None:
    """Check (1) and (2): several batches, gradients on the scale of single examples, U = GI V AI with V's length."""
    build, shape, labels, names = NETS[kind]
    net = build()
    options = {"loss": "cross_entropy", "update": update, "ema": 0.8, "limit": BIG, "factor_every": 1}
    model = transform(net, "mkor", torch.randn(shape), **options)
    expected = {(n, s, k): torch.eye(1) for n, groups in names.items() for s in "AG" for k in range(groups)}
    for _ in range(4):
        x, y = torch.randn(shape), torch.randint(0, 3, labels)

        def user(f: Tensor, y: Tensor = y) -> Tensor:
            return F.cross_entropy(f, y)

        for name, groups in names.items():
            a, g = (rows.mean(1) for rows in rows_of(net, name, x, user, groups))
            for side, vectors in (("A", a), ("G", g * y.numel())):
                for k, v in enumerate(vectors):
                    old = expected[name, side, k]
                    old = torch.eye(len(v)) if len(old) != len(v) else old
                    expected[name, side, k] = one(v, old, update, 0.8)
        model.zero_grad()
        user(model(x)).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.precondition_()
    for name, groups in names.items():
        g, a = (read(model, f"{name}.{side}I", groups) for side in "GA")
        for k in range(groups):
            for side, value in (("A", a[k]), ("G", g[k])):
                torch.testing.assert_close(value, expected[name, side, k])
                assert torch.linalg.eigvalsh(value).min() > 0
                assert update == "package" or (value - torch.eye(len(value))).norm() > 0.05
        v, u = (
            torch.cat([part[n].reshape(groups, g.shape[1], -1) for n in stored(net, name)], 2)
            for part in (gradient, {n: p.grad for n, p in model.named_parameters()})
        )
        direction = g @ v @ a
        torch.testing.assert_close(u, direction * (v.norm() / direction.norm()))
        blocks = model.block(name).reshape(groups, *[v[0].numel()] * 2)
        for k in range(groups):
            torch.testing.assert_close(torch.linalg.inv(blocks[k]), torch.kron(g[k], a[k]))


@pytest.mark.parametrize("update", ["exact", "printed"])
def test_identity_inverses_leave_the_gradient(update: str) -> None:
    """Check (4): with all weight on the old factors nothing is measured."""
    net, x, y = mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    result = step(net, "mkor", x, lambda f: F.cross_entropy(f, y), ema=1.0, update=update, rescale="none")
    for name, gradient in result.gradient.items():
        torch.testing.assert_close(result.direction[name], gradient)


@pytest.mark.parametrize("rescale", ["graft", "match", "kl"])
def test_lengths_of_steps(rescale: str) -> None:
    """Check (3): per layer, of all layers together, or by the clip."""
    net, x, y = mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    options = {"ema": 0.5, "limit": BIG, "kl_clip": 1e-3, "lr": 1.0}
    plain, result = (
        step(net, "mkor", x, lambda f: F.cross_entropy(f, y), rescale=r, **options) for r in ("none", rescale)
    )
    pairs = [result.pair(name) for name in ("0", "2")]
    if rescale == "graft":
        for gradient, direction in pairs:
            torch.testing.assert_close(direction.norm(), gradient.norm())
    elif rescale == "match":
        total = [sum(pair[i].square().sum() for pair in pairs) for i in (0, 1)]
        torch.testing.assert_close(total[0], total[1])
    else:
        dot = sum((v * u).sum() for v, u in (plain.pair(name) for name in ("0", "2")))
        assert dot > 1e-3
        torch.testing.assert_close(pairs[0][1], plain.pair("0")[1] * (1e-3 / dot).sqrt())


def test_the_stabiliser_comes_before_the_update() -> None:
    net, x = nn.Sequential(nn.Linear(2, 3)), torch.randn(5, 2)
    model = transform(net, "mkor", x, ema=0.5, limit=1.2, zeta=0.25, factor_every=1)
    inverse, blended = torch.eye(3), 0
    for _ in range(4):
        y = torch.randn(5, 3)
        a, _ = rows_of(net, "0", x, lambda f, y=y: F.mse_loss(f, y))
        if inverse.abs().max() > 1.2:
            inverse, blended = 0.25 * inverse + 0.75 * torch.eye(3), blended + 1
        inverse = one(a.mean(1)[0], inverse, "exact", 0.5)
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        model.precondition_()
        torch.testing.assert_close(model._engine.states.read("0.AI"), inverse)
    assert blended > 1


def test_inverses_change_every_factor_every_steps_alone() -> None:
    net, x, y = mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    model = transform(net, "mkor", x, ema=0.5, factor_every=3)
    seen = []
    for _ in range(5):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        model.precondition_()
        seen.append(model._engine.states.read("0.GI").clone())
    assert [torch.equal(p, q) for p, q in zip(seen, seen[1:], strict=False)] == [True, True, False, True]


@pytest.mark.parametrize("side", ["A", "G"])
@pytest.mark.parametrize("update", ["exact", "printed", "package"])
def test_a_wide_side_keeps_the_diagonal(side: str, update: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3) if side == "A" else nn.Linear(2, 4))
    x, y = torch.randn(6, net[0].in_features), torch.randn(6, net[0].out_features)

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    limit = 4 if side == "A" else 3
    options = {"loss": "mse", "update": update, "ema": 0.6, "limit": 0.5, "zeta": 0.9, "rescale": "none"}
    result = step(net, "mkor", x, user, max_factor_dim=limit, **options)
    a, g = (rows.mean(1)[0] for rows in rows_of(net, "0", x, user))
    vector = a if side == "A" else g * y.numel()
    value = result.model._engine.states.read(f"0.{side}I")
    assert value.shape == vector.shape
    expected = torch.stack([one(v.reshape(1), torch.eye(1), update, 0.6)[0, 0] for v in vector])
    torch.testing.assert_close(value, expected)
    gradient, direction = (part.squeeze(0) for part in result.pair("0"))
    gi, ai = (result.model._engine.states.read(f"0.{s}I") for s in "GA")
    gi, ai = (torch.diag(m) if m.ndim == 1 else m for m in (gi, ai))
    torch.testing.assert_close(direction, gi @ gradient @ ai)
    torch.testing.assert_close(torch.linalg.inv(result.model.block("0")), torch.kron(gi, ai))


def test_the_input_side_of_an_embedding_is_a_diagonal() -> None:
    net = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 2))
    x, y = torch.tensor([[1, 2], [2, 6], [0, 2]]), torch.randn(3, 2)
    result = step(net, "mkor", x, lambda f: F.mse_loss(f, y), ema=0.6, limit=BIG)
    frequency = torch.tensor([1.0, 1, 3, 0, 0, 0, 1]) / 6
    torch.testing.assert_close(result.model._engine.states.read("0.AI"), 1 / (0.6 + 0.4 * frequency.square()))


@pytest.mark.filterwarnings("ignore:layers 0 keep their plain gradient")
def test_a_layer_whose_inverse_is_not_finite_falls_back_to_its_gradient() -> None:
    net, x, y = mlp(4, 5, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    model = transform(net, "mkor", x, ema=0.5, factor_every=5)
    for k in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        if k:
            model._engine.states.values[model._engine.states.by_key["0.AI"]][0, 0] = float("inf")
        info = model.precondition_()
    assert info.fallback == ("0",)
    assert torch.equal(net[0].weight.grad, gradient["0.weight"])
    assert not torch.allclose(net[2].weight.grad, gradient["2.weight"])


def test_wrong_settings() -> None:
    with pytest.raises(FxcurvError, match="update='minus' is unknown"):
        fxcurv.methods.mkor(update="minus")
    with pytest.raises(FxcurvError, match="ema=0.0 of MKOR must be more than 0"):
        fxcurv.methods.mkor(ema=0.0)


# MKOR-H -------------------------------------------------------------------------------------------------------------

OPTIONS = {"ema": 0.9, "factor_every": 2, "switch_after": 8, "switch_below": 0.8}


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    return mlp(4, 6, 3), torch.randn(8, 4), torch.randn(8, 3)


def descend(
    model: CurvatureModule, x: Tensor, y: Tensor, steps: int, zero: float = 0.0
) -> list[tuple[float, bool, bool]]:
    """(loss, whether statistics were wanted, whether the update was the gradient) of plain steps down."""
    found = []
    for _ in range(steps):
        model.zero_grad()
        wanted = model._engine.wants_statistics
        outputs = model(x)
        loss = F.mse_loss(outputs, y) + zero
        model.backward(loss, outputs)
        gradient = [p.grad.clone() for p in model.parameters()]
        model.precondition_()
        same = all(torch.equal(p.grad, v) for p, v in zip(model.parameters(), gradient, strict=True))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.3 * p.grad
        found.append((loss.item(), wanted, same))
    return found


def switched(losses: list[float], every: int, after: int, below: float) -> int:
    """The first step whose update is the gradient."""
    fast = slow = best = 0.0
    for k, loss in enumerate(losses):
        fast, slow = (
            w * old + (1 - w) * loss for old, w in ((fast, min(k / (k + 1), 0.9)), (slow, min(k / (k + 1), 0.98)))
        )
        if k % every == 0:
            best = max(best, slow - fast)
            if k + 1 >= after and slow - fast < below * best:
                return k + 1
    return len(losses)


def test_all_layers_retire_when_the_loss_stops_to_fall() -> None:
    net, x, y = problem()
    model = transform(net, "mkor_h", x, **OPTIONS)
    found = descend(model, x, y, 120)
    at = switched([loss for loss, _, _ in found], 2, 8, 0.8)
    assert 12 < at < 110
    assert [same for _, _, same in found] == [False] * at + [True] * (120 - at)
    assert [wanted for _, wanted, _ in found] == [k % 2 == 0 and k < at for k in range(120)]
    assert model._engine.retired == {"0", "2"}


def test_the_switch_does_not_know_the_zero_of_the_loss() -> None:
    found = []
    for zero in (0.0, -64.0):
        net, x, y = problem()
        found.append([same for _, _, same in descend(transform(net, "mkor_h", x, **OPTIONS), x, y, 110, zero)])
    assert found[0] == found[1] and True in found[0]


def test_training_goes_on_bit_for_bit_before_and_after_the_switch() -> None:
    net, x, y = problem()
    model = transform(net, "mkor_h", x, **OPTIONS)
    at = [same for _, _, same in descend(model, x, y, 110)].index(True)
    for stop in (at - 3, at + 4):
        net, x, y = problem()
        model = transform(net, "mkor_h", x, **OPTIONS)
        descend(model, x, y, stop)
        saved = {key: value.clone() for key, value in model.state_dict().items()}
        rest = descend(model, x, y, 10)
        other = transform(problem()[0], "mkor_h", x, **OPTIONS)
        other.load_state_dict(saved)
        assert descend(other, x, y, 10) == rest
        for mine, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)


def test_until_the_switch_it_is_mkor() -> None:
    results = []
    for method in ("mkor", "mkor_h"):
        net, x, y = problem()
        model = transform(net, method, x, ema=0.9, factor_every=2)
        descend(model, x, y, 7)
        results.append([p.detach().clone() for p in model.parameters()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_loss_must_be_seen() -> None:
    net, x, y = problem()
    model = transform(net, "mkor_h", x, **OPTIONS)
    F.mse_loss(model(x), y).backward()
    with pytest.raises(FxcurvError, match="looks at the loss of every step: call model.backward"):
        model.precondition_()


def test_micro_batches_and_a_scaler_add_up_to_one_loss() -> None:
    class Scaler:
        """As much of a gradient scaler as a step asks for."""

        _per_optimizer_states: dict[int, Any] = {}

        def is_enabled(self) -> bool:
            return True

        def get_scale(self) -> float:
            return 1024.0

    net, x, y = problem()
    model = transform(net, "mkor_h", x, **OPTIONS)
    total = F.mse_loss(net(x), y).item()
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 8)):
        outputs = model(x[part])
        model.backward(F.mse_loss(outputs, y[part], reduction="sum") / y.numel() * 1024.0, outputs)
    model.precondition_(Scaler())
    assert float(model._engine.states.read("switch.fast")) == pytest.approx(total, rel=1e-12)
