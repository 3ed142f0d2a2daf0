"""Leave no trace: everything that a capture may disturb is put back, whatever happens.

Covered: attributes, parameters, buffers (identity and content) and sub-modules of every module, ``training``
flags, ``.grad``, and the random number generators of torch, CUDA, Python and NumPy.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import nn
from torch.utils import _pytree as pytree

_CONTAINERS = (list, dict, set)
_FLAT = ("_flat_weights", "_flat_weight_refs")  # what a class derived from torch's recurrent ones inherits
_HIDDEN = ("_parameters", "_buffers", "_modules")  # compared and restored as the dicts they are


@final
class Snapshot:
    """The attributes of every module of a model, shallow copies of list, dict and set attributes included."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (
                f"{name}." if name else "",
                module,
                dict(module.__dict__),
                {key: copy.copy(value) for key, value in module.__dict__.items() if type(value) in _CONTAINERS},
            )
            for name, module in model.named_modules()
        ]

    def changes(self) -> list[str]:
        """Paths of attributes that hold something else now.

        Filling in a missing value does not count (a cache) unless it has a gradient (an auxiliary loss), nor does
        what modules of torch.nn keep for themselves.
        """
        found = []
        for prefix, module, attributes, containers in self._modules:
            if type(module).__module__.startswith("torch.nn."):
                continue
            for key, value in module.__dict__.items():
                if isinstance(module, nn.RNNBase) and key in _FLAT:
                    continue
                old = attributes.get(key)
                if key in containers:
                    if key not in _HIDDEN and not _same_items(value, containers[key]):
                        found.append(prefix + key)
                elif value is not old and not _equal(value, old) and (old is not None or _trainable(value)):
                    found.append(prefix + key)
        return found

    def restore(self) -> None:
        """Put every attribute back."""
        for _, module, attributes, containers in self._modules:
            for key, items in containers.items():
                container = attributes[key]
                if not _same_items(container, items):
                    container.clear()
                    getattr(container, "extend" if isinstance(container, list) else "update")(items)
            if _differs(module.__dict__, attributes):
                module.__dict__.clear()
                module.__dict__.update(attributes)


def _differs(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() != before.keys() or any(now[key] is not before[key] for key in before)


def _same_items(now: Any, before: Any) -> bool:
    if type(now) is not type(before) or len(now) != len(before):
        return False
    if isinstance(before, dict):
        return list(now) == list(before) and all(now[key] is before[key] for key in before)
    if isinstance(before, set):
        return now == before
    return all(a is b for a, b in zip(now, before, strict=True))


def _trainable(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(value))


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, (int, float, str, bytes)) and a == b


def remember_random_state() -> Callable[[], None]:
    """What sets the random number generators of torch, CUDA, Python and NumPy back to where they are now."""
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    array = None if numpy is None else numpy.random.get_state()

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(array)

    return restore


def reseed(seed: int) -> None:
    """Give the random number generators of torch, Python and NumPy a seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextlib.contextmanager
def random_state() -> Iterator[None]:
    """Restore the random number generators on exit."""
    restore = remember_random_state()
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """Run something on ``model`` and restore the model and the random number generators on exit."""
    snapshot = Snapshot(model)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    with random_state():
        try:
            yield snapshot
        finally:
            snapshot.restore()
            with torch.no_grad():
                for buffer, content in buffers:
                    if not _holds(buffer, content):  # batch_norm does not raise the version counter
                        buffer.copy_(content)
            for parameter, grad in grads:
                if parameter.grad is not grad:
                    parameter.grad = grad


def _holds(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same; sparse ones (an adjacency) the same entries in the same places."""
    if one.layout == torch.sparse_coo:
        return torch.equal(one._indices(), other._indices()) and torch.equal(one._values(), other._values())
    if one.layout != torch.strided:  # compressed rows or columns: nothing writes into their structure
        return torch.equal(one.values(), other.values())
    return torch.equal(one, other)
