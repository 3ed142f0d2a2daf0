"""Write your own layer kind: teach detection a product of yours, and let the gradient proof check the lesson.

Every parametrised product is brought to one normal form, out[b, s, g, o] = sum_i W[g, o, i] x[b, s, g, i] + bias[g, o]:
examples b, positions s, groups g, outputs o, inputs i. A *form* says how the tensors of one operation map to these
axes, a *spelling* how to read the operation's arguments. After that every method works on it.

The operation here is a block-diagonal linear map, a function of your own that fxcurv cannot see into (it could call a
hand-written kernel). ``torch.fx.wrap`` keeps it whole in the captured graph. Until it has a spelling, its parameters
keep their plain gradient, and ``transform`` says so. A module class of your own is taught in the same way, and its
spelling is all that keeps its calls whole: fxcurv then never looks into its forward.

    python examples/write_your_own_layer.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxcurv
from fxcurv.capture import Call, capture
from fxcurv.layers.detect import detect
from fxcurv.layers.form import Form
from fxcurv.layers.layer import Detection
from fxcurv.layers.proof import prove
from fxcurv.layers.spelling import Match, Operand, Site, spelling
from fxcurv.layers.view import Refused


@torch.fx.wrap
def block_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Features in equal blocks, each with a matrix of its own: x (..., g i), weight (g, o, i) -> (..., g o)."""
    blocks = x.unflatten(-1, (weight.shape[0], weight.shape[2]))
    return torch.einsum("...gi,goi->...go", blocks, weight).flatten(-2) + bias


class BlockLinear(nn.Module):
    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(groups * outputs))

    def forward(self, x: Tensor) -> Tensor:
        return block_linear(x, self.weight, self.bias)


class GatedBlocks(nn.Module):
    """The same product in a module whose forward no tracer can follow: it decides by values."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(groups * outputs))

    def forward(self, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise ValueError("the blocks got a number that is not finite")
        return block_linear(x, self.weight, self.bias)


# 1. The form: rows of inputs (b, s, g, d_in) and of output gradients (b, s, g, d_out). The constant coordinate of the
#    bias and a constant factor on the weight are ``_augment``'s business.
@dataclass(frozen=True)
class BlockForm(Form):
    """Axis roles of ``block_linear``: the first axis is the example, others up to the last are positions."""

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        return self._augment(x.reshape(x.shape[0], -1, self.groups, self.inputs))

    def rows_g(self, g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], -1, self.groups, self.d_out)

    @property
    def tag(self) -> str:  # layers whose input node and tag are equal share one input factor
        return f"blocks {self.groups}{self._constant}"


# 2. The spelling. After ``at`` its signature is the operation's own. ``view`` follows the weight's axes from the stored
#    parameter to here (it may have been transposed or scaled); what cannot be read is refused, never guessed.
@spelling(block_linear)
def _block_linear(at: Site, x: Any, weight: Any, bias: Any) -> Match:
    operand = at.weight(weight)
    view = operand.view
    if view.ndim != 3:
        raise Refused("meets block_linear with another number of axes than three")
    groups, outputs, inputs = view.shape
    return match_blocks(at, x, operand, at.bias(bias, groups * outputs))


def match_blocks(at: Site, x: Any, weight: Operand, bias: Operand | None) -> Match:
    """What both spellings have in common: the weight's derived axes are groups, outputs and inputs."""
    view = weight.view
    groups, outputs, inputs = view.shape
    form = BlockForm(groups, outputs, inputs, False, view.order((0, 1, 2)), view.stored, view.scale)
    return Match("block_linear", form, at.data(x), at.node, weight, bias)


# 3. The spelling of a module class: its signature is that of the forward, and ``own`` gives the module's tensors (or
#    refuses one that a parametrisation computes). With this the symbolic front-end keeps calls of the class whole.
@spelling(GatedBlocks)
def _gated_blocks(at: Site, x: Any) -> Match:
    weight = at.own("weight")
    if weight is None:
        raise Refused("is the bias of blocks without weight")
    return match_blocks(at, x, weight, at.own("bias"))


class WrongForm(BlockForm):
    """The same with a mistake: blocks and features of the input in the wrong order. All shapes are right."""

    def rows_a(self, x: Tensor, *aux: Tensor) -> Tensor:
        return self._augment(x.reshape(x.shape[0], -1, self.inputs, self.groups).mT.contiguous())


def build_model() -> nn.Module:
    """64 - 48 - 32 - 10, the first two layers block-diagonal."""
    torch.manual_seed(0)
    return nn.Sequential(BlockLinear(4, 16, 12), nn.Tanh(), GatedBlocks(2, 24, 16), nn.Tanh(), nn.Linear(32, 10))


def verify() -> list[str]:
    """Prove the form against autograd, and that the proof can fail; returns what it says of the wrong form."""
    net, x = build_model().double(), torch.randn(6, 64, dtype=torch.float64)
    captured = capture(net, Call.of(net, (x,)), "symbolic")
    found = detect(captured, net)
    assert not found.uncovered
    assert [layer.params for layer in found.layers[:2]] == [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    assert prove(captured, found, net, (x,)) == []  # the same weight and bias gradients as autograd's
    block = found.layers[0]
    uses = tuple(replace(use, form=WrongForm(**vars(use.form))) for use in block.uses)
    return prove(captured, Detection((replace(block, uses=uses),), ()), net, (x,))


def train(method: str, lr: float, steps: int = 30) -> float:
    """Loss on all digits after some full-batch steps. ``transform`` runs the proof on the example inputs too."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    model = fxcurv.transform(build_model(), method, example_inputs=(x[:8],), loss="cross_entropy")
    optimizer = fxcurv.optimizer(model, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        model.backward(loss, outputs)
        optimizer.step()
    if method == "kfac":
        assert not model.uncovered
        assert {k: v.shape for k, v in model.factors("0").items()} == {"A": (4, 17, 17), "G": (4, 12, 12)}
        assert {k: v.shape for k, v in model.factors("2").items()} == {"A": (2, 25, 25), "G": (2, 16, 16)}
    return nn.functional.cross_entropy(model(x), y).item()


def main() -> dict[str, float]:
    """Verify the layer and train a net with it; returns final losses by method."""
    (problem,) = verify()[:1]
    print(f"a wrong form is found: {problem}")
    rates = {"sgd": (0.3, 1.0, 2.0), "kfac": (0.1, 0.3)}
    losses = {name: min(train(name, lr) for lr in rates[name]) for name in rates}  # the best rate each
    print(", ".join(f"{name}: loss {loss:.4f}" for name, loss in losses.items()), "after 30 full-batch steps")
    assert losses["kfac"] < losses["sgd"]
    return losses


if __name__ == "__main__":
    main()
