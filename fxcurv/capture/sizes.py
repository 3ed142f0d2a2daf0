"""Which sizes a graph leaves open, and the condition on them under which it is the graph of a call.

A tracer that works with symbolic sizes (``export``, ``dynamo``) takes a branch on a size as the example does and notes
the condition: ``if x.shape[1] > 3`` leaves the dimension open, but only above 3. A graph used outside of its condition
would compute something else in silence, so the condition is kept as an expression and checked for every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

Sizes = tuple[tuple[int | None, ...], ...]


@final
class SizeGuard:
    """A condition on the shapes of some of a call's tensor leaves.

    code: over ``L['t0']``, ``L['t1']``, ..., "" for none; places: which leaves these are.
    """

    def __init__(self, code: str = "", places: tuple[int, ...] = ()) -> None:
        self.code, self.places = code, places
        self._condition: Callable[[dict[str, torch.Tensor]], Any] = eval(
            f"lambda L: {code or True}", dict(SYMPY_INTERP)
        )

    def __call__(self, leaves: Sequence[torch.Tensor]) -> bool:
        """Whether tensors of these shapes satisfy it."""
        return bool(self._condition({f"t{k}": leaves[place] for k, place in enumerate(self.places)}))


def open_sizes(fakes: Sequence[Any], ranks: Sequence[int]) -> tuple[Sizes, SizeGuard]:
    """Sizes that a trace with symbolic sizes fixed (``None`` for open ones), and its condition on the open ones.

    fakes: the fake tensors that stood for the tensor leaves, ``None`` for a leaf that the graph does not read; ranks:
    their numbers of axes. A condition that cannot be written down fixes every size to that of the example.
    """
    sizes = tuple(
        (None,) * rank if fake is None else tuple(_fixed(size) for size in fake.shape)
        for fake, rank in zip(fakes, ranks, strict=True)
    )
    places = tuple(k for k, fake in enumerate(fakes) if fake is not None)
    symbolic = [size for k in places for size in fakes[k].shape if _fixed(size) is None]
    if not symbolic:
        return sizes, SizeGuard()
    try:
        code = symbolic[0].node.shape_env.produce_guards_expression([fakes[k] for k in places])
    except Exception:  # a condition on something that is no size of an input: torch raises of several kinds
        fixed = (row if fake is None else concrete(fake) for row, fake in zip(sizes, fakes, strict=True))
        return tuple(fixed), SizeGuard()
    return sizes, SizeGuard(code or "", places)


def fresh_leaves(leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves as tensors of their own: one may be given twice, and tracers leave marks on them."""
    return [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]


def concrete(value: Any) -> tuple[int, ...]:
    """The shape that a fake tensor had for the example."""
    return tuple(_hint(size) for size in value.shape)


def _fixed(size: int | torch.SymInt) -> int | None:
    """The size if the graph assumes it (one that was offered as open may have been specialised), else None."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
