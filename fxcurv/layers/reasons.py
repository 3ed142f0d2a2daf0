"""Words for what detection does not know: why an operation is no layer kind."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from fxcurv.capture.proxies import IN_PLACE

aten = torch.ops.aten

_ELEMENTWISE: set[Any] = {"add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"}
_ELEMENTWISE |= {operator.add, operator.sub, operator.mul, operator.truediv, *IN_PLACE.values()}
_ELEMENTWISE |= {operator.iadd, operator.isub, operator.imul, torch.add, torch.sub, torch.mul, torch.div}
_ELEMENTWISE |= {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add_.Tensor, aten.mul_.Tensor}
_PARTS: set[Any] = {"chunk", "split", "narrow", "select", "unbind", "index_select", operator.getitem}
_PARTS |= {
    torch.chunk,
    torch.split,
    torch.narrow,
    torch.select,
    torch.unbind,
    torch.index_select,
    torch.cat,
    torch.stack,
}
_PARTS |= {aten.select.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.narrow.default}
_PARTS |= {aten.unbind.int, aten.cat.default, aten.stack.default, aten.index.Tensor, aten.index_select.default}
_PARTS |= {aten.slice.Tensor}


def explain(node: fx.Node, module: Any) -> str:
    """Why a parameter stops at ``node``, to follow "It "."""
    if node.op == "output":
        return "is returned by the model itself"
    if node.op == "call_module":
        kind = type(module)
        if kind.__module__.startswith("torch.ao.nn.qat"):
            return f"is quantised on the fly by {kind.__module__}.{kind.__name__}, which is no layer kind"
        if "parametrizations" in dict(module.named_children()):
            return f"reaches {type(module).__name__} through a parametrisation"
        hint = ", but frontend='export' sees its projections" if isinstance(module, nn.MultiheadAttention) else ""
        return f"belongs to the module '{node.target}' of class {type(module).__name__}, which is no layer kind{hint}"
    if node.target in _ELEMENTWISE:
        return "is used elementwise, not in a product"
    if node.target in _PARTS:
        return "is sliced or joined with other tensors"
    return f"is used by {getattr(node.target, '__name__', node.target)}, which is no layer kind"


def remedy(model: nn.Module, parameter: str) -> str:
    """What to do about a parameter from which a module computes its tensor; "" for any other."""
    path, _, leaf = parameter.rpartition(".")
    if "parametrizations" in path.split("."):
        path, _, tensor = f".{path}".rpartition(".parametrizations.")
        call = f"torch.nn.utils.parametrize.remove_parametrizations(model{path}, '{tensor}')"
        return f"; it keeps its plain gradient, or call {call} first"
    try:
        owner = model.get_submodule(path)
    except AttributeError:  # a parameter of a front-end's own module
        return ""
    stem, _, kind = leaf.rpartition("_")
    buffers, own = dict(owner.named_buffers(recurse=False)), dict(owner.named_parameters(recurse=False))
    call = ""
    if kind == "orig" and f"{stem}_mask" in buffers:
        call = f"prune.remove({{}}, '{stem}')"
    elif kind == "orig" and f"{stem}_u" in buffers:
        call = f"remove_spectral_norm({{}}, '{stem}')"
    elif kind in ("g", "v") and f"{stem}_g" in own and f"{stem}_v" in own:
        call = f"remove_weight_norm({{}}, '{stem}')"
    where = f"model.{path}" if path else "model"
    return f"; it keeps its plain gradient, or call torch.nn.utils.{call.format(where)} first" if call else ""
