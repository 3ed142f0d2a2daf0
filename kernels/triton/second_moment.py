"""Second moments of single examples' gradients: sum over b of (sum over s of g a^T)^2, in an eigenbasis or as it is.

With one position the square of a product is the product of squares, (g^2)^T (a^2): one matrix product whose operands
are squared on their way in. With several, positions are summed before the square: a program owns a tile of (o, i),
forms an example's gradient on it in registers, adds its square and goes on to the next example. No example's gradient
is ever written; a chunk of them would be larger than the network.

Narrow rows (both sides at most 64) are turned into the eigenbasis inside, so rows are read once. For wider rows the
change of basis is itself a large product, which stays with cuBLAS; the kernel then reads the turned rows. A diagonal
basis (the identity of a one-hot input) only scales the result.

Few tiles are split over examples; a second kernel adds the parts in order. Squares are taken in float32 from any dtype,
and multiplied as tf32 for half precision: all terms are positive, so rounding cannot cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxcurv.ir.types import Diag, Rows
from fxcurv.kernels.triton.family import DTYPES, Family, Geometry, Traffic, Variant, normal, precision
from fxcurv.kernels.triton.kron_apply import LIMIT, padded

Turns = tuple[str, str]
"""How a and g are turned: "" (not at all), "matrix" or "diagonal"."""


def moment_geometry(
    name: str, i: int, o: int, groups: int, turns: Turns, dtype: torch.dtype, how: str | None = None
) -> Geometry:
    """What is baked in: for narrow rows their blocks, for others how they are turned beforehand."""
    narrow = max(i, o) <= LIMIT
    ways = {"": "", "diagonal": "scale", "matrix": "inside" if narrow else "before"}
    products = precision(dtype) if dtype == torch.float32 else "tf32"
    return {
        "name": name,
        "turned": name == "second_moment",
        "turn_a": ways[turns[0]],
        "turn_g": ways[turns[1]],
        "hold_i": padded(i) if narrow else 0,
        "hold_o": padded(o) if narrow else 0,
        "groups": groups,
        "dtype": DTYPES[dtype],
        "precision": how or products,
    }


def geometry(name: str, result: Any, a: Any, g: Any, *bases: Any) -> Geometry | None:
    """Rows of one dtype with known groups and features; bases that are matrices or diagonals in float32 or half."""
    i, o, groups = a.shape[-1], g.shape[-1], a.shape[2] if len(a.shape) == 4 else None
    if not (isinstance(a, Rows) and isinstance(g, Rows)) or not (i and o and groups):
        return None
    if a.dtype != g.dtype or any(x.dtype not in DTYPES for x in (a, *bases)):
        return None
    ways = ["diagonal" if isinstance(basis, Diag) else "matrix" for basis in bases] or ["", ""]
    return moment_geometry(name, i, o, groups, (ways[0], ways[1]), a.dtype)


def _naive(a: Tensor, g: Tensor, *bases: Tensor) -> Tensor:
    """An example and a group at a time."""
    groups = a.shape[2]
    result = torch.zeros(groups, g.shape[-1], a.shape[-1], dtype=torch.float64)
    for k in range(groups):
        rows = [a[:, :, k].double(), g[:, :, k].double()]
        for side, basis in enumerate(bases):
            own = basis.double().reshape(groups, *basis.shape[-(basis.ndim - (groups > 1)) :])[k]
            rows[side] = rows[side] @ (own.diag() if own.ndim == 1 else own)
        for one_a, one_g in zip(*rows, strict=True):
            result[k] += (one_g.T @ one_a) ** 2
    return result[0] if groups == 1 else result


def _splits(values: Geometry, a: Tensor, tiles: int) -> int:
    """As ``launch`` divides the examples."""
    b, s = a.shape[:2]
    splits = max(1, min(values["programs"] // (tiles * values["groups"]), b * s // values["least"], b))
    chunk = -(-b // splits)
    if s == 1:
        chunk = -(-chunk // values["step"]) * values["step"]
    return max(1, -(-b // max(1, chunk)))


def cost(values: Geometry, a: Tensor, g: Tensor, *bases: Tensor) -> Traffic:
    """Rows and bases once, the result once, parts once out and in; tiles of a row or column ask for the same rows.

    Rows that are turned beforehand come from a product of the library's, whose traffic is its own.
    """
    b, s, groups, i = a.shape
    o = g.shape[-1]
    down = -(-o // (values["hold_o"] or values["tile_o"]))
    across = -(-i // (values["hold_i"] or values["tile_i"]))
    splits = _splits(values, a, down * across)
    read, again, flops = 0.0, 0.0, 2.0 * b * s * groups * o * i
    for rows, turn, times, basis in (
        (a, values["turn_a"], down, bases[:1]),
        (g, values["turn_g"], across, bases[1:]),
    ):
        once = float(rows.numel() * (4 if turn == "before" else rows.dtype.itemsize))
        read, again = read + once, again + once * (times - 1)
        if turn in ("inside", "scale"):
            size = float(basis[0].numel() * basis[0].dtype.itemsize)
            read, again = read + size, again + size * ((times if turn == "scale" else 1) * splits - 1)
        if turn == "inside":
            flops += 2.0 * rows.numel() * rows.shape[-1]
    result = 4.0 * groups * o * i
    parts = result * splits if splits > 1 else 0.0
    return Traffic(read + parts, result + parts, flops, again)


SHAPES = ((5, 1, 1, 3, 2), (3, 4, 1, 2, 5), (1, 1, 1, 1, 1), (37, 1, 1, 17, 13), (7, 19, 1, 31, 17), (0, 3, 1, 5, 3))
GROUPED = ((5, 7, 3, 2, 3), (67, 1, 2, 19, 5))
WIDE = ((5, 1, 1, 67, 3), (3, 17, 1, 5, 79), (41, 1, 2, 65, 71))
TURNS: tuple[Turns, ...] = (("matrix", "matrix"), ("diagonal", "matrix"), ("diagonal", "diagonal"))


def _basis(turn: str, size: int, groups: int, seed: int) -> tuple[Tensor, ...]:
    if not turn:
        return ()
    shape = (groups,) if groups > 1 else ()
    full = torch.linalg.qr(normal(*shape, size, size, seed=seed))[0]
    return (full if turn == "matrix" else normal(*shape, size, seed=seed),)


def operands(shape: tuple[int, ...], turns: Turns, dtype: torch.dtype, layout: str = "") -> tuple[Tensor, ...]:
    """Rows a (b, s, groups, i) and g (b, s, groups, o), and bases. layout "channels": g as a convolution leaves it."""
    b, s, groups, i, o = shape
    a, g = normal(b, s, groups, i, dtype=dtype), normal(b, s, groups, o, dtype=dtype, seed=1)
    if layout == "channels":
        a = normal(b, s, groups, 2 * i, dtype=dtype)[..., ::2]
        g = normal(b, groups, o, s, dtype=dtype).permute(0, 3, 1, 2)
    return a, g, *_basis(turns[0], i, groups, 2), *_basis(turns[1], o, groups, 3)


def variants(name: str, all_turns: tuple[Turns, ...]) -> Iterator[Variant]:
    """Shapes with one and several positions, tiles and splits, every turn and dtype; large ones compile only."""

    def one(
        shape: tuple[int, ...], turns: Turns, dtype: torch.dtype, how: str, layout: str = "", **more: Any
    ) -> Variant:
        b, s, groups, i, o = shape
        kind = how if dtype == torch.float32 and how == "tf32" else DTYPES[dtype]
        label = "-".join(filter(None, (kind, "x".join(map(str, shape)), *(turn[:3] for turn in turns), layout)))
        values = moment_geometry(name, i, o, groups, turns, dtype, how)
        return Variant(label, values, partial(operands, shape, turns, dtype, layout), dot=how == "tf32", **more)

    for turns in all_turns:
        for shape in SHAPES + GROUPED + WIDE:
            yield one(shape, turns, torch.float32, "ieee", compile=False)
        for dtype in DTYPES:
            for shape in ((37, 1, 1, 17, 13), (7, 19, 1, 31, 17), (3, 17, 1, 5, 79)):
                yield one(shape, turns, dtype, "tf32", tolerance=2e-3)
            for shape in ((256, 1, 1, 64, 64), (8, 64, 1, 64, 64), (256, 1, 1, 300, 200), (8, 64, 1, 300, 200)):
                quick = dtype == torch.float32 and turns[0] != "diagonal" and shape[-1] == 64
                yield one(shape, turns, dtype, "tf32", run=False, quick=quick)
        for shape in ((8, 64, 1, 64, 64), (256, 1, 1, 300, 200)):
            yield one(shape, turns, torch.float32, "ieee", run=False)
    yield one((6, 11, 2, 9, 7), all_turns[0], torch.float32, "ieee", "channels", compile=False)


GRAD_SQUARE = Family(
    name="grad_square",
    op="grad_square",
    template="second_moment.py.jinja",
    label="{hold_o}x{hold_i}_{dtype}",
    geometry=partial(geometry, "grad_square"),
    naive=_naive,
    variants=partial(variants, "grad_square", (("", ""),)),
    cost=cost,
    tuned="second_moment",
    doc="Sums over examples of their squared gradients. One program owns a tile of the result and forms an example's "
    "gradient in registers; with one position it multiplies squares. Claims rows of fp32, bf16 and fp16.",
)
SECOND_MOMENT = Family(
    name="second_moment",
    op="second_moment",
    template="second_moment.py.jinja",
    label="{hold_o}x{hold_i}_{dtype}",
    geometry=partial(geometry, "second_moment"),
    naive=_naive,
    variants=partial(variants, "second_moment", TURNS),
    cost=cost,
    doc="Sums over examples of their squared gradients in an eigenbasis. Rows of at most 64 features are turned inside "
    "the kernel, wider ones by a product beforehand; then as grad_square. Claims rows of fp32, bf16 and fp16.",
)
