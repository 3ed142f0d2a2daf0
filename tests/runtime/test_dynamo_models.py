"""Models under the dynamo front-end: factors, gradients and updates are those of the symbolic capture."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcurv
from fxcurv import capture
from fxcurv.capture import kept
from fxcurv.errors import FxcurvError, FxcurvWarning
from tests.capture.nets import build
from tests.runtime.steps import batch, mlp


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train_step(model: Any, args: tuple[Any, ...], read: Callable[[Any], Tensor] = lambda output: output) -> None:
    model.zero_grad()
    output = read(model(*args))
    loss = F.cross_entropy(output.flatten(0, -2), torch.arange(output.flatten(0, -2).shape[0]) % output.shape[-1])
    model.backward(loss, output)


def assert_equal_steps(one: Any, two: Any, batches: list[tuple[Any, ...]], read: Any = lambda output: output) -> None:
    """Factors, gradients and updates of two transformed models agree in every step."""
    assert [layer.name for layer in one.layers] == [layer.name for layer in two.layers] != []
    for args in batches:
        for model in (one, two):
            train_step(model, args, read)
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(parameter.grad, two.get_parameter(name).grad, rtol=1e-10, atol=1e-12)
        for model in (one, two):
            model.precondition_()
        for layer in one.layers:
            mine, theirs = one.factors(layer.name), two.factors(layer.name)
            assert mine.keys() == theirs.keys() and mine
            for key in mine:
                torch.testing.assert_close(mine[key], theirs[key], rtol=1e-10, atol=1e-12)
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(parameter.grad, two.get_parameter(name).grad, rtol=1e-8, atol=1e-10)


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "mlp": lambda: (mlp(), (batch()[0],)),
    **{name: (lambda name=name: build(name)[:2]) for name in ("convnet", "tied", "functional", "attention")},
}


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_measures_what_symbolic_does(name, method):
    model, args = CASES[name]()
    options = {"example_inputs": args, "loss": "cross_entropy"}
    one = fxcurv.transform(copy.deepcopy(model), method, frontend="symbolic", **options)
    two = fxcurv.transform(model, method, frontend="dynamo", **options)
    assert two.report().frontend == "dynamo" and two.report().covered == one.report().covered
    halves = tuple(a[: a.shape[0] // 2 + 1] for a in args)
    assert_equal_steps(one, two, [args, halves, args])


@dataclass
class ModelOutput:
    """What a transformer library returns: a dataclass that is registered as a pytree."""

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


pytree.register_pytree_node(
    ModelOutput,
    lambda output: ([output.logits, output.loss, output.hidden_states], None),
    lambda values, _: ModelOutput(*values),
    serialized_type_name="tests.runtime.ModelOutput",
)


class Decoder(nn.Module):
    """A causal language model in library style: keyword arguments, a mask checked by value, tied head, ModelOutput."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.norm, self.q, self.k, self.v = nn.LayerNorm(8), *(nn.Linear(8, 8) for _ in range(3))
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **options: Any
    ) -> ModelOutput:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        if self.breaks and attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        y = self.norm(x)
        scores = self.q(y) @ self.k(y).transpose(1, 2) / math.sqrt(8)
        length = input_ids.shape[1]
        scores = scores.masked_fill(~torch.tril(torch.ones(length, length, dtype=torch.bool)), float("-inf"))
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None, :] == 0, float("-inf"))
        hidden = x + self.out(scores.softmax(-1) @ self.v(y))
        logits = self.head(hidden)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return ModelOutput(logits, loss, (hidden,) if options.get("output_hidden_states") else None)


def tokens(b: int, t: int) -> Tensor:
    return torch.randint(11, (b, t), generator=torch.Generator().manual_seed(b * t))


def test_a_graph_break_inside_changes_no_statistic():
    torch.manual_seed(0)
    whole, broken = Decoder(False).double(), Decoder(True).double()
    broken.load_state_dict(whole.state_dict())
    example = (tokens(4, 6), torch.ones(4, 6, dtype=torch.long))
    one = fxcurv.transform(whole, "kfac", example_inputs=example, loss="cross_entropy")
    two = fxcurv.transform(broken, "kfac", example_inputs=example, loss="cross_entropy")
    assert (one.report().frontend, two.report().frontend) == ("symbolic", "dynamo")
    assert two.report().covered == one.report().covered == 1.0
    assert any("test_dynamo_models.py" in n and "attention_mask.all()" in n for n in two.report().notes)
    text = two.graph.text()
    assert two.graph.rest and "tap" in text and text.count("def forward") == len(two.graph.graphs)
    padded = torch.ones(3, 5, dtype=torch.long)
    padded[0, 3:] = 0  # takes the other branch
    batches = [example, (tokens(2, 6), example[1][:2]), (tokens(3, 5), padded), (tokens(1, 4), example[1][:1, :4])]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxcurvWarning)
        assert_equal_steps(one, two, batches, lambda output: output.logits)


