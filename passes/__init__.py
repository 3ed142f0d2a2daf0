"""The pipeline, to be read from top to bottom: forward graph, then update program."""

from __future__ import annotations

from fxcurv.passes.build import Build
from fxcurv.passes.cadence import Cadence
from fxcurv.passes.detect import Detect
from fxcurv.passes.guard import Guard
from fxcurv.passes.lower import Lower
from fxcurv.passes.manager import Compilation, Pass, Record, parse_pipeline, run_passes
from fxcurv.passes.share import Share
from fxcurv.passes.simplify import Simplify
from fxcurv.passes.sink import Sink
from fxcurv.passes.tap import TapPass

PIPELINE: tuple[Pass, ...] = (
    Detect(),  # forward graph: find layers
    Build(),  # program: let the method write its ops
    Sink(),  # program: move reductions of rows into taps
    Share(),  # program: merge equal values and states
    Simplify(),  # program: rewrite rules, dead code
    TapPass(),  # forward graph: insert the slots that are still read
    Cadence(),  # program: keep what is read between refreshes
    Guard(),  # program: report what is finite
    Lower(),  # program: kernels and slices
)
PASSES: dict[str, type[Pass]] = {step.name: type(step) for step in PIPELINE}

__all__ = ["PASSES", "PIPELINE", "Compilation", "Pass", "Record", "parse_pipeline", "run_passes"]
