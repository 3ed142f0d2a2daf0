"""What a trace has to know about ``torch_geometric``, its modules and its code.

The library is looked up among the loaded modules and never imported: without it every answer is no.
"""

from __future__ import annotations

import dis
import linecache
import operator
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from fxcurv.capture.proxies import has_proxy

LIBRARY = "torch_geometric"
_NEGATION = re.compile(r"(?<!is )\bnot\b(?! in)")


def loaded(module: str, name: str) -> Any:
    """A class of the library, ``None`` where the user has not loaded it."""
    return getattr(sys.modules.get(f"{LIBRARY}.{module}"), name, None)


def convolution_class() -> Any:
    """``MessagePassing``, ``None`` where the user has not loaded it."""
    return loaded("nn.conv.message_passing", "MessagePassing")


def is_convolution(module: nn.Module) -> bool:
    """Whether a module passes messages."""
    base = convolution_class()
    return base is not None and isinstance(module, base)


def stays_whole(module: nn.Module) -> bool:
    """Whether a module is the library's own and has no parameter."""
    return type(module).__module__.startswith(f"{LIBRARY}.") and next(module.parameters(), None) is None


def knows_library(module: nn.Module, namespace: dict[str, Any]) -> bool:
    """Whether a module or the code of its forward has to do with the library."""
    names = [cls.__module__ for cls in type(module).__mro__]
    for value in namespace.values():
        if isinstance(value, types.ModuleType):
            names.append(value.__name__)
        elif isinstance(value, (type, types.FunctionType)):
            names.append(value.__module__)
    return any(name.startswith(LIBRARY) for name in names)


def leftovers(model: nn.Module) -> list[str]:
    """Attributes of convolutions in which a trace has left a value of its own."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if is_convolution(module)
        for name, value in vars(module).items()
        if has_proxy(value)
    ]


def from_library(frame: types.FrameType) -> bool:
    """Whether a stack frame runs the library's code."""
    return str(frame.f_globals.get("__name__", "")).startswith(f"{LIBRARY}.")


def is_refusal(frame: types.FrameType) -> bool:
    """Whether the condition under evaluation only decides if an error is raised: ``if condition:`` and ``raise``.

    Like that of an ``assert`` it is taken to be in order: the plain model, which runs as well, checks it.
    """
    filename, number = frame.f_code.co_filename, frame.f_lineno
    line, following = (linecache.getline(filename, number + k).strip() for k in (0, 1))
    return line.startswith(("if ", "elif ")) and not _NEGATION.search(line) and following.startswith("raise ")


def is_emptiness_test(node: fx.Node) -> bool:
    """Whether a condition asks if a tensor is empty, for which the library has shortcuts to the same result."""
    if node.target not in (operator.eq, "eq") or len(node.args) != 2 or node.args[1] != 0:
        return False
    count = node.args[0]
    return isinstance(count, fx.Node) and count.target in ("numel", torch.numel)


def has_state(module: Any, hooks: tuple[str, ...]) -> bool:
    """Whether functions of a convolution read a parameter, or leave something on the module.

    Told from the names in their code and in that of the methods that they call.
    """
    seen: set[str] = set()
    stack = list(hooks)
    while stack:
        name = stack.pop()
        if name in seen or name in dir(nn.Module):
            continue
        seen.add(name)
        child = module._modules.get(name)
        if module._parameters.get(name) is not None or (child is not None and any(True for _ in child.parameters())):
            return True
        code = getattr(getattr(type(module), name, None), "__code__", None)
        for part in () if code is None else _codes(code):
            if any(instruction.opname == "STORE_ATTR" for instruction in dis.get_instructions(part)):
                return True
            stack.extend(part.co_names)
    return False


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
