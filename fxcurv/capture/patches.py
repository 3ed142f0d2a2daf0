"""What is different in torch and Python while a symbolic trace runs, and only then.

Each entry closes a hole through which plain ``torch.fx`` tracing silently captures another program:

- factories (``torch.arange(8)``, ``torch.randn(4)``) become nodes, so that they are evaluated on every run;
- ``len(x)``, ``min(n, m)`` and ``max(n, m)`` are recorded, and a traced tensor is an instance of ``torch.Tensor``;
- ``autograd.Function.apply`` stays one node with its own backward instead of being traced through its forward;
- activation checkpointing is inlined;
- packing and padding of sequences stay one node each (:mod:`fxcurv.capture.packed`);
- a value of the trace assigned to a module attribute is refused instead of left behind on the user's model;
- a random draw or a computation on a parameter that would be baked in as a constant is refused.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import rnn
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from fxcurv.capture import packed
from fxcurv.capture.builtin import traced_builtins
from fxcurv.capture.examples import Examples
from fxcurv.capture.proxies import IN_PLACE, has_proxy
from fxcurv.errors import FxcurvError

CHECKPOINT_NOTE = "activation checkpointing is inlined on statistic steps"

_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
# Methods of a plain tensor that do not look for a traced value among several positional sizes.
_SIZE_METHODS = ("__getitem__", "expand", "repeat", "reshape", "new_zeros", "new_ones", "new_empty")
_LITERALS = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a class or module and put the old ones back on exit."""
    old = {name: vars(owner)[name] for name in values if name in vars(owner)}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in values:
            if name in old:
                setattr(owner, name, old[name])
            else:
                delattr(owner, name)


@contextlib.contextmanager
def dynamo_kept_out() -> Iterator[None]:
    """Importing ``torch._dynamo`` (which checkpointing does on first use) fails unless it is loaded already.

    It tabulates torch's functions when it is imported; were they patched then, ``torch.compile`` would not know the
    real ones for the rest of the process. The import is too slow to be done for every capture.
    """
    name = "torch._dynamo"
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]  # what the import system takes for "cannot be imported"
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


class Patches(contextlib.ExitStack):
    """All patches for one trace; ``globals_of`` extends them to the global names of a function about to be traced."""

    def __init__(
        self, tracer: fx.Tracer, state_names: dict[int, str], on_checkpoint: Callable[[], None], examples: Examples
    ) -> None:
        super().__init__()
        self._tracer = tracer
        self._examples = examples
        self._state_names = state_names
        self._on_checkpoint = on_checkpoint
        self._seen: set[int] = set()
        self._factories = {name: _factory(tracer, getattr(torch, name), examples) for name in _FACTORIES}
        self._by_id = {id(getattr(torch, name)): wrapper for name, wrapper in self._factories.items()}
        self._packing = packed.recorded(tracer)
        self._by_id |= {id(getattr(rnn, name)): wrapper for name, wrapper in self._packing.items()}
        self._builtins = traced_builtins(tracer)

    def __enter__(self) -> Patches:
        super().__enter__()
        methods = {name: _method(self._tracer, name) for name in _SIZE_METHODS}
        self.enter_context(_no_python_random())
        self.enter_context(replaced(torch, **self._factories))
        self.enter_context(replaced(torch.Tensor, **methods))
        self.enter_context(replaced(rnn, **self._packing))
        # A recurrent module of the user's own class would take the values of the trace for new weights and keep them.
        self.enter_context(replaced(nn.RNNBase, _update_flat_weights=lambda module: None))
        self.enter_context(replaced(rnn.PackedSequence, __new__=packed.constructor(self._tracer)))
        self.enter_context(replaced(torch.autograd.Function, apply=_function_apply(self._tracer)))
        self.enter_context(replaced(nn.Module, __setattr__=_refuse_assignment(nn.Module.__setattr__)))
        self.enter_context(inlined_checkpoint(self._on_checkpoint))
        self.enter_context(_no_fast_path())
        self.enter_context(_Watch(self._state_names, self._examples))
        return self

    def globals_of(self, function: Any) -> None:
        """Patch the names that ``function`` finds in its module: built-ins, and factories imported by name."""
        self.names_of(getattr(function, "__globals__", {}))

    def names_of(self, namespace: dict[str, Any]) -> None:
        """The same for the global names of a module."""
        if id(namespace) in self._seen:
            return
        self._seen.add(id(namespace))
        new = {name: self._by_id[id(value)] for name, value in namespace.items() if id(value) in self._by_id}
        if not namespace.get("__name__", "").startswith("torch."):
            new.update((name, value) for name, value in self._builtins.items() if name not in namespace)
            self.enter_context(replaced_items(namespace, new))


