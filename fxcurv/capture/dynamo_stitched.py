"""Runs a model under Dynamo with a back end that hands every graph to whoever is running the forward.

``torch.compile`` splits a forward where plain Python must run (``if x.sum() > 0``, ``.item()``, ``print``) and stitches
the graphs together with that Python. So the running forward is Dynamo's own code, guards and side effects included;
what a graph computes is decided by the ``run`` of the moment. A call with another branch, shape or mode makes Dynamo
trace again: the new graph is converted and added to ``pieces``.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import fx, nn

from fxcurv.capture.call import Call
from fxcurv.capture.captured import Captured, RunPiece
from fxcurv.capture.dynamo_graph import Converter, Piece, named_tensors, paths_of
from fxcurv.capture.runner import Runner
from fxcurv.capture.where import user_line
from fxcurv.errors import FxcurvError

# A limit that ends in an error: beyond it Dynamo would run the plain model, and statistics would stop without a word.
_SETTINGS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("recompile_limit", "cache_size_limit"), 64),
    (("accumulated_recompile_limit", "accumulated_cache_size_limit"), 1 << 20),
    (("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit"), True),
    (("allow_unspec_int_on_nn_module",), True),  # a counter on the module is no reason to trace at every step
    (("allow_rnn",), True),
    (("trace_numpy",), False),  # traced, NumPy's random numbers would be others than those of the plain model
)


_BRIEF = 120  # characters of the reason for a break


@final
class Stitched:
    """One model's forward under Dynamo, for calls of one kind.

    whole: raise where the forward does not fit into one graph. pieces: the graphs seen so far, in order.
    """

    def __init__(self, call: Call, whole: bool = False) -> None:
        self.pieces: list[Piece] = []
        self._call, self._whole = call, whole
        self._run: RunPiece = _not_running
        self._model: nn.Module | None = None
        self._paths: dict[int, str] = {}
        entry = types.FunctionType(_entry.__code__.replace(), globals())  # code of its own: so is its cache of graphs
        self._compiled: Callable[..., Any] = torch.compile(entry, backend=self._backend, fullgraph=whole)

    def __call__(self, run: RunPiece, model: nn.Module, leaves: Sequence[torch.Tensor]) -> Any:
        """The user's output, every graph evaluated by ``run(piece, inputs)``.

        Raises FxcurvError when the forward takes yet another path at every call.
        """
        before = self._run, self._model, self._paths
        tensors = named_tensors(model)  # held here, so that no id is given to another tensor while the forward runs
        self._run, self._model, self._paths = run, model, paths_of(tensors)
        for leaf in leaves:  # a parameter that is passed as an argument is an input
            self._paths.pop(id(leaf), None)
        args, kwargs = self._call.rebuild(leaves)
        try:
            with _settings():
                return self._compiled(model, args, kwargs)
        except Exception as error:
            if type(error).__name__ not in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit"):
                raise
            raise FxcurvError(
                f"the forward of {type(model).__name__} is traced anew at every call, because it branches on a value "
                "that always changes; keep such a value in a tensor, or pass it as an argument."
            ) from error
        finally:
            self._run, self._model, self._paths = before

    def _backend(self, owner: fx.GraphModule, sources: Sequence[Any]) -> Callable[..., Any]:
        """What Dynamo calls for a graph. Modules of one class may share it: it is a piece for each of them."""
        reason = _reason(owner)
        variants: dict[tuple[str | None, ...], Piece] = {}

        def run(*arguments: Any) -> Any:
            key = tuple(self._paths.get(id(argument)) for argument in arguments)
            if key not in variants:
                assert self._model is not None
                piece = Converter(owner, arguments, self._model, self._paths).piece(reason)
                # what the arguments are is of use for one graph only, and they are activations
                variants[key] = piece if self._whole else replace(piece, sources=(), fakes=())
                self.pieces.append(variants[key])
            piece = variants[key]
            return self._run(piece.captured, [arguments[place] for place in piece.places])

        return run


@final
class StitchedRunner:
    """``runner(model, *leaves)`` evaluates a capture of several pieces as it is, without taps."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self._runners: dict[int, tuple[Captured, Runner]] = {}

    def __call__(self, model: nn.Module, *leaves: Any) -> Any:
        """The user's output."""
        assert self.captured.stitched is not None

        def run(piece: Captured, inputs: Sequence[Any]) -> Any:
            if id(piece) not in self._runners:
                self._runners[id(piece)] = piece, Runner(piece)
            return self._runners[id(piece)][1](model, *inputs)

        return self.captured.stitched(run, model, leaves)


def _entry(model: Any, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _not_running(piece: Captured, inputs: Sequence[Any]) -> Any:
    raise AssertionError("a graph runs only within a call of its Stitched")


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    config = torch._dynamo.config
    chosen = {}
    for names, value in _SETTINGS:  # under the name that this version of torch has for it
        name = next((name for name in names if getattr(config, name, None) is not None), None)
        if name is not None:
            chosen[name] = value
    with config.patch(chosen), torch.enable_grad():
        yield


def _reason(owner: fx.GraphModule) -> str:
    """Why a graph ends where Python goes on, as ``model.py:12: if x.sum() > 0: (a branch on data)``."""
    found = getattr(owner, "compile_subgraph_reason", None)
    if found is None or not found.graph_break:
        return ""
    return f"{user_line(found.user_stack)} ({short_reason(found.reason)})"


def short_reason(text: str) -> str:
    """The first explanation in one of Dynamo's messages, in one line."""
    if "generic_jump" in text:
        return "a Python branch on a value of a tensor"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    explained = next((line for line in lines if line.startswith("Explanation:")), lines[0] if lines else "unknown")
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", explained.removeprefix("Explanation:").strip()).split(". ")[0].rstrip(".")
    return text if len(text) <= _BRIEF else text[: _BRIEF - 3] + "..."
