"""Tensors by role, some of them rows of a stack.

Small layers' states live in stacks, one for all equal layers, as the program computes them (see
:mod:`fxcurv.passes.batch`). Everybody but the step itself asks for a row. A row that is set by itself leaves its stack,
which then falls apart; the next step puts it together again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping

import torch
from torch import Tensor

from fxcurv.ir.program import Role
from fxcurv.passes.lower import Bundle


class Values(MutableMapping[Role, Tensor]):
    """A mapping from roles to tensors; a row of a stack is a view."""

    def __init__(self) -> None:
        self.alone: dict[Role, Tensor] = {}
        self.stacks: dict[Bundle, Tensor] = {}
        self.home: dict[Role, tuple[Bundle, int]] = {}

    def __getitem__(self, role: Role) -> Tensor:
        if role in self.alone:
            return self.alone[role]
        bundle, index = self.home[role]
        return self.stacks[bundle][index]

    def __setitem__(self, role: Role, value: Tensor) -> None:
        if role in self.home:
            self.take_apart(self.home[role][0])
        self.alone[role] = value

    def __delitem__(self, role: Role) -> None:
        self[role] = self[role]
        del self.alone[role]

    def __iter__(self) -> Iterator[Role]:
        yield from self.alone
        yield from self.home

    def __len__(self) -> int:
        return len(self.alone) + len(self.home)

    def together(self, bundle: Bundle) -> Tensor:
        """The stack of these values: as it lies there, or put together now."""
        found = self.stacks.get(bundle)
        return torch.stack([self[role] for role in bundle.roles]) if found is None else found

    def put(self, bundle: Bundle, stack: Tensor) -> None:
        """Let the rows of a stack be the values of a bundle's roles."""
        if bundle not in self.stacks:
            for other in {self.home[role][0] for role in bundle.roles if role in self.home}:
                self.take_apart(other)
            for index, role in enumerate(bundle.roles):
                self.alone.pop(role, None)
                self.home[role] = bundle, index
        self.stacks[bundle] = stack

    def take_apart(self, bundle: Bundle) -> None:
        """Let every row of a stack be a value by itself."""
        for role, value in zip(bundle.roles, self.stacks.pop(bundle).unbind(), strict=True):
            del self.home[role]
            self.alone[role] = value

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, stacks as a whole."""
        self.alone = {role: function(value) for role, value in self.alone.items()}
        self.stacks = {bundle: function(value) for bundle, value in self.stacks.items()}

    def clone(self) -> Values:
        """An independent copy."""
        other = Values()
        other.alone, other.stacks, other.home = dict(self.alone), dict(self.stacks), dict(self.home)
        other.change(torch.clone)
        return other
