"""The same statistics however they are delivered: micro-batches, checkpointing, a compiled model; and a silent tap."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.layers.tap import TapSpec
from tests.methods.nets import Attention, convnet, mlp
from tests.methods.oracle import accumulate, transform

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:fisher='ggn' runs")]

SOURCES = ("mc", "ggn", "ggn_signs", "empirical")


class Tokens(nn.Module):
    """An embedding, attention and a head, for indices of shape (batch, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.core = nn.Embedding(7, 3), nn.LayerNorm(3), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.norm(self.table(x)))


def normed() -> nn.Sequential:
    net = convnet()
    net.insert(1, nn.BatchNorm2d(4))
    return net


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "mlp": lambda: (mlp(3, 4, 3), torch.randn(6, 3), torch.randint(0, 3, (6,))),
    "conv and batch norm": lambda: (normed(), torch.randn(6, 2, 5, 5), torch.randint(0, 3, (6,))),
    "tokens": lambda: (Tokens(), torch.randint(0, 7, (6, 4)), torch.randint(0, 3, (6, 4))),
}


def states(model: Any) -> dict[str, Tensor]:
    """All curvature state, a basis as the projectors' sum that does not depend on signs."""
    return {k: v for k, v in model.state_dict().items() if k.startswith("curvature.")}


