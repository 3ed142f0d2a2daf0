"""THOR: K-FAC in blocks of one size, renewed only where the curvature still moves."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.blocks import BlockInverse, BlockKron, TraceRule
from fxcurv.methods.parts.damp import Replicated
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published

RULES: dict[str, tuple[float, float] | None] = {"thor": (0.01, 0.0), "stop": (0.01, 0.001), "none": None}
"""Limits (move, settle) of the trace rule by name: "THOR", "THOR_stop" and "THOR_NT" of the paper."""


@published(
    "thor",
    papers=(11,),
    fisher="empirical",
    fisher_samples=1,
    damping=0.03,
    ema=0.0,
    block_size=128,
    trace_rule="thor",
    trace_move=None,
    trace_settle=None,
    kl_clip=1e-3,
    rescale="kl",
    factor_every=100,
    solve_every=100,
)
def thor(o: SimpleNamespace) -> Method:
    """THOR: K-FAC with factors cut into diagonal blocks, and a rule by layer for when to renew them.

    The factors of a batch, A = E[a a^T] and G = E[g g^T] over examples and positions, are cut into diagonal blocks of
    block_size features; each gets sqrt(damping/T) on its diagonal, T the positions of a loss term (1 for a linear
    layer on vectors), and U = (1/T) G^-1 V A^-1. Every factor_every steps a layer has a candidate k with trace
    tr_k = tr A tr G + damping d_in d_out and D = |tr_k - tr| / tr, tr that of the last candidate taken over:

    - D > trace_move: it is taken over, and the inverses with it;
    - trace_settle <= D <= trace_move: the layer keeps what it has;
    - D < trace_settle: the layer has settled: it is never measured or refreshed again.

    trace_rule: "thor" (trace_move 0.01, trace_settle 0), "stop" (0.01, 0.001) or "none", which takes every candidate;
    trace_move and trace_settle override its numbers. ema: weight of the old factors where a candidate is taken over; 0,
    as in the reference code, uses the batch alone. An embedding's A is the diagonal of token frequencies; norm layers
    keep exact unit-wise blocks under the same rule, in place of the diagonal grad/(grad^2 + sqrt(damping)) of the
    reference code. Sides of at most block_size features are whole, so that with large blocks this is kfac with
    damping_scheme "sqrt". Neighbours in the order of ``weight.flatten(1)`` (channel, row, column for a convolution)
    share a block. Rarer candidates late in training: transform with a small factor_every, and later call
    ``model.due(statistics=..., refresh=...)``, or rely on settled layers, which cost nothing.

    A settled layer leaves the program at the next step: its taps measure nothing, its inverses are not computed, and
    once all have settled no step captures statistics. Where layers are so small that the pass ``batch`` stacks them,
    refreshes stop when all of a stack have settled. A layer that only keeps its factors is measured and inverted as
    before, which leaves its state as it was: to skip that, the rule would have to stop the device between the trace and
    the inverse.

    Cost: statistics n T d block_size in place of n T d^2, inverses d block_size^2 in place of d^3, memory
    block_size (d_in + d_out) for a layer, a step 2 block_size d_in d_out. Choose it over kfac for wide layers and long
    runs with a rare refresh; block_size trades the correlations that are lost for work
    (:func:`fxcurv.methods.parts.blocks.block_size_table` measures it).

    Source: Chen et al. 2021, sections 4-5; limits and block size are the paper's, damping is the initial one of its
    ResNet-50 run (there it decays by half every 10 epochs), the period the generic one of its reference code, the
    comparison with the last *accepted* trace and the KL clip (the reference has a small learning rate) are ours.
    """
    if o.trace_rule not in RULES:
        raise FxcurvError(f"trace_rule='{o.trace_rule}' is unknown; choose one of {', '.join(RULES)}.")
    if o.block_size < 1 or o.block_size != int(o.block_size):
        raise FxcurvError(f"block_size={o.block_size} must be a whole number of features, at least 1.")
    limits = RULES[o.trace_rule]
    numbers = {}
    if limits is not None:
        given = (o.trace_move, o.trace_settle)
        names = ("trace_move", "trace_settle")
        numbers = {n: float(d if g is None else g) for n, d, g in zip(names, limits, given, strict=True)}
    return Method(
        name="thor",
        source=Source(o.fisher, o.fisher_samples),
        scope=Layers(),
        estimate=BlockKron(int(o.block_size)),
        track=EMA() if limits is None else TraceRule(),
        damp=Replicated(),
        solve=BlockInverse(),
        rescale=rescaling(o),
        hyper=numbers,
    )
