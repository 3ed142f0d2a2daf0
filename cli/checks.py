"""The checks of ``fxcurv check``, each a row: pass, fail, info or skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.utils import _pytree as pytree

from fxcurv.capture import Call
from fxcurv.cli.build import build, call_model, first_batch, split_hyper
from fxcurv.cli.modelfile import ModelFile
from fxcurv.errors import FxcurvError
from fxcurv.ir.verify import verify
from fxcurv.layers.region import place_of
from fxcurv.losses import CrossEntropy, Loss, resolve_loss
from fxcurv.methods import PUBLISHED
from fxcurv.runtime import CurvatureModule, optimizer
from fxcurv.runtime.prove import PROOFS, prove_transform

SMALL = 3000  # parameters of a layer whose dense block is computed
EXAMPLES = 8  # of the batch for dense blocks
COLUMNS = 512  # backward passes for dense blocks


@dataclass(frozen=True)
class Check:
    """One row. value: a number for JSON, where there is one."""

    name: str
    status: str
    detail: str = ""
    value: float | None = None


def run_checks(
    file: ModelFile, method: str, hyper: dict[str, Any], options: dict[str, Any], strict: bool
) -> list[Check]:
    """All checks; raises :class:`FxcurvError` only for what is wrong before anything can be checked."""
    split_hyper(file, method, hyper)
    found: list[Check] = []
    modules: list[CurvatureModule] = []

    def transform() -> str:
        modules.append(build(file, method, hyper, check="numeric", proofs=(), **options))
        return f"{len(modules[0].history)} passes, results equal before and after each"

    found.append(_attempt("passes", transform))
    if not modules:
        return found
    module = modules[0]

    def types() -> str:
        verify(module.program)
        return f"{len(module.program)} nodes"

    found.append(_attempt("types", types))
    found += _proofs(file, module, strict)
    batch = _batch(file, module)
    if batch is None:
        return [*found, Check("step", "skipped", "define 'batches' or 'example_inputs', or pass --input")]
    found += _dense(file, method, hyper, options, batch)
    found.append(_attempt("step", lambda: _one_step(file, module, batch, split_hyper(file, method, hyper)[1])))
    return found


def _attempt(name: str, action: Callable[[], str]) -> Check:
    try:
        return Check(name, "pass", action())
    except FxcurvError as error:
        return Check(name, "fail", " ".join(str(error).split()))


def _proofs(file: ModelFile, module: CurvatureModule, strict: bool) -> Iterator[Check]:
    compilation = module._engine.compilation
    call = Call.default(module.strip())
    if file.example_inputs is not None:
        call = Call.of(module.strip(), file.example_inputs)
    for name in PROOFS:
        if name != "coverage" and (compilation.captured is None or not call.real):
            why = "needs example inputs" if compilation.captured is not None else "nothing is captured for this method"
            yield Check(name, "skipped", why)
            continue

        def prove(name: str = name) -> str:
            if name == "coverage" or not strict:
                prove_transform(module, call, {name}, strict)
            else:
                prove_transform(module, call, {name}, False)
            return _SHOWN[name](module)

        yield _attempt(name, prove)


_SHOWN: dict[str, Callable[[CurvatureModule], str]] = {
    "coverage": lambda module: f"{100 * module.report().covered:.1f} % of the elements, the rest with a reason",
    "gradient": lambda module: f"{len(module.layers)} layers' gradients, recomputed from their rows, equal autograd's",
    "output": lambda module: "tapped and plain model agree",
}


def _batch(file: ModelFile, module: CurvatureModule) -> tuple[Any, Any] | None:
    """Inputs and targets: the file's first batch, or example inputs with targets that the loss accepts."""
    batch = first_batch(file)
    if batch is not None or file.example_inputs is None:
        return batch
    with file.running(), torch.no_grad():
        outputs = copy.deepcopy(module.strip()).eval()(*file.example_inputs)
    if not isinstance(outputs, Tensor):
        return None
    loss = resolve_loss(file.loss)
    targets = outputs.argmax(dim=1) if isinstance(loss, CrossEntropy) else torch.zeros_like(outputs)
    return file.example_inputs, targets


def _one_step(file: ModelFile, module: CurvatureModule, batch: tuple[Any, Any], options: dict[str, Any]) -> str:
    inputs, targets = batch
    loss = resolve_loss(file.loss)
    opt = optimizer(module, **options)
    before = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    module.train()

    def closure() -> Tensor:
        opt.zero_grad()
        outputs = call_model(module, inputs)
        value = loss.value(outputs, targets) if loss is not None else outputs.square().mean()
        module.backward(value, outputs, targets=targets if loss is not None else None)
        return value

    with file.running():
        value = opt.step(closure)
    after = opt.param_groups[0]["params"]
    wrong = [name for name, p in module._engine.parameters().items() if not bool(torch.isfinite(p).all())]
    if wrong:
        raise FxcurvError(f"after one step '{wrong[0]}' is not finite.")
    if all(torch.equal(p, q) for p, q in zip(before, after, strict=True)):
        raise FxcurvError("one step changed no parameter.")
    bad = opt.info.fallback if opt.info is not None else ()
    if bad:
        raise FxcurvError(f"the update of {', '.join(bad)} was not finite, so the gradient was used.")
    return f"loss {float(value.detach()):.4g}, every parameter finite after it" if value is not None else ""


