"""Write your own pass: a peephole on update programs, with options, and proof that it changes no number.

A pass is a frozen dataclass with a ``name`` and ``run(compilation) -> number of rewrites``. Its fields are its options,
in Python and as text: ``fuse_square{min_numel=64}``. The manager times it, verifies types before and after, keeps the
program's text, honours fuel, and with ``check="numeric"`` runs the program before and after on the same random inputs.

The pass here fuses two ops of Adam, ``moving(v, square(g), beta)``, into one that reads g once and writes no square to
memory. Rules are text in the printer's own syntax; what they need is an op to rewrite to (see write_your_own_op.py).

    python examples/write_your_own_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.ir.cost import program_cost
from fxcurv.ir.op import OPS, Op
from fxcurv.ir.ops.draws import Draw
from fxcurv.ir.program import STEP
from fxcurv.ir.rules import Bindings, Rule, apply_rules
from fxcurv.ir.types import Type
from fxcurv.passes import PASSES, PIPELINE, parse_pipeline
from fxcurv.passes.manager import Compilation, Pass
from fxcurv.runtime import CurvatureModule


# 1. What to rewrite to: one op instead of two. It gives the type that the two together give, or the verifier objects.
def _moving_square(old: Tensor, x: Tensor, beta: Tensor) -> Tensor:
    """beta * old + (1 - beta) * x^2, elementwise."""
    beta = torch.as_tensor(beta, dtype=old.dtype, device=old.device)
    return torch.addcmul(old * beta, x, x * (1.0 - beta))


def _infer(old: Type, x: Type, beta: Type) -> Type | tuple[Type, ...]:
    return OPS["moving"].infer(old, OPS["square"].infer(x), beta)


Op(
    "moving_square",
    "(Tensor old, Tensor x, Tensor beta) -> Tensor",
    _moving_square,
    _infer,
    lambda: [(Draw(1).positive(3, 4), Draw(2).normal(3, 4), Draw().number(0.9))],
    flops=lambda old, x, beta: 4 * old.numel,
)


# 2. The pass. ``c.spend`` must allow every rewrite: that is how a wrong one is found by bisection.
@dataclass(frozen=True)
class FuseSquare(Pass):
    """Fuses averages of squares of at least ``min_numel`` elements."""

    min_numel: int = 1
    name: ClassVar[str] = "fuse_square"

    def run(self, c: Compilation) -> int:
        assert c.program is not None  # the manager has seen to it: see Pass.needs

        def large(bindings: Bindings) -> bool:
            x = bindings["x"]
            return isinstance(x, fx.Node) and x.meta["type"].numel >= self.min_numel

        rule = Rule("moving(old, square(x), beta)", "moving_square(old, x, beta)", when=large)
        return apply_rules(c.program, [rule], c.spend)


@dataclass(frozen=True)
class FuseWrongly(Pass):
    """The same with a mistake that types cannot show: the average of x instead of x^2."""

    name: ClassVar[str] = "fuse_wrongly"

    def run(self, c: Compilation) -> int:
        assert c.program is not None
        return apply_rules(c.program, [Rule("moving(old, square(x), beta)", "moving(old, x, beta)")], c.spend)


# 3. Where it runs. The pipeline is a tuple, and text can name any pass of a table: here ours beside the built-in ones.
TABLE: dict[str, type[Pass]] = {**PASSES, FuseSquare.name: FuseSquare, FuseWrongly.name: FuseWrongly}


def pipeline(step: str) -> tuple[Pass, ...]:
    """The built-in pipeline with ``step``, such as "fuse_square{min_numel=64}", after simplify."""
    names = [one.name for one in PIPELINE]
    names.insert(names.index("simplify") + 1, step)
    return parse_pipeline(",".join(names), TABLE)


def train(passes: tuple[Pass, ...], steps: int = 20, **options: Any) -> tuple[CurvatureModule, list[float]]:
    """A small net trained with Adam on all digits; options go to ``transform``. Returns it and its losses."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    model = fxcurv.transform(net, "adam", passes=passes, **options)
    optimizer = fxcurv.optimizer(model, lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def main() -> dict[str, int]:
    """Run the pass with several options; returns the number of fused ops by pipeline text."""
    plain, expected = train(PIPELINE)
    fused = {}
    for step in ("fuse_square", "fuse_square{min_numel=64}", "fuse_square{min_numel=5000}"):
        model, losses = train(pipeline(step), check="numeric")  # compares the program before and after the pass
        (record,) = (record for record in model.history if record.name == "fuse_square")
        fused[step] = record.rewrites
        assert record.rewrites == model.program.text().count("= moving_square(")
        assert all(abs(a - b) < 1e-4 for a, b in zip(losses, expected, strict=True))
        before, after = (program_cost(p)[STEP].bytes / 1e3 for p in (plain.program, model.program))
        print(f"{step}: {record.rewrites} rewrites, {after:.1f} kB a step instead of {before:.1f}")
    assert list(fused.values()) == [4, 2, 0]  # two weights and two biases; the weights alone; nothing

    model, _ = train(pipeline("fuse_square"), fuel=3)
    assert model.program.text().count("= moving_square(") < 4  # fuel ran out: some rewrites did not happen

    caught = ""
    try:
        train(pipeline("fuse_wrongly"), check="numeric")
    except FxcurvError as error:
        caught = str(error)
    assert "fuse_wrongly" in caught
    print(f"a wrong pass is caught: {caught}")
    return fused


if __name__ == "__main__":
    main()
