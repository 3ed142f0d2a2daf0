"""What a step knows of its batch: statistics, products with curvature, and how many loss terms are behind them.

With several ranks this is where they meet, once a step and only in steps that use curvature: first all say what they
have and whether it is in order, then statistics are reduced. A step that fails on one rank fails on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from fxcurv.errors import FxcurvError
from fxcurv.ir.program import STATISTICS
from fxcurv.runtime.distributed import RanksOracle, reduced
from fxcurv.runtime.oracles import GGNOracle, HessianOracle
from fxcurv.runtime.statistics import Statistics

if TYPE_CHECKING:
    from fxcurv.runtime.engine import Engine


@dataclass(frozen=True)
class Batch:
    """statistics, and oracle for products with curvature: of all ranks. terms: loss terms behind the statistics."""

    statistics: Statistics
    oracle: HessianOracle | GGNOracle | RanksOracle | None
    terms: float = 0.0


def measured(engine: Engine, due: frozenset[str]) -> Batch:
    """What the batch of this step says; raises :class:`FxcurvError` when something is missing or wrong."""
    source = engine.method.source
    products = source.kind == "ggn_product" or (source.kind == "hessian" and STATISTICS in due)
    if products:
        return Batch(engine.statistics, of_all_ranks(engine, due, engine.oracle))
    if STATISTICS in due and source.taps and engine.statistics.types:
        return _statistics(engine, due)
    return Batch(engine.statistics, engine.oracle)


def _statistics(engine: Engine, due: frozenset[str]) -> Batch:
    terms = _terms_by_rank(engine, due, partial(_check_statistics, engine))
    if terms is None:
        raise FxcurvError(
            f"no statistics have arrived for step {engine.step} of '{engine.method.name}': run the model in training "
            "mode and call model.backward(loss, outputs) before precondition_()."
        )
    ranks, statistics = engine.ranks, engine.statistics
    if ranks.size > 1:
        own_means = engine.method.source.kind == "empirical" and not engine.summed
        statistics = reduced(ranks, statistics, terms, own_means, engine.stat_device)
    return Batch(statistics, None, float(statistics.terms))


def of_all_ranks(
    engine: Engine, due: frozenset[str], oracle: HessianOracle | GGNOracle | None
) -> HessianOracle | GGNOracle | RanksOracle:
    """Products with the curvature of all ranks' batches, from those of this rank; raises :class:`FxcurvError` on all
    ranks when one has none."""
    terms, ranks = _terms_by_rank(engine, due, partial(_check_products, engine, oracle)), engine.ranks
    assert terms is not None and oracle is not None
    if ranks.size == 1:
        return oracle
    if isinstance(oracle, GGNOracle):  # local products are divided by the local number of terms
        share = max(terms[ranks.rank], 1.0) / max(sum(terms), 1.0)
    else:
        share = 1.0 if engine.summed else 1.0 / ranks.size  # as gradients
    return RanksOracle(ranks, oracle, share)


def _terms_by_rank(engine: Engine, due: frozenset[str], check: Callable[[], float | None]) -> list[float] | None:
    """Loss terms that each rank has, ``None`` when nothing arrived anywhere; raises on all ranks or on none."""
    ranks = engine.ranks
    if ranks.size == 1:
        terms = check()
        return None if terms is None else [terms]
    flags = sum(2.0**i for i, name in enumerate(engine.lowered.program.cadences) if name in due)
    grads = [p.grad.detach() for p in engine.parameters().values() if p.grad is not None]
    norm = math.sqrt(sum(float(n) ** 2 for n in torch._foreach_norm(grads))) if grads else 0.0
    return ranks.agree(check, (engine.step, engine.seed, flags), norm, engine.device_of(""))


def _check_products(engine: Engine, oracle: HessianOracle | GGNOracle | None) -> float:
    """Loss terms behind the products; raises :class:`FxcurvError` without a backward call that kept its graph."""
    if oracle is None:
        raise FxcurvError(
            f"'{engine.method.name}' needs products with the curvature of this batch: run the model in training mode "
            "and call model.backward(loss, outputs) in place of loss.backward() before the step."
        )
    return oracle.terms if isinstance(oracle, GGNOracle) else 0.0


def _check_statistics(engine: Engine) -> float | None:
    """Number of loss terms behind this process's statistics, ``None`` when none arrived; takes what a plain backward
    pass left. Raises :class:`FxcurvError` when they come from a wrong call."""
    name, source, statistics = engine.method.name, engine.method.source, engine.statistics
    if statistics.plain and source.kind != "empirical":
        raise FxcurvError(
            f"these statistics come from loss.backward(), but '{name}' uses fisher='{source.kind}': call "
            "model.backward(loss, outputs) in its place, or transform with fisher='empirical'."
        )
    if source.kind == "empirical" and statistics.plain:
        if engine.loss is not None and engine.loss.needs_targets and not statistics.collected:
            raise FxcurvError(
                "the loss weights or ignores terms, so their number is unknown after loss.backward(): call "
                "model.backward(loss, outputs, targets=...) in its place."
            )
        statistics.take_plain()
    return float(statistics.terms) if statistics.arrived else None
