"""TEKFAC: the eigenbasis of trace-restricted factors with the right eigenvalues."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from fxcurv.methods.ekfac import ekfac
from fxcurv.methods.method import Method
from fxcurv.methods.parts.solve import Corrected
from fxcurv.methods.parts.traces import Traces, by_kind
from fxcurv.methods.registry import published


@published(
    "tekfac",
    papers=(6,),
    fisher="empirical",
    fisher_samples=1,
    damping=1e-3,
    damping_scheme="eigenvalue",
    conv_damping="trace",
    trace_floor=1e-3,
    ema=0.95,
    ema_spectrum=None,
    kl_clip=1e-3,
    rescale="kl",
    basis="eigh",
    spectrum="examples",
)
def tekfac(o: SimpleNamespace) -> Method:
    """TEKFAC: EKFAC in the eigenbasis of TKFAC's factors.

    U = Q_G [ (Q_G^T V Q_A) / (Theta + lambda) ] Q_A^T, with Q_A and Q_G the eigenvectors of N_A = E[|g|^2 a a^T] and
    N_G = E[|a|^2 g g^T] (see tkfac) and Theta = E[(Q_G^T grad Q_A)^2], grad the gradient of one example, summed over
    its positions before squaring. Theta carries the scale, so nothing is divided by delta = tr N_A, except in a
    refresh: there Theta restarts from the products of eigenvalues over delta, which have the block's trace. No diagonal
    in this basis is closer to the Fisher, so it is never farther from it than tkfac's block.

    - conv_damping: "trace": lambda of a convolution is max(tr Theta, trace_floor) / (d_in d_out), the mean of Theta,
      and that of other layers beside convolutions damping times the largest of these; "fixed": damping everywhere.
    - damping_scheme: "eigenvalue" as above, "floor", "relative" (by the trace in every layer) or "mask"; trace_floor:
      the floor nu under the trace.
    - factor_every is the interval of N_A, N_G and of Theta (T_FIM and T_RE), solve_every that of the basis (T_EIG).
    - ema: weight of the old N_A and N_G (1 - beta2 of the paper, whose weights are those of the new value);
      ema_spectrum: of the old Theta (1 - beta1), ``None`` for the same. basis, spectrum: as in ekfac.

    Cost: as ekfac, with tkfac's weighted Grams in place of plain ones. Choose it over ekfac where the lengths of inputs
    and gradients go together, and over tkfac where refreshes are rare, since Theta follows every batch.

    Source: Gao et al. 2020, algorithm 1; the damping of convolutions and the empirical Fisher as there. Numbers are
    ours, their values not known to us; that Theta restarts at a refresh is ours too, the paper goes on averaging it in
    the new basis.
    """
    method = ekfac.compose(o)
    assert method.damp is not None and isinstance(method.solve, Corrected)
    return replace(
        method,
        name="tekfac",
        estimate=Traces(),
        damp=by_kind(method.damp, o.conv_damping),
        solve=replace(method.solve, ema="ema" if o.ema_spectrum is None else "ema_spectrum"),
    )