@contextlib.contextmanager
def replaced_items(namespace: dict[str, Any], new: dict[str, Any]) -> Iterator[None]:
    """Set items of a dictionary and put the old ones back on exit."""
    old = {name: namespace[name] for name in new if name in namespace}
    namespace.update(new)
    try:
        yield
    finally:
        for name in new:
            namespace.pop(name, None)
        namespace.update(old)


def _factory(tracer: fx.Tracer, original: Callable[..., Any], examples: Examples) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not examples.active and (has_proxy(args, kwargs) or _literal((args, kwargs))):
            return tracer.create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    return wrapper


def _literal(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_literal, value))
    if isinstance(value, dict):
        return all(map(_literal, value.values()))
    return isinstance(value, _LITERALS)


def _method(tracer: fx.Tracer, name: str) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    @functools.wraps(original)
    def wrapper(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not has_proxy(args, kwargs):
            return original(self, *args, **kwargs)
        if name == "__getitem__":
            return tracer.create_proxy("call_function", operator.getitem, (self, *args), kwargs)
        return tracer.create_proxy("call_method", name, (self, *args), kwargs)

    return wrapper


def _function_apply(tracer: fx.Tracer) -> classmethod[Any, Any, Any]:
    original = torch.autograd.Function.__dict__["apply"]  # a class method, of Python or (from torch 2.14) of C

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not has_proxy(args, kwargs):
            return original.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", custom_function(cls), args, kwargs)

    return classmethod(apply)


@functools.cache
def custom_function(cls: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``cls.apply`` as a function that fx can print, named after the class."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = cls.__name__
    apply.__module__ = cls.__module__
    return apply


def _refuse_assignment(original: Callable[[nn.Module, str, Any], None]) -> Callable[[nn.Module, str, Any], None]:
    def assign(self: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and value.node.target in IN_PLACE.values():
            target = value.node.args[0]
            if isinstance(target, fx.Node) and target.op == "get_attr" and str(target.target).split(".")[-1] == name:
                return  # ``self.count += 1``: recorded as the in-place operation, and the buffer stays the same tensor
        library = any(cls.__module__.startswith("torch_geometric.") for cls in type(self).__mro__)
        if has_proxy(value) and not library:  # those clear what they store; symbolic refuses what is left
            raise FxcurvError(
                f"the forward assigns a value computed from its input to self.{name}; return it, or update a buffer "
                "in place (self.buffer.copy_(value))."
            )
        original(self, name, value)

    return assign


@contextlib.contextmanager
def inlined_checkpoint(note: Callable[[], None]) -> Iterator[None]:
    """``checkpoint(function, x)`` calls ``function(x)``, in both variants.

    The two names below are where ``torch.utils.checkpoint.checkpoint`` hands over, however it was imported.
    """

    class Inline:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            note()
            return function(*args)

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        note()
        yield  # here the function runs

    with replaced(checkpoint, CheckpointFunction=Inline, _checkpoint_without_reentrant_generator=generator):
        yield


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Transformer layers must run their sub-modules, not the fused inference kernel that hides them.

    The sequence length, which they compute with ``len``, only serves to recognise a causal mask by its content.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with replaced(nn.modules.transformer, _get_seq_len=lambda *args: None):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _no_python_random() -> Iterator[None]:
    state = random.getstate()
    yield
    if random.getstate() != state:
        raise FxcurvError(
            "the forward draws from Python's random module, and the draw would be baked into the captured graph; draw "
            "with torch on a tensor that the forward computes with, or pass the drawn value as an argument."
        )


class _Watch(TorchDispatchMode):
    """Sees every operation that really runs while tracing, that is, every one that the graph will not repeat."""

    def __init__(self, state_names: dict[int, str], examples: Examples) -> None:
        super().__init__()
        self._state_names, self._examples = state_names, examples

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._examples.active:
            return func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise FxcurvError(
                f"{func.name()} draws random numbers without depending on the input, so the draw would be baked into "
                "the captured graph; use torch.rand, torch.randn or a *_like function of an input instead."
            )
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, torch.Tensor) and id(value) in self._state_names:
                raise FxcurvError(
                    f"the forward reads '{self._state_names[id(value)]}' through {func.name()} on a list of parameters "
                    "or buffers, so its value would be baked into the graph; read it as an attribute of its module."
                )
        return func(*args, **(kwargs or {}))