@pytest.mark.parametrize("kwargs", [{}, {"output_hidden_states": True}, {"labels": tokens(4, 6)}])
def test_output_structures_and_keyword_only_calls(kwargs):
    torch.manual_seed(0)
    model = Decoder(True).double()
    call = {"input_ids": tokens(4, 6), "attention_mask": torch.ones(4, 6, dtype=torch.long), **kwargs}
    plain = copy.deepcopy(model)(**call)
    cm = fxcurv.transform(model, "kfac", example_kwargs=call, loss="cross_entropy", frontend="dynamo")
    output = cm(**call)
    assert type(output) is ModelOutput
    assert torch.equal(output.logits, plain.logits)
    assert (output.loss is None) == (plain.loss is None)
    assert output.loss is None or torch.equal(output.loss, plain.loss)
    assert (output.hidden_states is None) == (plain.hidden_states is None)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


class Stack(nn.Module):
    """Equal blocks with breaks between them: Dynamo runs one graph for all, whose nodes have the same names."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = Block()

    def forward(self, x: Tensor) -> Tensor:
        for index in range(3):
            x = self.block(index, x)
        return self.out(x)

    def block(self, index: int, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return self.blocks[index](x)


class Chain(nn.Module):
    """Three breaks in a row."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        if self.breaks and x.sum() > 1e9:
            return x
        x = self.b(x).tanh()
        if self.breaks and x.sum() > 1e9:
            return x
        x = self.c(x).tanh()
        if self.breaks and x.sum() > 1e9:
            return x
        return self.d(x)


@pytest.mark.parametrize("net", [Stack, Chain])
def test_several_pieces_measure_what_one_graph_does(net):
    torch.manual_seed(0)
    whole, broken = net(False).double(), net(True).double()
    broken.load_state_dict(whole.state_dict())
    x = torch.randn(6, 4, dtype=torch.float64)
    one = fxcurv.transform(whole, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="symbolic")
    two = fxcurv.transform(broken, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="dynamo")
    assert len(two.graph.graphs) == 4 and two.report().covered == 1.0
    assert_equal_steps(one, two, [(x,), (x[:3],), (-x,)])


class Branches(nn.Module):
    """Two branches with a layer each and one layer in both, read twice."""

    def __init__(self, side: str = "") -> None:
        super().__init__()
        self.a, self.left, self.right, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        side = self.side or ("left" if x.sum() > 0 else "right")
        h = self.left(h) if side == "left" else self.right(h)
        return self.out(self.a(h).tanh())


def test_the_other_branch_is_tapped_and_what_is_new_in_it_is_warned_of_once():
    torch.manual_seed(0)
    model = Branches().double()
    x = torch.rand(6, 4, dtype=torch.float64)
    cm = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="dynamo")
    rows = {row.parameter: row for row in cm.report().rows}
    assert rows["left.weight"].layer == "left" and rows["a.weight"].uses == 2
    assert rows["right.weight"].status == "gradient only" and "no captured graph" in rows["right.weight"].reason
    references = {}
    for side in ("left", "right"):  # the same network with the branch decided beforehand
        fixed = Branches(side).double()
        fixed.load_state_dict(model.state_dict())
        references[side] = fxcurv.transform(
            fixed, "kfac", example_inputs=(x,), loss="cross_entropy", layers=["a", "out"], frontend="symbolic", ema=0.0
        )
    cm = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="dynamo", ema=0.0)
    with pytest.warns(FxcurvWarning, match="'right.bias' and 'right.weight' is used, unlike at transform") as caught:
        for side, sign in (("left", 1), ("right", -1), ("right", -1), ("left", 1)):
            for transformed in (cm, references[side]):
                transformed._engine.seed, transformed._engine.step = 7, 0
                train_step(transformed, (sign * x,))
                gradient = transformed.get_parameter("right.weight").grad
                transformed.precondition_()
            for layer in ("a", "out"):
                for key, value in references[side].factors(layer).items():
                    torch.testing.assert_close(cm.factors(layer)[key], value, rtol=1e-10, atol=1e-12)
            if side == "right":
                assert cm.get_parameter("right.weight").grad is not None and bool(gradient.any())
    assert len([w for w in caught if issubclass(w.category, FxcurvWarning)]) == 1


