"""Layers that own a part of a weight: a sliced fused weight does what separate weights would do, to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.layers.region import Place, Region, by_name, parts_of, place_of, rest
from tests.layers.check import FRONTENDS, Fn, assert_exact, find, reasons

pytestmark = pytest.mark.usefixtures("float64")
METHODS = ("kfac", "ekfac", "foof", "diag")
D, H = 4, 3  # features and outputs of one part


def _rows(m):
    return m.w[:H], m.w[H : 2 * H], m.w[2 * H :], m.b[:H], m.b[H : 2 * H], m.b[2 * H :]


def _chunk(m):
    w, b = m.w.chunk(3), m.b.chunk(3)
    return w[0], w[1], w[2], b[0], b[1], b[2]


def _split(m):
    q, k, v = torch.split(m.w, [H, H, H])
    b, c, d = m.b.split(H, dim=0)
    return q, k, v, b, c, d


def _narrow(m):
    parts = [m.w.narrow(0, k * H, H) for k in range(3)]
    return (*parts, *(torch.narrow(m.b, 0, k * H, H) for k in range(3)))


def _unbind(m):
    q, k, v = m.w.unbind(0)
    b, c, d = m.b.unbind()
    return q, k, v, b, c, d


def _index(m):
    return m.w[0], m.w.select(0, 1), m.w[-1], m.b[0], m.b[1, :], m.b[2, ...]


def _viewed(m):
    w, b = m.w.view(3, H, D), m.b.view(3, H)
    return w[0], w[1], w[2], b[0], b[1], b[2]


def _transposed(m):
    w = m.w[:, :H], m.w[:, H : 2 * H], m.w[:, 2 * H : 9]
    return (*(part.t() for part in w), m.b[:H], m.b[H : 2 * H], m.b[2 * H :])


def _turned(m):
    q, k, v = m.w.t().chunk(3)
    return q, k, v, m.b[:H], m.b[H : 2 * H], m.b[2 * H :]


# how the parts are cut out: (function, shape of the weight, shape of the bias)
CUTS = {
    "rows": (_rows, (3 * H, D), (3 * H,)), "chunk": (_chunk, (3 * H, D), (3 * H,)),
    "split": (_split, (3 * H, D), (3 * H,)), "narrow": (_narrow, (3 * H, D), (3 * H,)),
    "unbind": (_unbind, (3, H, D), (3, H)), "index": (_index, (3, H, D), (3, H)),
    "viewed": (_viewed, (3 * H, D), (3 * H,)), "columns": (_transposed, (D, 3 * H), (3 * H,)),
    "turned": (_turned, (D, 3 * H), (3 * H,)),
}  # fmt: skip


class Fused(nn.Module):
    """Attention with one sliced weight for query, key and value."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.cut, weight, bias = CUTS[cut]
        self.w, self.b = nn.Parameter(torch.randn(weight) / 2), nn.Parameter(torch.randn(bias) / 2)
        self.out = nn.Linear(H, 3)

    def forward(self, x):
        q, k, v, b, c, d = self.cut(self)
        q, k, v = F.linear(x, q, b), F.linear(x, k, c), F.linear(x, v, d)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))


class Apart(nn.Module):
    """The same with three layers."""

    def __init__(self, fused: nn.Module, parts) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(D, H), fused.out
        with torch.no_grad():
            for mine, theirs in zip(self.parts(), parts, strict=True):
                mine.copy_(theirs)

    def parts(self):
        """Weights and biases in the order of the cuts."""
        return self.q.weight, self.k.weight, self.v.weight, self.q.bias, self.k.bias, self.v.bias

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)).mean(1))


