"""Write your own op: declare it once, check it, and make a small method of it.

An op of update programs is one ``Op(...)`` object. Its schema, type rule, reference, cost and samples stand side by
side, and everything else follows from them: ``torch.ops.fxcurv.<name>``, the method ``b.<name>(...)`` of program
builders, the printed and parsed text, the verifier, the cost model, the page of ``fxcurv ops NAME``.

The op here is the *polar factor* of a matrix: the nearest orthogonal one, U V^T for M = U S V^T. As an update it is
steepest descent in the spectral norm: every singular direction of the gradient moves by the same amount.

    python examples/write_your_own_op.py
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import Op, Trait
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.program import Builder
from fxcurv.ir.types import Mat, Type
from fxcurv.methods.facts import Facts
from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.scope import Tensors
from fxcurv.methods.registry import published


# 1. The reference: the definition, in plain torch. It is pure, does not read values on the host, and makes no NaN of a
#    zero gradient. Its docstring is the op's documentation.
def _polar(M: Tensor, steps: int) -> Tensor:
    """The polar factor U V^T of M = U S V^T, by ``steps`` Newton-Schulz iterations X <- 3/2 X - 1/2 X X^T X.

    M: Mat (o, i) or (G, o, i). Matrix products alone; a singular value s of M / |M| needs about log(1/s) / log(1.5)
    steps to arrive at 1, and 0 stays 0.
    """
    X = M / torch.linalg.matrix_norm(M, keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    wide = X.shape[-2] <= X.shape[-1]
    for _ in range(steps):
        X = 1.5 * X - 0.5 * ((X @ X.mT) @ X if wide else X @ (X.mT @ X))
    return X.contiguous()


# 2. The type rule: what the result is, from types alone. A clear sentence here saves an hour elsewhere.
def _infer_polar(M: Type, steps: int) -> Type:
    if not isinstance(M, Mat):
        raise FxcurvError(f"operand 'M' of op 'polar' must be a Mat, got {M}; use 'matricize' before it.")
    return Mat(M.shape, M.dtype)


# 3. Samples: float64 operands that tests and benchmarks run on. Include the awkward shapes.
def _samples() -> Iterator[tuple[Tensor, int]]:
    draw = Draw(1)
    for shape in ((3, 5), (5, 3), (1, 7), (2, 4, 4)):
        yield draw.normal(*shape), 30


# 4. The op. BATCHABLE is a promise to the passes: leading dimensions are independent of one another.
polar = Op(
    "polar",
    "(Tensor M, int steps) -> Tensor",
    _polar,
    _infer_polar,
    _samples,
    flops=lambda M, steps: 4.0 * steps * M.numel * min(M.shape[-2:]),
    traits=frozenset({Trait.BATCHABLE}),
)


# 5. A method that uses it: one direction a tensor. ``b.polar`` exists because the op does.
class SpectralDescent(Tensors):
    """The polar factor of the gradient of every matrix; other tensors keep their gradient."""

    def direction(self, b: Builder, method: Method, facts: Facts, name: str, gradient: fx.Node) -> fx.Node:
        shape = list(gradient.meta["type"].shape)
        if len(shape) != 2:
            return b.copy(gradient)  # a result is a tensor of its own, never an input
        return b.tensorize(b.polar(b.matricize(gradient, [0, 1], shape), 12), [0, 1], shape)


@published("spectral", momentum=0.9, lr=0.05)
def spectral(o: SimpleNamespace) -> Method:
    """Spectral descent: the nearest orthogonal matrix to the gradient, from gradients alone."""
    return Method(name="spectral", source=Source("gradient"), scope=SpectralDescent())


def verify() -> None:
    """What every op of the package is tested for, on this one."""
    for M, steps in polar.samples():
        # the dispatcher's view: schema, no aliasing, and shapes and strides on fake tensors
        torch.library.opcheck(torch.ops.fxcurv.polar.default, (M, steps), test_utils=("test_schema", "test_faketensor"))
        # the type rule says what the reference returns
        result, rule = polar(M, steps), polar.infer(Mat(tuple(M.shape), M.dtype), steps)
        assert isinstance(rule, Mat) and (tuple(result.shape), result.dtype) == (rule.shape, rule.dtype)
        # an independent definition gives the same numbers
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        torch.testing.assert_close(result, U @ Vh, rtol=1e-8, atol=1e-8)
    assert torch.equal(polar(torch.zeros(3, 2), 5), torch.zeros(3, 2))


def train(method: str, lr: float, steps: int = 25) -> float:
    """Training loss of a small net on all digits after some full-batch steps."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    model = fxcurv.transform(nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10)), method)
    optimizer = fxcurv.optimizer(model, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> dict[str, float]:
    """Verify the op, look at a program with it, train with it; returns final losses by method."""
    verify()
    print(f"op {polar.name}{polar.schema}\n  {polar.doc.splitlines()[0]}")
    model = fxcurv.transform(nn.Linear(6, 4), "spectral")
    print(model.program.text())
    assert "polar(" in model.program.text()
    print(f"cost of a 48 x 64 matrix: {polar.cost(Mat((48, 64)), Mat((48, 64)), 12).flops / 1e6:.1f} Mflop")
    rates = {"sgd": (0.1, 0.3, 1.0), "spectral": (0.01, 0.02, 0.05)}
    losses = {name: min(train(name, lr) for lr in rates[name]) for name in rates}  # the best of three rates each
    print(", ".join(f"{name}: loss {loss:.4f}" for name, loss in losses.items()), "after 25 full-batch steps")
    assert losses["spectral"] < losses["sgd"]
    return losses


if __name__ == "__main__":
    main()
