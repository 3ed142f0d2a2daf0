"""Types of program values: what a tensor *is* (symmetric, orthogonal, rows, ...), not only its shape.

A type chooses algorithms (the inverse of an ``Orth`` is its transpose, the inverse of a ``Diag`` is
elementwise) and lets the verifier catch a swapped operand before anything runs. Types are light
frozen dataclasses; no tensor, real or fake, is ever built to infer one.

Every type holds the full tensor ``shape``. Leading dimensions beyond the type's own rank are *batch*
dimensions (for example the groups of a grouped convolution). ``None`` is a size that is only known
when the program runs, such as the number of rows of a statistic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from fxcurv.errors import FxcurvError

Shape = tuple[int | None, ...]

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Type:
    """Abstract: a tensor of a given ``shape`` and ``dtype``; ``rank`` counts its non-batch dimensions."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    rank: ClassVar[int | None] = None
    square: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank is not None and len(self.shape) < self.rank:
            raise FxcurvError(f"a {type(self).__name__} needs at least {self.rank} dimensions, got shape {self.shape}.")
        if self.square and self.shape[-1] != self.shape[-2]:
            raise FxcurvError(f"a {type(self).__name__} must be square, got shape {self.shape}.")

    @property
    def batch(self) -> Shape:
        """Leading batch dimensions."""
        return self.shape[: len(self.shape) - self.rank] if self.rank is not None else ()

    @property
    def numel(self) -> int:
        """Number of elements, counting an unknown size as 1."""
        total = 1
        for size in self.shape:
            total *= 1 if size is None else size
        return total

    @property
    def nbytes(self) -> int:
        """Bytes of storage, counting an unknown size as 1."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        core = self.shape[len(self.batch) :]
        dims = ",".join("?" if s is None else str(s) for s in (core[:1] if self.square else core))
        if self.batch:
            dims = ",".join("?" if s is None else str(s) for s in self.batch) + ";" + dims
        suffix = "" if self.dtype == torch.float32 else ":" + DTYPE_NAMES[self.dtype]
        return f"{type(self).__name__}[{dims}]{suffix}"


@dataclass(frozen=True)
class Tensor(Type):
    """A tensor without further structure; every dimension is its own (a gradient as the user stores it)."""


@dataclass(frozen=True)
class Scalar(Type):
    """A 0-dimensional tensor."""

    shape: Shape = ()
    rank: ClassVar[int | None] = 0


@dataclass(frozen=True)
class Vec(Type):
    """A vector of size d."""

    rank: ClassVar[int | None] = 1


@dataclass(frozen=True)
class Diag(Type):
    """A diagonal matrix, stored as the vector of its diagonal."""

    rank: ClassVar[int | None] = 1


@dataclass(frozen=True)
class Mat(Type):
    """A matrix."""

    rank: ClassVar[int | None] = 2


@dataclass(frozen=True)
class Rows(Type):
    """Statistic rows in normal form, shape (examples, positions, groups, features)."""

    rank: ClassVar[int | None] = 4


@dataclass(frozen=True)
class Sym(Type):
    """A symmetric matrix, both triangles stored."""

    rank: ClassVar[int | None] = 2
    square: ClassVar[bool] = True


@dataclass(frozen=True)
class Psd(Sym):
    """A symmetric positive semidefinite matrix."""


@dataclass(frozen=True)
class Orth(Type):
    """An orthogonal matrix, its columns a basis."""

    rank: ClassVar[int | None] = 2
    square: ClassVar[bool] = True


@dataclass(frozen=True)
class Tri(Type):
    """A lower-triangular matrix."""

    rank: ClassVar[int | None] = 2
    square: ClassVar[bool] = True


@dataclass(frozen=True)
class Packed(Type):
    """The lower triangle of a symmetric d x d matrix as a vector of d (d + 1) / 2 numbers."""

    rank: ClassVar[int | None] = 1


@dataclass(frozen=True)
class LowRank(Type):
    """A d x r factor U of the matrix U U^T."""

    rank: ClassVar[int | None] = 2


TYPES: dict[str, type[Type]] = {
    cls.__name__: cls for cls in (Tensor, Scalar, Vec, Diag, Mat, Rows, Sym, Psd, Orth, Tri, Packed, LowRank)
}
_TEXT = re.compile(r"(\w+)\[(?:([\d?,]*);)?([\d?,]*)\](?::(\w+))?")


def _sizes(text: str | None) -> list[int | None]:
    return [None if part == "?" else int(part) for part in (text or "").split(",") if part]


def parse_type(text: str) -> Type:
    """The type that ``str`` printed as ``text``; raises :class:`FxcurvError` on anything else."""
    match = _TEXT.fullmatch(text.strip())
    if match is None or match[1] not in TYPES or (match[4] or "f32") not in DTYPES:
        raise FxcurvError(f"'{text}' is not a type; write for example Psd[12], Mat[8,12] or Psd[4;9]:f64.")
    cls = TYPES[match[1]]
    core = _sizes(match[3])
    if cls.square:
        core = core * 2
    return cls(tuple(_sizes(match[2]) + core), DTYPES[match[4] or "f32"])
