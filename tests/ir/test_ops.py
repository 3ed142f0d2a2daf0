"""What every op promises: dispatcher checks, its type rule, purity, any strides, and the traits it declares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.ir.op import OPS, Op, Trait
from fxcurv.ir.types import Diag, Mat, Orth, Packed, Psd, Rows, Scalar, Sym, Tensor, Type, Vec

PURE = [
    op for op in OPS.values() if op.reference.__module__.startswith("fxcurv.ir.ops.") and Trait.ORACLE not in op.traits
]
CASES = [pytest.param(op, i, id=f"{op.name}-{i}") for op in PURE for i, _ in enumerate(op.samples())]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def sample(op: Op, index: int) -> tuple[Any, ...]:
    return list(op.samples())[index]


def tree(operand: Any, change: Any) -> Any:
    if isinstance(operand, torch.Tensor):
        return change(operand)
    if isinstance(operand, (list, tuple)):
        return type(operand)(tree(item, change) for item in operand)
    return operand


def leaves(operand: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree(operand, found.append)
    return found


def with_trait(trait: Trait) -> list[Any]:
    return [case for case in CASES if trait in case.values[0].traits]


ROWS = {"mean_positions", "sum_positions", "gram", "diag_gram", "row_sum", "count", "grad_square", "grad_gram"}
ROWS |= {"lagged_gram", "examples", "row_kernel"}
ROWS |= {"weighted_gram", "weighted_diag_gram"}
FACTOR = {"inverse", "border", "eigh", "inverse_root", "mean_diagonal", "pi_split"}
MATRIX = {"kron_apply", "rotate", "rotate_back", "right_apply", "unit_apply"}
RANK1: dict[str, tuple[Any, ...]] = {
    "rank1_update": (Psd, Vec, Scalar, bool),
    "stabilize": (Psd, Scalar, Scalar, bool),
    "rank1_apply": (Mat, Vec, Vec, Scalar),
    "rank1_right_apply": (Mat, Vec, Scalar),
    "newton_root": (Psd, int, Scalar, int),
    "newton_schulz": (Mat, int),
}
PAIRS = (Rows, Rows, int, Scalar, Scalar, Scalar)
SAMPLE_SPACE: dict[str, tuple[Any, ...]] = {
    "keep_rows": (Rows, int),
    "push_rows": (Mat, Mat, Scalar),
    "factor_diagonal": (Mat,),
    "whitened_rows": (Mat, Scalar),
    "damped_rows": (Mat, Scalar),
    "rows_between": (Mat, Mat, Scalar),
    "unexplained": (Mat, Mat, Mat, Scalar),
    "pairs_solve": (Mat, Mat, Mat, Psd, Scalar),
    "reweighted": (Mat, Mat, Psd, Scalar),
    **dict.fromkeys(("spaced_pairs", "interpolated_pairs", "sampled_pairs"), PAIRS),
}
NORMAL_FORM = {"tensorize", "append_column", "weight_columns", "last_column"}


def plain(x: torch.Tensor) -> Type:
    return (Scalar, Vec, Vec, Mat, Tensor)[min(x.ndim, 4)](tuple(x.shape), x.dtype)


def typed(name: str, operands: tuple[Any, ...]) -> list[Any]:
    """Types of a sample's operands, from what the ops' signatures say."""

    def square(x: torch.Tensor, companion_dims: int, cls: type[Type]) -> Type:
        return (cls if x.ndim == companion_dims else Diag)(tuple(x.shape), x.dtype)

    def factor(x: torch.Tensor, flag: bool) -> Type:
        matrix = x.ndim > 1 and x.shape[-1] == x.shape[-2] and not flag
        return (Psd if matrix else Diag)(tuple(x.shape), x.dtype)

    def of(cls: type[Type], x: torch.Tensor) -> Type:
        return cls(tuple(x.shape), x.dtype)

    if name in ROWS:
        return [of(Rows, x) for x in operands]
    if name == "second_moment":
        a, g, *bases = operands
        dims = 3 if a.shape[2] > 1 else 2
        return [of(Rows, a), of(Rows, g), *(square(Q, dims, Orth) for Q in bases)]
    if name in FACTOR:
        flags = [x for x in operands if isinstance(x, bool)]
        types, factors = [], 2 if name == "pi_split" else 1
        for i, x in enumerate(operands):
            flag = flags[i] if i < len(flags) else False
            types.append(factor(x, flag) if i < factors else of(Scalar, x) if isinstance(x, torch.Tensor) else x)
        return types
    if name in MATRIX:
        V, *sides = operands
        cls = Orth if name.startswith("rotate") else Psd
        return [of(Mat, V), *(square(M, V.ndim, cls) for M in sides)]
    if name in ("row_product", "sides_rows"):
        rows = [of(Rows, x) for x in operands[:2]]
        return [*rows, *(tree(x, lambda t: of(Vec if t.ndim == 1 else Psd, t)) for x in operands[2:])]
    if name in ("subset_examples", "every_position", "channel_gram"):
        return [of(Rows, operands[0]), operands[1]]
    if name in ("top_kron", "top_two_kron"):
        a, g, weight, *rest = operands
        return [of(Rows, a), of(Rows, g), of(Scalar, weight), *(tree(x, lambda t: of(Sym, t)) for x in rest)]
    if name in ("pencil_modes", "two_term_gain"):
        classes = (Psd, Sym, Scalar) if name == "pencil_modes" else (Vec, Vec, Scalar)
        return [of(cls, x) for cls, x in zip(classes, operands, strict=False)] + list(operands[3:])
    if name in ("chain_modes", "symmetric_chain_modes"):
        return [of(cls, x) for cls, x in zip((Psd, Mat, Scalar), operands, strict=True)]
    if name in ("chain_gain", "finite_chain_gain"):
        return [of(cls, x) for cls, x in zip((Vec, Vec, Scalar), operands, strict=False)]
    if name in ("sides_apply", "sides_apply_transposed", "explained"):
        return [of(Mat, x) for x in operands]
    if name in ("at_least", "masked_divide"):
        values = 2 if name == "masked_divide" else 1
        given = [plain(x) for x in operands[:values]]
        return given + [of(Scalar, x) if isinstance(x, torch.Tensor) else x for x in operands[values:]]
    if name == "recompose":
        return [of(Vec, operands[0]), square(operands[1], operands[0].ndim + 1, Orth)]
    if name == "largest":
        return [[of(Scalar, x) for x in operands[0]]]
    if name == "entries_mean":
        return [plain(operands[0]), operands[1]]
    if name in ("centred", "patch_diagonal"):
        return [of(Psd, operands[0]), *operands[1:]]
    if name == "uncorrelated_apply":
        V, GI, *rest = operands
        classes = zip((Psd, Vec, Scalar), rest, strict=False)
        return [of(Mat, V), square(GI, V.ndim, Psd), *(of(cls, x) for cls, x in classes), rest[-1]]
    if name == "block_gram":
        return [of(Rows, operands[0]), operands[1]]
    if name == "block_apply":
        V, *sides = operands
        return [of(Mat, V), *(of(Psd if x.ndim >= V.ndim else Diag, x) for x in sides)]
    if name == "block_trace":
        return [[of(Psd if x.ndim > 1 and x.shape[-1] == x.shape[-2] else Diag, x) for x in operands[0]], operands[1]]
    if name == "trace_rule":
        return [of(Scalar, x) for x in operands]
    if name in SAMPLE_SPACE:
        found = zip(SAMPLE_SPACE[name], operands, strict=False)
        return [of(c, x) if isinstance(x, torch.Tensor) else x for c, x in found] + [x for x in operands[6:]]
    if name == "pairs_kernel":
        return [[of(c, x) for x in xs] for c, xs in zip((Mat, Mat, Psd), operands, strict=True)]
    if name == "rows_solve":
        V, *sides = operands
        whole = [[of(Mat, side[0]), of(Scalar, side[1])] if len(side) == 2 else None for side in sides]
        return [of(Mat, V), *(w or [square(side[0], V.ndim, Psd)] for w, side in zip(whole, sides, strict=True))]
    if name == "pointwise":
        xs, steps, kept = operands
        dims = max(x.ndim for x in xs)
        return [[plain(x) if x.ndim == dims else of(Scalar, x) for x in xs], steps, kept]
    if name in RANK1:
        classes = RANK1[name]
        flagged = operands[-1] is True if name == "stabilize" else operands[0].ndim == getattr(operands[1], "ndim", -1)
        if name in ("stabilize", "rank1_update") and flagged:
            classes = (Diag, *classes[1:])
        return [of(c, x) if isinstance(x, torch.Tensor) else x for c, x in zip(classes, operands, strict=False)]
    if name in ("unstack", "dot_each", "finite_each", "last_column_each"):
        cls = Mat if name == "last_column_each" else Tensor
        return [tree(x, lambda t: of(cls, t)) for x in operands]
    if name == "mode_apply_each":
        return [plain(operands[0]), square(operands[1], 3, Psd), operands[2]]
    if name == "outer_all":
        return [tree(x, lambda t: of(Vec, t)) for x in operands]
    if name == "mode_apply":
        return [plain(operands[0]), square(operands[1], 2, Psd), operands[2]]
    if name in NORMAL_FORM:
        return [of(Mat, operands[0]), *(plain(x) if isinstance(x, torch.Tensor) else x for x in operands[1:])]
    if name in ("ema_weight", "tick", "outer"):
        return [of(Vec if name == "outer" else Scalar, x) for x in operands]
    if name in ("ema", "moving", "ema_scaled", "ema_mean"):
        return [plain(operands[0]), plain(operands[1]), *(of(Scalar, x) for x in operands[2:])]
    if name in ("gram_ema_mean", "gram_ema_scaled"):
        return [of(cls, x) for cls, x in zip((Psd, Rows, Scalar, Scalar), operands, strict=True)]
    if name in ("diagonal", "pack_triangle", "track_basis"):
        return [of(cls, x) for cls, x in zip((Psd, Orth), operands, strict=False)]
    if name == "unpack_triangle":
        return [of(Packed, operands[0])]
    if name == "cast":
        return [plain(operands[0]), operands[1]]
    if name.startswith("slopes_"):
        return [of(Rows, x) for x in operands]
    if name == "pull_back":
        G, W, S, size = operands
        return [square(G, 2, Psd), of(Mat, W), of(Psd if S.ndim else Scalar, S), size]
    if name in ("fit_squared", "fit_matching"):
        V, H, *rest = operands
        second = square(H, V.ndim, Psd) if name == "fit_squared" else of(Rows, H)
        return [of(Mat, V), second, *(tree(x, lambda t: of(Mat if t.ndim else Scalar, t)) for x in rest)]
    if name in ("mean", "scale", "bias_correct"):
        return [plain(operands[0]), *(of(Scalar, x) for x in operands[1:])]
    if name in ("add", "sub", "mul", "div") and operands[0].ndim != operands[1].ndim:
        big = max(operands, key=lambda x: x.ndim)
        return [plain(x) if x is big else of(Scalar, x) for x in operands]
    return [tree(x, plain) for x in operands]


@pytest.mark.parametrize(("op", "index"), CASES)
def test_opcheck(op: Op, index: int) -> None:
    dispatched = getattr(torch.ops.fxcurv, op.name).default
    torch.library.opcheck(dispatched, sample(op, index), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("op", "index"), CASES)
def test_type_rule_and_purity(op: Op, index: int) -> None:
    for dtype in DTYPES:
        operands = tree(sample(op, index), lambda x, dtype=dtype: x.to(dtype))
        before = tree(operands, torch.clone)
        types = typed(op.name, operands)
        result, rule = op(*operands), op.infer(*types)
        results = result if isinstance(result, tuple) else (result,)
        rules = rule if isinstance(rule, tuple) else (rule,)
        assert [(tuple(x.shape), x.dtype) for x in results] == [(r.shape, r.dtype) for r in rules]
        assert all(x.is_contiguous() for x in results)

        storages = {x.untyped_storage().data_ptr() for x in leaves(operands) if x.numel()}
        assert not storages & {x.untyped_storage().data_ptr() for x in results}, "a result aliases an operand"
        for old, new in zip(leaves(before), leaves(operands), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
        assert op.cost(rule, *types).flops >= 0
        assert op.cost(rule, *types).bytes >= sum(r.nbytes for r in rules)


@pytest.mark.parametrize(("op", "index"), CASES)
def test_non_contiguous_operands(op: Op, index: int) -> None:
    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(2)[::2] if x.ndim else x

    operands = sample(op, index)
    expected, result = op(*operands), op(*tree(operands, strided))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("op", "index"), with_trait(Trait.ADDITIVE))
def test_additive_over_examples(op: Op, index: int) -> None:
    operands = sample(op, index)
    rows = [x for x in operands if isinstance(x, torch.Tensor) and x.ndim == 4]
    rest = operands[len(rows) :]
    cut = rows[0].shape[0] // 2
    parts = op(*(x[:cut] for x in rows), *rest) + op(*(x[cut:] for x in rows), *rest)
    torch.testing.assert_close(parts, op(*operands), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "index"), with_trait(Trait.ROWWISE))
def test_rowwise_over_examples(op: Op, index: int) -> None:
    rows, *sizes = sample(op, index)
    cut = rows.shape[0] // 2
    apart = torch.cat([op(rows[:cut], *sizes), op(rows[cut:], *sizes)])
    torch.testing.assert_close(apart, op(rows, *sizes), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "index"), with_trait(Trait.LINEAR))
def test_linear_in_the_first_operand(op: Op, index: int) -> None:
    x, *rest = sample(op, index)
    y = x.sin() + 0.25
    combined = op(x + 3 * y, *rest)
    torch.testing.assert_close(combined, op(x, *rest) + 3 * op(y, *rest), rtol=1e-9, atol=1e-10)


FLAGS = {"stabilize": 1, "inverse": 1, "inverse_root": 1, "eigh": 1, "mean_diagonal": 1, "pi_split": 2}


@pytest.mark.parametrize(("op", "index"), with_trait(Trait.BATCHABLE))
def test_batchable_ops_may_be_stacked(op: Op, index: int) -> None:
    operands = [x for x in sample(op, index) if not isinstance(x, bool)]
    types = typed(op.name, sample(op, index))
    other = [x * 1.5 if isinstance(x, torch.Tensor) and x.ndim else x for x in operands]
    stacked = [
        torch.stack(pair) if isinstance(pair[0], torch.Tensor) else pair[0]
        for pair in zip(operands, other, strict=True)
    ]
    flags = [isinstance(types[i], Diag) for i in range(FLAGS.get(op.name, 0))]
    together = op(*stacked, *flags)
    apart = [op(*operands, *flags), op(*other, *flags)]
    for whole, first, second in zip(*(x if isinstance(x, tuple) else (x,) for x in (together, *apart)), strict=True):
        torch.testing.assert_close(whole, torch.stack([first, second]), rtol=1e-9, atol=1e-11)
