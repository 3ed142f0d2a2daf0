"""Grouped products: one node with sorted rows, or a loop over experts, are the same layer of as many groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.layers.experts import gathered, own_rows
from tests.layers.check import find

needs_operator = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
BLOCKS = {
    "all": [3, 5, 9],
    "one without rows": [4, 4, 9],
    "rows behind the last": [2, 3, 7],
    "only the last": [0, 0, 9],
}


def loop(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    starts = [0, *ends[:-1]]
    blocks = [x[i:j] @ matrix for i, j, matrix in zip(starts, ends, weight, strict=True)]
    return torch.cat([*blocks, x.new_zeros(len(x) - ends[-1], weight.shape[2])])


@pytest.mark.parametrize("name", BLOCKS)
def test_the_parts_are_the_grouped_product(name: str):
    ends = BLOCKS[name]
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 4), (3, 4, 2)))
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor(ends, dtype=dtype)
        found = gathered(torch.einsum("ngi,gio->ngo", own_rows(x, offsets, 3), weight), offsets)
        expected = loop(x, weight, ends)
        torch.testing.assert_close(found, expected)
        column = torch.randn_like(expected)
        for mine, theirs in zip(
            torch.autograd.grad(found, (x, weight), column),
            torch.autograd.grad(expected, (x, weight), column),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


class Experts(nn.Module):
    """Tokens go to the expert of their largest score; rows are sorted, multiplied in blocks and sorted back."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, 8, 16) / 3)
        self.down = nn.Parameter(torch.randn(*((3, 8, 16) if transposed else (3, 16, 8))) / 3)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        weights, chosen = scores.max(-1)
        order = chosen.argsort(stable=True)
        offsets = torch.bincount(chosen, minlength=3).cumsum(0).to(torch.int32)
        h = torch.tanh(F.grouped_mm(x[order], self.up, offs=offsets))
        h = F.grouped_mm(h, self.down.transpose(1, 2) if self.transposed else self.down, offs=offsets)
        return torch.zeros_like(h).index_copy(0, order, h) * weights[:, None]


@needs_operator
@pytest.mark.parametrize("transposed", [False, True])
def test_a_mixture_of_experts_is_covered(transposed: bool):
    torch.manual_seed(0)
    net, x = Experts(transposed), torch.randn(16, 8)
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), loss="mse", fisher="empirical", ema=0)
    assert model.report().covered == 1.0
    shapes = {layer.name: (layer.kind, layer.shape) for layer in model.layers}
    assert shapes["up"] == ("linear", (3, 16, 8)) and shapes["down"] == ("linear", (3, 8, 16))
    out = model(x)
    torch.testing.assert_close(out, net(x))
    loss = F.mse_loss(out, torch.zeros_like(out))
    model.backward(loss, out)
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    F.mse_loss(net(x), torch.zeros_like(out)).backward()
    torch.testing.assert_close(grads, [p.grad for p in net.parameters()])


@needs_operator
def test_an_expert_s_factors_are_made_of_its_own_rows():
    torch.manual_seed(0)
    net, x = Experts(False), torch.randn(16, 8)
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), loss="mse", fisher="empirical", ema=0)
    out = model(x)
    model.backward(F.mse_loss(out, torch.zeros_like(out)), out)
    model.precondition_()
    weights, chosen = net.router(x).softmax(-1).max(-1)
    pre = torch.stack([x[i] @ net.up[chosen[i]] for i in range(16)]).detach().requires_grad_()
    again = torch.stack([torch.tanh(pre[i]) @ net.down[chosen[i]] * weights[i] for i in range(16)])
    (g,) = torch.autograd.grad(F.mse_loss(again, torch.zeros_like(again)), pre)
    for part, rows in (("A", x), ("G", g)):
        moments = torch.stack([rows[chosen == k].T @ rows[chosen == k] for k in range(3)])
        factor = model.factors("up")[part]
        torch.testing.assert_close(factor, moments * (factor[0].trace() / moments[0].trace()), rtol=1e-4, atol=1e-6)


@needs_operator
def test_without_shapes_the_reason_says_what_to_do():
    _, detection = find(Experts(False), torch.randn(16, 8))
    reasons = {item.parameter: item.reason for item in detection.uncovered}
    assert set(reasons) == {"up", "down"} and "pass example inputs" in reasons["up"]
