"""One schema for everything that ``bench`` measures, in JSON and CSV alike."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fxcurv.tools.clock import percentiles

OK, WRONG, SKIPPED = "ok", "wrong", "skipped"


@dataclass(frozen=True)
class BenchRow:
    """One side of a comparison.

    bench: "ops", "methods" or "step". name: of the op or method; side: what was timed ("reference", a kernel, "plain",
    ...); case: on what. p20, p50, p80: seconds; ratio: median time in units of the comparison's base side.
    estimate: the cost model's ratio, where there is one. error: largest difference to the reference, relative to its
    largest entry. status: OK, WRONG (nothing was timed) or SKIPPED; note: why.
    """

    bench: str
    name: str
    side: str
    case: str
    device: str
    threads: int
    rounds: int = 0
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio: float | None = None
    estimate: float | None = None
    error: float | None = None
    status: str = OK
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields under their own names."""
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(BenchRow))


def timed(row: BenchRow, times: Sequence[float], ratio: float | None) -> BenchRow:
    """The row with its times filled in."""
    return BenchRow(**{**asdict(row), **percentiles(times), "rounds": len(times), "ratio": ratio})


def to_csv(rows: Iterable[BenchRow]) -> str:
    """A header and a line for each row; what is not there is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None else value for key, value in asdict(row).items()})
    return text.getvalue()
