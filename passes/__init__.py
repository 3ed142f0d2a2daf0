"""The pipeline, to be read from top to bottom: forward graph, then update program."""

from __future__ import annotations

from fxcurv.passes.batch import Batch
from fxcurv.passes.build import Build
from fxcurv.passes.cadence import Cadence
from fxcurv.passes.defer import Defer
from fxcurv.passes.detect import Detect
from fxcurv.passes.fuse import Fuse
from fxcurv.passes.guard import Guard
from fxcurv.passes.lower import Lower
from fxcurv.passes.manager import Compilation, Pass, Record, parse_pipeline, run_passes
from fxcurv.passes.memory import Memory
from fxcurv.passes.order import Order
from fxcurv.passes.pack import Pack
from fxcurv.passes.pointwise import Pointwise
from fxcurv.passes.precision import Precision
from fxcurv.passes.share import Share
from fxcurv.passes.simplify import Simplify
from fxcurv.passes.sink import Sink
from fxcurv.passes.stagger import Stagger
from fxcurv.passes.tap import TapPass
from fxcurv.passes.views import Views

PIPELINE: tuple[Pass, ...] = (
    Detect(),  # forward graph: find layers
    Build(),  # program: let the method write its ops
    Sink(),  # program: move reductions of rows into taps
    Share(),  # program: merge equal values and states
    Simplify(),  # program: rewrite rules, dead code
    Order(),  # program: rows in place of weight gradients, on request
    TapPass(),  # forward graph: insert the slots that are still read
    Defer(),  # forward graph: statistics of small layers, all at once
    Cadence(),  # program: keep what is read between refreshes
    Pack(),  # program: kept symmetric matrices by one triangle, on request
    Precision(),  # program: kept values in fewer bits, on request
    Stagger(),  # program: layers refreshed in turn, on request
    Guard(),  # program: report what is finite
    Batch(),  # program: one op for what many small layers do alike
    Fuse(),  # program: one walk over a matrix in place of several
    Views(),  # program: layout without copies
    Pointwise(),  # program: one generated kernel for a chain of point-wise ops
    Memory(),  # program: averages in the memory of their statistics
    Lower(),  # program: kernels and slices
)
PASSES: dict[str, type[Pass]] = {step.name: type(step) for step in PIPELINE}

__all__ = ["PASSES", "PIPELINE", "Compilation", "Pass", "Record", "parse_pipeline", "run_passes"]
