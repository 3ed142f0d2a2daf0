"""Generated kernels as an operation of the dispatcher, for whoever watches: compilers, fake tensors, dispatch modes.

In a plain step a kernel's ``launch`` is called directly, which costs nothing. Under ``torch.compile``, under a fake
tensor mode or any other dispatch mode the same call is one operation, ``fxcurv::generated``: opaque to Dynamo (so the
graph is not broken), shaped by running ``launch`` on fake tensors, and taken apart into its Triton kernels where a
graph is lowered, so that Inductor sees them. That is what ``torch.library.triton_op`` arranges for one kernel; here one
operation serves all of them, because a kernel exists only once a program has been lowered, and an operation defined for
each would load Triton to find its signature.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from fxcurv.kernels.generator import Source, load

SOURCES: dict[str, Source] = {}
"""Sources that may be launched as an operation, by key."""

_LIBRARY = torch.library.Library("fxcurv", "FRAGMENT")
_SINGLE = re.compile(r"\ndef launch\([^)]*\) -> torch\.Tensor:")


def add(source: Source) -> None:
    """Let a source be launched by its key. Triton is not loaded."""
    SOURCES[source.key] = source


def watched() -> bool:
    """Whether a compiler or a dispatch mode looks at what is called."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_single(source: Source) -> bool:
    """Whether ``launch`` returns one tensor, and not several in a tuple or list."""
    return _SINGLE.search(source.text) is not None


def as_operation(key: str, single: bool, operands: Sequence[Any]) -> Any:
    """``launch`` of the source ``key`` on operands, as one operation of the dispatcher."""
    tensors: list[Tensor] = []
    layout = "[" + ", ".join([_lay_out(operand, tensors) for operand in operands]) + "]"
    results = torch.ops.fxcurv.generated(key, layout, tensors)
    return results[0] if single else tuple(results)


def _lay_out(operand: Any, tensors: list[Tensor]) -> str:
    """Text of an operand; a tensor is put into the list and reads ``'*'``.

    What is neither data nor a literal describes the geometry, which is in the kernel already, and reads ``None``.
    """
    if isinstance(operand, Tensor):
        tensors.append(operand)
        return "'*'"
    if isinstance(operand, (list, tuple)):
        return "[" + ", ".join([_lay_out(item, tensors) for item in operand]) + "]"
    return repr(operand) if isinstance(operand, (bool, int, float, str)) else "None"


def _operands(layout: str, tensors: Iterable[Tensor]) -> list[Any]:
    """The operands again."""
    rest = iter(tensors)

    def read(item: Any) -> Any:
        if isinstance(item, list):
            return [read(one) for one in item]
        return next(rest) if item == "*" else item

    return [read(item) for item in ast.literal_eval(layout)]


def _results(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _launch(kernel: str, layout: str, tensors: list[Tensor]) -> list[Tensor]:
    return _results(load(SOURCES[kernel]).launch(*_operands(layout, tensors)))


def trace(kernel: str, layout: str, tensors: list[Tensor]) -> list[Tensor]:
    """The same with every Triton kernel wrapped, so that each is seen and none is started."""
    return _results(_traceable(kernel)(*_operands(layout, tensors)))


def _traceable(key: str) -> Callable[..., Any]:
    """``launch`` in a copy of its module's names in which Triton kernels are wrapped.

    Wrapped anew for every trace: ``torch._dynamo.reset`` forgets the numbers by which wrapped kernels are known.
    """
    module = load(SOURCES[key])
    names = dict(module.__dict__)
    names.update(dict(_wrapped(module.__dict__)))
    launch = module.launch
    return FunctionType(launch.__code__, names, launch.__name__, launch.__defaults__, launch.__closure__)


def _wrapped(names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    from triton.runtime import JITFunction

    for name, value in names.items():
        if isinstance(value, JITFunction):
            yield name, torch.library.wrap_triton(value)


def _taken_apart(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    with mode:
        return trace(*args, **(kwargs or {}))


_LIBRARY.define("generated(str kernel, str layout, Tensor[] tensors) -> Tensor[]")
_LIBRARY.impl("generated", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("fxcurv::generated", trace, lib=_LIBRARY)
torch.library.register_torch_dispatch("fxcurv::generated", FunctionalTensorMode, _taken_apart, lib=_LIBRARY)