class Hidden(nn.Module):
    """A part that Dynamo is told not to look into."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.again = again

    @torch.compiler.disable
    def outside(self, x: Tensor) -> Tensor:
        return self.a(self.b(x)) if self.again else self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.outside(self.a(x).tanh()).tanh())


def test_what_runs_outside_of_every_graph_is_listed():
    model = Hidden(False).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    cm = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="dynamo")
    assert [layer.name for layer in cm.layers] == ["a", "c"]
    assert {name for name, reason in cm.uncovered if "plain Python" in reason} == {"b.weight", "b.bias"}
    train_step(cm, (x,))
    cm.precondition_()


def test_a_use_outside_of_every_graph_is_found_by_the_proof():
    model = Hidden(True).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(FxcurvError, match=r"Layer 'a' \(linear\): the gradient of 'a.weight' differs"):
        fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="dynamo")


def test_a_forward_in_pieces_is_traced_a_few_times_only():
    torch.manual_seed(0)
    model = Branches().double()
    x = torch.rand(6, 4, dtype=torch.float64)
    cm = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="dynamo")
    counts = []
    for n in (6, 5, 4, 3, 7, 2, 9):
        train_step(cm, (x[:1].expand(n, 4).contiguous(),))
        cm.precondition_()
        (known,) = cm._forwards.known.values()
        counts.append(len(known[0].parts))
    assert counts[-1] == counts[1] <= 2 * counts[0]


def test_copies_loaded_weights_and_other_dtypes_follow():
    torch.manual_seed(0)
    model = Branches().double()
    x = torch.rand(6, 4, dtype=torch.float64)
    cm = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="dynamo")
    other = copy.deepcopy(cm)
    for transformed in (cm, other):
        train_step(transformed, (x,))
        transformed.precondition_()
    grads = {name: p.grad for name, p in cm.named_parameters() if p.grad is not None}
    assert grads and all(torch.equal(grad, other.get_parameter(name).grad) for name, grad in grads.items())
    state = {key: value.clone() for key, value in cm.state_dict().items()}
    cm.load_state_dict(state, assign=True)
    train_step(cm, (x,))
    cm.precondition_()
    cm.float()
    train_step(cm, (x.float(),))
    assert cm.precondition_().step == 2
    assert cm.get_parameter("a.weight").grad.dtype is torch.float32


class Untold(nn.Module):
    """Symbolic tracing does not see that the second call does something else."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (1.0 if isinstance(x, torch.fx.Proxy) else 2.0)


def test_auto_goes_on_when_a_capture_is_not_the_model():
    model, x = Untold().double(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(FxcurvError, match="the captured graph's output differs"):
        fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy", frontend="symbolic")
    cm = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy")
    assert cm.report().frontend == "export"
    train_step(cm, (x,))
    cm.precondition_()


class UntoldInPart(Untold):
    """The same, and a third of its parameters is in no product, whatever the front-end."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain.exp().sum()


def test_auto_goes_on_also_where_it_has_looked_for_more_coverage():
    model, x = UntoldInPart().double(), torch.randn(5, 4, dtype=torch.float64)
    cm = fxcurv.transform(model, "kfac", example_inputs=(x,), loss="cross_entropy")
    report = cm.report()
    assert report.frontend == "export" and 0.5 < report.covered < 0.8 and not report.notes


class Whole(nn.Module):
    """A user's module that symbolic tracing is told to keep as one node; no layer kind knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


def test_auto_prefers_the_capture_that_covers_more(monkeypatch):
    monkeypatch.setattr(kept, "_KEPT", {Whole})
    model, x = nn.Sequential(Whole(), nn.Linear(4, 3)).double(), torch.randn(5, 4, dtype=torch.float64)
    options = {"example_inputs": (x,), "loss": "cross_entropy"}
    assert 0 < fxcurv.transform(model, "kfac", frontend="symbolic", **options).report().covered < 0.6
    report = fxcurv.transform(model, "kfac", **options).report()
    assert (report.frontend, report.covered) == ("export", 1.0)
    assert "export covers 100 % of the elements, symbolic 43 %: export was chosen" in report.notes


def test_auto_captures_once_where_another_capture_cannot_cover_more(monkeypatch):
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    monkeypatch.setitem(capture.FRONTENDS, "export", lambda model, call: pytest.fail("captured twice"))
    x = torch.randn(5, 4, dtype=torch.float64)
    cm = fxcurv.transform(Unused().double(), "kfac", example_inputs=(x,), loss="cross_entropy")
    assert cm.report().frontend == "symbolic" and cm.report().notes == ()
