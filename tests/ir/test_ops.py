"""Every op: dispatcher checks, type rule, purity and float64 agreement with a formula written out independently."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import fxcurv.ir.ops  # noqa: F401  (registers the ops)
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS, Op, Trait
from fxcurv.ir.ops import linalg, moments
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Rows, Scalar, Tensor, Type, Vec

OWN = {name: op for name, op in OPS.items() if op.reference.__module__.startswith("fxcurv.ir.ops.")}
PURE = {name: op for name, op in OWN.items() if Trait.ORACLE not in op.traits}
CASES = [pytest.param(op, i, id=f"{name}-{i}") for name, op in PURE.items() for i, _ in enumerate(op.samples())]
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


# --- the type of every operand of a sample --------------------------------------------------------------------

ROWS = {"mean_positions", "sum_positions", "gram", "diag_gram", "row_sum", "count", "grad_square", "grad_gram"}
FACTOR = {"inverse", "eigh", "inverse_root", "mean_diagonal", "pi_split"}
MATRIX = {"kron_apply", "rotate", "rotate_back", "right_apply", "unit_apply"}
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
    if name == "mode_apply":
        return [plain(operands[0]), square(operands[1], 2, Psd), operands[2]]
    if name in NORMAL_FORM:
        return [of(Mat, operands[0]), *(plain(x) if isinstance(x, torch.Tensor) else x for x in operands[1:])]
    if name in ("ema_weight", "tick", "outer"):
        return [of(Vec if name == "outer" else Scalar, x) for x in operands]
    if name in ("ema", "moving"):
        return [plain(operands[0]), plain(operands[1]), of(Scalar, operands[2])]
    if name in ("mean", "scale", "bias_correct"):
        return [plain(operands[0]), *(of(Scalar, x) for x in operands[1:])]
    if name in ("add", "sub", "mul", "div") and operands[0].ndim != operands[1].ndim:
        big = max(operands, key=lambda x: x.ndim)
        return [plain(x) if x is big else of(Scalar, x) for x in operands]
    return [tree(x, plain) for x in operands]


# --- independent formulas, in numpy and loops -------------------------------------------------------------------


def by_group(result: np.ndarray) -> np.ndarray:
    return result[0] if result.shape[0] == 1 else result


def full(M: np.ndarray, matrix: bool) -> np.ndarray:
    """A (batch of) dense matrix from a matrix or a diagonal."""
    return M if matrix else M[..., None] * np.eye(M.shape[-1])


def example_gradients(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    b, s, groups, i = a.shape
    out = np.zeros((b, groups, g.shape[3], i))
    for n, t, k in product(range(b), range(s), range(groups)):
        out[n, k] += np.outer(g[n, t, k], a[n, t, k])
    return out


def oracle_gram(rows: np.ndarray) -> np.ndarray:
    out = np.zeros((rows.shape[2], rows.shape[3], rows.shape[3]))
    for n, t, k in product(*map(range, rows.shape[:3])):
        out[k] += np.outer(rows[n, t, k], rows[n, t, k])
    return by_group(out)


def oracle_second_moment(a: np.ndarray, g: np.ndarray, QA: np.ndarray, QG: np.ndarray) -> np.ndarray:
    groups = a.shape[2]
    QA, QG = (
        full(Q, Q.ndim == (3 if groups > 1 else 2)).reshape(groups, d, d)
        for Q, d in ((QA, a.shape[3]), (QG, g.shape[3]))
    )
    E = example_gradients(a, g)
    return by_group(np.stack([sum((QG[k].T @ E[n, k] @ QA[k]) ** 2 for n in range(len(E))) for k in range(groups)]))


def oracle_grad_gram(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    E = example_gradients(a, g)
    flat = E.reshape(*E.shape[:2], -1)
    return by_group(np.stack([sum(np.outer(v[k], v[k]) for v in flat) for k in range(a.shape[2])]))


def is_matrix(A: np.ndarray, flag: bool) -> bool:
    return A.ndim > 1 and A.shape[-1] == A.shape[-2] and not flag


def lead(s: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(s).reshape(np.shape(s) + (1,) * (x.ndim - np.ndim(s)))


def diagonal_of(A: np.ndarray, flag: bool) -> np.ndarray:
    return np.einsum("...ii->...i", A) if is_matrix(A, flag) else A


def oracle_inverse(A: np.ndarray, damping: np.ndarray, flag: bool = False) -> np.ndarray:
    if not is_matrix(A, flag):
        return 1 / (A + lead(damping, A))
    return np.linalg.inv(A + lead(damping, A) * np.eye(A.shape[-1]))


def oracle_inverse_root(A: np.ndarray, root: float, eps: np.ndarray, flag: bool = False) -> np.ndarray:
    dense = full(A, is_matrix(A, flag))
    dense = dense + lead(eps, dense) * np.eye(A.shape[-1])
    U, s, Vt = np.linalg.svd(dense)  # the samples are PSD, so singular values are eigenvalues
    out = (U * s[..., None, :] ** (-1 / root)) @ Vt
    return out if is_matrix(A, flag) else np.einsum("...ii->...i", out)


def oracle_pi(A: np.ndarray, G: np.ndarray, flag_a: bool = False, flag_g: bool = False) -> np.ndarray:
    a, g = diagonal_of(A, flag_a).mean(-1), diagonal_of(G, flag_g).mean(-1)
    return np.vectorize(lambda x, y: math.sqrt(x / y) if x > 0 and y > 0 else 1.0)(a, g)


def kron(V: np.ndarray, L: np.ndarray, R: np.ndarray) -> np.ndarray:
    """(L (x) R) vec(V), vec row-major, that is L V R^T, through the explicit Kronecker product in each group."""
    L, R = full(L, L.ndim == V.ndim), full(R, R.ndim == V.ndim)
    if V.ndim == 2:
        return (np.kron(L, R) @ V.reshape(-1)).reshape(V.shape)
    return np.stack([kron(v, left, right) for v, left, right in zip(V, L, R, strict=True)])


def t(M: np.ndarray, V: np.ndarray) -> np.ndarray:
    return np.swapaxes(M, -1, -2) if M.ndim == V.ndim else M


def oracle_unit_apply(V: np.ndarray, M: np.ndarray) -> np.ndarray:
    M = full(M, M.ndim == V.ndim)
    if V.ndim == 2:
        return (M @ V.reshape(-1)).reshape(V.shape)
    return np.stack([oracle_unit_apply(v, m) for v, m in zip(V, M, strict=True)])


def unfold(T: np.ndarray, mode: int) -> np.ndarray:
    return np.stack([np.take(T, j, axis=mode).reshape(-1) for j in range(T.shape[mode])])


def oracle_mode_apply(T: np.ndarray, M: np.ndarray, mode: int) -> np.ndarray:
    M = full(M, M.ndim == 2)
    out = np.zeros_like(T)
    for j, k in product(range(len(M)), repeat=2):
        index = [slice(None)] * T.ndim
        index[mode] = j
        out[tuple(index)] += M[j, k] * np.take(T, k, axis=mode)
    return out


def oracle_matricize(W: np.ndarray, perm: list[int], shape: list[int]) -> np.ndarray:
    flat = [
        W[tuple(index[perm.index(axis)] for axis in range(W.ndim))] for index in np.ndindex(*(W.shape[p] for p in perm))
    ]
    return np.array(flat).reshape(shape)


def oracle_tensorize(M: np.ndarray, perm: list[int], shape: list[int]) -> np.ndarray:
    out = np.zeros(shape)
    for value, index in zip(M.reshape(-1), np.ndindex(*(shape[p] for p in perm)), strict=True):
        out[tuple(index[perm.index(axis)] for axis in range(len(shape)))] = value
    return out


def oracle_clip(dots: list[np.ndarray], lr: float, kappa: float) -> float:
    total = sum(float(x) for x in dots if math.isfinite(x))
    return 1.0 if total <= 0 or lr == 0 else min(1.0, math.sqrt(kappa / (lr**2 * total)))


def oracle_ema(old: np.ndarray, new: np.ndarray, weight: np.ndarray) -> np.ndarray:
    w = np.broadcast_to(lead(weight, old), old.shape)
    return np.array(
        [o if v == 1 else v * o + (1 - v) * n for o, n, v in zip(old.flat, new.flat, w.flat, strict=True)]
    ).reshape(old.shape)


def aligned(function: Any) -> Any:
    return lambda x, y: function(lead(x, y) if x.ndim < y.ndim else x, lead(y, x) if y.ndim < x.ndim else y)


ORACLES: dict[str, Any] = {
    "mean_positions": lambda r: r.sum(1, keepdims=True) / r.shape[1],
    "sum_positions": lambda r: sum(r[:, s : s + 1] for s in range(r.shape[1])),
    "gram": oracle_gram,
    "diag_gram": lambda r: np.einsum("...ii->...i", oracle_gram(r)),
    "row_sum": lambda r: by_group(np.einsum("bsgd->gd", r)),
    "count": lambda r: r.shape[0] * r.shape[1],
    "second_moment": oracle_second_moment,
    "grad_square": lambda a, g: by_group((example_gradients(a, g) ** 2).sum(0)),
    "grad_gram": oracle_grad_gram,
    "mean": lambda x, n: x / lead(np.maximum(n, 1), x),
    "ema_weight": lambda k, n, rho: min(k / (k + 1), rho) if n > 0 else 1.0,
    "tick": lambda k, n: k + 1 if n > 0 else k,
    "ema": oracle_ema,
    "moving": oracle_ema,
    "bias_correct": lambda x, beta, k: x / (1 - beta**k) if k else x,
    "add": aligned(np.add),
    "sub": aligned(np.subtract),
    "mul": aligned(np.multiply),
    "div": aligned(np.divide),
    "square": lambda x: x * x,
    "sqrt": np.sqrt,
    "neg": lambda x: 0 - x,
    "mean_diagonal": lambda A, flag=False: diagonal_of(A, flag).sum(-1) / A.shape[-1],
    "pi_split": oracle_pi,
    "inverse": oracle_inverse,
    "inverse_root": oracle_inverse_root,
    "outer": lambda g, a: np.einsum("...o,...i->...oi", g, a),
    "kron_apply": lambda V, G, A: kron(V, G, A),  # A is symmetric
    "right_apply": lambda V, A: kron(V, np.ones(V.shape[:-1]), A),
    "rotate": lambda V, QG, QA: kron(V, t(QG, V), t(QA, V)),
    "rotate_back": lambda V, QG, QA: kron(V, QG, QA),
    "unit_apply": oracle_unit_apply,
    "mode_gram": lambda T, m: unfold(T, m) @ unfold(T, m).T,
    "mode_diag": lambda T, m: np.array([(row**2).sum() for row in unfold(T, m)]),
    "mode_apply": oracle_mode_apply,
    "matricize": oracle_matricize,
    "tensorize": oracle_tensorize,
    "append_column": lambda M, v: np.concatenate([M, v.reshape(M.shape[:-1])[..., None]], -1),
    "weight_columns": lambda M: np.delete(M, -1, axis=-1),
    "last_column": lambda M: np.take(M, -1, axis=-1).ravel(),
    "dot": lambda x, y: sum(float(p) * float(q) for p, q in zip(x.flat, y.flat, strict=True)),
    "norm": lambda x: math.sqrt(sum(float(p) ** 2 for p in x.flat)),
    "clip_kl": oracle_clip,
    "finite": lambda xs: all(np.isfinite(x).all() for x in xs),
    "scale": lambda x, c: x * lead(c, x),
    "pack": lambda xs: np.concatenate([x.ravel() for x in xs]),
    "unpack": lambda v, offset, shape: np.array([v[offset + k] for k in range(math.prod(shape))]).reshape(shape),
}
INDIRECT = {"eigh"}  # eigenvectors are not unique: tested by what they must satisfy


def test_every_op_has_an_oracle() -> None:
    assert set(PURE) == set(ORACLES) | INDIRECT


@pytest.mark.parametrize(("op", "index"), CASES)
def test_agrees_with_oracle(op: Op, index: int) -> None:
    if op.name in INDIRECT:
        pytest.skip("has a test of its own")
    operands = sample(op, index)
    expected = ORACLES[op.name](*tree(operands, lambda x: x.numpy()))
    result = op(*operands)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9, atol=1e-11)


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


ADDITIVE = [case for case in CASES if Trait.ADDITIVE in case.values[0].traits]


@pytest.mark.parametrize(("op", "index"), ADDITIVE)
def test_additive_over_examples(op: Op, index: int) -> None:
    operands = sample(op, index)
    rows = [x for x in operands if x.ndim == 4]
    rest = operands[len(rows) :]
    cut = rows[0].shape[0] // 2
    parts = op(*(x[:cut] for x in rows), *rest) + op(*(x[cut:] for x in rows), *rest)
    torch.testing.assert_close(parts, op(*operands), rtol=1e-12, atol=1e-12)


LINEAR = [case for case in CASES if Trait.LINEAR in case.values[0].traits]


@pytest.mark.parametrize(("op", "index"), LINEAR)
def test_linear_in_the_first_operand(op: Op, index: int) -> None:
    x, *rest = sample(op, index)
    y = x.sin() + 0.25
    combined = op(x + 3 * y, *rest)
    torch.testing.assert_close(combined, op(x, *rest) + 3 * op(y, *rest), rtol=1e-9, atol=1e-10)


BATCHABLE = [case for case in CASES if Trait.BATCHABLE in case.values[0].traits]
FLAGS = {"inverse": 1, "inverse_root": 1, "eigh": 1, "mean_diagonal": 1, "pi_split": 2}


@pytest.mark.parametrize(("op", "index"), BATCHABLE)
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


# --- eigendecomposition and failures ---------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(list(OPS["eigh"].samples()))))
def test_eigh_decomposes(index: int) -> None:
    A, *flags = sample(OPS["eigh"], index)
    values, vectors = OPS["eigh"](A, *flags)
    assert (values >= 0).all()
    if not is_matrix(A.numpy(), bool(flags)):
        torch.testing.assert_close(values, A)
        torch.testing.assert_close(vectors, torch.ones_like(A))
        return
    torch.testing.assert_close((vectors * values.unsqueeze(-2)) @ vectors.mT, A)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(A.shape[-1], dtype=A.dtype).expand(A.shape))
    assert (values.diff(dim=-1) >= 0).all()


def test_eigh_clips_negative_round_off() -> None:
    A = torch.diag(torch.tensor([-1e-9, 1.0], dtype=torch.float64))
    assert OPS["eigh"](A)[0].tolist() == [0.0, 1.0]
    assert OPS["eigh"](torch.tensor([-1e-9, 1.0]))[0].tolist() == [0.0, 1.0]


BAD = {
    "indefinite": torch.diag(torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)),
    "nan": torch.full((3, 3), float("nan"), dtype=torch.float64),
    "inf": torch.diag(torch.tensor([1.0, float("inf"), 1.0], dtype=torch.float64)),
}


@pytest.mark.parametrize(
    ("name", "bad"), [("inverse", b) for b in BAD] + [(n, b) for n in ("eigh", "inverse_root") for b in ("nan", "inf")]
)
@pytest.mark.parametrize("form", ["matrix", "group", "diagonal", "diagonal group"])
def test_failure_is_nan_for_the_failing_group_alone(name: str, bad: str, form: str) -> None:
    matrix, good = BAD[bad], 2 * torch.eye(3, dtype=torch.float64)
    if "diagonal" in form:
        matrix, good = matrix.diagonal(), good.diagonal()
    A = torch.stack([matrix, good]) if "group" in form else matrix
    rest = {"inverse": (0.5,), "eigh": (), "inverse_root": (2.0, 0.5)}[name]
    results = OPS[name](A, *rest)
    for result in results if isinstance(results, tuple) else (results,):
        failed = result[0] if "group" in form else result
        assert failed.isnan().all()
        if "group" in form:
            assert result[1].isfinite().all()


def test_eigh_that_does_not_converge_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def failing(A: torch.Tensor) -> Any:
        if (A == 7.0).any():
            raise torch.linalg.LinAlgError("did not converge")
        return real(A)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    bad, good = 7 * torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    values, vectors = linalg.decompose(torch.stack([bad, good]))
    assert values[0].isnan().all() and vectors[0].isnan().all()
    assert values[1].tolist() == [1.0, 1.0] and vectors[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse_is_exactly_symmetric(dtype: torch.dtype) -> None:
    root = torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(0))
    inverse = OPS["inverse"]((root @ root.mT).to(dtype), 0.1)
    assert torch.equal(inverse, inverse.mT)


# --- scalars -----------------------------------------------------------------------------------------------------


def test_numbers_may_stand_for_scalars() -> None:
    for name, op in PURE.items():
        if "[]" in op.schema or name in ("add", "sub", "mul", "div", "dot", "ema_weight", "tick"):
            continue
        for operands in op.samples():
            numbers = [
                operands[0],
                *(x.item() if isinstance(x, torch.Tensor) and x.ndim == 0 else x for x in operands[1:]),
            ]
            torch.testing.assert_close(op(*numbers), op(*operands), equal_nan=True)
    x = torch.tensor([2.0, 4.0])
    assert OPS["sub"](1.0, x).tolist() == [-1.0, -3.0]
    assert OPS["div"](1.0, x).tolist() == [0.5, 0.25]
    assert OPS["ema_weight"](torch.tensor(99.0), 3, 0.5).item() == 0.5
    assert OPS["tick"](torch.tensor(4.0), 3).item() == 5.0
    assert OPS["clip_kl"]([torch.tensor(4.0)], 1.0, 1.0).item() == 0.5


def test_a_double_scalar_does_not_promote_single_precision() -> None:
    x, scalar, line = (
        torch.ones(2, 3, 3),
        torch.tensor(0.5, dtype=torch.float64),
        torch.full((2,), 0.5, dtype=torch.float64),
    )
    for value in (scalar, line):
        assert OPS["scale"](x, value).dtype == torch.float32
        assert OPS["mul"](x, value).dtype == torch.float32
        assert OPS["ema"](x, x, value).dtype == torch.float32
        assert OPS["mean"](x, value).dtype == torch.float32
        assert OPS["inverse"](x, value).dtype == torch.float32


def test_ema_of_half_precision_state_keeps_its_weight() -> None:
    old, new = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    assert OPS["ema"](old, new, 0.999)[0].item() == pytest.approx(0.001, rel=0.01)


def test_ema_with_weight_one_ignores_a_broken_new_value() -> None:
    old = torch.tensor([1.0, 2.0], dtype=torch.float64)
    new = torch.tensor([float("nan"), float("inf")], dtype=torch.float64)
    assert torch.equal(OPS["ema"](old, new, torch.tensor(1.0)), old)
    assert torch.equal(OPS["ema"](old, new, 1.0), old)


def test_per_example_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 3, 2, 4, generator=generator, dtype=torch.float64)
    g = torch.randn(7, 3, 2, 5, generator=generator, dtype=torch.float64)
    whole = OPS["grad_square"](a, g), OPS["grad_gram"](a, g)
    sizes = []
    monkeypatch.setattr(moments, "CHUNK", 2 * 2 * 4 * 5)
    for part in moments.per_example(a, g):
        sizes.append(part.shape[0])
    assert sizes == [2, 2, 2, 1]
    torch.testing.assert_close((OPS["grad_square"](a, g), OPS["grad_gram"](a, g)), whole)


# --- what the type rules refuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "operands", "message"),
    [
        ("gram", (Mat((3, 4)),), "must be a Rows"),
        ("second_moment", (Rows((5, 1, 1, 3)), Rows((4, 1, 1, 2)), Orth((3, 3)), Orth((2, 2))), "shape must be"),
        ("second_moment", (Rows((5, 1, 1, 3)), Rows((5, 1, 1, 2)), Orth((2, 2)), Orth((3, 3))), "shape must be"),
        ("kron_apply", (Mat((3, 5)), Psd((5, 5)), Psd((3, 3))), "shape must be"),
        ("kron_apply", (Mat((4, 3, 5)), Psd((3, 3)), Psd((4, 5, 5))), "shape must be"),
        ("rotate", (Mat((3, 5)), Psd((3, 3)), Orth((5, 5))), "must be a Diag or Orth"),
        ("inverse", (Diag((4, 4)), 0.1), "diagonal=True"),
        ("inverse", (Psd((4, 4)), 0.1, True), "leave the flag out"),
        ("inverse", (Psd((2, 4, 4)), Scalar((3,))), "groups"),
        ("inverse", (Orth((4, 4)), 0.1), "must be a Diag or Psd"),
        ("pi_split", (Psd((2, 4, 4)), Psd((3, 3))), "equal groups"),
        ("add", (Psd((4, 4)), 0.1), "damping"),
        ("add", (Psd((4, 4)), Psd((3, 3))), "shape must be"),
        ("add", (Psd((4, 4)), Mat((4, 4))), "must be a Psd"),
        ("add", (1.0, 2.0), "at least one tensor"),
        ("mul", (Vec((4,)), Scalar((4,))), "groups"),
        ("ema", (Psd((4, 4)), Mat((4, 4)), 0.5), "must be a Psd"),
        ("mode_gram", (Tensor((4, 3)), 2), "modes go from 0 to 1"),
        ("matricize", (Tensor((4, 3)), [0, 0], [4, 3]), "does not order"),
        ("matricize", (Tensor((4, 3)), [0, 1], [4, 4]), "cannot bring"),
        ("append_column", (Mat((4, 3)), Vec((3,))), "one bias entry"),
        ("unpack", (Vec((4,)), 2, [3]), "not all there"),
        ("clip_kl", ([], 0.1, 0.1), "at least one value"),
        ("finite", ([],), "at least one value"),
        ("pack", ([],), "at least one value"),
    ],
)
def test_type_rule_refuses(name: str, operands: tuple[Any, ...], message: str) -> None:
    with pytest.raises(FxcurvError, match=message):
        OPS[name].infer(*operands)


@pytest.mark.parametrize(
    ("name", "operands", "expected"),
    [
        ("add", (Psd((4, 4)), Psd((4, 4))), "Psd[4]"),
        ("sub", (Psd((4, 4)), Psd((4, 4))), "Sym[4]"),
        ("mul", (Psd((4, 4)), 2.0), "Psd[4]"),
        ("mul", (Scalar((3,)), Psd((3, 4, 4))), "Psd[3;4]"),
        ("mul", (Orth((4, 4)), 2.0), "Mat[4,4]"),
        ("div", (1.0, Scalar()), "Scalar[]"),
        ("add", (Diag((4,)), Scalar()), "Diag[4]"),
        ("sqrt", (Psd((4, 4)),), "Sym[4]"),
        ("inverse", (Diag((4,)), 0.1), "Diag[4]"),
        ("inverse", (Diag((4, 4)), 0.1, True), "Diag[4;4]"),
        ("gram", (Rows((None, None, 1, 3)),), "Psd[3]"),
        ("gram", (Rows((None, None, 4, 3), torch.bfloat16),), "Psd[4;3]"),
        ("gram", (Rows((None, None, 4, 3), torch.float64),), "Psd[4;3]:f64"),
        ("mean_positions", (Rows((None, None, 4, 3)),), "Rows[?,1,4,3]"),
        ("dot", (Mat((3, 4), torch.bfloat16), Mat((3, 4), torch.bfloat16)), "Scalar[]"),
    ],
)
def test_type_rule_gives(name: str, operands: tuple[Any, ...], expected: str) -> None:
    assert str(OPS[name].infer(*operands)) == expected


def test_cost_of_unknown_rows_counts_them_once() -> None:
    gram = OPS["gram"]
    known, unknown = Rows((10, 1, 1, 3)), Rows((None, None, 1, 3))
    assert gram.cost(gram.infer(known), known).flops == 10 * gram.cost(gram.infer(unknown), unknown).flops == 180


def test_cost_counts_the_tensors_of_a_list() -> None:
    pack = OPS["pack"]
    types = [Mat((3, 4)), Vec((5,))]
    assert pack.cost(pack.infer(types), types).bytes == 4 * (17 + 17)
