"""One sentence for a capture that failed: which construct, where in the user's code, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
_ADVICE = {"symbolic": f"pass example_inputs so that the other front-ends can try, or {_REWRITE}"}
_BRIEF = 160  # characters of a further front-end's reason


class CaptureFailed(FxcurvError):
    """A front-end met a construct that it cannot capture: ``what``, with the user's line.

    on_sizes: whether it may be due to sizes that were left open.
    """

    def __init__(self, what: str, frontend: str, on_sizes: bool = False) -> None:
        super().__init__(f"the {frontend} front-end cannot capture {what}; {_ADVICE.get(frontend, _REWRITE)}.")
        self.what, self.on_sizes = what, on_sizes


def explain(error: Exception, frontend: str) -> CaptureFailed:
    """The error to raise when ``frontend`` failed with ``error``."""
    message = str(error)
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no message")
    construct = next((what for pattern, what in _CONSTRUCTS if re.search(pattern, message)), None)
    place = raised_at(error)
    what = construct or f"the forward ({type(error).__name__}: {first.rstrip('.')})"
    on_sizes = construct is None or bool(re.search(r"\bs\d+\b|[Cc]onstraint|dynamic", message))
    return CaptureFailed(f"{what} at {place}" if place else what, frontend, on_sizes)


def nothing_captures(failures: Mapping[str, FxcurvError]) -> FxcurvError:
    """The one error of all front-ends together: the first failure, and the others' in brackets."""
    (_, first), *others = failures.items()
    more = "; ".join(f"{name}: {_brief(error)}" for name, error in others)
    what = str(first).rstrip(".")
    if isinstance(first, CaptureFailed):
        what = f"no front-end can capture {first.what}; {_REWRITE}" if others else what
    found = FxcurvError(f"{what} ({more})." if more else f"{what}.")
    found.__cause__ = first
    return found


def _brief(error: FxcurvError) -> str:
    text = error.what if isinstance(error, CaptureFailed) else str(error).split(";")[0].rstrip(".")
    return text if len(text) <= _BRIEF else text[: _BRIEF - 3] + "..."
