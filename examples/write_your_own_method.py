"""Write your own method: a composition of parts on one screen, one part of it new.

A method is eight small parts: where curvature comes from (source), what one problem is (scope), the estimate of one
batch, how it is tracked, damped and solved with, a common rescaling, and how often. Published methods are functions
that compose them with the paper's defaults, so a variant is a function too. A part has one job and writes ops with a
builder ``b``; it knows shapes, never a layer's spelling, so it works for convolutions and embeddings as well.

The variant here is K-FAC with *relative* damping: each factor is damped in proportion to its own mean eigenvalue, so
the strength has no unit and means the same for every layer, however small its gradients are.

    python examples/write_your_own_method.py
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.ir.program import Builder
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Damp, Method, Source, flag, hyper
from fxcurv.methods.parts.estimate import Kron
from fxcurv.methods.parts.rescale import KLClip
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.solve import Inverse
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published


# 1. The new part. A factor is a node; ``flag`` says to an op whether it is kept as a diagonal (a very wide layer).
#    ``hyper`` reads a number at run time: changing it recompiles nothing.
@dataclass(frozen=True)
class Relative(Damp):
    """damping * (mean eigenvalue of the factor) + floor; the floor keeps the factor of a dead layer invertible."""

    def split(self, b: Builder, facts: Facts, factors: dict[str, fx.Node]) -> dict[str, fx.Node]:
        damping, floor = hyper(b, facts, "damping"), hyper(b, facts, "floor")
        means = {part: b.mean_diagonal(factor, *flag(factor)) for part, factor in factors.items()}
        return {part: b.add(b.mul(mean, damping), floor) for part, mean in means.items()}


# 2. The method. Its name, its hyper-parameters with defaults (beside the common ones: ema, solve_every, seed, ...), and
#    the composition. The docstring is what ``fxcurv methods kfac_relative`` shows.
@published("kfac_relative", fisher="mc", fisher_samples=1, damping=0.03, floor=1e-7, ema=0.95, kl_clip=1e-2)
def kfac_relative(o: SimpleNamespace) -> Method:
    """K-FAC with relative damping: U = (G + g I)^-1 V (A + a I)^-1, a and g ``damping`` times the mean eigenvalues."""
    return Method(
        name="kfac_relative",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=Kron(),
        track=EMA(),
        damp=Relative(),
        solve=Inverse(),
        rescale=None if o.kl_clip is None else KLClip(),
        hyper={"floor": o.floor},
    )


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """All of scikit-learn's digits: inputs (1797, 64) in [0, 1] and labels."""
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=dtype), torch.tensor(data.target)


def verify() -> float:
    """One step against the formula, with dense matrices; returns the largest relative error over the layers."""
    torch.manual_seed(0)
    x, y = (tensor[:32] for tensor in digits(torch.float64))
    net = nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 10)).double()
    model = fxcurv.transform(net, "kfac_relative", loss="cross_entropy", damping=0.2, kl_clip=None)
    outputs = model(x)
    model.backward(nn.functional.cross_entropy(outputs, y), outputs)
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    model.precondition_()
    worst = 0.0
    for layer in model.layers:
        weight, bias = (net.get_parameter(name) for name in layer.params)
        V = torch.cat([gradients[layer.params[0]], gradients[layer.params[1]][:, None]], dim=1)
        damped = {}
        for part, factor in model.factors(layer.name).items():
            eye = torch.eye(len(factor), dtype=factor.dtype)
            damped[part] = factor + (0.2 * factor.trace() / len(factor) + 1e-7) * eye
        U = torch.linalg.solve(damped["G"], V) @ torch.linalg.inv(damped["A"])
        assert weight.grad is not None and bias.grad is not None
        error = (torch.cat([weight.grad, bias.grad[:, None]], dim=1) - U).norm() / U.norm()
        worst = max(worst, error.item())
    return worst


def train(method: str, lr: float, steps: int = 30) -> float:
    """Loss on all digits after some full-batch steps of the method's complete update rule."""
    torch.manual_seed(0)
    x, y = digits()
    net = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    model = fxcurv.transform(net, method, loss="cross_entropy")
    optimizer = fxcurv.optimizer(model, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        model.backward(loss, outputs)
        optimizer.step()
    return nn.functional.cross_entropy(net(x), y).item()


def main() -> dict[str, float]:
    """Verify the method and train with it; returns final losses by method."""
    error = verify()
    print(f"one step against dense matrices: relative error {error:.1e}")
    assert error < 1e-9
    print(f"fxcurv.methods() now has it: {fxcurv.methods()['kfac_relative'].summary}")
    rates = {"sgd": (0.3, 1.0, 2.0), "kfac_relative": (0.03, 0.1, 0.3)}
    losses = {name: min(train(name, lr) for lr in rates[name]) for name in rates}  # the best of three rates each
    print(", ".join(f"{name}: loss {loss:.4f}" for name, loss in losses.items()), "after 30 full-batch steps")
    assert losses["kfac_relative"] < losses["sgd"]
    return losses


if __name__ == "__main__":
    main()
