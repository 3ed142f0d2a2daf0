"""Every ATen kernel equals the reference of its op, with memory that is allocated but not written full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxcurv.ir.op import OPS
from fxcurv.ir.types import Diag, Mat, Orth, Psd, Rows, Scalar, Type
from fxcurv.kernels import registry
from fxcurv.kernels.registry import KERNELS, Kernel, select

registry.load("aten")
ATEN = [kernel for kernel in KERNELS if kernel.backend == "aten"]


def of(cls: type[Type], x: torch.Tensor) -> Type:
    return cls(tuple(x.shape), x.dtype)


def typed(op: str, operands: tuple[Any, ...]) -> list[Any]:
    """Types of the operands of the ops that have kernels."""
    first = operands[0]
    if op in ("gram", "grad_square", "second_moment"):
        dims = 3 if first.shape[2] > 1 else 2
        return [of(Rows if x.ndim == 4 else Orth if x.ndim == dims else Diag, x) for x in operands]
    if op == "inverse":
        diagonal = operands[2:] == (True,) or first.ndim < 2 or first.shape[-1] != first.shape[-2]
        return [of(Diag if diagonal else Psd, first), of(Scalar, operands[1]), *operands[2:]]
    if op == "sides_rows":
        g, x, v, left, right = operands
        return [of(Rows, g), of(Rows, x), [of(Diag, t) for t in v], [of(Orth, t) for t in left], of(Orth, right)]
    if op in ("ema", "moving", "ema_scaled", "ema_mean"):
        kind = Mat if first.ndim > 1 else Diag if first.ndim else Scalar
        return [of(kind, first), of(kind, operands[1]), *(of(Scalar, x) for x in operands[2:])]
    if isinstance(first, torch.Tensor):  # unstack
        return [of(Mat if first.ndim > 2 else Diag if first.ndim > 1 else Scalar, first)]
    return [[of(Mat if x.ndim > 1 else Diag if x.ndim else Scalar, x) for x in first]]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every way to allocate without writing give NaN."""

    def full_of_nan(make: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, full_of_nan(getattr(owner, name)))


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def larger() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Operands beyond the small samples: every branch of every kernel, sizes that do not divide."""
    for b, s, d in ((300, 1, 257), (20, 17, 300), (256, 1, 256), (3, 1, 511), (0, 2, 300)):
        yield "gram", (normal(b, s, 1, d),)
    yield "gram", (normal(300, 1, 300, 1).mT,)
    for d in (64, 129):
        root = normal(d, d + 3)
        yield "inverse", (root @ root.mT, torch.tensor(0.3, dtype=torch.float64))
    for b, s, i, o in ((7, 3, 191, 173), (9, 5, 101, 97), (0, 5, 7, 9), (6, 1, 33, 65)):
        yield "grad_square", (normal(b, s, 1, i), normal(b, s, 1, o).sin())
    yield "finite", ([normal(200, 200), *(normal(n) for n in (1, 5, 3, 9)), normal(4).float()],)
    for n, o, i in ((5, 17, 23), (40, 17, 23), (0, 4, 5)):
        g, x = normal(n, 1, 1, o), normal(n, 1, 1, i).cos()
        yield "sides_rows", (g, x, [normal(o)], [normal(o, o)], normal(i + 1, i + 1))
        yield "sides_rows", (g, x, [], [], normal(i, i))
    for size in (3, 200):
        bad = normal(size, size)
        bad[1, 1] = float("inf")
        yield "finite", ([bad, *(normal(n) for n in (1, 5, 3, 9)), normal(3)],)


def cases() -> Iterator[Any]:
    for kernel in ATEN:
        extra = [operands for op, operands in larger() if op == kernel.op]
        for i, operands in enumerate([*OPS[kernel.op].samples(), *extra]):
            types = typed(kernel.op, operands)
            if kernel.when(OPS[kernel.op].infer(*types), *types):
                yield pytest.param(kernel, operands, id=f"{kernel.op}-{kernel.name}-{i}")


def tree(operand: Any, change: Any) -> Any:
    if isinstance(operand, torch.Tensor):
        return change(operand)
    return [tree(x, change) for x in operand] if isinstance(operand, (list, tuple)) else operand


@pytest.mark.parametrize(("kernel", "operands"), list(cases()))
def test_equals_reference(kernel: Kernel, operands: tuple[Any, ...], poison: None) -> None:
    before = tree(operands, torch.clone)
    expected, result = OPS[kernel.op].reference(*operands), kernel(*operands)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    if kernel.name == "views":  # rows of a stack that nothing writes to
        return
    assert result.is_contiguous() and result.dtype == expected.dtype
    torch.testing.assert_close(tree(operands, lambda x: x), before, rtol=0, atol=0, equal_nan=True)
    storages: set[int] = set()
    tree(operands, lambda x: storages.add(x.untyped_storage().data_ptr()) if x.numel() else None)
    assert result.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_kernels_accumulate_in_single_precision(dtype: torch.dtype) -> None:
    a, g = normal(300, 2, 1, 260).to(dtype), normal(300, 2, 1, 5).to(dtype)
    for op, operands in (("gram", (a,)), ("grad_square", (a, g))):
        types = [of(Rows, x) for x in operands]
        result_type = OPS[op].infer(*types)
        kernel = select(op, result_type, types, "aten")
        assert kernel is not None
        result = kernel(*operands)
        assert result.dtype == torch.float32 == result_type.dtype
        torch.testing.assert_close(result, OPS[op].reference(*operands), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("bad", [-5.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_failed_inverse_is_nan_for_the_failing_matrix_alone(bad: float, batch: tuple[int, ...]) -> None:
    good = torch.eye(3, dtype=torch.float64)
    broken = torch.diag(torch.tensor([1.0, bad, 1.0], dtype=torch.float64))
    A = torch.stack([broken, good]) if batch else broken
    kernel = select("inverse", Psd(tuple(A.shape), A.dtype), [Psd(tuple(A.shape), A.dtype), 1.0], "aten")
    assert kernel is not None
    result = kernel(A, 1.0)
    assert (result[0] if batch else result).isnan().all()
    if batch:
        torch.testing.assert_close(result[1], good / 2)


def test_inverse_is_exactly_symmetric() -> None:
    root = normal(4, 33, 40, dtype=torch.float32)
    (kernel,) = (k for k in ATEN if k.op == "inverse")
    result = kernel(root @ root.mT, 0.1)
    assert torch.equal(result, result.mT)


def test_gram_by_slabs_is_exactly_symmetric_off_the_diagonal_blocks() -> None:
    (kernel,) = (k for k in ATEN if k.op == "gram")
    result = kernel(normal(400, 1, 1, 300, dtype=torch.float32))
    assert torch.equal(result[:128, 128:], result[128:, :128].mT)


@pytest.mark.parametrize("weight", [1.0, torch.tensor(1.0)])
def test_ema_with_weight_one_ignores_a_broken_new_value(weight: Any) -> None:
    old, new = torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), float("inf")])
    (kernel,) = (k for k in ATEN if k.op == "ema")
    assert torch.equal(kernel(old, new, weight), old)


def test_every_kernel_says_what_it_is_worth() -> None:
    assert all("x for" in kernel.doc for kernel in ATEN)
