"""Compare a captured graph with the plain model, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcurv.capture import Call


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, dataclasses included, in order."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += [t for part in fields(leaf) for t in tensors(getattr(leaf, part.name))]
    return found


def skeleton(output: Any) -> Any:
    """The structure and every non-tensor of an output."""
    leaves, spec = pytree.tree_flatten(output)
    own = [
        "tensor" if isinstance(leaf, Tensor)
        else (type(leaf), [skeleton(getattr(leaf, part.name)) for part in fields(leaf)]) if is_dataclass(leaf)
        else leaf
        for leaf in leaves
    ]  # fmt: skip
    return own, repr(spec)


def loss_of(output: Any) -> Tensor:
    return sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in tensors(output))


def assert_same(model: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``run(twin, *leaves)`` equals ``model(*args, **kwargs)``: structure, values, gradients, buffers, RNG use."""
    twin = copy.deepcopy(model)
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    call = Call.of(model, args, kwargs)
    results = []
    for module, function in ((model, lambda: model(*args, **kwargs)), (twin, lambda: run(twin, *call.leaves))):
        torch.manual_seed(1)
        output = function()
        after = torch.get_rng_state()
        parameters = [p for p in module.parameters() if p.requires_grad]
        inputs = [leaf for leaf in call.leaves if leaf.requires_grad]
        for tensor in parameters + inputs:
            tensor.grad = None
        loss_of(output).backward()
        grads = [tensor.grad for tensor in parameters + inputs]
        results.append((output, after, grads, dict(module.named_buffers())))
    (plain, rng, grads, buffers), (captured, rng_, grads_, buffers_) = results
    assert skeleton(plain) == skeleton(captured)
    assert len(tensors(plain)) == len(tensors(captured)) > 0
    for a, b in zip(tensors(plain), tensors(captured), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(rng, rng_)
    for a, b in zip(grads, grads_, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert buffers.keys() == buffers_.keys()
    for name in buffers:
        assert torch.equal(buffers[name], buffers_[name]), name
