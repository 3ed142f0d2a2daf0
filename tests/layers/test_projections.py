"""Projections of attention as real models write them: covered in full, proved, and with the factors of dense rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons

pytestmark = pytest.mark.usefixtures("float64")
B, T, E, H = 4, 5, 8, 2
D = E // H


class Noted(nn.Module):
    """A classifier on tokens whose forward notes, when run plainly, what goes in and out of every product."""

    frozen: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.log = None
        self.o, self.head = nn.Linear(E, E), nn.Linear(E, 3)
        self.make()
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.4)
            parameter.requires_grad_(name not in self.frozen)

    def make(self):
        """Parameters of the case."""

    def note(self, name, x, y):
        """Remember one product that has a gradient; the identity on y."""
        if self.log is not None and y.requires_grad:
            y.retain_grad()
            self.log[name] = (x, y)
        return y

    def layer(self, name, x, module=None):
        """A module's product, noted."""
        return self.note(name, x, (module or getattr(self, name))(x))

    def forward(self, x):
        y = self.layer("o", self.mix(x).reshape(x.shape[0], -1, E))
        return self.layer("head", y.mean(1))

    def heads(self, x, count=H):
        """(B, T, count D) to (B, count, T, D)."""
        return x.unflatten(-1, (count, D)).transpose(1, 2)


class Separate(Noted):
    """Three layers, one sdpa."""

    def make(self):
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def mix(self, x):
        q, k, v = (self.heads(self.layer(name, x)) for name in "qkv")
        return self.attend(q, k, v).transpose(1, 2)


class Causal(Separate):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