class Whole(nn.Module):
    """One product with all outputs, then three parts of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * H), nn.Linear(H, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))


def _batch():
    return torch.randn(6, 5, D), torch.tensor([0, 1, 2, 0, 1, 2])


def _train(model, x, y, steps=3):
    """Gradients after ``precondition_`` of every step."""
    taken = []
    for _ in range(steps):
        model.zero_grad()
        out = model(x)
        model.backward(F.cross_entropy(out, y), out)
        model.precondition_()
        taken.append({name: p.grad.clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return taken


def _transform(net, x, method, **options):
    return fxcurv.transform(net, method, example_inputs=(x,), loss="cross_entropy", solve_every=1, **options)


def _same(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def _assert_equal_factors(fused, names, apart):
    for mine, theirs in zip(names, ("q", "k", "v"), strict=True):
        found, expected = fused.factors(mine), apart.factors(theirs)
        assert set(found) == set(expected) and found
        for part in found:
            value, wanted = found[part], expected[part]
            if part in ("QA", "QG"):  # a basis is known up to signs
                value, wanted = value.abs(), wanted.abs()
            _same(value, wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", CUTS)
def test_sliced_weight_equals_separate_layers(cut, method):
    net, (x, y) = Fused(cut), _batch()
    reference = Apart(net, [part.detach() for part in net.cut(net)])
    fused = _transform(net, x, method)
    apart = _transform(reference, x, method)
    names = [layer.name for layer in fused.layers][:3]
    assert len(fused.layers) == 4 and len(set(names)) == 3 and fused.uncovered == () and fused.report().covered == 1.0
    with torch.random.fork_rng():
        head = {name: value.clone() for name, value in net.out.state_dict().items()}
        mine = _train(fused, x, y)
        net.out.load_state_dict(head)  # the head is shared, so that both start from the same
        theirs = _train(apart, x, y)
    for found, expected in zip(mine, theirs, strict=True):
        holder = nn.ParameterDict({"w": found["w"], "b": found["b"]})
        for value, name in zip(net.cut(holder), ("q", "k", "v", "q", "k", "v"), strict=True):
            _same(value, expected[f"{name}.{'weight' if value.dim() == 2 else 'bias'}"])
    _assert_equal_factors(fused, names, apart)


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("cut", CUTS)
def test_rows_give_the_gradient_of_their_part(cut, frontend):
    detection = assert_exact(Fused(cut), _batch()[0], frontend=frontend)
    assert [layer.shape for layer in detection.layers] == [(1, H, D + 1)] * 3 + [(1, 3, H + 1)]
    assert not detection.uncovered


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_a_fused_layer_equal_separate_layers(method):
    net, (x, y) = Whole(), _batch()
    reference = Apart(net, [*net.qkv.weight.detach().chunk(3), *net.qkv.bias.detach().chunk(3)])
    fused = _transform(net, x, method, fused={"q?v": 3})
    apart = _transform(reference, x, method)
    names = [layer.name for layer in fused.layers][:3]
    assert names == ["qkv[0:3]", "qkv[3:6]", "qkv[6:9]"] and fused.report().covered == 1.0
    head = {name: value.clone() for name, value in net.out.state_dict().items()}
    mine = _train(fused, x, y)
    net.out.load_state_dict(head)
    for found, expected in zip(mine, _train(apart, x, y), strict=True):
        for kind in ("weight", "bias"):
            _same(found[f"qkv.{kind}"], torch.cat([expected[f"{name}.{kind}"] for name in "qkv"]))
    _assert_equal_factors(fused, names, apart)


def test_blocks_share_one_input_slot():
    net, (x, _) = Whole(), _batch()
    program = _transform(net, x, "kfac", fused={"qkv": 3}).program
    keys = {role.key for role in program.inputs("stat")}
    assert {key for key in keys if "gram(qkv" in key and key.endswith(".a)")} == {"gram(qkv[0:3].a)"}
    shared = [role.keys for role in program.inputs("state") if "qkv[0:3].A" in role.keys]
    assert shared == [("qkv[0:3].A", "qkv[3:6].A", "qkv[6:9].A")]


def test_blocks_in_a_new_call_and_after_saving(tmp_path):
    net, (x, y) = Whole(), _batch()
    fused = _transform(net, x, "kfac", fused={"qkv": 3})
    fused.eval()
    fused.due(statistics=True)  # another kind of call: captured anew
    out = fused(x)
    fused.backward(F.cross_entropy(out, y), out)
    assert not fused.precondition_().fallback and fused.factors("qkv[3:6]")["G"].any()
    fxcurv.save(fused, tmp_path / "artifact")
    loaded = fxcurv.load(tmp_path / "artifact", net, example_inputs=(x,))
    assert loaded.program.text() == fused.program.text()


@pytest.mark.parametrize(
    "fused, words",
    [
        ({"nothing": 3}, "fits no layer"),
        ({"qkv": 4}, "do not divide"),
        ({"qkv": 0}, "at least 1"),
        ({"qkv": 1.5}, "whole"),
    ],
)
def test_blocks_that_do_not_fit(fused, words):
    with pytest.raises(FxcurvError, match=words):
        _transform(Whole(), _batch()[0], "kfac", fused=fused)


def test_blocks_of_a_grouped_convolution_are_refused():
    net = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(FxcurvError, match="ranges of its outputs"):
        _transform(net, torch.randn(6, 4, 3), "kfac", fused={"0": 2})


def test_blocks_of_a_convolution():
    net, (x, y) = nn.Sequential(nn.Conv1d(5, 6, 2), nn.Flatten(), nn.Linear(18, 3)), _batch()
    whole, model = _transform(net, x, "kfac", ema=0.0), _transform(net, x, "kfac", ema=0.0, fused={"0": 3})
    for one in (whole, model):
        out = one(x)
        one.backward(F.cross_entropy(out, y), out)
        one.precondition_()
    g = whole.factors("0")["G"]
    for k in range(3):
        found = model.factors(f"0[{2 * k}:{2 * k + 2}]")
        _same(found["G"], g[2 * k : 2 * k + 2, 2 * k : 2 * k + 2])
        _same(found["A"], whole.factors("0")["A"])


@pytest.mark.parametrize("method", METHODS)
def test_resume_and_artifact(method, tmp_path):
    net, (x, y) = Fused("columns"), _batch()
    model = _transform(net, x, method, ema=0.9)
    _train(model, x, y, 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fxcurv.save(model, tmp_path / "artifact")
    first = _train(model, x, y, 2)
    other = Fused("columns")
    loaded = fxcurv.load(tmp_path / "artifact", other, example_inputs=(x,))
    loaded.load_state_dict(state)
    for mine, theirs in zip(first, _train(loaded, x, y, 2), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(FxcurvError, match="compile it again"):
        fxcurv.load(tmp_path / "artifact", Fused("chunk"))


def test_a_layer_that_fails_keeps_its_part_of_the_gradient():
    net, (x, y) = Fused("chunk"), _batch()
    model = _transform(net, x, "kfac", kl_clip=None)
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    plain = net.w.grad.clone()
    net.w.grad[H : 2 * H] = torch.nan
    with pytest.warns(fxcurv.FxcurvWarning):
        info = model.precondition_()
    assert info.fallback == ("w[3:6]",)
    assert net.w.grad[H : 2 * H].isnan().all()
    assert net.w.grad[:H].isfinite().all() and not torch.allclose(net.w.grad[:H], plain[:H])


def test_skipping_one_part_leaves_its_gradient():
    net, (x, y) = Fused("chunk"), _batch()
    model = _transform(net, x, "kfac", skip="w[3:6]")
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    plain = net.w.grad.clone()
    model.precondition_()
    changed = [not torch.equal(net.w.grad[k : k + H], plain[k : k + H]) for k in (0, H, 2 * H)]
    assert changed == [True, False, True]
    rows = {row.parameter: row for row in model.report().rows}
    assert rows["w[3:6]"].reason == "its layer was skipped" and rows["w[0:3]"].status == "approximated"
    assert model.report().covered == pytest.approx(1 - (H * D + H) / sum(p.numel() for p in net.parameters()))


def test_what_is_left_of_a_weight_is_listed():
    def forward(m, x):
        return (x @ m.w[:, 1:3]) @ m.v

    net, x = Fn(forward, w=(4, 6), v=(2, 3)), torch.randn(6, 4)
    model = _transform(net, x, "kfac", proofs=True)
    assert [layer.name for layer in model.layers] == ["w[1:3]", "v"]
    left = "This part of it is never used in this graph."
    assert model.uncovered == (("w[:, 0:1]", left), ("w[:, 3:6]", left))
    assert model.report().covered == pytest.approx((8 + 6) / 30)
    with pytest.raises(FxcurvError, match=r"w\[:, 0:1\]"):
        _transform(net, x, "kfac", strict=True)
    out, y = model(x), torch.tensor([0, 1, 2, 0, 1, 2])
    model.backward(F.cross_entropy(out, y), out)
    model.precondition_()
    assert not net.w.grad[:, 0].any() and not net.w.grad[:, 3:].any() and net.w.grad[:, 1:3].all()


def test_same_part_twice_is_one_layer():
    net = Fn(lambda m, x: torch.tanh(x @ m.w[:, :3]) @ m.w[:, :3], w=(3, 5))
    (layer,) = assert_exact(net, torch.randn(6, 3)).layers
    assert len(layer.uses) == 2 and layer.name == "w[0:3]"


def test_whole_use_is_divided_like_the_parts():
    def forward(m, x):
        return F.linear(x, m.w, m.b).tanh().sum(1) + F.linear(x.sin(), m.w[2:5], m.b[2:5]).sum(1)

    detection = assert_exact(Fn(forward, w=(6, 3), b=(6,)), torch.randn(5, 3))
    found = [(layer.name, len(layer.uses), layer.shape) for layer in detection.layers]
    assert found == [("w[0:2]", 1, (1, 2, 4)), ("w[2:5]", 2, (1, 3, 4)), ("w[5:6]", 1, (1, 1, 4))]


def test_part_of_a_part_is_divided_with_its_bias():
    def forward(m, x):
        return F.linear(x, m.w[1:6], m.b[1:6]).tanh().sum(1) + F.linear(x.sin(), m.w[3:4], m.b[3:4]).sum(1)

    detection = assert_exact(Fn(forward, w=(6, 3), b=(6,)), torch.randn(5, 3))
    found = [(layer.name, layer.weight_key, layer.bias_key) for layer in detection.layers]
    assert found == [(f"w{part}", f"w{part}", f"b{part}") for part in ("[1:3]", "[3:4]", "[4:6]")]
    assert set(reasons(detection)) == {"w[0:1]", "b[0:1]"}


def test_whole_use_with_another_bias():
    def forward(m, x):
        return F.linear(x, m.w, m.b).tanh().sum(1) + F.linear(x.sin(), m.w[2:5]).sum(1)

    detection = assert_exact(Fn(forward, w=(6, 3), b=(6,)), torch.randn(5, 3))
    assert [layer.shape[2] for layer in detection.layers] == [4, 3, 4]
    assert set(reasons(detection)) == {"b[2:5]"}


# name: (forward, shapes, what is uncovered, words of the reason)
REFUSED = {
    "overlap": (lambda m, x: x @ m.p[:, :3] + x @ m.p[:, 1:4], {"p": (3, 4)}, {"p"}, "overlap"),
    "crossing axes": (
        lambda m, x: (x[:, :2] @ m.p[:2]).sum(1) + (x @ m.p[:, :2]).sum(1), {"p": (3, 4)}, {"p"}, "overlap",
    ),
    "whole and input part": (
        lambda m, x: (x @ m.p).sum(1) + (x[:, :2] @ m.p[:2]).sum(1), {"p": (3, 4)}, {"p"}, "not ranges of its outputs",
    ),
    "square whole and input part": (
        lambda m, x: (x @ m.p).sum(1) + (x[:, :2] @ m.p[:2]).sum(1), {"p": (3, 3)}, {"p"}, "not ranges of its outputs",
    ),
    "two axes": (lambda m, x: x[:, :2] @ m.p[:2, 1:], {"p": (3, 4)}, {"p"}, "two of its axes"),
    "step": (lambda m, x: x @ m.p[:, ::2], {"p": (3, 4)}, {"p"}, "with a step"),
    "apart": (lambda m, x: x @ m.p.view(3, 2, 2)[:, :, 0], {"p": (3, 4)}, {"p"}, "lie apart"),
    "also summed": (
        lambda m, x: x @ m.p[:, :2] + m.p[:, 1:].exp().sum(), {"p": (3, 4)}, {"p"}, "exp",
    ),
    "other part summed": (
        lambda m, x: x @ m.p[:, :2] + m.p[:, 2:].exp().sum(), {"p": (3, 4)}, {"p[:, 2:4]"}, "exp",
    ),
    "part of a split joined": (
        lambda m, x: x @ m.p[:, :2] + torch.cat([m.p[:, 2:].split(1, 1)[0], x]).sum(), {"p": (3, 4)}, {"p[:, 2:4]"},
        "joined",
    ),
    "size of the data": (lambda m, x: x @ m.p[:, : x.shape[1]], {"p": (3, 4)}, {"p"}, "that the graph computes"),
    "bias of two": (
        lambda m, x: F.linear(x, m.q, m.p[:2]) + F.linear(x, m.r, m.p[1:3]), {"q": (2, 3), "r": (2, 3), "p": (3,)},
        {"p"}, "several weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_or_left(name):
    forward, shapes, uncovered, words = REFUSED[name]
    detection = find(Fn(forward, **shapes), torch.randn(4, 3))[1]
    missing = reasons(detection)
    assert set(missing) == uncovered
    assert all(words in reason and reason.startswith("It ") for reason in missing.values())


def test_a_tied_table_read_in_part_by_the_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.b = nn.Embedding(7, 4), nn.Parameter(torch.randn(7))

        def forward(self, tokens):
            return F.linear(self.table(tokens).tanh(), self.table.weight[:5])

    detection = find(Tied(), torch.randint(7, (3, 2)))[1]
    assert "not ranges of its outputs" in reasons(detection)["table.weight"]


def test_keys():
    place = Place("a.w", Region(1, 2, 5))
    assert place.key == "a.w[:, 2:5]" and place_of(place.key, {"a.w"}) == place
    assert place_of("b[0:3]", {"b[0:3]"}) == Place("b[0:3]")  # a parameter of that very name
    assert Place("w", Region(2, 0, 4)).key == "w[:, :, 0:4]"
    assert place_of("w[0:4]", {"w"}) == Place("w", Region(0, 0, 4))
    with pytest.raises(FxcurvError, match="no parameter"):
        place_of("v[0:2]", {"w"})
    assert place.of(torch.arange(12).view(2, 6)).tolist() == [[2, 3, 4], [8, 9, 10]]
    assert place.shape((2, 6)) == (2, 3)


def test_what_parts_leave():
    first, last = Place("w", Region(0, 1, 2)), Place("w", Region(0, 4, 6))
    assert rest("w", (6, 2), [last, first]) == (Place("w", Region(0, 0, 1)), Place("w", Region(0, 2, 4)))
    assert rest("w", (6, 2), []) == (Place("w"),) and rest("w", (6, 2), [Place("w")]) == ()
    assert [place.key for place in parts_of("w", (6, 2), [last, first])] == ["w[0:1]", "w[1:2]", "w[2:4]", "w[4:6]"]
    assert by_name([first, Place("v"), last]) == {"w": [first, last], "v": [Place("v")]}
    assert first.overlaps(Place("w")) and not first.overlaps(last) and first.overlaps(Place("w", Region(1, 0, 1)))
    assert not first.overlaps(Place("v"))
