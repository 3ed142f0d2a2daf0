"""One sentence for a capture that failed: which construct, where in the user's code, and what to do."""

from __future__ import annotations

import re

from fxcurv.capture.where import raised_at
from fxcurv.errors import FxcurvError

# What a message of torch means for the user: pattern -> construct.
_CONSTRUCTS = (
    (r"cannot be used as inputs to control flow|data-dependent|GuardOnDataDependent|Eq\(u\d|u\d+ [<>=]",
     "a Python branch on a value that depends on the input"),
    (r"Proxy object cannot be iterated|not iterable",
     "a Python loop or star-expansion over a traced value"),
    (r"cannot be interpreted as an integer|an integer is required|must be integers or None",
     "a size of the input used as a plain Python integer (range(), list index)"),
    (r"int\(\) argument|float\(\) argument|must be a string or a real number|__(int|float|index)__|_local_scalar_dense",
     "a conversion of a traced value to a Python number (int(), float(), .item())"),
    (r"argument of type: |not supported in symbolic tracing|object is not subscriptable",
     "an object or function that cannot be recorded"),
    (r"numpy", "a conversion to NumPy"),
)  # fmt: skip
_REWRITE = "write it with tensor operations such as torch.where, or move it out of the forward"
_ADVICE = {"symbolic": f"pass example_inputs so that the export front-end can try, or {_REWRITE}", "export": _REWRITE}


class CaptureFailed(FxcurvError):
    """A front-end met a construct that it cannot capture: ``what``, with the user's line."""

    def __init__(self, what: str, frontend: str) -> None:
        super().__init__(f"the {frontend} front-end cannot capture {what}; {_ADVICE[frontend]}.")
        self.what = what


def explain(error: Exception, frontend: str) -> CaptureFailed:
    """The error to raise when ``frontend`` failed with ``error``."""
    message = str(error)
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no message")
    construct = next((what for pattern, what in _CONSTRUCTS if re.search(pattern, message)), None)
    place = raised_at(error)
    what = construct or f"the forward ({type(error).__name__}: {first.rstrip('.')})"
    return CaptureFailed(f"{what} at {place}" if place else what, frontend)


def nothing_captures(first: FxcurvError) -> FxcurvError:
    """The one error of all front-ends together, from the failure of the first."""
    if isinstance(first, CaptureFailed):
        return FxcurvError(f"no front-end can capture {first.what}; {_REWRITE}.")
    return first
