"""The intermediate representation: types, ops and update programs."""

import fxcurv.ir.ops  # noqa: F401  (fills the table of ops)
from fxcurv.ir.op import OPS, Cost, Op, Trait
from fxcurv.ir.program import Builder, Program, Role
from fxcurv.ir.text import parse_program

__all__ = ["OPS", "Builder", "Cost", "Op", "Program", "Role", "Trait", "parse_program"]
