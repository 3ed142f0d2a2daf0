"""THOR: blocks against dense block-diagonal factors, the trace rule on scripted traces, what settled layers save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.ops.blocks import block_loss, dense_blocks
from fxcurv.layers.tap import TapSpec
from fxcurv.methods.parts.blocks import block_size_table
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import kron, step, transform

pytestmark = pytest.mark.usefixtures("float64")
DAMPING = 0.1


def once(net: nn.Module, x: Tensor, y: Tensor, method: str = "thor", **options: Any) -> Any:
    return step(
        net, method, x, lambda f: F.cross_entropy(f, y), loss="cross_entropy",
        **{"fisher": "empirical", "damping": DAMPING, "factor_every": 1, **options},
    )  # fmt: skip


CASES = {
    "linear": lambda: (mlp(5, 7, 3), torch.randn(6, 5), torch.randint(0, 3, (6,)), {"0": 1, "2": 1}),
    "conv": lambda: (convnet(), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), {"0": 1, "2": 1, "5": 1}),
    "grouped": lambda: (convnet(2), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,)), {"0": 2, "2": 1, "5": 1}),
    "tokens": lambda: (Attention(), torch.randn(3, 4, 3), torch.randint(0, 3, (3, 4)), {"q": 1, "v": 1, "head": 1}),
}


def positions(kind: str, name: str) -> int:
    """Rows of a layer for one loss term; a token is a term."""
    return {"0": 25, "2": 4}.get(name, 1) if kind in ("conv", "grouped") else 1


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_direction_is_the_dense_solve_with_block_diagonal_factors(kind: str, size: int) -> None:
    """Checks (2) and, with one block, (1): (1/T) (G/T + sqrt(l/T))^-1 V (A + sqrt(l/T))^-1 on the cut factors."""
    net, x, y, names = CASES[kind]()
    whole = once(net, x, y, "kfac", damping_scheme="sqrt")
    taken = once(net, x, y, block_size=size, trace_rule="none")
    for name, groups in names.items():
        t, factors = positions(kind, name), whole.factors(name)
        gradient, direction = taken.pair(name, groups)
        for k in range(groups):
            a, g = (factors[s][k] if groups > 1 else factors[s] for s in "AG")
            a, g = (m * torch.block_diag(*[torch.ones(size, size)] * (len(m) // size + 1))[: len(m), : len(m)]
                    if size < len(m) else m for m in (a, g))  # fmt: skip
            root = (DAMPING / t) ** 0.5
            left, right = g / t + root * torch.eye(len(g)), a + root * torch.eye(len(a))
            expected = torch.linalg.solve(left, gradient[k]) @ right.inverse() / t
            torch.testing.assert_close(direction[k], expected)


def test_one_block_is_kfac_with_sqrt_damping() -> None:
    """Check (1), on vectors: equal to the last bit but for the order of sums."""
    net, x, y, _ = CASES["linear"]()
    mine, theirs = once(net, x, y), once(net, x, y, "kfac", damping_scheme="sqrt")
    for name, direction in theirs.direction.items():
        torch.testing.assert_close(mine.direction[name], direction, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(7, 5), (4, 4), (1, 9)])
@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_block_apply_is_the_dense_product(shape: tuple[int, int], size: int) -> None:
    V, (o, i) = torch.randn(shape), shape
    left, right = (OPS["block_gram"](torch.randn(6, 1, 1, d), size) for d in (o, i))
    expected = dense_blocks(left, o) @ V @ dense_blocks(right, i)
    torch.testing.assert_close(OPS["block_apply"](V, left, right), expected)


def test_embedding_is_dense_kfac_with_one_hot_rows() -> None:
    """Check (4)."""
    torch.manual_seed(3)
    words, y = torch.randint(0, 6, (5,)), torch.randint(0, 3, (5,))
    table = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3))
    plain = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3))
    plain[0].weight.data = table[0].weight.detach().T.clone()
    plain[1].load_state_dict(table[1].state_dict())
    mine = once(table, words, y, block_size=2)
    dense = once(plain, F.one_hot(words, 6).double(), y, block_size=1000)
    short = once(plain, F.one_hot(words, 6).double(), y, block_size=2)
    torch.testing.assert_close(mine.direction["0.weight"].T, short.direction["0.weight"])
    torch.testing.assert_close(once(table, words, y).direction["0.weight"].T, dense.direction["0.weight"])


def test_wide_sides_stay_diagonal() -> None:
    net, x, y, _ = CASES["linear"]()
    taken = once(net, x, y, block_size=2, max_factor_dim=5)
    full = once(net, x, y, "kfac", damping_scheme="sqrt")
    a = full.factors("0")["A"].diagonal()
    g = full.factors("0")["G"].diagonal()
    gradient, direction = (m[0] for m in taken.pair("0"))
    root = DAMPING**0.5
    torch.testing.assert_close(direction, gradient / (g + root)[:, None] / (a + root))


@pytest.mark.parametrize("kind", CASES)
def test_block_is_the_block_diagonal_product(kind: str) -> None:
    net, x, y, names = CASES[kind]()
    taken, whole = once(net, x, y, block_size=2), once(net, x, y, "kfac")
    for name, groups in names.items():
        block = taken.model.block(name)
        for k in range(groups):
            a, g = (whole.factors(name)[s][k] if groups > 1 else whole.factors(name)[s] for s in "AG")
            a, g = (torch.stack([torch.where(torch.arange(len(m)) // 2 == j // 2, m[j], 0.0) for j in range(len(m))])
                    for m in (a, g))  # fmt: skip
            torch.testing.assert_close(block[k] if groups > 1 else block, kron({"A": a, "G": g}))


# The trace rule ----------------------------------------------------------------------------------------------------


class Script:
    """A linear layer fed with inputs of a scripted scale, so that traces are known: tr A tr G + l d_in d_out."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 2, bias=False))
        self.x, self.y = torch.randn(6, 3), torch.randn(6, 2)
        options = {"damping": 1e-3, "factor_every": 1, **options}
        self.model = transform(self.net, "thor", self.x, loss="mse", fisher="ggn", **options)

    def feed(self, scale: float) -> dict[str, Tensor]:
        """One step on inputs times the root of ``scale``: the trace of A is ``scale`` times that of the first."""
        self.model.zero_grad()
        outputs = self.model(self.x * scale**0.5)
        self.model.backward(F.mse_loss(outputs, self.y), outputs)
        self.model.precondition_()
        return {k[len("curvature.0.") :]: v.clone() for k, v in self.model.state_dict().items() if ".0." in k}

    @property
    def first(self) -> float:
        return float(self.x.square().sum() / 6)


