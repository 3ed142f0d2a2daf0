"""What else must hold on several ranks, each a function of (rank, world) that runs on all of them.

What one returns must be equal on all ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.runtime import distributed
from tests.dist.cases import CASES, OFTEN, Case, Training
from tests.dist.nets import mlp

Found = dict[str, Tensor]


@contextmanager
def refusal(text: str) -> Iterator[None]:
    """The body raises an :class:`FxcurvError` with this text in it."""
    try:
        yield
    except FxcurvError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing was raised about '{text}'")


def state(model: Any) -> Found:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a: Found, b: Found) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def simple(rank: int, fisher: str = "mc", **options: Any) -> tuple[Any, Tensor, Tensor]:
    """A model, and this rank's batch."""
    torch.manual_seed(0)
    model = fxcurv.transform(mlp(), "kfac", loss="cross_entropy", fisher=fisher, **{**OFTEN, **options})
    torch.manual_seed(1 + rank)
    return model, torch.randn(6, 5), torch.randint(0, 3, (6,))


def backward(model: Any, wrapper: Any, x: Tensor, y: Tensor) -> None:
    wrapper.zero_grad()
    out = wrapper(x)
    model.backward(F.cross_entropy(out, y), out)


def resume(rank: int, world: int) -> Found:
    """A run that was saved and loaded goes on as the one that was not, bit for bit, and a copy does too."""
    case = Case("conv", "ekfac", {"solve_every": 3, "factor_every": 2})
    first = Training(case, rank, world)
    for number in range(3):
        first.step(number)
    second = Training(case, rank, world)
    second.model.load_state_dict(state(first.model))
    copied = copy.deepcopy(first.model)
    for number in range(3, 6):
        first.step(number)
        second.step(number)
    assert equal(state(first.model), state(second.model))
    third = Training(case, rank, world)
    third.model, third.wrapper = copied, DistributedDataParallel(copied)
    third.opt = torch.optim.SGD(copied.parameters(), lr=0.1)
    for number in range(3, 6):
        third.step(number)
    assert equal(state(first.model), state(third.model))
    return state(first.model)


def unaveraged_gradients(rank: int, world: int) -> Found:
    """Ranks whose gradients differ are told so, and nothing changes."""
    model, x, y = simple(rank)
    before = state(model)
    backward(model, model, x, y)
    with refusal("average p.grad"):
        model.precondition_()
    assert equal(before, state(model))
    return before


def alone(rank: int, world: int) -> Found:
    """With process_group = None every rank trains by itself, and exchanges nothing."""
    model, x, y = simple(rank)
    assert model.process_group is dist.group.WORLD
    model.process_group = None
    assert model.process_group is None and copy.deepcopy(model).process_group is None
    with counted() as calls:
        backward(model, model, x, y)
        model.precondition_()
    assert not calls
    others = [torch.empty(6, 6) for _ in range(world)]
    dist.all_gather(others, model.factors("0")["A"])
    assert not torch.equal(others[0], others[1])
    return {}


