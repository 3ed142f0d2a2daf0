"""Axis views against real tensors: every step, random sequences of steps, and refusal only where it is needed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxcurv.layers.chain import follow
from fxcurv.layers.view import Refused, View

CHAINS = {
    "t": lambda w: w.t(), "T": lambda w: w.T, "mT": lambda w: w.mT, "torch.t": lambda w: torch.t(w),
    "transpose": lambda w: w.transpose(0, -1), "torch.transpose": lambda w: torch.transpose(w, 0, 1),
    "swapaxes": lambda w: w.swapaxes(-1, 0), "permute": lambda w: w.permute(1, -2),
    "permute list": lambda w: w.permute([1, 0]),
    "torch.permute": lambda w: torch.permute(w, (1, 0)), "movedim": lambda w: w.movedim(0, -1),
    "view": lambda w: w.view(2, 2, -1), "view tuple": lambda w: w.view((4, 2, 3)), "reshape": lambda w: w.reshape(-1),
    "torch.reshape": lambda w: torch.reshape(w, (2, 12)), "flatten": lambda w: w.view(2, 2, 6).flatten(1),
    "flatten part": lambda w: w.view(2, 2, 2, 3).flatten(1, 2), "torch.flatten": lambda w: torch.flatten(w),
    "unsqueeze": lambda w: w.unsqueeze(1), "unsqueeze last": lambda w: w.unsqueeze(-1),
    "squeeze dim": lambda w: w.view(4, 1, 6).squeeze(1), "squeeze kept": lambda w: w.view(4, 1, 6).squeeze(0),
    "times": lambda w: 3 * w, "torch.mul": lambda w: torch.mul(w, 0.5), "method mul": lambda w: w.mul(2.0),
    "over": lambda w: w / 4, "torch.div": lambda w: torch.div(w, 4.0), "minus": lambda w: -w, "neg": lambda w: w.neg(),
    "cast": lambda w: w.to(torch.float64), "double": lambda w: w.double(), "contiguous": lambda w: w.t().contiguous(),
    "clone": lambda w: w.clone(), "several": lambda w: (w.view(2, 2, 6).permute(2, 0, 1) * 2).reshape(6, 4).t() / 3,
}  # fmt: skip


def _through(function, shape):
    """The view that the links of a traced function give."""
    graph = fx.symbolic_trace(function).graph
    view, source = View.of(shape), next(iter(graph.nodes))
    for node in list(graph.nodes)[1:-1]:
        view, source = follow(node, source, view), node
        assert view is not NotImplemented
    return view


def _rebuilt(view, tensor):
    return tensor.permute(view.order(range(view.ndim))).reshape(view.shape) * view.scale


@pytest.mark.parametrize("name", CHAINS)
def test_links(name):
    w = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    torch.testing.assert_close(_rebuilt(_through(CHAINS[name], (4, 6)), w), CHAINS[name](w))


def test_ends_and_what_is_no_link():
    def second(function):
        nodes = list(fx.symbolic_trace(function).graph.nodes)
        return follow(nodes[1], nodes[0], View.of((4, 6)))

    for end in (lambda w: w.detach(), lambda w: w.shape, lambda w: w.size(0), lambda w: w.dtype, lambda w: w.data):
        assert second(end) is None
    for other in (lambda w: w * w, lambda w: w + w, lambda w: w.exp(), lambda w: w.grad):
        assert second(other) is NotImplemented
    for refused in (lambda w: w.view(3, 8), lambda w: w.to(torch.int64), lambda w: w.view(w.size(0), -1)):
        with pytest.raises(Refused):
            nodes = list(fx.symbolic_trace(refused).graph.nodes)
            follow(nodes[-2], nodes[0], View.of((4, 6)))


def test_expanded_axes_carry_nothing():
    view = View.of((4, 6)).expand([5, -1, 6])
    assert view.shape == (5, 4, 6) and view.axes[0] == ()
    with pytest.raises(Refused):
        view.reshape([20, 6])
    with pytest.raises(Refused):
        View.of((4, 6)).expand([8, 6])


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)


@given(SIZES, st.lists(st.integers(0, 10**6), max_size=5))
def test_random_steps(stored, steps):
    """The view agrees with the tensor; it refuses an order only if no permutation of whole axes gives it."""
    tensor = torch.arange(math.prod(stored)).reshape(stored)
    view, derived = View.of(stored), tensor
    for step in steps:
        if step % 2:
            orders = list(itertools.permutations(range(derived.dim())))
            order = orders[step // 2 % len(orders)]
            view, derived = view.permute(order), derived.permute(order)
        else:
            n = derived.numel()
            parts = range(1, n + 1)
            shapes = [(a, b, n // a // b) for a in parts if n % a == 0 for b in parts if n // a % b == 0]
            shape = shapes[step // 2 % len(shapes)]
            try:
                view, derived = view.reshape(shape), derived.reshape(shape)
            except Refused:
                return
    flat = derived.reshape(-1)
    orders = itertools.permutations(range(len(stored)))
    fitting = [order for order in orders if torch.equal(tensor.permute(order).reshape(-1), flat)]
    try:
        assert view.order(range(view.ndim)) in fitting
    except Refused:
        assert not fitting