def assert_same(one: Any, other: Any) -> None:
    a, b = states(one), states(other)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, msg=lambda text, key=key: f"{key}: {text}")
    assert any(value.is_floating_point() and value.abs().sum() > 0 for value in a.values())


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_tapped_forward_and_gradients_are_bitwise_those_of_the_plain_model(kind: str, method: str) -> None:
    net, x, y = NETS[kind]()
    twin, _, _ = NETS[kind]()
    twin.load_state_dict(net.state_dict())
    model = transform(net, method, x, loss="cross_entropy", fisher="mc")
    for _ in range(2):
        plain, tapped = twin(x), model(x)
        assert torch.equal(tapped, plain)
        for p in [*net.parameters(), *twin.parameters()]:
            p.grad = None
        F.cross_entropy(plain, y).backward()
        model.backward(F.cross_entropy(tapped, y), tapped)
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        for (name, p), q in zip(net.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(p, q), name
        model.precondition_()


@pytest.mark.parametrize("fisher, backwards", [("mc", 1), ("ggn", 3), ("empirical", 1)])
def test_the_gradient_pass_measures_nothing_again(fisher: str, backwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statistic of outputs is reduced once a curvature pass, every one of inputs once a batch."""
    net, x, y = NETS["mlp"]()
    model = transform(net, "kfac", x, loss="cross_entropy", fisher=fisher)
    measured: list[str] = []
    original = TapSpec.measure

    def counted(spec: TapSpec, index: int, *operands: Any) -> Tensor:
        measured.append(str(spec.statistics[index]))
        return original(spec, index, *operands)

    monkeypatch.setattr(TapSpec, "measure", counted)
    outputs = model(x)
    model.backward(F.cross_entropy(outputs, y), outputs)
    assert {key: measured.count(key) for key in measured} == {
        "gram(0.a)": 1, "count(0.a)": 1, "gram(0.g)": backwards, "gram(2.a)": 1, "count(2.a)": 1, "gram(2.g)": backwards
    }  # fmt: skip


def batches(net: nn.Module, x: Tensor, y: Tensor, parts: list[slice]) -> list[tuple[Tensor, Any, dict[str, Any]]]:
    return [
        (x[part], lambda f, part=part: F.cross_entropy(f, y[part]) * (y[part].numel() / y.numel()), {})
        for part in parts
    ]


@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "diag"])
@pytest.mark.parametrize("kind", ["mlp", "tokens"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_micro_batches_add_up(kind: str, method: str, fisher: str, sharing: str) -> None:
    """Two ragged micro-batches, and three, equal one batch."""
    net, x, y = NETS[kind]()
    whole = transform(net, method, x, loss="cross_entropy", fisher=fisher, sharing=sharing)
    expected = accumulate(whole, batches(net, x, y, [slice(0, 6)]))
    for parts in ([slice(0, 3), slice(3, 6)], [slice(0, 4), slice(4, 5), slice(5, 6)]):
        model = transform(net, method, x, loss="cross_entropy", fisher=fisher, sharing=sharing)
        taken = accumulate(model, batches(net, x, y, parts))
        assert taken.info.terms == expected.info.terms == y.numel()
        for name in (layer.name for layer in model.layers):
            for part, value in whole.factors(name).items():
                if part not in ("QA", "QG"):
                    torch.testing.assert_close(model.factors(name)[part], value)
        for name, direction in expected.direction.items():
            torch.testing.assert_close(taken.direction[name], direction)


def test_micro_batches_by_plain_backward_add_up() -> None:
    net, x, y = NETS["mlp"]()
    whole = transform(net, "kfac", x, loss="cross_entropy", fisher="empirical")
    accumulate(whole, batches(net, x, y, [slice(0, 6)]))
    model = transform(net, "kfac", x, loss="cross_entropy", fisher="empirical")
    split = [(a, b, {"plain": True}) for a, b, _ in batches(net, x, y, [slice(0, 4), slice(4, 6)])]
    assert accumulate(model, split).info.terms == 6
    assert_same(whole, model)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_forwards_before_backwards_keep_their_own_batch(order: tuple[int, int]) -> None:
    """Exact columns of flattened tokens need the number of examples of the forward that made them, not of the last."""
    net = Attention(flat=True)
    parts = [(torch.randn(n, 4, 3), torch.randint(0, 3, (4 * n,))) for n in (2, 4)]
    options = {"loss": "cross_entropy", "fisher": "ggn"}
    one, other = (transform(net, "diag", parts[0][0], **options) for _ in range(2))
    arguments = [(x, lambda f, y=y: F.cross_entropy(f, y) * len(y) / 24, {}) for x, y in parts]
    expected = accumulate(one, arguments).factors("q")["D"]
    other.zero_grad()
    outputs = {i: other(parts[i][0]) for i in order}
    for i in (0, 1):
        other.backward(F.cross_entropy(outputs[i], parts[i][1]) * len(parts[i][1]) / 24, outputs[i])
    other.precondition_()
    torch.testing.assert_close(other.factors("q")["D"], expected)


def test_micro_batches_draw_different_labels() -> None:
    """Two equal micro-batches are two draws: their mean is that of neither."""
    net, x, y = NETS["mlp"]()
    one = transform(net, "kfac", x, loss="cross_entropy")
    single = accumulate(one, batches(net, x, y, [slice(0, 6)])).factors("0")["G"]
    model = transform(net, "kfac", x, loss="cross_entropy")
    double = accumulate(model, batches(net, x, y, [slice(0, 6)] * 2)).factors("0")["G"]
    assert (single - double).norm() > 1e-3 * single.norm()


class Checkpointed(nn.Module):
    """A two-layer net, half of it recomputed in the backward pass; or not."""

    def __init__(self, active: bool, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.active = active

    def body(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(checkpoint(self.body, x, use_reentrant=self.reentrant) if self.active else self.body(x))


@pytest.mark.parametrize("fisher", SOURCES)
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_checkpointing_inside_the_model(method: str, fisher: str) -> None:
    net, x, y = Checkpointed(False), torch.randn(6, 3), torch.randint(0, 3, (6,))
    other = Checkpointed(True)
    other.load_state_dict(net.state_dict())
    models = [transform(m, method, x, loss="cross_entropy", fisher=fisher) for m in (net, other)]
    for _ in range(2):
        directions = [accumulate(m, batches(m, x, y, [slice(0, 4), slice(4, 6)])).direction for m in models]
        for name, direction in directions[0].items():
            torch.testing.assert_close(directions[1][name], direction)
    assert_same(*models)


@pytest.mark.parametrize("fisher", SOURCES)
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_checkpointing_around_the_model(method: str, fisher: str, sharing: str) -> None:
    net, x, y = NETS["tokens"]()
    twin, _, _ = NETS["tokens"]()
    twin.load_state_dict(net.state_dict())
    plain, model = (transform(m, method, x, loss="cross_entropy", fisher=fisher, sharing=sharing) for m in (net, twin))
    expected = accumulate(plain, batches(net, x, y, [slice(0, 4), slice(4, 6)]))
    model.zero_grad()
    for part in (slice(0, 4), slice(4, 6)):
        outputs = checkpoint(model, x[part], use_reentrant=False)
        model.backward(F.cross_entropy(outputs, y[part]) * (y[part].numel() / y.numel()), outputs)
    model.precondition_()
    assert_same(plain, model)
    for name, direction in expected.direction.items():
        torch.testing.assert_close(model.get_parameter(name).grad, direction)


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_reentrant_checkpointing_inside_is_refused_or_equal(fisher: str) -> None:
    """A front-end may inline the checkpoint, which is fine; it must not lose statistics quietly."""
    net, x, y = Checkpointed(False), torch.randn(6, 3), torch.randint(0, 3, (6,))
    other = Checkpointed(True, reentrant=True)
    other.load_state_dict(net.state_dict())
    plain, model = (transform(m, "kfac", x, loss="cross_entropy", fisher=fisher) for m in (net, other))
    accumulate(plain, batches(net, x, y, [slice(0, 6)]))
    try:
        accumulate(model, batches(other, x, y, [slice(0, 6)]))
    except FxcurvError as error:
        assert "use_reentrant=False" in str(error)
    else:
        assert_same(plain, model)


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_reentrant_checkpointing_around_the_model_is_refused(fisher: str) -> None:
    net, x, y = NETS["mlp"]()
    model = transform(net, "kfac", x, loss="cross_entropy", fisher=fisher)
    outputs = checkpoint(model, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(FxcurvError, match="use_reentrant=False"):
        model.backward(F.cross_entropy(outputs, y), outputs)


QUICK = {
    ("mlp", "mc", "aot_eager"),
    ("mlp", "ggn", "eager"),
    ("mlp", "empirical", "eager"),
    ("tokens", "ggn", "aot_eager"),
}
COMPILED = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(NETS, ("mc", "ggn", "empirical"), ("eager", "aot_eager"))
]


@pytest.mark.parametrize("kind, fisher, backend", COMPILED)
def test_a_compiled_model_delivers_the_same(kind: str, fisher: str, backend: str) -> None:
    torch._dynamo.reset()
    net, x, y = NETS[kind]()
    twin, _, _ = NETS[kind]()
    twin.load_state_dict(net.state_dict())
    plain, model = (transform(m, "ekfac", x, loss="cross_entropy", fisher=fisher, solve_every=2) for m in (net, twin))
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        for m, run in ((plain, plain), (model, compiled)):
            m.zero_grad()
            outputs = run(x)
            m.backward(F.cross_entropy(outputs, y), outputs)
            m.precondition_()
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert_same(plain, model)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_with_rows_that_are_kept(backend: str) -> None:
    """Without the pass ``sink`` a slot is made during the forward pass, shaped like its rows."""
    torch._dynamo.reset()
    net, x, y = NETS["mlp"]()
    options = {"loss": "cross_entropy", "fisher": "ggn"}
    plain, model = (transform(net, "kfac", x, disable=off, **options) for off in ((), ("sink",)))
    accumulate(plain, batches(net, x, y, [slice(0, 6)]))
    net.zero_grad()
    outputs = torch.compile(model, backend=backend)(x)
    model.backward(F.cross_entropy(outputs, y), outputs)
    model.precondition_()
    assert_same(plain, model)


def test_off_steps_and_evaluation_run_the_plain_model() -> None:
    net, x, y = NETS["mlp"]()
    model = fxcurv.transform(net, "kfac", example_inputs=(x,), loss="cross_entropy", factor_every=2)
    kinds = []
    for _ in range(4):
        model.zero_grad()
        outputs = model(x)
        kinds.append("Tap" in str(_functions(outputs.grad_fn)))
        model.backward(F.cross_entropy(outputs, y), outputs)
        model.precondition_()
    assert kinds == [True, False, True, False]
    model.eval()
    assert "Tap" not in str(_functions(model(x).grad_fn))


def _functions(node: Any) -> set[str]:
    found, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is not None:
            found.add(node.name())
            stack += [parent for parent, _ in node.next_functions]
    return found
