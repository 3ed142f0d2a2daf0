"""Values of a symbolic trace that behave like Python values where ``torch.fx`` alone would not.

``torch.fx.Proxy`` turns ``x += y`` into ``x = x + y``, which is another program when ``x`` has a second name, and
refuses ``x[i] = y``. Here both are recorded as what they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, final

import torch
from torch import fx

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def apply(target: Any, value: Any) -> Any:
        return function(target, value)

    # Not operator.iadd itself: fx prints that as the statement ``a += b``, which rebinds ``a`` when it is an int.
    apply.__name__ = apply.__qualname__ = name
    return apply


IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {name: _in_place(name) for name in _IN_PLACE}
"""Targets of ``call_function`` nodes for augmented assignments, by name: ``IN_PLACE["iadd"]`` is ``x += y``."""
globals().update(IN_PLACE)  # so that each is found under its qualified name (pickle, generated code)


class RecordingProxy(fx.Proxy):
    """A value of the trace; never a nested tensor, so that torch's own transformer layers can be traced through."""

    is_nested = False

    def dim(self) -> Any:
        """Number of axes: a plain number where the tracer knows it."""
        tracer: Any = self.tracer
        rank = tracer.rank(self.node)
        return tracer.create_proxy("call_method", "dim", (self,), {}) if rank is None else rank

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _recorder(name: str) -> Callable[[Any, Any], Any]:
    def method(self: RecordingProxy, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", IN_PLACE[name], (self, value), {})

    return method


for _name in _IN_PLACE:
    setattr(RecordingProxy, f"__{_name}__", _recorder(_name))


@final
class StateProxy(RecordingProxy):
    """A parameter or buffer; its sizes and dtype, which are the same for all calls of a kind, are plain values."""

    def __init__(self, node: fx.Node, tracer: Any, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor_sizes, self.tensor_dtype = tensor.shape, tensor.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Data type."""
        return self.tensor_dtype

    @property
    def shape(self) -> torch.Size:
        """Sizes."""
        return self.tensor_sizes

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.tensor_sizes)

    def size(self, dim: int | None = None) -> Any:
        """Sizes, or the size of one dimension."""
        return self.tensor_sizes if dim is None else self.tensor_sizes[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.tensor_sizes)

    def numel(self) -> int:
        """Number of elements."""
        return self.tensor_sizes.numel()

    def __len__(self) -> int:
        return self.tensor_sizes[0]


def has_proxy(*values: Any) -> bool:
    """Whether a trace value is among ``values`` or inside their containers."""
    stack: list[Any] = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, fx.Proxy):
            return True
        if isinstance(value, (tuple, list, set)):
            stack.extend(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, slice):
            stack.extend((value.start, value.stop, value.step))
    return False
