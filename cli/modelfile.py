"""The user's model file: Python that defines a model and, if it likes, its data.

    model, or build_model()        the network                     example_inputs   a tuple of tensors
    loss                           a name, nn module or object     settings         hyper-parameters by method
    batches(epoch)                 pairs (inputs, targets)         evaluate(model)  a dictionary of scores
    prepare(model)                 called once before transforming

The file runs as a script would, with its folder first on ``sys.path``. Whatever goes wrong in it is one sentence.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from fxcurv.ir.types import DTYPES

HINT = "define 'model = ...' or 'def build_model(): ...', or name one as FILE.py:NAME"
_SPEC = re.compile(r"\s*(\w+)\[([\d,\s]*)\]\s*(?:<\s*(\d+))?\s*(?:[;,]|$)")


@dataclass(frozen=True)
class ModelFile:
    """A model and what its file says about it; ``source`` is the module of the file."""

    path: Path
    source: ModuleType
    model: nn.Module
    example_inputs: tuple[Any, ...] | None
    loss: Any
    settings: dict[str, dict[str, Any]]

    def function(self, name: str) -> Callable[..., Any] | None:
        """An optional function of the file."""
        found = getattr(self.source, name, None)
        if found is not None and not callable(found):
            raise FxcurvError(f"{self.path}: '{name}' is a {type(found).__name__}; it must be a function.")
        return found

    def hyper(self, method: str, given: dict[str, Any]) -> dict[str, Any]:
        """Hyper-parameters of a method: the file's settings, overridden by the given ones."""
        return {**self.settings.get(method, {}), **given}

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which the file's functions find their neighbours and fail in one sentence."""
        with running(self.path):
            yield


def load_model_file(
    spec: str, inputs: Sequence[str] | None = None, loss: str | None = None, seed: int | None = None
) -> ModelFile:
    """Run ``FILE.py`` or ``FILE.py:NAME`` and build its model.

    inputs: specifications that replace the file's ``example_inputs``; loss: a name that replaces its ``loss``; seed: of
    torch's global generator while the file runs (0). Raises :class:`FxcurvError` in one sentence, with the user's line.
    """
    path, name = split_spec(spec)
    example = parse_inputs(inputs) if inputs else None
    if not path.is_file():
        raise FxcurvError(f"there is no file '{path}'.")
    torch.manual_seed(seed or 0)
    with running(path):
        source = _import(path)
    with running(path):
        model = _model(path, source, name)
    if example is None:
        example = _example(path, getattr(source, "example_inputs", None))
    settings = getattr(source, "settings", {})
    if not isinstance(settings, dict) or not all(isinstance(value, dict) for value in settings.values()):
        raise FxcurvError(f"{path}: 'settings' must be a dictionary of dictionaries, hyper-parameters by method.")
    file = ModelFile(path, source, model, example, loss or getattr(source, "loss", None), settings)
    prepare = file.function("prepare")
    if prepare is not None:
        with file.running():
            prepare(model)
    return file


def split_spec(spec: str) -> tuple[Path, str]:
    """``FILE.py:NAME`` as path and name ("" without one); a colon inside the path is left alone."""
    head, colon, tail = spec.rpartition(":")
    if colon and tail.isidentifier() and not Path(spec).exists():
        return Path(head), tail
    return Path(spec), ""


def parse_inputs(specs: Sequence[str]) -> tuple[Tensor, ...]:
    """Tensors from specifications such as ``f32[8,3,32,32]`` or ``i64[8,16]<100``; ``;`` or ``,`` between several.

    Numbers are standard normal or, for integers, uniform below the bound (2 without one), always the same ones.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    for text in specs:
        position = 0
        while position < len(text):
            match = _SPEC.match(text, position)
            if match is None:
                rest = text[position:]
                raise FxcurvError(f"--input '{text}': '{rest}' is not a tensor; write for example f32[8,3,32,32].")
            position = match.end()
            tensors.append(_tensor(text, match, generator))
    return tuple(tensors)


def _tensor(text: str, match: re.Match[str], generator: torch.Generator) -> Tensor:
    if match[1] not in DTYPES:
        raise FxcurvError(f"--input '{text}': '{match[1]}' is not a type; there are {', '.join(DTYPES)}.")
    dtype, shape = DTYPES[match[1]], [int(size) for size in match[2].split(",") if size.strip()]
    if dtype.is_floating_point:
        if match[3]:
            raise FxcurvError(f"--input '{text}': an upper bound is for integers, as in i64[8,16]<100.")
        return torch.randn(shape, generator=generator).to(dtype)
    bound = int(match[3] or 2)
    if bound < 1:
        raise FxcurvError(f"--input '{text}': the upper bound must be at least 1.")
    return torch.randint(bound, shape, generator=generator).to(dtype)


@contextmanager
def running(path: Path) -> Iterator[None]:
    """Run the user's code: its folder on ``sys.path``, its exceptions as one sentence that names its line."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    except (FxcurvError, KeyboardInterrupt):
        raise
    except SyntaxError as error:
        raise FxcurvError(f"{error.filename or path}, line {error.lineno}: {error.msg}.") from error
    except SystemExit as error:
        raise FxcurvError(f"{_where(path, error)}: it exits; guard that with if __name__ == '__main__'.") from error
    except Exception as error:
        raise FxcurvError(f"{_where(path, error)}: {type(error).__name__}: {error}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _where(path: Path, error: BaseException) -> str:
    """The user's file and the innermost of its lines that an exception passed."""
    resolved = str(path.resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == resolved]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _import(path: Path) -> ModuleType:
    name = f"fxcurv_model_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise FxcurvError(f"'{path}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module


def _model(path: Path, source: ModuleType, name: str) -> nn.Module:
    if name and not hasattr(source, name):
        raise FxcurvError(f"{path} has no '{name}'; {HINT}.")
    chosen = name or ("model" if hasattr(source, "model") else "build_model")
    if not hasattr(source, chosen):
        raise FxcurvError(f"{path} has no model; {HINT}.")
    found = getattr(source, chosen)
    if inspect.isclass(found):
        raise FxcurvError(f"{path}: '{chosen}' is a class; give an instance, or a function that builds one.")
    what = f"'{chosen}'"
    if not isinstance(found, nn.Module) and callable(found):
        found, what = found(), f"what '{chosen}()' returns"
    if not isinstance(found, nn.Module):
        raise FxcurvError(f"{path}: {what} is a {type(found).__name__}, not an nn.Module; {HINT}.")
    return found


def _example(path: Path, found: Any) -> tuple[Any, ...] | None:
    if found is None or isinstance(found, tuple):
        return found
    if isinstance(found, (Tensor, list)):
        return (found,) if isinstance(found, Tensor) else tuple(found)
    raise FxcurvError(f"{path}: 'example_inputs' is a {type(found).__name__}; make it a tuple of tensors.")
