"""No host synchronisation in a slice: the host never waits for the device while one runs.

Then a slice can be captured in a CUDA graph, and the host can run ahead. Checked on the operations that a slice sends
to the dispatcher (see :mod:`fxcurv.passes.dispatched`): none reads a value on the host, none has a result whose size
depends on values, none copies between host and device, and factorisations are in the form that reports errors in a
tensor. What is left is named in ``UNAVOIDABLE`` (torch's eigendecomposition has no such form) and ``HOST_DECIDES``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxcurv.errors import FxcurvError
from fxcurv.passes.dispatched import Dispatched, dispatched
from fxcurv.passes.lower import Lowered, Slice

UNAVOIDABLE = {
    "aten._linalg_eigh": (
        "torch has no eigendecomposition that leaves its error code on the device; only refreshes use one, and methods "
        "with Cholesky factors, Newton roots or QR-tracked bases have none"
    ),
}
"""Dispatcher ops that wait for the device and cannot be replaced -> why."""

HOST_DECIDES = {"cg": "when the iterations stop depends on their values, and every one of them calls the model"}
"""Program ops whose course the host decides by design -> why. Only whole optimizers that call the model use them."""


@dataclass(frozen=True)
class Wait:
    """One synchronisation: the program node it is in, the dispatcher op, and why the host waits."""

    node: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"%{self.node} calls {self.op}, which {self.reason}"


def waits(lowered: Lowered, piece: Slice, rows: int = 64, device: str = "cuda") -> tuple[Wait, ...]:
    """Every synchronisation of a slice on ``device``, unavoidable ones included; empty is what a CUDA graph needs.

    After one that needs a real value nothing more of the slice can be seen.
    """
    return waits_of(dispatched(lowered, piece, rows, device))


def waits_of(found: tuple[Dispatched, ...]) -> tuple[Wait, ...]:
    """The synchronisations among what a slice sent to the dispatcher."""
    return tuple(Wait(one.node, one.op, one.waits) for one in found if one.waits)


def check_syncfree(lowered: Lowered, piece: Slice, rows: int = 64, device: str = "cuda") -> tuple[Wait, ...]:
    """Raise :class:`FxcurvError` where a slice makes the host wait; returns the waits that are named above."""
    ops = {node.name: getattr(node.target, "name", "") for node in lowered.program.nodes}
    found = waits(lowered, piece, rows, device)
    wrong = [wait for wait in found if wait.op not in UNAVOIDABLE and ops.get(wait.node) not in HOST_DECIDES]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise FxcurvError(
            f"a step with {', '.join(sorted(piece.due))} due would wait for the device: {wrong[0]}{more}; give the op "
            "a form that keeps its decision on the device."
        )
    return found
