"""How many launches a step needs.

On a GPU every operation of a slice is a launch, so for small layers their number is the cost of a step. What is counted
here is what reaches the dispatcher (see :mod:`fxcurv.passes.dispatched`): views and allocations are free, an operation
of a library (a product, a factorisation) counts as one whatever it starts inside, and a generated kernel is one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fxcurv.passes.dispatched import Dispatched, dispatched
from fxcurv.passes.lower import Lowered, Slice


@dataclass(frozen=True)
class Launches:
    """Launches of one slice.

    calls: nodes that the slice evaluates. total: launches. by_node, by_op: launches by program node and by operation.
    complete: False when an operation needed a real value, so that nothing after it could be counted.
    """

    calls: int
    total: int
    by_node: dict[str, int]
    by_op: dict[str, int]
    complete: bool = True


def launches(lowered: Lowered, piece: Slice, rows: int = 64, device: str = "cuda") -> Launches:
    """Launches of a slice on ``device``, counted without one.

    rows: taken for every size that is known only when the program runs. The result depends on the kernels that claimed
    the nodes (``lowered.kernels``): a kernel may choose its operations by device and size. Nothing is computed; a
    launch takes about a millisecond to find. device: "cuda" or another GPU; on a CPU nothing is launched, and what is
    computed may depend on values.
    """
    return count(dispatched(lowered, piece, rows, device), piece)


def count(found: tuple[Dispatched, ...], piece: Slice) -> Launches:
    """The launches among what a slice sent to the dispatcher."""
    started = [one for one in found if one.launches]
    return Launches(
        calls=len({line.split(" = ")[0] for line in piece.source.splitlines()[1:-1] if "(" in line.split("  #")[0]}),
        total=len(started),
        by_node=dict(Counter(one.node for one in started)),
        by_op=dict(Counter(one.op for one in started)),
        complete=all(one.launches or not one.waits for one in found),
    )
