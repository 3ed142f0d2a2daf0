"""HyLo: the empirical natural gradient of every layer in the space of few examples, interpolated or sampled."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.sample_pairs import Decay, Pairs, PairsSolve, Switch
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.track import Reached
from fxcurv.methods.registry import published


@published(
    "hylo",
    papers=(14,),
    fisher="empirical",
    fisher_samples=1,
    damping=0.1,
    kl_clip=None,
    factor_every=10,
    sharing="reduce",
    rank=64,
    mode="switch",
    period=100,
    threshold=0.1,
    intervals=None,
    replacement=False,
    pivots="left",
    damping_target=None,
    decay_steps=50,
    warmup=0,
)
def hylo(o: SimpleNamespace) -> Method:
    """HyLo: natural gradient with the Fisher of ``rank`` examples of a batch, chosen by interpolation or by sampling.

    A layer's Fisher is F = sum over examples of u u^T with u = g (x) a, a the mean input and g the summed gradient of
    an example (divided by sqrt(N)). With kept pairs S, K[j, k] = (a_j . a_k)(g_j . g_k) and M = (I + P K)^-1 P the
    direction is U = (V - sum_j z_j g_j a_j^T) / damping, z = M r, r_j = g_j^T V a_j. It is (F + damping I)^-1 V,
    exactly, where all examples fit in.

    mode: "kid" keeps the pairs that span the others best, K = Y^T K_SS Y + E, P = Y (E + damping I)^-1 Y^T; "kis" draws
    pairs with probability proportional to |a|^2 |g|^2, P = I / damping; "exact" keeps all of a batch of at most
    ``rank`` (evenly spaced ones of a larger); "switch" is "kid" in a period after the summed norm of the layer's
    gradient changed by more than ``threshold`` from one ``period`` of steps to the next, and in the first, else "kis";
    or with intervals=(a, b, c), or the text "a b c", it is "kid" in steps below a and from b + 1 to c. It computes
    both. replacement: draw with replacement and weigh by 1 / sqrt(p): unbiased, with the trace of F, where the paper's
    draws without it each count alike. pivots: "left" takes the pair with most left after those taken before, "norm" the
    order of |a|^2 |g|^2 as in the paper, in which copies of an example use up the rank. damping_target: where the
    damping decays to, by 2 log10(damping / target) / decay_steps with every update after ``warmup`` of them. sharing:
    "expand" makes every position an example. solve_every has no effect: pairs and kernel belong together and are
    renewed every factor_every steps.

    With mode="exact", the empirical Fisher and factor_every=1 the pairs are those of the gradient, which is then
    weighted anew, U = r Xg^T diag(w) Xa with (K + damping I) w = 1: nothing cancels. Embeddings, and weights that are
    one elsewhere, have the diagonal of F; norm layers their exact blocks. Several micro-batches count as one batch,
    several processes too: rows are gathered, so that P is that of the whole batch. For blocks that stay apart,
    P = blockdiag(P_w), there is the op pairs_kernel.

    Cost: with n examples and r = rank, an update n^2 (d_in + d_out) + n^3 / 3 for "kid", r^2 (d_in + d_out) + r^3 for
    the kernel; a step 4 r d_in d_out in float64; memory 4 r (d_in + d_out) + 16 r^2 bytes, and the rows of the batch in
    between. Choose it over kfac for wide layers with small batches, or where the independence of a and g is far from
    true; a damping that is small against the eigenvalues missed by r pairs makes noise of the step.

    Source: Mu et al. 2022. The paper's damping falls from 1.5 or 4 to a tenth or a hundredth, its ratio of rows is 0.1,
    its threshold is not known; damping, rank, period, threshold and pivots here are ours, and so is the least-squares
    interpolation of the gradients themselves, which makes every direction one of descent.
    """
    if o.pivots not in ("left", "norm"):
        raise FxcurvError(f"pivots='{o.pivots}' is unknown; choose 'left' or 'norm'.")
    decay = None
    if o.damping_target is not None:
        decay = Decay(_whole("decay_steps", o.decay_steps, 1), _whole("warmup", o.warmup))
        if not 0 < o.damping_target <= o.damping:
            raise FxcurvError(f"damping_target={o.damping_target} must lie between 0 and damping={o.damping}.")
    own_rows = o.mode == "exact" and o.fisher == "empirical" and o.factor_every == 1
    switch = Switch(o.period, o.threshold, _intervals(o.intervals))
    return Method(
        name="hylo",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=Pairs(o.rank, o.mode, bool(o.replacement), o.pivots == "norm", switch, decay),
        track=Reached(),
        solve=PairsSolve(own_rows),
        rescale=rescaling(o),
        hyper={"ema": 0.0} | ({} if decay is None else {"damping_target": float(o.damping_target)}),
    )


def _whole(name: str, value: float, least: int = 0) -> int:
    if value != int(value) or value < least:
        raise FxcurvError(f"{name}={value} must be a whole number, at least {least}.")
    return int(value)


def _intervals(given: object) -> tuple[int, int, int] | None:
    """(a, b, c) from three numbers or from a text of three, "10 35 40"."""
    if given is None:
        return None
    parts = given.replace(",", " ").split() if isinstance(given, str) else given
    try:
        a, b, c = (int(part) for part in parts)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise FxcurvError(f"intervals={given!r} must be three numbers of steps, such as '10 35 40'.") from error
    return a, b, c