# Factors against the dense curvature ----------------------------------------------------------------------------------


def _dense(
    file: ModelFile, method: str, hyper: dict[str, Any], options: dict[str, Any], batch: tuple[Any, Any]
) -> Iterator[Check]:
    """The relative Frobenius distance of each small layer's block to the exact GGN block of the mean loss."""
    loss = resolve_loss(file.loss)
    known = PUBLISHED[method].defaults
    if loss is None or "fisher" not in known:
        yield Check("dense blocks", "skipped", "no layer factors" if "fisher" not in known else "no loss is known")
        return
    inputs, targets = pytree.tree_map(_small, batch)
    exact = {"fisher": "ggn"} | ({"ema": 0.0} if "ema" in known else {})
    model = copy.deepcopy(file.model).double().eval()
    twin = replace(file, model=model, example_inputs=None, loss=loss)
    try:
        with torch.no_grad():
            outputs = call_model(model, inputs)
        count = loss.column_count(outputs) * outputs.shape[0]
        if count > COLUMNS:
            yield Check("dense blocks", "skipped", f"{count} outputs for {EXAMPLES} examples, more than {COLUMNS}")
            return
        columns = _columns(loss, outputs, targets)
        module = build(twin, method, {**hyper, **exact}, proofs=(), **options)
        module.eval()
        for refresh in (True, False):  # what is measured in a basis, as EKFAC does, needs the basis first
            module.due(statistics=True, refresh=refresh)
            outputs = call_model(module, inputs)
            module.backward(loss.value(outputs, targets), outputs, targets=targets)
            module.precondition_()
    except FxcurvError as error:
        yield Check("dense blocks", "skipped", " ".join(str(error).split()))
        return
    terms = float(loss.count(outputs.detach(), targets, None))
    for layer in module.layers:
        groups, d_out, d_in = layer.shape
        block = _block(module.factors(layer.name)) if groups == 1 and layer.weight else None
        target = next(t for t in module._engine.facts.targets if t.name == layer.name)
        if block is None or target.unitwise or d_out * d_in > SMALL:
            continue
        dense = _exact_block(model, target, inputs, columns, terms)
        if dense.shape != block.shape:
            continue
        distance = float((block - dense).norm() / dense.norm().clamp_min(1e-300))
        yield Check(f"block of {layer.name}", "info", f"{distance:.3g} from the exact GGN block (Frobenius)", distance)


def _small(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value[:EXAMPLES] if value.ndim else value
    return value.double() if value.is_floating_point() else value


def _columns(loss: Loss, outputs: Tensor, targets: Any) -> list[Tensor]:
    """An exact square root of the loss's Hessian in the outputs, a row of the batch at a time."""
    columns = []
    for column in loss.columns(outputs, targets):
        for row in range(outputs.shape[0]):
            single = torch.zeros_like(column)
            single[row] = column[row]
            columns.append(single)
    return columns


def _block(factors: dict[str, Tensor]) -> Tensor | None:
    """The curvature that a layer's factors stand for, in row-major order of [W b]; ``None`` when they are others."""
    if {"QA", "QG", "S"} <= set(factors):
        basis = torch.kron(factors["QG"].contiguous(), factors["QA"].contiguous())
        return basis @ torch.diag(factors["S"].reshape(-1)) @ basis.T
    if {"A", "G"} <= set(factors) and factors["A"].ndim == factors["G"].ndim == 2:
        return torch.kron(factors["G"].contiguous(), factors["A"].contiguous())
    return torch.diag(factors["D"].reshape(-1)) if set(factors) == {"D"} else None


def _exact_block(model: nn.Module, target: Any, inputs: Any, columns: list[Tensor], terms: float) -> Tensor:
    """J^T H J / N for one layer, from vector-Jacobian products of the plain model."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    places = [place_of(key, own) for key in (target.weight, target.bias) if key is not None]
    names = [place.name for place in places]
    kwargs = inputs if isinstance(inputs, dict) else {}
    args = () if kwargs else inputs if isinstance(inputs, (tuple, list)) else (inputs,)

    def output(*values: Tensor) -> Tensor:
        return functional_call(model, {**own, **dict(zip(names, values, strict=True))}, tuple(args), kwargs)  # type: ignore[no-any-return]

    pull: Callable[..., tuple[Tensor, ...]] = vjp(output, *(own[name] for name in names))[1]
    rows = []
    for column in columns:
        gradient = [place.of(part) for place, part in zip(places, pull(column), strict=True)]
        matrix = gradient[0].permute(target.permutation).reshape(target.d_out, -1)
        if len(gradient) == 2:
            matrix = torch.cat([matrix, gradient[1].reshape(-1, 1)], dim=1)
        rows.append(matrix.reshape(-1))
    jacobian = torch.stack(rows)
    return jacobian.T @ jacobian / terms
