"""What follows a layer: one function, one reader, or nothing that can be relied on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcurv
from fxcurv.layers.sequence import ACTIVATIONS, Follower, followers
from tests.layers.check import FRONTENDS, find


class Net(nn.Module):
    """Three linear layers around a function given as a module or a plain callable, then the given forward."""

    def __init__(self, between, forward=None):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.between = between if isinstance(between, nn.Module) else None
        self.function = [between, forward]

    def act(self, x):
        return self.between(x) if self.between is not None else self.function[0](x)

    def forward(self, x):
        if self.function[1] is not None:
            return self.function[1](self, x)
        return self.b(self.act(self.a(x)))


def following(model, frontend="symbolic", rows=5):
    _, detection = find(model, torch.randn(rows, 4), frontend=frontend)
    return followers(detection.layers, model)


SPELLINGS = [
    *((name, spelled.module()) for name, spelled in ACTIVATIONS.items()),
    *(("tanh", f) for f in (torch.tanh, F.tanh, lambda x: x.tanh(), lambda x: x.tanh_())),
    *(("sigmoid", f) for f in (torch.sigmoid, F.sigmoid, torch.special.expit, lambda x: x.sigmoid())),
    *(("relu", f) for f in (torch.relu, F.relu, F.relu_, lambda x: x.relu(), lambda x: F.relu(x, inplace=True))),
    *(("leaky_relu", f) for f in (F.leaky_relu, lambda x: F.leaky_relu(x, 0.01), lambda x: F.leaky_relu_(x))),
    ("softplus", F.softplus),
    ("softplus", lambda x: F.softplus(x, beta=1.0)),
    ("relu", nn.ReLU(inplace=True)),
    ("identity", nn.Identity()),
    ("identity", lambda x: x),
    ("relu", nn.Sequential(nn.ReLU(), nn.Dropout(0.5).eval())),
    ("tanh", nn.Sequential(nn.Identity(), nn.Tanh(), nn.Dropout(0.0))),
    ("tanh", lambda x: F.dropout(torch.tanh(x), 0.5, training=False)),
]


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(("name", "between"), SPELLINGS)
def test_function_and_next_layer(name, between, frontend):
    model = Net(between)
    found = following(model, frontend)
    assert found == {"a": Follower(name, "b", aligned=True), "b": Follower("identity", "", last=True)}
    x = torch.linspace(-4, 4, 60)
    if name in ACTIVATIONS:  # the name means the function
        torch.testing.assert_close(model.act(x.clone()), ACTIVATIONS[name].module()(x))


UNKNOWN = [
    nn.LeakyReLU(0.2),
    lambda x: F.leaky_relu(x, 0.2),
    lambda x: F.leaky_relu(x, negative_slope=0.2),
    nn.Softplus(beta=2.0),
    lambda x: F.softplus(x, 2.0),
    nn.GELU(),
    lambda x: torch.tanh(2 * x),
    lambda x: x + 1,
    lambda x: x * x,
    lambda x: torch.relu(x.flip(0)),
]


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("between", UNKNOWN)
def test_anything_else_is_unknown(between, frontend):
    assert following(Net(between), frontend)["a"] == Follower()


class Twisted(nn.Tanh):
    def forward(self, x):
        return -super().forward(x)


def test_a_module_with_a_forward_of_its_own_is_what_its_forward_says():
    assert following(Net(Twisted()))["a"] == Follower("tanh")  # and the sign behind it is no layer


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(
    "between",
    [
        nn.Sequential(nn.Tanh(), nn.Dropout(0.5)),
        nn.Sequential(nn.Tanh(), nn.Flatten()),
        lambda x: 2 * torch.tanh(x),
        lambda x: torch.tanh(x).sigmoid(),
        lambda x: F.dropout(torch.tanh(x), 0.5, training=True),
    ],
)
def test_a_function_is_known_where_the_next_layer_is_not(between, frontend):
    assert following(Net(between), frontend)["a"] == Follower("tanh")


def residual(m, x):
    h = torch.tanh(m.a(x))
    return m.b(h) + h


def two_readers(m, x):
    h = torch.tanh(m.a(x))
    return m.b(h) + m.c(h)


def read_before(m, x):
    s = m.a(x)
    return m.b(torch.tanh(s)) + s


def reads_a_size(m, x):
    h = torch.tanh(m.a(x))
    return m.b(h).reshape(h.shape)


def repeated(m, x):
    return m.b(torch.tanh(m.a(torch.tanh(m.a(x)))))


def next_repeated(m, x):
    return m.b(torch.tanh(m.b(torch.tanh(m.a(x)))))


def with_hidden(m, x):
    h = m.a(x)
    return m.b(h), h


FORKS = [
    (residual, {"a": Follower("tanh"), "b": Follower()}),
    (two_readers, {"a": Follower("tanh"), "b": Follower(), "c": Follower()}),
    (read_before, {"a": Follower(), "b": Follower()}),
    (reads_a_size, {"a": Follower("tanh", "b", aligned=True), "b": Follower()}),
    (repeated, {"a": Follower(), "b": Follower("identity", "", last=True)}),
    (next_repeated, {"a": Follower("tanh"), "b": Follower()}),
    (with_hidden, {"a": Follower(), "b": Follower()}),
    (lambda m, x: (m.a(x), m.b(x)), {"a": Follower(), "b": Follower()}),
    (lambda m, x: m.a(x).sigmoid(), {"a": Follower("sigmoid")}),
]


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize(("forward", "expected"), FORKS)
def test_forks_and_repetitions(forward, expected, frontend):
    assert following(Net(None, forward), frontend) == expected


def scaled(m, x):
    return F.linear(torch.tanh(m.a(x)), 2 * m.b.weight)


def columns(m, x):
    return m.b.weight @ torch.tanh(m.a.weight @ x)


def other_axis(m, x):
    return m.b.weight @ torch.tanh(m.a(x))


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("forward", [scaled, columns, other_axis])
def test_rows_that_are_others_are_not_aligned(forward, frontend):
    found = following(Net(None, forward), frontend, rows=4)
    assert found["a"] == Follower("tanh", "b")


class Fused(nn.Module):
    """One product whose halves are two layers."""

    def __init__(self):
        super().__init__()
        self.qk, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.qk(x)))


def test_a_part_of_a_product_feeds_nobody():
    model = fxcurv.transform(Fused(), "foof", example_inputs=(torch.randn(3, 4),), fused={"qk": 2})
    found = {t.name: (t.activation, t.feeds, t.last) for t in model._engine.facts.targets}
    parts = [name for name in found if name.startswith("qk")]
    assert len(parts) == 2 and all(found[name] == ("tanh", "", False) for name in parts)


def test_a_layer_that_was_left_out_is_no_next_layer():
    model = fxcurv.transform(Net(nn.Tanh()), "foof", example_inputs=(torch.randn(3, 4),), skip=["b"])
    (target,) = model._engine.facts.targets
    assert (target.activation, target.feeds) == ("tanh", "")


@pytest.mark.parametrize(
    ("loss", "link"),
    [
        ("cross_entropy", "softmax"),
        ("bce", "sigmoid"),
        ("mse", "identity"),
        ("gaussian", "identity"),
        (None, "identity"),
    ],
)
def test_the_loss_says_what_the_model_output_goes_through(loss, link, tmp_path):
    x = torch.randn(3, 4)
    model = fxcurv.transform(Net(nn.Tanh()), "foof", example_inputs=(x,), loss=loss)
    facts = [(t.name, t.activation, t.feeds, t.last) for t in model._engine.facts.targets]
    assert facts == [("a", "tanh", "b", False), ("b", link, "", True)]
    fxcurv.save(model, tmp_path / "artifact")
    loaded = fxcurv.load(tmp_path / "artifact", Net(nn.Tanh()))
    assert loaded._engine.facts == model._engine.facts


def test_a_layer_that_feeds_a_norm_says_so():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    _, detection = find(model, torch.randn(2, 1, 4, 4))
    expected = {"0": Follower("identity", "1"), "1": Follower("relu"), "4": Follower("identity", "", last=True)}
    assert followers(detection.layers, model) == expected
