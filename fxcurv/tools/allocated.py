"""Memory that a piece of work really takes: the allocator's own record of what was alive at once."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

WORK = "fxcurv::work"


def allocated_peak(run: Callable[[], object], before: Callable[[], object] | None = None) -> int | None:
    """Most bytes of tensors alive at once while ``run()`` runs, beyond those that were alive at its start.

    On the CPU, as torch's profiler records every allocation and release, kernels' scratch space included; memory that
    other libraries take for themselves is not seen. A release counts only of what was allocated under the record, so
    ``before``, which runs first, should allocate what ``run`` replaces: the step before a step. ``None`` where this
    torch keeps no such record. Exceptions are passed on.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # that it starts and stops is not the user's concern
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        if before is not None:
            before()
        with torch.autograd.profiler.record_function(WORK):
            run()
    results = getattr(profile, "kineto_results", None)
    if results is None:
        return None
    events = list(results.events())
    start = next((event.start_ns() for event in events if event.name() == WORK), None)
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    if start is None or not changes:
        return None
    now = peak = 0
    for at, change in changes:
        if at >= start:
            now += change
            peak = max(peak, now)
    return peak
