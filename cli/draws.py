"""Random streams of one's own: several trainings in one process that do not disturb each other's draws.

Code in a model file, and dropout, draw from the global generators of torch, numpy and Python. Trainings that take turns
would mix up one another's numbers; here each keeps its own generators' states and puts them in place while it runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

END = object()


class Stream:
    """The states of the global CPU generators that belong to one user; ``seed`` starts them."""

    def __init__(self, seed: int) -> None:
        before = _states()
        self.seed(seed)
        self._own = _states()
        _restore(before)

    @staticmethod
    def seed(seed: int) -> None:
        """Seed the global generators."""
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the global generators are this stream's; afterwards they are what they were."""
        before = _states()
        _restore(self._own)
        try:
            yield
        finally:
            self._own = _states()
            _restore(before)


def own_batches(batches: Callable[[int], Any], seed: int) -> Callable[[int], Iterator[Any]]:
    """``batches`` drawing from a stream of its own that the seed and the epoch start.

    Whatever a method draws in between, each gets equal batches, and an epoch can be begun again.
    """

    def drawn(epoch: int) -> Iterator[Any]:
        stream = Stream(seed + 1_000_003 * epoch)
        with stream.active():
            supply = iter(batches(epoch))
        while True:
            with stream.active():
                batch = next(supply, END)
            if batch is END:
                return
            yield batch

    return drawn


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
