"""What torch's tracers log, warn of and print while they try; where they fail, one sentence says it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_LOGGERS = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def quiet(prints: bool = False) -> Iterator[None]:
    """Silence of loggers and warnings; prints: also of what goes to the error stream (half a graph, from export)."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            if prints:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
