"""Bytes and operations of the launches that a target would run, against the least that any kernel must move.

The model of a family is checked byte by byte in the interpreter (``kernels/interpret.py``); here it is evaluated with
the block sizes of real targets, on the operands of each variant, beside the floor: every input read once, every output
written once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fxcurv.kernels.aot import Job, record
from fxcurv.kernels.generator import load
from fxcurv.kernels.interpret import floor
from fxcurv.kernels.triton import FAMILIES, Family, Variant

BALANCE = 64.0
"""Operations a byte below which every target waits for memory: an A100 does 156 T tf32 operations and moves 2 TB a
second, 78 a byte; the others do more."""
MOST = 1.15
"""Largest ratio to the floor where memory is the limit."""


@dataclass(frozen=True)
class Moved:
    """One variant on one target: bytes between memory and chip, bytes that the cache answers, operations, the floor."""

    family: str
    variant: str
    arch: str
    read: float
    written: float
    cached: float
    flops: float
    floor: int
    launches: int

    @property
    def ratio(self) -> float:
        """Bytes moved, in floors."""
        return (self.read + self.written) / max(self.floor, 1)

    @property
    def intensity(self) -> float:
        """Operations a byte of the floor."""
        return self.flops / max(self.floor, 1)

    @property
    def limited_by_memory(self) -> bool:
        """Whether memory is the limit on every target."""
        return self.intensity < BALANCE


def moved(family: Family, variant: Variant, arch: str) -> Moved:
    """The model of a variant with the tuning of a target, on what ``launch`` would start there."""
    operands = variant.operands()
    launches, result = record(load(family.source(variant.geometry, arch)), operands)
    model = family.cost(family.values(variant.geometry, arch), *operands)
    return Moved(
        family.name,
        variant.name,
        arch,
        model.read,
        model.written,
        model.reread,
        model.flops,
        floor(operands, result),
        len(launches),
    )


def table(work: Iterable[Job]) -> Iterator[Moved]:
    """What each job of :func:`fxcurv.kernels.aot.jobs` moves."""
    for family, variant, arch in work:
        yield moved(FAMILIES[family], next(v for v in FAMILIES[family].variants() if v.name == variant), arch)