class Masked(Separate):
    def attend(self, q, k, v):
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ByMatmul(Separate):
    def attend(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(D)
        return torch.matmul(scores.softmax(-1), v)


class ByAt(Separate):
    def attend(self, q, k, v):
        return F.softmax(q @ k.mT * D**-0.5, dim=-1) @ v


class ByEinsum(Separate):
    def attend(self, q, k, v):
        weights = torch.softmax(torch.einsum("bhtd,bhsd->bhts", q, k), dim=-1)
        return torch.einsum("bhts,bhsd->bhtd", weights, v)


class ByBmm(Separate):
    def attend(self, q, k, v):
        q, k, v = (x.reshape(-1, T, D) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(1, T, T), q, k.transpose(1, 2), alpha=0.5)
        return torch.bmm(torch.softmax(scores, -1), v).view(-1, H, T, D)


class Grouped(Noted):
    """Keys and values of one head serve several queries."""

    def make(self):
        self.q, self.k, self.v = nn.Linear(E, E), nn.Linear(E, D), nn.Linear(E, D, bias=False)

    def more(self, x):
        return x.repeat_interleave(H, dim=1)

    def mix(self, x):
        q = self.heads(self.layer("q", x))
        k, v = (self.more(self.heads(self.layer(name, x), 1)) for name in "kv")
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class GroupedByExpand(Grouped):
    def more(self, x):
        b, n, t, d = x.shape
        return x[:, :, None].expand(b, n, H, t, d).reshape(b, n * H, t, d)


class GroupedInside(Grouped):
    def mix(self, x):
        q = self.heads(self.layer("q", x))
        k, v = (self.heads(self.layer(name, x), 1) for name in "kv")
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


class HeadAxes(Noted):
    """Weights with an axis of heads, as einsum users write them."""

    def make(self):
        self.q, self.k, self.v = (nn.Parameter(torch.empty(E, H, D)) for _ in range(3))
        self.b, self.out = nn.Parameter(torch.empty(H, D)), nn.Parameter(torch.empty(H, D, E))

    def mix(self, x):
        q = self.note("q", x, torch.einsum("bte,ehd->bthd", x, self.q) + self.b)
        k = self.note("k", x, torch.einsum("bte,ehd->bthd", x, self.k))
        v = self.note("v", x, torch.einsum("bte, ehd -> bthd", x, self.v))
        weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", weights, v)
        return self.note("out", y.flatten(2), torch.einsum("bthd,hde->bte", y, self.out))


class Adapter(Noted):
    """A low-rank adapter beside a frozen weight."""

    frozen = ("w.weight", "w.bias")
    scale = 2.0

    def make(self):
        self.w = nn.Linear(E, E)
        self.a, self.b = nn.Parameter(torch.empty(E, 2)), nn.Parameter(torch.empty(2, E))

    def mix(self, x):
        low = self.note("a", x, x @ self.a)
        return torch.tanh(self.layer("w", x) + self.note("b", low, low @ self.b) * self.scale)


class TrainedAdapter(Adapter):
    frozen = ()


class AdapterModules(Noted):
    frozen = ("w.weight",)

    def make(self):
        self.w, self.down, self.up = nn.Linear(E, E), nn.Linear(E, 2, bias=False), nn.Linear(2, E, bias=False)
        self.w.bias = None

    def mix(self, x):
        low = self.layer("down", x)
        return torch.tanh(self.w(x) + 0.5 * self.layer("up", low))


class Transposed(Noted):
    """The weight stored (inputs, outputs), data flattened for addmm."""

    def make(self):
        self.w, self.b = nn.Parameter(torch.empty(E, 3 * E)), nn.Parameter(torch.empty(3 * E))

    def mix(self, x):
        y = torch.addmm(self.b, x.view(-1, E), self.w)
        q, k, v = self.note("w", x.reshape(-1, E), y).view(x.shape[0], T, 3 * E).split(E, dim=2)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Fused(Noted):
    """One layer for query, key and value."""

    def make(self):
        self.qkv = nn.Linear(E, 3 * E)

    def cut(self, y):
        q, k, v = y.chunk(3, dim=-1)
        return self.heads(q), self.heads(k), self.heads(v)

    def mix(self, x):
        q, k, v = self.cut(self.layer("qkv", x))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class FusedReshaped(Fused):
    def cut(self, y):
        y = y.reshape(y.shape[0], -1, 3, H, D).permute(2, 0, 3, 1, 4)
        return y[0], y[1], y[2]


class FusedUnbound(Fused):
    def cut(self, y):
        q, k, v = y.unflatten(-1, (3, H, D)).transpose(1, 3).unbind(2)
        return q, k, v


class FusedSplit(Fused):
    def cut(self, y):
        q, k, v = torch.split(y, [E, E, E], dim=-1)
        return self.heads(q), self.heads(k), self.heads(v)


class FusedSliced(Fused):
    def cut(self, y):
        return self.heads(y[..., :E]), self.heads(y[..., E : 2 * E]), self.heads(y[..., 2 * E :])


class FusedByHead(Fused):
    def cut(self, y):
        y = y.view(y.shape[0], -1, H, 3 * D).transpose(1, 2)
        q, k, v = y.chunk(3, -1)
        return q, k, v


class MultiQuery(Fused):
    """One head of keys and values in the fused layer."""

    def make(self):
        self.qkv = nn.Linear(E, E + 2 * D)

    def cut(self, y):
        q, k, v = y.split([E, D, D], dim=-1)
        return self.heads(q), self.heads(k, 1).expand(-1, H, -1, -1), self.heads(v, 1).expand(-1, H, -1, -1)


CASES = [
    Separate, Causal, Masked, ByMatmul, ByAt, ByEinsum, ByBmm, Grouped, GroupedByExpand, GroupedInside, HeadAxes,
    Adapter, TrainedAdapter, AdapterModules, Transposed, Fused, FusedReshaped, FusedUnbound, FusedSplit, FusedSliced,
    FusedByHead, MultiQuery,
]  # fmt: skip


def _dense(model, x, y):
    """A and G of every noted product: mean of [x 1] [x 1]^T over rows, sum of g g^T over rows by example."""
    model.log = {}
    try:
        F.cross_entropy(model(x), y, reduction="sum").backward()
        found = {}
        for name, (a, z) in model.log.items():
            a = a.detach().reshape(-1, a.shape[-1])
            g = z.grad.reshape(a.shape[0], -1)
            found[name] = (torch.cat([a, torch.ones(len(a), 1)], 1), g.T @ g / len(x))
    finally:
        model.log = None
        model.zero_grad()
    return found


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("case", CASES)
def test_factors_are_those_of_dense_rows(case, frontend):
    model, x, y = case(), torch.randn(B, T, E), torch.tensor([0, 1, 2, 0])
    expected = _dense(model, x, y)
    module = fxcurv.transform(
        model, "kfac", example_inputs=(x,), loss="cross_entropy", fisher="empirical", ema=0.0, frontend=frontend,
        strict=True,
    )  # fmt: skip
    assert module.report().covered == 1.0 and module.report().frontend == frontend
    out = module(x)
    module.backward(F.cross_entropy(out, y), out)
    module.precondition_()
    names = {layer.name for layer in module.layers}
    assert names == set(expected)
    for name in names:
        factors, (rows, g) = module.factors(name), expected[name]
        rows = rows[:, : factors["A"].shape[0]]
        torch.testing.assert_close(factors["A"], rows.T @ rows / len(rows))
        torch.testing.assert_close(factors["G"], g)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_stack_of_heads(frontend):
    """Weights (heads, inputs, outputs) against data without heads: a block a head."""

    def forward(m, x):
        return torch.tanh(x.unsqueeze(1) @ m.w).transpose(1, 2).flatten(2) @ m.o

    model = Fn(forward, w=(H, E, D), o=(E, 3))
    detection = assert_exact(model, torch.randn(B, T, E), frontend=frontend, shapes=True)
    assert [layer.shape for layer in detection.layers] == [(H, D, E), (1, 3, E)] and not detection.uncovered


def test_an_adapter_added_to_the_weight_is_listed():
    def forward(m, x):
        return F.linear(x, m.w + m.up @ m.down)

    model = Fn(forward, frozen=("w",), w=(4, 4), up=(4, 2), down=(2, 4))
    missing = reasons(find(model, torch.randn(B, 4))[1])
    assert set(missing) == {"up", "down"} and all("another parameter" in reason for reason in missing.values())


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "diag"])
def test_fused_layer_in_blocks(method):
    """fused= on a fused layer: G in blocks, the same A."""
    x, y = torch.randn(B, T, E), torch.tensor([0, 1, 2, 0])
    model = Fused()
    module = fxcurv.transform(model, method, example_inputs=(x,), loss="cross_entropy", fused={"q*": 3}, strict=True)
    names = [layer.name for layer in module.layers][:3]
    assert names == ["qkv[0:8]", "qkv[8:16]", "qkv[16:24]"]
    out = module(x)
    module.backward(F.cross_entropy(out, y), out)
    module.precondition_()
    assert all(set(module.factors(name)) == set(module.factors("o")) for name in names)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_another_batch_and_length_after_capture(frontend):
    model, x = Fused(), torch.randn(B, T, E)
    module = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy", frontend=frontend)
    for batch, length in ((B, T), (2, T), (6, 3)):
        x, y = torch.randn(batch, length, E), torch.arange(batch) % 3
        out = module(x)
        torch.testing.assert_close(out, model(x))
        module.backward(F.cross_entropy(out, y), out)
        assert not module.precondition_().fallback
