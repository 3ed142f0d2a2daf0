"""No slice makes the host wait for the device, and what it launches is counted: on fake CUDA tensors, without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fxcurv
from fxcurv import sampling
from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.program import Builder
from fxcurv.ir.types import Mat, Psd, Scalar
from fxcurv.passes.dispatched import Unguarded, dispatched
from fxcurv.passes.launches import launches
from fxcurv.passes.lower import Lower, Lowered
from fxcurv.passes.manager import Compilation
from fxcurv.passes.syncfree import HOST_DECIDES, UNAVOIDABLE, check_syncfree, waits
from fxcurv.runtime.numbers import Numbers
from tests.kernels.programs import everything, slices

EIGH = {"ekfac", "tekfac", "acktr", "shampoo", "kfac_rnn", "deflation", "lanczos", "kfac_corrected"}
"""Methods that refresh by an eigendecomposition; lanczos takes one with every statistic too."""
HOST = {"hessian_free"}  # methods whose program decides on the host


@pytest.mark.parametrize("method", fxcurv.methods())
def test_no_slice_waits(method: str) -> None:
    lowered = everything(method, "aten")._engine.lowered
    for piece in slices(lowered):
        left = check_syncfree(lowered, piece)
        eigh = "statistics" if method == "lanczos" else "refresh"
        expected = set(UNAVOIDABLE) if method in EIGH and eigh in piece.due else set()
        assert {wait.op for wait in left} == expected or method in HOST, left
        assert method not in HOST or len(left) == 1


@pytest.mark.parametrize("method", ["kfac", "foof", "diag", "adam"])
def test_no_slice_with_generated_kernels_waits(method: str) -> None:
    pytest.importorskip("triton")
    lowered = everything(method, "triton")._engine.lowered
    assert all(not check_syncfree(lowered, piece) for piece in slices(lowered))


def lower(build: Callable[[Builder], Any], backend: str = "reference") -> Lowered:
    """A program whose only output is what ``build`` returns."""
    builder = Builder()
    builder.give("info", "result", build(builder))
    compilation = Compilation(program=builder.finish(), options={"backend": backend})
    Lower().run(compilation)
    return compilation.lowered


def scaled(b: Builder) -> Any:
    return b.scale(b.input("grad", "w", Mat((3, 5))), b.input("hyper", "c", Scalar()))


def to_item(x: Tensor, c: Tensor) -> Tensor:
    return x * float(c)


def to_branch(x: Tensor, c: Tensor) -> Tensor:
    return x * c if c > 0 else -x


def to_host(x: Tensor, c: Tensor) -> Tensor:
    return x * torch.as_tensor(0.5, device=x.device)


def to_back(x: Tensor, c: Tensor) -> Tensor:
    return (x.cpu() * 2).to(x.device)


def to_size(x: Tensor, c: Tensor) -> Tensor:
    return x * x.nonzero().shape[0]


def to_checked(x: Tensor, c: Tensor) -> Tensor:
    return x * torch.linalg.cholesky(x[:, :3]).sum()


WAITING = {
    to_item: "aten._local_scalar_dense",
    to_branch: "aten._local_scalar_dense",
    to_host: "aten._to_copy",
    to_back: "aten._to_copy",
    to_size: "aten.nonzero",
    to_checked: "aten._linalg_check_errors",
}


@pytest.mark.parametrize("kernel", WAITING)
def test_a_kernel_that_waits_is_found(kernel: Callable[..., Tensor]) -> None:
    lowered = lower(scaled)
    lowered.functions["scale"] = kernel
    piece = lowered.slice(())
    assert WAITING[kernel] in {wait.op for wait in waits(lowered, piece)}
    assert {wait.node for wait in waits(lowered, piece)} == {"scale"}
    with pytest.raises(FxcurvError, match="would wait for the device: %scale calls"):
        check_syncfree(lowered, piece)


def test_a_kernel_that_does_not_wait_is_not() -> None:
    lowered = lower(scaled)
    assert check_syncfree(lowered, lowered.slice(())) == ()
    lowered.functions["scale"] = lambda x, c: x * torch.tensor(0.5)  # a number on the host may meet a device tensor
    assert check_syncfree(lowered, lowered.slice(())) == ()


@pytest.mark.parametrize("key", [(3, 11, 2), (0, 0, 0), (-5, 7, 2**40)])
def test_a_key_on_the_device_draws_what_its_integers_draw(key: tuple[int, int, int]) -> None:
    drawn = sampling.uniform(key, 3, 4)
    for places in ((0,), (1, 2), (0, 1, 2)):
        mixed = [torch.tensor(part) if place in places else part for place, part in enumerate(key)]
        assert torch.equal(sampling.uniform(mixed, 3, 4), drawn)


def test_numbers_are_filled_once_and_where_the_program_runs() -> None:
    numbers = Numbers(torch.float32)
    first = numbers.tensor("damping", 0.1)
    assert numbers.tensor("damping", 0.1) is first and float(numbers.tensor("damping", 0.2)) == pytest.approx(0.2)
    with FakeTensorMode():
        here, there = torch.empty(2, device="cuda"), torch.empty(2)
        numbers.place([here, here])
        assert numbers.tensor("damping", 0.2).device.type == "cuda"
        numbers.place([here, there])  # on several devices numbers stay on the host
        assert numbers.tensor("damping", 0.2).device.type == "cpu"


def test_every_name_of_an_unavoidable_wait_is_an_op() -> None:
    assert all(getattr(torch.ops.aten, name.removeprefix("aten."), None) is not None for name in UNAVOIDABLE)
    assert set(HOST_DECIDES) <= set(OPS)


def test_launches_are_what_reaches_the_device() -> None:
    def build(b: Builder) -> Any:
        M = b.input("grad", "w", Mat((3, 3)))
        sides = [b.input("state", key, Psd((3,) * 2), init="eye") for key in ("G", "A")]
        return b.neg(b.kron_apply(M, *sides))

    lowered = lower(build)
    counted = launches(lowered, lowered.slice(()))
    assert counted.by_op == {"aten.mm": 2, "aten.neg": 1}
    assert counted.by_node == {"kron_apply": 2, "neg": 1}
    assert (counted.total, counted.calls, counted.complete) == (3, 2, True)


def test_views_and_allocations_are_free() -> None:
    lowered = lower(scaled)
    lowered.functions["scale"] = lambda x, c: torch.empty_like(x).view(5, 3).mT[1:].unsqueeze(0)
    assert launches(lowered, lowered.slice(())).total == 0
    lowered = lower(scaled)
    lowered.functions["scale"] = lambda x, c: x.mT.contiguous() + 1  # a copy and a sum
    assert launches(lowered, lowered.slice(())).by_op == {"aten.clone": 1, "aten.add": 1}


def test_a_count_says_when_it_is_not_complete() -> None:
    lowered = lower(lambda b: b.scale(b.neg(b.input("grad", "w", Mat((3, 5)))), b.input("hyper", "c", Scalar())))
    lowered.functions["scale"] = to_item
    counted = launches(lowered, lowered.slice(()))
    assert counted.by_node == {"neg": 1} and not counted.complete


def test_indexing_by_views_is_indexing() -> None:
    x = torch.arange(4 * 5 * 6.0).reshape(4, 5, 6)
    for index in (
        2,
        (..., -1),
        (slice(None, -1), ..., None),
        (None, 2, ..., slice(1, 4)),
        (slice(None), None, -2),
        (..., None, None),
        (...,),
        slice(3, 1),
        (1, slice(None, None, 2), None, ..., 0),
    ):
        with Unguarded():
            found = x[index]
        torch.testing.assert_close(found, x[index], rtol=0, atol=0)


def chain(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def step_launches(method: str, layers: int, **options: Any) -> Counter[str]:
    """Launches by operation of a step in which everything is due."""
    model = fxcurv.transform(chain(layers), method, loss="mse", proofs=(), **options)
    lowered = model._engine.lowered
    found = dispatched(lowered, lowered.slice(lowered.program.cadences, bundled=True))
    return Counter(one.op for one in found if one.launches)


@pytest.mark.parametrize("method", ["kfac", "adam", pytest.param("ekfac", marks=pytest.mark.slow)])
def test_launches_do_not_grow_with_layers_of_one_shape(method: str) -> None:
    few, many = step_launches(method, 50), step_launches(method, 200)
    assert many == few
    apart = step_launches(method, 10, disable=("batch",))
    assert sum(apart.values()) > 3 * sum(few.values()) > 0


def test_launches_do_not_grow_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what "auto" chooses there: generated kernels, and ATen's where there is none."""
    pytest.importorskip("triton")
    for place in ("kernels.registry", "passes.lower", "passes.tap", "passes.pointwise"):
        monkeypatch.setattr(f"fxcurv.{place}.preferred", lambda backend: ("triton", "aten"))
    few, many = step_launches("adam", 50), step_launches("adam", 200)
    assert many == few and any(op.startswith("triton.pointwise") for op in few)
