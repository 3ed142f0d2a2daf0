"""The three proofs of a transform: coverage, gradients through the normal form, and the tapped output.

(a) "coverage": every use of every parameter is on a matched path or listed with a reason; ``strict`` makes a listed one
an error. (b) "gradient": each layer's weight gradient, recomputed from the rows its taps see, equals autograd's: this
catches a wrong padding, dilation, transposition or tie. (c) "output": tapped and plain model agree under one seed.
(b) and (c) need example inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcurv.capture import Call
from fxcurv.capture.state import preserved
from fxcurv.capture.structure import flatten_output
from fxcurv.errors import FxcurvError
from fxcurv.layers.layer import Detection
from fxcurv.layers.proof import prove

PROOFS = ("coverage", "gradient", "output")


class ProofFailed(FxcurvError):
    """A captured graph is not the model: another front-end may do better."""


def prove_transform(module: Any, call: Call, proofs: set[str], strict: bool) -> None:
    """Run the chosen proofs; raises :class:`FxcurvError` in one sentence for the first that fails."""
    unknown = sorted(proofs - set(PROOFS))
    if unknown:
        raise FxcurvError(f"there is no proof '{unknown[0]}'; there are {', '.join(PROOFS)}.")
    engine = module._engine
    if strict and engine.method.source.taps:
        bare = [row for row in module.report().rows if row.status == "gradient only"]
        if bare:
            more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
            raise FxcurvError(f"strict=True and '{bare[0].parameter}'{more} is not covered: {bare[0].reason}")
    compilation = engine.compilation
    if compilation.captured is None or not call.real:
        return
    model = engine.model
    plain = _plain_output(model, call) if proofs - {"coverage"} else None
    if "gradient" in proofs:
        chosen = Detection(compilation.layers, ())
        faults = prove(compilation.captured, chosen, model, call.leaves)
        if faults:
            raise ProofFailed(f"{faults[0]} Skip the layer with skip=, or leave this proof out with proofs=().")
    if "output" in proofs and compilation.tapped is not None:
        difference = _output_difference(module, call, plain)
        if difference:
            raise ProofFailed(
                f"the captured graph's output differs from the model's ({difference}): its forward does something that "
                "tracing cannot see; try frontend='export', or leave this proof out with proofs=()."
            )


def _plain_output(model: Any, call: Call) -> Any:
    """The model's own output; raises :class:`FxcurvError` when the example inputs are no call that it accepts."""
    args, kwargs = call.rebuild([leaf.detach() for leaf in call.leaves])
    try:
        with preserved(model), torch.no_grad():
            torch.manual_seed(0)
            return model(*args, **kwargs)
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message").rstrip(".")
        raise FxcurvError(
            f"{type(model).__name__} itself fails on the example inputs ({type(error).__name__}: {reason}); pass the "
            "arguments that a training step passes."
        ) from error


def _output_difference(module: Any, call: Call, plain: Any) -> str:
    engine, leaves = module._engine, [leaf.detach() for leaf in call.leaves]
    forward, _ = module._forwards.find(engine, *call.rebuild(leaves))
    with preserved(engine.model), torch.no_grad():
        torch.manual_seed(0)
        tapped = forward(engine, leaves)
    engine.statistics.discard()
    outputs = [flatten_output(output, lambda value: isinstance(value, Tensor))[0] for output in (tapped, plain)]
    if [value.shape for value in outputs[0]] != [value.shape for value in outputs[1]]:
        return "in its structure"
    for mine, theirs in zip(*outputs, strict=True):
        if not torch.equal(torch.nan_to_num(mine), torch.nan_to_num(theirs)):
            error = float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))
            if error > 1e-5:  # export decomposes some modules, which changes the last bits
                return f"by {error:.1e} of its largest entry"
    return ""
