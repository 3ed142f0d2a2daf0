"""What a comparison keeps on disk, so that the same command goes on where it was interrupted.

Finished trainings are JSON under a key of everything that they depend on (the file's text, method, settings, seed,
steps, options, versions); another command that asks for the same finds them too. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxcurv
from fxcurv.cli.modelfile import ModelFile


class Store:
    """Kept results in ``folder``; without one nothing is kept. ``fresh``: what is there is not looked at."""

    def __init__(self, folder: Path | None, file: ModelFile, name: str, loss: str | None, fresh: bool = False) -> None:
        self.folder = None if folder is None else folder / "runs"
        self.fresh = fresh
        text = hashlib.sha256(file.path.read_bytes()).hexdigest()
        self.base = [text, name, loss, fxcurv.__version__, torch.__version__]
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def key(self, method: str, *parts: Any) -> str:
        """A file name for what depends on these parts and on the model file."""
        text = json.dumps([*self.base, method, *parts], sort_keys=True, default=str)
        return f"{method}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def get(self, key: str) -> dict[str, Any] | None:
        """What is kept under a key; ``None`` without it, or where it cannot be read."""
        if self.folder is None or self.fresh:
            return None
        try:
            found = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep a result; its checkpoint, of when it was under way, goes."""
        if self.folder is None:
            return
        write_text(self.folder / f"{key}.json", json.dumps(value, default=str))
        if not key.endswith(".part"):
            for left in (self.folder / f"{key}.part.json", self.checkpoint(key)):
                left.unlink(missing_ok=True)

    def checkpoint(self, key: str) -> Path:
        """Where the checkpoint of a training under way is."""
        assert self.folder is not None
        return self.folder / f"{key}.pt"


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    write(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Let ``make`` write a file of the same suffix beside ``path``, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        make(scratch)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
