"""The structure of a model's output: flattened while capturing, rebuilt after each run of the graph.

Pytrees (tuples, lists, dicts, named tuples, classes that a library registered) are handled by torch; dataclasses
that nobody registered are rebuilt through their constructor, other objects (a cache of keys and values) attribute by
attribute, at any depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxcurv.errors import FxcurvError

_BAKED = (int, float, complex, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)

_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement


@dataclass(frozen=True)
class _Value:
    """A leaf that the graph computes."""


@dataclass(frozen=True)
class _Fixed:
    """A leaf that does not depend on the input."""

    value: Any


@dataclass(frozen=True)
class _Record:
    """An unregistered dataclass and the structure of its fields."""

    cls: type
    names: tuple[str, ...]
    inner: Structure

    def build(self, values: dict[str, Any]) -> Any:
        """The dataclass."""
        return self.cls(**values)


@dataclass(frozen=True)
class _Object(_Record):
    """An object that is rebuilt from its attributes, without its constructor."""

    def build(self, values: dict[str, Any]) -> Any:
        """The object."""
        made: Any = object.__new__(self.cls)
        vars(made).update(values)
        return made


@dataclass(frozen=True)
class Structure:
    """Where the values that a graph returns belong in the user's output."""

    spec: pytree.TreeSpec
    parts: tuple[_Value | _Fixed | _Record, ...]

    def __call__(self, values: Any) -> Any:
        """The user's output from the graph's flat sequence of values."""
        return self._fill(iter(values))

    def _fill(self, values: Iterator[Any]) -> Any:
        return pytree.tree_unflatten([_fill_part(part, values) for part in self.parts], self.spec)


def _fill_part(part: _Value | _Fixed | _Record, values: Iterator[Any]) -> Any:
    if isinstance(part, _Record):
        return part.build(dict(zip(part.names, part.inner._fill(values), strict=True)))
    return part.value if isinstance(part, _Fixed) else next(values)


def flatten_output(output: Any, is_value: Callable[[Any], bool], objects: bool = True) -> tuple[list[Any], Structure]:
    """The values in ``output``, in order, and the structure around them.

    objects: whether to look into objects that are neither pytrees nor dataclasses; else each stays as it is.
    Raises FxcurvError for an object that holds values but cannot be taken apart.
    """
    leaves, spec = pytree.tree_flatten(output)
    values: list[Any] = []
    parts: list[_Value | _Fixed | _Record] = []
    for leaf in leaves:
        if is_value(leaf):
            values.append(leaf)
            parts.append(_Value())
        elif is_dataclass(leaf) and not isinstance(leaf, type) and all(part.init for part in fields(leaf)):
            names = tuple(part.name for part in fields(leaf))
            inner_values, inner = flatten_output(tuple(getattr(leaf, name) for name in names), is_value, objects)
            values.extend(inner_values)
            parts.append(_Record(type(leaf), names, inner))
        elif isinstance(leaf, _BAKED) or not objects:
            parts.append(_Fixed(leaf))
        elif _is_bag(leaf):
            inner_values, inner = flatten_output(tuple(vars(leaf).values()), is_value)
            values.extend(inner_values)
            parts.append(_Object(type(leaf), tuple(vars(leaf)), inner))
        else:
            raise FxcurvError(
                f"the model returns a {type(leaf).__name__}, which cannot be taken apart into tensors; return tuples, "
                "dicts or dataclasses, or register the class with torch.utils._pytree.register_pytree_node."
            )
    return values, Structure(spec, tuple(parts))


def _is_bag(value: Any) -> bool:
    """Whether an object is made of its attributes: a class of Python, with nothing of its own beside ``__dict__``."""
    bases = (cls for cls in type(value).__mro__ if cls is not object)
    plain = all(not vars(cls).get("__slots__") and cls.__flags__ & _HEAP for cls in bases)
    return plain and bool(vars(value)) and not isinstance(value, torch.nn.Module) and not callable(value)


def is_plain(output: Any, is_value: Callable[[Any], bool]) -> bool:
    """Whether a graph can return ``output`` as it is: a value, or tuples, lists and dicts of values and None."""
    if type(output) in (tuple, list):
        return all(is_plain(item, is_value) for item in output)
    if type(output) is dict:
        return all(type(key) is str and is_plain(item, is_value) for key, item in output.items())
    return output is None or is_value(output)
