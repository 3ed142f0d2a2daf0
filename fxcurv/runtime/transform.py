"""transform: from a model and a method to a :class:`CurvatureModule`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fxcurv.capture import Call, capture
from fxcurv.errors import FxcurvError
from fxcurv.losses import Loss, resolve_loss
from fxcurv.methods import Method, get_method
from fxcurv.methods.method import Source
from fxcurv.passes import PIPELINE, Compilation, Pass, run_passes
from fxcurv.runtime.engine import Engine
from fxcurv.runtime.example import pack_example
from fxcurv.runtime.forward import Forwards
from fxcurv.runtime.module import CurvatureModule
from fxcurv.runtime.prove import PROOFS, prove_transform

ON_NONFINITE = ("gradient", "raise")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def transform(
    model: nn.Module,
    method: str | Method = "kfac",
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    loss: Loss | nn.Module | str | None = None,
    frontend: str = "auto",
    backend: str = "auto",
    layers: Sequence[str] | str | None = None,
    skip: Sequence[str] | str | None = None,
    strict: bool = False,
    proofs: Iterable[str] | bool = True,
    on_nonfinite: str = "gradient",
    dump_failures: str | os.PathLike[str] | None = None,
    passes: Sequence[Pass] = PIPELINE,
    disable: Iterable[str] = (),
    check: str = "types",
    fuel: int | None = None,
    **hyper: Any,
) -> CurvatureModule:
    """Put a model under a second-order method.

    model: any module; it is captured, not copied, and stays usable. method: a name of ``fxcurv.methods()`` or a
    ``Method``; ``hyper`` overrides its hyper-parameters. example_inputs, example_kwargs: a call of the model, needed by
    the export front-end and by the numeric proofs. loss: a name, an nn loss module or a loss object; without it the
    Fisher is empirical. frontend: "auto", "symbolic" or "export". backend: "auto", "aten" or "reference" kernels.
    layers, skip: fnmatch patterns on layer names or kinds. strict: an uncovered parameter is an error. proofs: all,
    none or some of "coverage", "gradient", "output". on_nonfinite: "gradient" (a layer with a bad update keeps its
    gradient) or "raise". dump_failures: a folder for the matrices of failed factorisations. passes, disable, check,
    fuel: the pipeline, passes left out by name, "none"/"types"/"numeric" checking and a limit on rewrites.

    Raises :class:`FxcurvError` when something above is unknown, nothing captures the model, or a proof fails.
    """
    model, disable = _plain(model), tuple(disable)
    if on_nonfinite not in ON_NONFINITE:
        raise FxcurvError(f"on_nonfinite='{on_nonfinite}' must be one of {', '.join(ON_NONFINITE)}.")
    chosen, loss_object = get_method(method, **hyper), resolve_loss(loss)
    by_default = loss_object is None and chosen.source.kind in ("mc", "ggn", "ggn_signs")
    if by_default:
        chosen = replace(chosen, source=Source("empirical"))
    if chosen.source.kind == "ggn_product" and loss_object is None:
        raise FxcurvError(
            f"'{chosen.name}' multiplies with the loss's curvature: pass loss=, e.g. loss='cross_entropy'."
        )
    if chosen.source.kind == "ggn_product" and loss_object is not None and loss_object.reduction == "sum":
        raise FxcurvError(f"'{chosen.name}' compares losses with a model of the mean loss: use reduction='mean'.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FxcurvError(f"{type(model).__name__} has no trainable parameter.")
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise FxcurvError(
            f"example_inputs is a {type(example_inputs).__name__}; pass a tuple with the positional arguments of one "
            "call, such as example_inputs=(x,)."
        )
    given = example_inputs is not None or example_kwargs is not None
    call = Call.of(model, tuple(example_inputs or ()), example_kwargs) if given else Call.default(model)
    compilation = Compilation(model=model, method=chosen, fuel=fuel, check=check)
    compilation.options.update(call=call, layers=layers, skip=skip, backend=backend, empirical_by_default=by_default)
    compilation.options["dump_failures"] = dump_failures
    compilation.options["request"] = {  # what an artifact needs to ask for the same again
        "method": method if isinstance(method, str) else None,
        "hyper": dict(hyper),
        "frontend": frontend,
        "backend": backend,
        "layers": layers,
        "skip": skip,
        "on_nonfinite": on_nonfinite,
        "disable": sorted(set(disable)),
        "example": pack_example(example_inputs, example_kwargs),
    }
    coupled = any(isinstance(module, _BATCH_NORMS) and module.training for module in model.modules())
    compilation.options["batch_statistics"] = coupled and chosen.source.kind == "ggn"
    forwards = Forwards(frontend)
    disabled = set(disable)
    if chosen.source.taps:
        compilation.captured = capture(model, call, frontend)
    else:
        disabled |= {"detect", "tap"}  # the method reads gradients only: the forward graph is not needed
    unknown = sorted(set(disable) - {step.name for step in passes})
    if unknown:
        raise FxcurvError(f"there is no pass '{unknown[0]}' to disable; there are {', '.join(p.name for p in passes)}.")
    run_passes(compilation, passes, disabled)
    if compilation.lowered is None:
        raise FxcurvError("the passes end without 'lower', so there is nothing to run.")
    engine = Engine(model, compilation, loss_object, on_nonfinite)
    if compilation.captured is not None:
        forwards.add(call, compilation.captured, compilation.tapped)
    module = CurvatureModule(model, engine, forwards)
    chosen_proofs = set(PROOFS) if proofs is True else set(proofs or ())
    prove_transform(module, call, chosen_proofs, strict)
    return module


def _plain(model: nn.Module) -> nn.Module:
    if isinstance(model, CurvatureModule):
        raise FxcurvError("the model is transformed already; call strip() on it first.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise FxcurvError(
            "transform the model before wrapping it: DistributedDataParallel(fxcurv.transform(net, ...))."
        )
    if not isinstance(model, nn.Module):
        kind = "class" if inspect.isclass(model) else type(model).__name__
        raise FxcurvError(f"fxcurv.transform takes an nn.Module, got a {kind}.")
    inner = [n for n, m in model.named_modules() if isinstance(m, CurvatureModule)]
    if inner:
        raise FxcurvError(
            f"the sub-module '{inner[0]}' is transformed already; put its strip() in its place, or train it by its own "
            "backward and precondition_ and leave the whole model plain."
        )
    return model
