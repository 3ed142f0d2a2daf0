"""The diagonal Fisher."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.estimate import Diagonal
from fxcurv.methods.parts.rescale import KLClip
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.solve import Divide
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published


@published("diag", papers=(), fisher="mc", fisher_samples=1, damping=1e-3, ema=0.95, kl_clip=1e-3)
def diag(o: SimpleNamespace) -> Method:
    """Diagonal Fisher: divide every gradient entry by the mean square of the per-example gradients, plus damping.

    U = V / (D + damping), D = E[grad^2] elementwise, grad the gradient of one example for a sampled label, summed over
    its positions before squaring. Unlike Adam's second moment it is not taken from mean gradients, and has no root.

    Cost: n d_in d_out for the statistics, as much as a weight gradient, and one division a step; memory d_in d_out, as
    Adam's second moment, where kfac has d_in^2 + d_out^2. Choose it for layers too wide for factors, and as the
    baseline that says what the off-diagonal curvature is worth.

    Source: the natural gradient with a diagonal metric (sheet diagonal-and-proximal). Damping, the moving
    average and the KL clip are those of kfac.
    """
    return Method(
        name="diag",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(exact_norms=False),
        estimate=Diagonal(),
        track=EMA(),
        solve=Divide(),
        rescale=None if o.kl_clip is None else KLClip(),
    )
