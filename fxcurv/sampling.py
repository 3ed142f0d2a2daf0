"""Random numbers that are a pure function of integers: the draw at (key, row, column) is a hash of them.

Sampled labels, random signs and probe vectors must be the same whatever the number of devices, the
order in which micro-batches arrive or the state of anybody's generator, and a resumed run needs no
generator state but the integers in the key. A counter-based generator gives all of that: row r of a
block may be drawn on any device, in any chunk, and is the same row. The global generators of Python,
NumPy and torch are neither read nor moved.

The hash is the splitmix64 finaliser (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", 2014; constants "variant 13" of D. Stafford), applied to the key on the host, then to the
row, then to the column. torch has no unsigned 64-bit arithmetic, so it runs in int64: products wrap
around, and a logical right shift is an arithmetic one followed by a mask.

All three functions read the same bits: equal keys give dependent draws (``normal`` is the inverse
distribution function of ``uniform``, ``signs`` the sign of ``normal``). For independent draws put one
more integer into the key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_ROW = 0x9E3779B97F4A7C15  # odd increments: distinct counters stay distinct modulo 2^64
_COLUMN = 0xD1B54A32D192ED03
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    for shift, factor in _ROUNDS:
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> _LAST_SHIFT)


def _shift(bits: Tensor, by: int) -> Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    for shift, factor in _ROUNDS:
        bits = (bits ^ _shift(bits, shift)) * _signed(factor)
    return bits ^ _shift(bits, _LAST_SHIFT)


def _seed(key: Sequence[int | Tensor]) -> int | Tensor:
    """The hash of a key as a signed integer; with a tensor in the key a 0-dimensional one, and nothing waits for it."""
    seed: int | Tensor = len(key)
    for part in key:
        if isinstance(seed, Tensor) or isinstance(part, Tensor):
            number = part.to(torch.int64) if isinstance(part, Tensor) else _signed(part)
            start = seed + _signed(_ROW) if isinstance(seed, Tensor) else _signed(seed + _ROW)
            seed = _mix(number ^ start)  # type: ignore[arg-type]  # one of the two is a tensor
        else:
            seed = _mix_int(((seed + _ROW) ^ (int(part) & _MASK)) & _MASK)
    return seed if isinstance(seed, Tensor) else _signed(seed)


def _bits(
    key: Sequence[int | Tensor], rows: int, columns: int, first_row: int, device: torch.device | str | int | None
) -> Tensor:
    """64 random bits at every (row, column), int64 of shape (rows, columns)."""
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)
    column = torch.arange(1, columns + 1, dtype=torch.int64, device=device)
    row = _mix(row * _signed(_ROW) + _seed(key))
    return _mix(row[:, None] + column * _signed(_COLUMN))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def uniform(
    key: Sequence[int | Tensor],
    rows: int,
    columns: int,
    *,
    first_row: int = 0,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in the open interval (0, 1), shape (rows, columns).

    key: integers that name the draw, for example (seed, step, micro_batch, sample); negative ones are allowed. A
        0-dimensional tensor on ``device`` counts as the integer it holds and is not read on the host.
    first_row: global number of the first row, so that a block drawn in chunks equals the block drawn at once.
    dtype: a number has as many random bits as the type's fraction (52, 23, 10 or 7) and is the midpoint of its
        cell, hence exact, never 0 or 1 and symmetric about 1/2. A wider type refines the same draw.
    """
    fraction = -round(math.log2(torch.finfo(dtype).eps))
    cell = _shift(_bits(key, rows, columns, first_row, device), 64 - fraction)
    return ((cell.to(_wide(dtype)) + 0.5) * 2.0**-fraction).to(dtype)


def normal(
    key: Sequence[int | Tensor],
    rows: int,
    columns: int,
    *,
    first_row: int = 0,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers, shape (rows, columns), always finite: the inverse distribution function of
    :func:`uniform` (arguments as there). The largest magnitude is 5.4 in float32 and 8.2 in float64."""
    draws = uniform(key, rows, columns, first_row=first_row, device=device, dtype=_wide(dtype))
    return torch.special.ndtri(draws).to(dtype)


def signs(
    key: Sequence[int | Tensor],
    rows: int,
    columns: int,
    *,
    first_row: int = 0,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """-1 or +1 with equal probability, shape (rows, columns); arguments as in :func:`uniform`."""
    positive = _bits(key, rows, columns, first_row, device) < 0  # the top bit, set in the upper half of uniform
    return positive.to(dtype) * 2 - 1
