"""TKFAC: a Kronecker product with the trace of the Fisher block."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.schemes import SPECTRAL, scheme
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.traces import Traces, by_kind
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published


@published(
    "tkfac",
    papers=(21,),
    fisher="empirical",
    fisher_samples=1,
    damping=1e-3,
    damping_scheme="sqrt",
    conv_damping="trace",
    trace_floor=1e-3,
    ema=0.95,
    kl_clip=1e-3,
    rescale="kl",
)
def tkfac(o: SimpleNamespace) -> Method:
    """TKFAC: the Fisher block as a Kronecker product that keeps its trace and both of its partial traces.

    K-FAC multiplies E[a a^T] and E[g g^T] as if |a| and |g| were independent; where large inputs meet large gradients
    its block is too small, and too large where they avoid each other. TKFAC weighs the rows of either side by the
    squared length of the other: with delta = E[|a|^2 |g|^2], N_A = E[|g|^2 a a^T] and N_G = E[|a|^2 g g^T] the block is
    kron(N_G, N_A) / delta, whose trace is the Fisher's. The direction is

        U = (N_G / sqrt(delta) + sqrt(lambda) I)^-1 V (N_A / sqrt(delta) + sqrt(lambda) I)^-1.

    Averages are of N_A and N_G, and delta is the trace of either. Of a convolution or a sequence (example, position)
    pairs count, different positions as uncorrelated. Norm layers keep exact blocks.

    - damping_scheme: "sqrt" as above, or one of the whole block's, "eigenvalue", "floor", "relative", "mask". The trace
      norm pi of kfac has no place here: the two factors have equal traces already.
    - conv_damping: "trace": lambda of a convolution is max(delta, trace_floor) / (d_in d_out), the mean eigenvalue of
      its block (each group's own), and that of other layers beside convolutions damping times the largest of these;
      "fixed": damping everywhere, the paper's "normal" damping. Without convolutions both are the same, and with
      damping_scheme="relative", which is by the trace in every layer.
    - trace_floor: the floor nu under the trace.

    Cost: K-FAC's, and row lengths with one scaled copy of the rows for each statistic: n (d_in + d_out). For
    convolutions patches are formed. Memory as K-FAC. Choose it over kfac where inputs and gradients have lengths that
    go together (ReLU networks, rare classes, padded or masked positions) and for convolutions of very different scale.

    Source: Gao et al. 2021; the empirical Fisher and the factored damping as there, the damping of convolutions as
    Gao et al. 2020 (TEKFAC) attribute it to TKFAC. damping, trace_floor, kl_clip and periods are ours, ema is K-FAC's
    (the papers' values are not known to us); the clip takes the place of their learning rate schedule.
    """
    damp, solve = scheme(o.damping_scheme, ("sqrt", *SPECTRAL))
    return Method(
        name="tkfac",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=Traces(),
        track=EMA(),
        damp=by_kind(damp, o.conv_damping),
        solve=solve,
        rescale=rescaling(o),
    )