def subgroups(rank: int, world: int) -> Found:
    """Two pairs of ranks train two models."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    model, x, y = simple(rank % 2 + 10 * (rank // 2))
    model.process_group = group
    wrapper = DistributedDataParallel(model, process_group=group)
    backward(model, wrapper, x, y)
    assert model.precondition_().terms == 12
    found = [torch.empty(6, 6) for _ in range(world)]
    dist.all_gather(found, model.factors("0")["A"])
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and not torch.equal(found[0], found[2])
    return {}


def different_calls(rank: int, world: int) -> Found:
    """A rank that calls loss.backward() where the others call model.backward: all hear of it."""
    model, x, y = simple(rank)
    with refusal("the ranks do different things"):
        if rank == 1:
            F.cross_entropy(model(x), y).backward()
            model.precondition_()
        else:
            backward(model, model, x, y)
    return {}


def one_rank_fails(rank: int, world: int) -> Found:
    """An error of one rank is an error of all."""
    torch.manual_seed(0)
    loss = fxcurv.losses.CrossEntropy(ignore_index=0)
    model = fxcurv.transform(mlp(), "kfac", loss=loss, fisher="empirical")
    before = state(model)
    wrapper = DistributedDataParallel(model)
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    out = wrapper(x)
    value = F.cross_entropy(out, y, ignore_index=0)
    if rank == 1:
        value.backward()
    else:
        model.backward(value, out, targets=y)
    with refusal("model.backward(loss, outputs, targets=...)" if rank == 1 else "rank 1 cannot take this step"):
        model.precondition_()
    assert equal(before, state(model))
    return before


def different_schedules(rank: int, world: int) -> Found:
    """Ranks in different steps, or with other things due, are told so."""
    model, x, y = simple(rank)
    wrapper = DistributedDataParallel(model)
    for _ in range(2):
        backward(model, wrapper, x, y)
        if model._engine.step == 1:
            model.due(refresh=rank == 1)
            with refusal("another state than rank 0"):
                model.precondition_()
        else:
            model.precondition_()
    return {}


def nothing_arrived(rank: int, world: int) -> Found:
    """Without statistics on any rank, all get the usual sentence."""
    model, x, y = simple(rank)
    model.eval()
    wrapper = DistributedDataParallel(model)
    F.cross_entropy(wrapper(x), y).backward()
    with refusal("no statistics have arrived"):
        model.precondition_()
    return {}


def rank_without_data(rank: int, world: int) -> Found:
    """A rank that ran nothing in this step has no say in it; gradients are averaged by hand."""
    model, x, y = simple(0, "empirical")
    reference, _, _ = simple(0, "empirical")
    reference.process_group = None
    backward(reference, reference, x, y)
    reference.precondition_()
    if rank == 0:
        backward(model, model, x, y)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    model.precondition_()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    return state(model)


def static_graph(rank: int, world: int) -> Found:
    """The first backward pass of a static graph must be that of the gradients."""
    model, x, y = simple(rank)
    wrapper = DistributedDataParallel(model, static_graph=True)
    with refusal("static_graph=True"):
        backward(model, wrapper, x, y)
    return {}


def overflow(rank: int, world: int) -> Found:
    """A scaler that finds an overflow on one rank: nobody takes the step; then all take the unscaled one."""
    model, x, y = simple(rank, "empirical")
    plain, _, _ = simple(rank, "empirical")
    before = state(model)
    wrapper, other = DistributedDataParallel(model), DistributedDataParallel(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for scale in (float("inf") if rank == 1 else 1.0, 1.0):
        wrapper.zero_grad()
        out = wrapper(x)
        model.backward(scaler.scale(F.cross_entropy(out, y)) * scale, out)
        info = model.precondition_(scaler)
        assert info.skipped == (info.step == 0 and equal(before, state(model)))
    backward(plain, other, x, y)
    plain.precondition_()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, 8 * q.grad, rtol=1e-10, atol=1e-12)
    return state(model)


def bad_batch(rank: int, world: int) -> Found:
    """A batch that is not finite on one rank: every layer falls back on all ranks, and no state changes."""
    model, x, y = simple(rank)
    wrapper = DistributedDataParallel(model)
    backward(model, wrapper, x, y)
    model.precondition_()
    before = {key: value for key, value in state(model).items() if key.endswith((".A", ".G", ".inverse"))}
    if rank == 1:
        x[0, 0] = float("nan")
    backward(model, wrapper, x, y)
    info = model.precondition_()
    assert set(info.fallback) == {"0", "2", "4"}
    after = state(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    return after


def collectives(rank: int, world: int) -> Found:
    """One reduction a step with statistics, one row count a backward call, nothing in between."""
    torch.set_default_dtype(torch.float32)  # counts are, too: one buffer
    model, x, y = simple(rank, factor_every=2)
    torch.set_default_dtype(torch.float64)
    wrapper = DistributedDataParallel(model)
    seen = []
    for _ in range(2):
        with counted() as calls:
            backward(model, wrapper, x, y)
            model.precondition_()
        seen.append(sorted(calls))
    assert seen == [["all_gather", "all_gather", "all_reduce"], []]
    return {}


def buckets(rank: int, world: int) -> Found:
    """Statistics in many small buffers, and in one, are the same."""
    case = CASES["conv-mc"]
    whole = Training(case, rank, world)
    whole.step(0)
    before, distributed.BUCKET = distributed.BUCKET, 256
    parts = Training(case, rank, world)
    with counted() as calls:
        parts.step(0)
    distributed.BUCKET = before
    assert calls.count("all_reduce") > 3
    assert equal(state(whole.model), state(parts.model))
    return {}


@contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives that this package starts within the body (those of the wrapper are started elsewhere)."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


CHECKS: dict[str, Callable[[int, int], Found]] = {
    function.__name__: function
    for function in (
        resume,
        unaveraged_gradients,
        alone,
        different_calls,
        one_rank_fails,
        different_schedules,
        nothing_arrived,
        rank_without_data,
        static_graph,
        overflow,
        bad_batch,
        collectives,
        buckets,
    )
}
FOUR: dict[str, Callable[[int, int], Found]] = {"subgroups": subgroups}
CHECKS |= FOUR
