"""What every test may rely on: one thread, one seed, one default dtype.

Tests run in several processes (see Makefile), so each keeps to one thread; numbers then do not depend on the machine's
number of cores either. Hypothesis draws the same examples in every run: a failure in one run is a failure in the next.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fxcurv", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("fxcurv")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed the global generators, so that no test depends on which ones ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """Restore the default dtype, whoever changed it."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def float64(_default_dtype: None) -> torch.dtype:
    """Make float64 the default dtype for one test; the dtype is also the fixture's value."""
    torch.set_default_dtype(torch.float64)
    return torch.float64
