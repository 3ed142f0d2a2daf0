"""SKFAC: K-FAC whose factors stay the rows of a batch, inverted in the space of examples."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Damp, Method, Source
from fxcurv.methods.parts.damp import Factored, PiSplit
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.sample_space import SampleInverse, SampleKron, SampleSpace, Window
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.registry import published

DAMPINGS: dict[str, Damp] = {"pi": PiSplit(), "sqrt": Factored()}


@published(
    "skfac",
    papers=(8,),
    fisher="mc",
    fisher_samples=1,
    damping=1e-3,
    damping_scheme="pi",
    ema=0.0,
    kl_clip=1e-3,
    factor_every=10,
    rows=256,
    window=1,
    path="auto",
)
def skfac(o: SimpleNamespace) -> Method:
    """SKFAC: K-FAC with the factors of one batch, each inverted in a space as small as the batch has rows.

    A = X^T X with the m rows X of a batch divided by sqrt(m), G likewise; where m is less than a factor is wide,
    (X^T X + c I)^-1 = (I - H^T H) / c with H = L^-1 X and L L^T = X X^T + c I. The direction is K-FAC's,
    U = (G + sqrt(damping)/pi I)^-1 V (A + pi sqrt(damping) I)^-1, exactly, and nothing d x d is kept.

    rows: room for the rows of a batch. Fewer are filled up with zeros; of more, evenly spaced ones are kept, of every
    example equally many positions, with the scale of all. A side wider than ``rows * window`` is low rank, any other
    dense ("auto"); path: "dense" or "low_rank" for all sides. sharing: "expand" sub-samples positions (K-FAC-expand),
    "reduce" takes the mean input and the summed gradient of an example (K-FAC-reduce): one row each. window: batches
    kept in the average of a low-rank side, weighted (1 - ema) ema^k; with ema > 0 make ema^window small.
    damping_scheme: "pi" (trace norm, from row norms) or "sqrt" (pi = 1). max_factor_dim concerns dense sides alone.

    With fisher="empirical" and factor_every=solve_every=1 the rows are those of the gradient, and what of V is their
    product, V = r Xg^T Xa, goes another way: U = r [Xg (G + c I)^-1]^T [Xa (A + c I)^-1]. The bracket above cancels to
    |X|^2 / c roundings, here nothing does: right to 1e-5 in float32 with c = 1e-6. The rest of V (weight decay in the
    loss, rows that did not fit in) takes the ordinary way. All of it is computed in float64 from float32 rows; only the
    gradient's own rounding is then magnified.

    Embeddings keep K-FAC's diagonal A; a weight that is both embedding and projection, K-FAC's dense factors.

    Cost: with m = rows * window, refresh 4 m^2 d + m^3 / 3 a side instead of 2 n d^2 + 7/3 d^3; apply 4 m d_out d_in a
    side instead of 2 d d_out d_in; memory 12 m d bytes instead of 8 d^2, and the rows of the batch in between. Choose
    it over kfac for wide layers and small batches, d > 2 m; with running averages and narrow layers choose kfac.

    Source: Tang et al. 2021. Batch factors and the low-rank path where n < d are a re-implementation's; rows=256, the
    period of 10, the push-through form and the window are ours; damping, KL clip and pi as in kfac.
    """
    if o.damping_scheme not in DAMPINGS:
        raise FxcurvError(f"damping_scheme='{o.damping_scheme}' is unknown; choose one of {', '.join(DAMPINGS)}.")
    if o.ema > 0 and o.window == 1:
        raise FxcurvError(f"ema={o.ema} of 'skfac' averages over a window of batches: give it window=2 or more.")
    space = SampleSpace(o.rows, o.window, o.path)
    own_rows = o.fisher == "empirical" and o.factor_every == o.solve_every == o.window == 1
    return Method(
        name="skfac",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=SampleKron(space),
        track=Window(space),
        damp=DAMPINGS[o.damping_scheme],
        solve=SampleInverse(space, own_rows),
        rescale=rescaling(o),
    )
