"""transform: from a model and a method to a :class:`CurvatureModule`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fxcurv.capture import Attempts, Call, Captured
from fxcurv.capture.library import is_convolution
from fxcurv.errors import FxcurvError
from fxcurv.losses import Loss, resolve_loss
from fxcurv.methods import Method, get_method
from fxcurv.methods.method import Source
from fxcurv.passes import PIPELINE, Compilation, Pass, run_passes
from fxcurv.passes.detect import find_layers
from fxcurv.runtime.engine import Engine
from fxcurv.runtime.example import pack_example
from fxcurv.runtime.forward import Forwards
from fxcurv.runtime.module import CurvatureModule
from fxcurv.runtime.prove import PROOFS, ProofFailed, prove_transform

WORTH = 0.05  # of the elements: from there on a second capture is worth its time
ON_NONFINITE = ("gradient", "raise")
STALE = ("full", "packed", "bf16", "packed,bf16")
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
    fused: Mapping[str, int] | None = None,
    weight_gradients: bool = True,
    stagger: bool = False,
    stale: str = "full",
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
    all front-ends but symbolic and by the numeric proofs. loss: a name, an nn loss module or a loss object; without it
    the Fisher is empirical. frontend: "symbolic", "export", "dynamo" or "auto", which takes the first of them that
    captures the model and passes the proofs. backend: "auto", "aten" or "reference" kernels. layers, skip: fnmatch
    patterns on layer names or kinds. fused: patterns on layer names with the number of equal parts into which such a
    layer's outputs are divided, each a layer of its own ({"*.qkv": 3}). strict: an uncovered parameter is an error.
    weight_gradients: False leaves out of the backward pass the weight gradients of linear layers for which it takes
    less to precondition their rows (batches smaller than layers are wide); their ``.grad`` is ``None`` until the step
    fills in the direction, so nothing in between (gradient clipping, a GradScaler) can use it.
    stagger: True refreshes layers in turn, each every ``solve_every`` steps, so that no step does all of the work.
    stale: how factorisations are kept between refreshes: "full", "packed" (one triangle of symmetric ones, exactly),
    "bf16" (all of them in half the bits) or "packed,bf16".
    proofs: all, none or some of "coverage", "gradient", "output". on_nonfinite: "gradient" (a layer with a bad update
    keeps its gradient) or "raise". dump_failures: a folder for the matrices of failed factorisations. passes, disable,
    check, fuel: the pipeline, passes left out by name, "none"/"types"/"numeric" checking and a limit on rewrites.

    Raises :class:`FxcurvError` when something above is unknown, nothing captures the model, or a proof fails.
    """
    model, disable = _plain(model), tuple(disable)
    unknown = sorted(set(disable) - {step.name for step in passes})
    if unknown:
        raise FxcurvError(f"there is no pass '{unknown[0]}' to disable; there are {', '.join(p.name for p in passes)}.")
    if stale not in STALE:
        raise FxcurvError(f"stale='{stale}' must be one of {', '.join(STALE)}.")
    if on_nonfinite not in ON_NONFINITE:
        raise FxcurvError(f"on_nonfinite='{on_nonfinite}' must be one of {', '.join(ON_NONFINITE)}.")
    chosen, loss_object = get_method(method, **hyper), resolve_loss(loss)
    if chosen.exact_products and loss_object is None:
        raise FxcurvError(
            f"'{chosen.name}' multiplies with the loss's curvature: pass loss=, e.g. loss='cross_entropy'."
        )
    if chosen.exact_products and loss_object is not None and loss_object.reduction == "sum":
        raise FxcurvError(f"'{chosen.name}' compares losses with a model of the mean loss: use reduction='mean'.")
    if chosen.rule.kind == "quadratic" and not weight_gradients:
        raise FxcurvError("step='quadratic' needs every gradient: leave weight_gradients=True.")
    by_default = loss_object is None and chosen.source.columns
    if by_default:
        chosen = replace(chosen, source=Source("empirical"))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FxcurvError(f"{type(model).__name__} has no trainable parameter.")
    if example_inputs is not None and not isinstance(example_inputs, (tuple, list)):
        raise FxcurvError(
            f"example_inputs is a {type(example_inputs).__name__}; pass a tuple with the positional arguments of one "
            "call, such as example_inputs=(x,)."
        )
    given = example_inputs is not None or example_kwargs is not None
    call = Call.of(model, tuple(example_inputs or ()), example_kwargs) if given else Call.default(model)
    options: dict[str, Any] = {"call": call, "layers": layers, "skip": skip, "backend": backend}
    options["empirical_by_default"] = by_default
    options["link"] = "" if loss_object is None else loss_object.link
    options["fused"] = None if fused is None else dict(fused)
    options["weight_gradients"] = bool(weight_gradients)
    options["on_nonfinite"] = on_nonfinite
    options["stagger"] = bool(stagger)
    options["stale"] = stale
    options["dump_failures"] = dump_failures
    options["request"] = {  # what an artifact needs to ask for the same again
        "method": method if isinstance(method, str) else None,
        "hyper": dict(hyper),
        "frontend": frontend,
        "backend": backend,
        "layers": layers,
        "skip": skip,
        "fused": options["fused"],
        "weight_gradients": options["weight_gradients"],
        "stagger": options["stagger"],
        "stale": options["stale"],
        "on_nonfinite": on_nonfinite,
        "disable": sorted(set(disable)),
        "example": pack_example(example_inputs, example_kwargs),
    }
    coupled = any((isinstance(m, _BATCH_NORMS) and m.training) or is_convolution(m) for m in model.modules())
    options["batch_statistics"] = coupled and chosen.source.passes == "ggn"
    attempts = Attempts(model, call, frontend)

    def compile_(captured: Captured | None) -> Compilation:
        compilation = Compilation(model=model, captured=captured, method=chosen, fuel=fuel, check=check)
        compilation.options.update(options)
        # A method that reads gradients only needs no forward graph.
        run_passes(compilation, passes, {*disable, *(("detect", "order", "tap") if captured is None else ())})
        if compilation.lowered is None:
            raise FxcurvError("the passes end without 'lower', so there is nothing to run.")
        return compilation

    def finish(compilation: Compilation) -> CurvatureModule:
        forwards = Forwards(frontend)
        if compilation.captured is not None:
            forwards.chosen = compilation.captured.frontend
            forwards.add(call, compilation.captured, compilation.tapped)
        module = CurvatureModule(model, Engine(model, compilation, loss_object, on_nonfinite), forwards)
        prove_transform(module, call, set(PROOFS) if proofs is True else set(proofs or ()), strict)
        return module

    if not chosen.source.taps:
        return finish(compile_(None))
    for captured in attempts:
        for compilation in _by_coverage(compile_(captured), attempts, compile_):
            try:
                return finish(compilation)
            except ProofFailed as error:
                assert compilation.captured is not None
                attempts.failed(compilation.captured.frontend, error)
    raise attempts.error()


