"""A call of the model, split into what a captured graph takes as input and what it bakes.

Tracing bakes every branch on ``mask is None``, on a flag or on ``self.training``. So two calls may share one
graph only if they agree on all of these, and ``Call.key`` is exactly that: which arguments are tensors and whether they
are sparse, the value of everything else, the ``.training`` flag of every sub-module and the dtype of every parameter.
Shapes are not part of it.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxcurv.errors import FxcurvError


@final
class _TensorLeaf:
    """Marks the place of a tensor among the leaves of a call."""

    def __repr__(self) -> str:
        return "tensor"


TENSOR = _TensorLeaf()
_RESERVED = ("self", "torch", "getattr", "len", "slice", "range", "device", "inf", "nan")  # names in generated code


@dataclass(frozen=True)
class _Same:
    """Key of a value that cannot be hashed: equal only to itself, and kept alive by the key."""

    value: Any = field(compare=False, repr=False)
    identity: int


@dataclass(frozen=True, eq=False)
class Call:
    """The signature of one call ``model(*args, **kwargs)``; build it with :meth:`of` or :meth:`default`.

    spec: pytree structure of ``(args, kwargs)``, bound to the forward's parameters with defaults filled in.
    baked: one entry a leaf: ``TENSOR`` for a tensor, the value itself for anything else.
    leaves: the tensors, in pytree order; meta tensors without content when ``real`` is false.
    names: a Python identifier for each tensor leaf, unique.
    key: hashable; calls with equal keys share a captured graph.
    real: whether ``leaves`` holds the user's tensors (false for a call made from the signature alone).
    keywords: names of the last arguments among ``args`` in ``spec``, which were not given by position.
    """

    spec: pytree.TreeSpec
    baked: tuple[Any, ...]
    leaves: list[torch.Tensor]
    names: tuple[str, ...]
    key: Hashable
    real: bool = True
    keywords: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Call:
        """The signature of ``model(*args, **kwargs)``.

        Raises FxcurvError if the arguments do not fit the forward, or if an argument hides tensors in an object
        that is not a registered pytree (they would be baked into the graph as constants).
        """
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*args, **dict(kwargs or {}))
        except TypeError as error:
            raise FxcurvError(
                f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}; pass the arguments "
                "that a training step passes."
            ) from None
        bound.apply_defaults()
        positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        ahead = sum(p.kind is p.POSITIONAL_ONLY for p in signature.parameters.values())
        keywords = tuple(positional[max(len(args) - ahead, 0) :])
        return replace(_build(model, bound.args, bound.kwargs, True), keywords=keywords)

    @classmethod
    def default(cls, model: nn.Module) -> Call:
        """The call that gives a tensor to every parameter of the forward without default, and nothing else."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in inspect.signature(model.forward).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            required = parameter.default is parameter.empty
            value = torch.empty(0, device="meta") if required else parameter.default
            if parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = value
            else:
                args.append(value)
        return _build(model, tuple(args), kwargs, False)

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of the call with ``tensors`` in the places of the leaves.

        What was not given by position is given by keyword: a decorator of the forward may look for it there.
        """
        supply = iter(tensors)
        leaves = [next(supply) if leaf is TENSOR else leaf for leaf in self.baked]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        split = len(args) - len(self.keywords)
        return args[:split], {**dict(zip(self.keywords, args[split:], strict=True)), **kwargs}


def _build(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], real: bool) -> Call:
    paths, spec = pytree.tree_flatten_with_path((args, kwargs))
    positional = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind <= p.VAR_POSITIONAL]
    tensors: dict[str, torch.Tensor] = {}
    baked: list[Any] = []
    for path, leaf in paths:
        name = _name(path, positional)
        if isinstance(leaf, torch.Tensor):
            while name in tensors:
                name += "_"
            tensors[name] = leaf
            baked.append(TENSOR)
        else:
            _refuse_hidden_tensors(leaf, name)
            baked.append(leaf)
    layouts = tuple(leaf.layout for leaf in tensors.values())  # a sparse adjacency takes other paths than edges
    modes = tuple(module.training for module in model.modules())
    dtypes = tuple(parameter.dtype for parameter in model.parameters())
    key = (repr(spec), tuple(map(_key, baked)), layouts, modes, dtypes)
    return Call(spec, tuple(baked), list(tensors.values()), tuple(tensors), key, real)


def _name(path: tuple[Any, ...], positional: list[str]) -> str:
    """An identifier for a leaf from the forward's parameter names: (0, 1, 'k') is ``mask_k``."""
    parts = [re.sub(r"\W+", "_", pytree.keystr((entry,))).strip("_") for entry in path]
    if parts[0] == "0":
        index = int(parts[1])
        parts[1] = positional[index] if index < len(positional) else f"{(positional or ['arg'])[-1]}_{index}"
    name = "_".join(parts[1:])
    usable = name.isidentifier() and not keyword.iskeyword(name) and name not in _RESERVED
    return name if usable else f"arg_{name}"


def _key(leaf: Any) -> Hashable:
    if leaf is TENSOR:
        return "tensor"
    try:
        hash(leaf)
    except TypeError:
        text = repr(leaf) if type(leaf) in (set, bytearray) else ""
        return (type(leaf), text or _Same(leaf, id(leaf)))
    return (type(leaf), repr(leaf) if isinstance(leaf, float) else leaf)  # repr: nan equals nan, -0.0 is not 0.0


def _refuse_hidden_tensors(leaf: Any, name: str) -> None:
    if is_dataclass(leaf) and not isinstance(leaf, type):
        inside = [getattr(leaf, part.name) for part in fields(leaf)]
    elif isinstance(leaf, Mapping):
        inside = list(leaf.values())
    else:
        inside = list(leaf) if isinstance(leaf, (tuple, list)) else list(getattr(leaf, "__dict__", {}).values())
    is_array = type(leaf).__module__ == "numpy" and type(leaf).__name__ == "ndarray"
    if is_array or any(isinstance(value, torch.Tensor) for value in pytree.tree_leaves(inside)):
        raise FxcurvError(
            f"argument '{name}' is a {type(leaf).__name__}, whose data would be baked into the captured graph; pass "
            "tensors in tuples, lists or dicts, or register the class with torch.utils._pytree.register_pytree_node."
        )
