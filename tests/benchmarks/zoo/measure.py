"""What is measured of one model; it runs in a process of its own and returns plain data."""

from __future__ import annotations

import copy
import importlib
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.capture import FRONTENDS
from fxcurv.runtime.prove import prove_transform
from zoo import ZOOS
from zoo.sample import Sample, tensors

# Differences that rounding explains: relative to the largest entry of an output, and to the norm of a gradient.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
WIDEST = 256  # max_factor_dim: a wider side keeps a diagonal factor, so that a step takes seconds, not minutes


def warm() -> None:
    """Load what a process loads once: that is no model's time. No backward pass, whose threads a fork would lose."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for frontend in FRONTENDS:
        fxcurv.transform(
            nn.Linear(2, 2), "kfac", loss="mse", example_inputs=(torch.ones(2, 2),), frontend=frontend, proofs=()
        )


def measure(zoo: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """One row. Whatever goes wrong is its ``problem``, in a sentence."""
    row: dict[str, Any] = {"zoo": zoo, "model": name, "problem": ""}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    try:
        torch.manual_seed(0)
        sample = _double(importlib.import_module(f"zoo.{ZOOS[zoo]}").sample(name))
        row["parameters"] = sum(p.numel() for p in sample.model.parameters() if p.requires_grad)
        row["dtype"] = str(next(sample.model.parameters()).dtype).removeprefix("torch.")
        row["build_seconds"] = time.perf_counter() - started
    except Exception as error:
        return {**row, **_failure("model", error), "stage": "build"}
    for stage, function in (("transform", _transform), ("outputs", _equal), ("step", _step)):
        try:
            function(sample, row, options)
        except Exception as error:
            row.update(_failure(stage, error), stage=stage)
            break
    row["seconds"] = time.perf_counter() - started
    row["passed"] = not row["problem"]
    row.pop("module", None)
    return row


def _failure(stage: str, error: Exception) -> dict[str, Any]:
    text = str(error) if isinstance(error, fxcurv.FxcurvError) else f"{stage}: {type(error).__name__}: {error}"
    sentence = " ".join(text.split())[:400]
    return {"problem": sentence, "traceback": "".join(traceback.format_exception(error))[-6000:]}


def _double(sample: Sample) -> Sample:
    """The sample in float64, where the model itself runs in it; else as it is."""
    model = copy.deepcopy(sample.model).double().train()
    args, kwargs = _cast(sample.args), _cast(sample.kwargs)
    try:
        torch.manual_seed(0)
        loss = sample.loss(copy.deepcopy(model)(*args, **kwargs))[0]
        loss.backward()
    except Exception:
        sample.model.train()
        sample.loss(copy.deepcopy(sample.model)(*sample.args, **sample.kwargs))[0].backward()  # it runs at all
        return sample
    return Sample(model, args, kwargs, sample.scores)


def _cast(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value
    )


def _clocked(function: Callable[..., Any], spent: Counter[str], name: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.process_time() - start

    return timed


@contextmanager
def _clocks(spent: Counter[str]) -> Iterator[None]:
    """Seconds spent in captures and in proofs, added up in ``spent``."""
    captures = {name: _clocked(function, spent, "capture") for name, function in FRONTENDS.items()}
    proofs = _clocked(prove_transform, spent, "proofs")
    with mock.patch.dict(FRONTENDS, captures), mock.patch("fxcurv.runtime.transform.prove_transform", proofs):
        yield


def _transform(sample: Sample, row: dict[str, Any], options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    probe = copy.deepcopy(sample.model)
    loss = sample.loss(probe(*sample.args, **sample.kwargs))[2]
    spent: Counter[str] = Counter()
    start = time.process_time()
    try:
        with _clocks(spent):
            module = fxcurv.transform(
                copy.deepcopy(sample.model),
                options.get("method", "kfac"),
                example_inputs=sample.args,
                example_kwargs=sample.kwargs,
                loss=loss,
                frontend=options.get("frontend", "auto"),
                max_factor_dim=options.get("max_factor_dim", WIDEST),
            )
    finally:
        row["capture_seconds"] = spent["capture"]
        row["transform_seconds"] = time.process_time() - start - spent["capture"] - spent["proofs"]
        row["proof_seconds"] = spent["proofs"]
    report = module.report()
    row.update(module=module, frontend=report.frontend, layers=len(module.layers), covered=report.covered)
    row["kinds"] = dict(Counter(layer.kind for layer in module.layers))
    missing: Counter[str] = Counter()
    for entry in report.rows:
        if entry.status == "gradient only":
            missing[re.sub(r" \(node '[^']*'\)", "", entry.reason)] += entry.elements
    row["uncovered"] = dict(missing.most_common())
    row["uncovered_rows"] = [
        (entry.parameter, entry.elements, entry.reason, entry.source)
        for entry in report.rows
        if entry.status == "gradient only"
    ][:20]


def _equal(sample: Sample, row: dict[str, Any], options: dict[str, Any]) -> None:
    """Outputs and gradients against the plain model's, in both modes and from one seed.

    Eval mode is tapped on request only. A model that the capture then refuses still runs as the user's own.
    """
    module = row["module"]
    problems = [*_compared(sample, row, "train")]
    try:
        problems += _compared(sample, row, "eval")
    except fxcurv.FxcurvError as error:
        row["eval_refused"] = str(error)
        module.zero_grad()
        module.due(statistics=False)
        problems += _compared(sample, row, "eval", tapped=False)
    module.train()
    if problems:
        row["problem"] = "; ".join(problems) + "."


def _compared(sample: Sample, row: dict[str, Any], mode: str, tapped: bool = True) -> list[str]:
    """What differs in a mode by more than rounding."""
    tolerance, problems = TOLERANCE[getattr(torch, row["dtype"])], []
    mine, plain = row["module"].train(mode == "train"), _plain(sample, row["module"]).train(mode == "train")
    mine.zero_grad()
    plain.zero_grad()
    mine.due(statistics=tapped)
    torch.manual_seed(2)
    expected = plain(*sample.args, **sample.kwargs)
    torch.manual_seed(2)
    output = mine(*sample.args, **sample.kwargs)
    row[f"output_error_{mode}"] = worst = _output_error(output, expected)
    if not worst <= tolerance:
        problems.append(f"outputs differ in {mode} mode by {worst:.1e}")
    torch.manual_seed(3)
    sample.loss(expected)[0].backward()
    torch.manual_seed(3)
    loss, scores, _ = sample.loss(output)
    mine.backward(loss, scores)
    worst, where = _gradient_error(mine.strip(), plain)
    row[f"gradient_error_{mode}"] = worst
    if not worst <= tolerance:
        problems.append(f"gradients differ in {mode} mode by {worst:.1e} ({where})")
    mine.zero_grad()
    return problems


def _plain(sample: Sample, module: nn.Module) -> nn.Module:
    """The untouched model with the parameters and buffers that the transformed one has now."""
    plain = copy.deepcopy(sample.model)
    theirs = dict((*module.strip().named_parameters(), *module.strip().named_buffers()))
    with torch.no_grad():
        for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):
            if tensor.shape == theirs[name].shape:  # else a cache, filled anew
                tensor.copy_(theirs[name])
    return plain


def _output_error(mine: Any, theirs: Any) -> float:
    pairs = list(zip(tensors(mine), tensors(theirs), strict=True))
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        a, b = torch.nan_to_num(a.detach().double()), torch.nan_to_num(b.detach().double())
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def _gradient_error(mine: nn.Module, theirs: nn.Module) -> tuple[float, str]:
    """Largest difference of a gradient over its norm, or over a thousandth of all gradients' where that is more."""
    pairs = {name: (a.grad, b.grad) for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True)}
    whole = sum(float(b.double().square().sum()) for _, b in pairs.values() if b is not None) ** 0.5
    worst, where = 0.0, ""
    for name, (a, b) in pairs.items():
        if (a is None) != (b is None):
            return float("inf"), f"{name}: {'no' if a is None else 'a'} gradient"
        if a is None or b is None:
            continue
        error = float((a - b).double().norm()) / max(float(b.double().norm()), 1e-3 * whole, 1e-30)
        if not error <= worst:
            worst, where = error, name
    return worst, where


def _step(sample: Sample, row: dict[str, Any], options: dict[str, Any]) -> None:
    """One preconditioned step: every gradient finite, nothing repaired or left out."""
    module = row["module"]
    opt = torch.optim.SGD(module.parameters(), lr=1e-3)
    module.train()
    start = time.process_time()
    torch.manual_seed(4)
    loss, scores, _ = sample.loss(module(*sample.args, **sample.kwargs))
    module.backward(loss, scores)
    info = module.precondition_()
    row["step_seconds"] = time.process_time() - start
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    row["fallback"] = list(info.fallback)
    opt.step()
    if bad:
        problem = f"the preconditioned gradient of {bad[0]} is not finite"
    elif info.fallback or info.kept:
        problem = f"layers {', '.join((*info.fallback, *info.kept)[:3])} kept their gradient or an old factorisation"
    else:
        return
    row["problem"] = "; ".join(part for part in (row["problem"].rstrip("."), problem) if part) + "."