def _by_coverage(
    first: Compilation, attempts: Attempts, compile_: Callable[[Captured], Compilation]
) -> Iterator[Compilation]:
    """The compilations to try in order: ``first``, and where it leaves much out that is used, also the next capture.

    The next one comes first if it covers more by ``WORTH`` of the elements. Only an automatic choice looks for it.
    """
    assert first.captured is not None and first.model is not None
    used = first.detection is not None and any(item.chain for item in first.detection.uncovered)
    share = _covered(first)
    looks = attempts.automatic and first.captured.frontend == "symbolic" and used and share < 1 - WORTH
    captured = next(iter(attempts), None) if looks else None
    if captured is None:
        yield first
        return
    found = find_layers(captured, first.model, first.options["call"], first.options["fused"])
    more = _covered(replace(first, detection=found))
    if more <= share + WORTH:
        yield first
        yield compile_(captured)
        return
    names = f"{captured.frontend} covers {100 * more:.0f} % of the elements, symbolic {100 * share:.0f} %"
    yield compile_(replace(captured, notes=(*captured.notes, f"{names}: {captured.frontend} was chosen")))
    yield first


def _covered(compilation: Compilation) -> float:
    """Share of the trainable elements that belong to a layer, chosen or not."""
    assert compilation.model is not None
    parameters = {name: p for name, p in compilation.model.named_parameters() if p.requires_grad}
    layers = compilation.detection.layers if compilation.detection is not None else ()
    places = {place for layer in layers for place in layer.places if not is_lazy(parameters[place.name])}
    total = sum(p.numel() for p in parameters.values() if not is_lazy(p))
    return sum(place.of(parameters[place.name]).numel() for place in places) / total if total else 1.0


def _plain(model: nn.Module) -> nn.Module:
    if isinstance(model, CurvatureModule):
        raise FxcurvError("the model is transformed already; call strip() on it first.")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise FxcurvError(
            "transform the model before wrapping it: DistributedDataParallel(fxcurv.transform(net, ...)); "
            "nn.DataParallel cannot wrap a transformed model."
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