@pytest.mark.parametrize("saves", [True, False])
def test_rule_accepts_keeps_and_stops_for_good(saves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check (3): the branches on a scripted sequence, on the device alone and with what the host saves.

    D against the last *accepted* trace: first, 0.5, 0.0047, 0.0093, 0.014 (0.0046 against the last one), 0.53
    downwards, 0.00014 (settled), over, over.
    """
    s = Script(trace_rule="stop", damping=1e-9)
    if not saves:
        monkeypatch.setattr(type(s.model._engine), "look_at_retired", lambda self: None)
    scales = [1.0, 1.5, 1.507, 1.514, 1.521, 0.7, 0.7001, 9.0, 9.0]
    accepted = [1.0, 1.5, 1.5, 1.5, 1.521, 0.7, 0.7, 0.7, 0.7]
    retired = [0, 0, 0, 0, 0, 0, 1, 1, 1]
    for scale, kept, over in zip(scales, accepted, retired, strict=True):
        state = s.feed(scale)
        assert float(state["A"].trace()) == pytest.approx(kept * s.first, rel=1e-9), scale
        assert float(state["retired"]) == over
        expected = torch.linalg.inv(state["A"] + 1e-9**0.5 * torch.eye(3))
        torch.testing.assert_close(state["A.inverse"], expected)


def test_trace_counts_the_damping() -> None:
    """tr(F + lambda I): with a strong damping the same change of F is no change."""
    for damping, moved in ((1e-6, True), (1e3, False)):
        s = Script(damping=damping)
        s.feed(1.0)
        assert (float(s.feed(1.5)["A"].trace()) == pytest.approx(1.5 * s.first)) is moved
        trace = s.model.state_dict()["curvature.0.trace"]
        a, g = s.model.factors("0").values()
        if moved:
            torch.testing.assert_close(trace, a.trace() * g.trace() + damping * 6)


@pytest.mark.parametrize("rule, scales, traces", [
    ("thor", [1.0, 1.005, 1.005, 1.02], [1.0, 1.0, 1.0, 1.02]),  # settle = 0: never over
    ("none", [1.0, 1.0001, 1.0], [1.0, 1.0001, 1.0]),
])  # fmt: skip
def test_named_rules(rule: str, scales: list[float], traces: list[float]) -> None:
    s = Script(trace_rule=rule)
    for scale, trace in zip(scales, traces, strict=True):
        state = s.feed(scale)
        assert float(state["A"].trace()) == pytest.approx(trace * s.first)
        assert not float(state.get("retired", torch.zeros(())))


def test_numbers_override_the_rule() -> None:
    assert fxcurv.methods.thor(trace_rule="stop", trace_settle=0.2).hyper["trace_settle"] == 0.2
    assert fxcurv.methods.thor(trace_rule="stop").hyper["trace_settle"] == 0.001
    assert fxcurv.methods.thor().hyper["trace_move"] == 0.01
    with pytest.raises(FxcurvError, match="trace_rule='often' is unknown"):
        fxcurv.methods.thor(trace_rule="often")
    with pytest.raises(FxcurvError, match="block_size=0.5 must be a whole number"):
        fxcurv.methods.thor(block_size=0.5)


def test_an_average_takes_accepted_batches_alone() -> None:
    s = Script(ema=0.5, trace_move=0.1)
    traces = [float(s.feed(scale)["A"].trace()) / s.first for scale in (1.0, 1.05, 2.0, 1.95, 4.0)]
    assert traces == pytest.approx([1.0, 1.0, 1.5, 1.5, 2.75])


# What settled layers save ------------------------------------------------------------------------------------------


def deep(fisher: str = "empirical", **options: Any) -> Any:
    torch.manual_seed(1)
    net, x, y = mlp(4, 5, 5, 3), torch.randn(8, 4), torch.randint(0, 3, (8,))
    options = {"trace_rule": "stop", "factor_every": 1, "damping": DAMPING, **options}
    return transform(net, "thor", x, loss="cross_entropy", fisher=fisher, **options), x, y


def go(model: Any, x: Tensor, y: Tensor, steps: int, lr: float = 0.0) -> Any:
    info = None
    for _ in range(steps):
        model.zero_grad()
        outputs = model(x)
        model.backward(F.cross_entropy(outputs, y), outputs)
        info = model.precondition_()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(lr * p.grad)
    return info


@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_when_all_have_settled_nothing_is_captured(fisher: str) -> None:
    model, x, y = deep(fisher)
    assert go(model, x, y, 1).statistics
    info = go(model, x, y, 1)  # the same batch: nothing has moved
    assert info.statistics and model._engine.retired == {"0", "2", "4"}
    assert model.due() == {"statistics": False, "refresh": False}
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("curvature.0")}
    info = go(model, x, y, 3, lr=0.1)
    assert not info.statistics and not info.refresh
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert model.due(statistics=True)["statistics"]  # on request


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_a_settled_layer_is_neither_measured_nor_inverted(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = deep(fisher, trace_settle=0.0)
    go(model, x, y, 1)
    model._engine.states.values[model._engine.states.by_key["2.retired"]] = torch.ones(())
    model._engine.look_at_retired()
    measured: list[str] = []
    measure = TapSpec.measure

    def noting(self: TapSpec, index: int, *rest: Any) -> Tensor:
        measured.append(str(self.statistics[index]))
        return measure(self, index, *rest)

    monkeypatch.setattr(TapSpec, "measure", noting)
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("curvature.2")}
    other = model.state_dict()["curvature.0.A"].clone()
    go(model, x * 2, y, 1)
    assert {key for key in measured if "gram" in key} == {"gram(0.a)", "gram(0.g)", "gram(4.a)", "gram(4.g)"}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not torch.equal(model.state_dict()["curvature.0.A"], other)
    engine = model._engine
    source = engine.lowered.slice(engine.due(), bundled=True, retired=engine.retired).source
    whole = engine.lowered.slice(engine.due(), bundled=True).source
    assert source.count("inverse") < whole.count("inverse")
    assert "gram_2" not in {key for key in source.split() if key.startswith("stat_gram_2")}


@pytest.mark.parametrize("disable", [(), ("batch",), ("share",), ("fuse",), ("defer",), ("memory",)])
def test_dropping_layers_changes_no_result(disable: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training with and without what the host saves; some layers settle on the way."""
    results = []
    for saves in (True, False):
        model, x, y = deep(trace_settle=0.02, trace_move=0.05, disable=disable)
        if not saves:
            monkeypatch.setattr(type(model._engine), "look_at_retired", lambda self: None)
            monkeypatch.setattr(type(model._engine), "retired", frozenset())
            monkeypatch.setattr(model._engine.retirement, "complete", lambda states: False)
        go(model, x, y, 12, lr=0.3)
        monkeypatch.undo()
        over = {k: float(v) for k, v in model.state_dict().items() if k.endswith("retired")}
        results.append((over, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert sum(results[0][0].values()) > 0
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_settled_layers_are_remembered_and_resumed() -> None:
    model, x, y = deep()
    go(model, x, y, 2)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    other, _, _ = deep()
    assert other.due()["statistics"]
    other.load_state_dict(saved)
    assert not other.due()["statistics"] and other._engine.retired == {"0", "2", "4"}
    go(model, x, y, 3, lr=0.1)
    go(other, x, y, 3, lr=0.1)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_is_not_reached_has_no_candidate() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.both = nn.Linear(3, 3), nn.Linear(3, 3), True

        def forward(self, x: Tensor, use: Tensor) -> Tensor:
            return self.one(x) + self.two(x.detach()[: int(use.shape[0])]).sum(0)

    net = Branch()
    x, y = torch.randn(5, 3), torch.randint(0, 3, (5,))
    model = fxcurv.transform(net, "thor", example_inputs=(x, x), loss="cross_entropy", frontend="dynamo",
                             factor_every=1, solve_every=1, trace_rule="stop", proofs=False)  # fmt: skip
    for use in (x, x[:0], x[:0]):
        model.zero_grad()
        outputs = model(x, use)
        model.backward(F.cross_entropy(outputs, y), outputs)
        model.precondition_()
    assert float(model.state_dict()["curvature.two.retired"]) == 0
    assert float(model.state_dict()["curvature.one.retired"]) == 1
    assert model._engine.retired == {"one"}


# Block sizes -------------------------------------------------------------------------------------------------------


def test_block_loss_and_table() -> None:
    root = torch.randn(8, 8)
    coupled, apart = root @ root.T, torch.block_diag(root[:4, :4] @ root[:4, :4].T, torch.eye(4))
    for size in (1, 2, 4, 8):
        cut = torch.block_diag(*(coupled[k : k + size, k : k + size] for k in range(0, 8, size)))
        ratio = torch.linalg.eigvalsh(cut @ cut.T)[-1] / torch.linalg.eigvalsh(coupled @ coupled.T)[-1]
        torch.testing.assert_close(block_loss(coupled, size), 1 - ratio.sqrt())
    assert float(block_loss(apart, 4)) == pytest.approx(0, abs=1e-12) and float(block_loss(coupled, 8)) == 0
    table = block_size_table({"x": coupled, "y": apart}, sizes=(1, 4, 8))
    assert [row[0] for row in table] == [1, 4, 8]
    assert [row[1] for row in table] == [0.0, 0.5, 1.0]
    assert [row[2] for row in table] == pytest.approx([1 / 64, 1 / 4, 1.0])
