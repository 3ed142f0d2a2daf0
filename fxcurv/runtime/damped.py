"""How much of a layer's curvature the damping outweighs: what to look at before believing in a second-order step.

Where lambda is larger than an eigenvalue of the block, the step along it is the gradient over lambda and curvature says
nothing. With almost all directions so, runs at different dampings compare step sizes; with none, and eigenvalues at
rounding error, the inverse is noise (sheet kronecker-1, Damping, item 9).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcurv.methods.dense import full
from fxcurv.methods.parts.estimate import InputGram, Kron
from fxcurv.methods.parts.strength import told
from fxcurv.methods.parts.traces import Traces
from fxcurv.runtime.module import CurvatureModule


def damped_fractions(model: CurvatureModule, damping: float | None = None) -> dict[str, float]:
    """The part of the eigen-directions with e_G e_A < lambda, by layer, of the curvature that the model now keeps.

    lambda is the layer's own where the last step's scheme measured one ("relative", or by the trace of convolutions),
    else the method's ``damping``; ``damping`` takes the place of both. Of layers that are kept as one Kronecker product
    or factor, as an eigenbasis with its spectrum, or (norm layers) as whole blocks; others are left out. Decomposes the
    factors on their device and waits for the result: for now and then, not for every step.
    """
    engine = model._engine
    found = {}
    for target in engine.facts.targets:
        spectrum = _spectrum(model, target.name)
        if spectrum is None:
            continue
        own: Tensor | float | None = damping if damping is not None else engine.info.get(told(target.name))
        strength = torch.as_tensor(engine.hyper["damping"] if own is None else own).to(spectrum)
        below = spectrum < strength.reshape(strength.shape + (1,) * (spectrum.ndim - strength.ndim))
        found[target.name] = float(below.double().mean())
    return found


def _spectrum(model: CurvatureModule, name: str) -> Tensor | None:
    """Eigenvalues of a layer's block, those of each group in a row behind it, in any order."""
    factors = model.factors(name)
    if "S" in factors:
        return factors["S"]
    if "F" in factors:
        return torch.linalg.eigvalsh(factors["F"])
    estimate = model._engine.method.estimate
    if not isinstance(estimate, (Kron, InputGram, Traces)):
        return None
    sides = [torch.linalg.eigvalsh(full(factors[s], factors[s].shape[-1])).clamp(min=0) for s in "GA" if s in factors]
    if len(sides) != 2:
        return sides[0] if sides else None
    products = sides[0].unsqueeze(-1) * sides[1].unsqueeze(-2)
    return products / sides[1].sum(-1)[..., None, None] if isinstance(estimate, Traces) else products
