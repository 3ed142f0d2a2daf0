"""torch.compile of slices and of the tapped forward: whole graphs, equal results, generated kernels included."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fxcurv
from fxcurv.passes.lower import Slice
from fxcurv.passes.validate import random_inputs
from fxcurv.runtime.module import CurvatureModule

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def transformed(method: str, **options: Any) -> CurvatureModule:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4), nn.LayerNorm(4))
    example = torch.randn(5, 2, 3, 3)
    return fxcurv.transform(net, method, example_inputs=(example,), loss="cross_entropy", **options)


def compiled_equals_eager(model: CurvatureModule, piece: Slice, backend: str) -> None:
    program = model._engine.lowered.program
    mine, theirs = (random_inputs(program, double=False) for _ in range(2))  # a slice may use up its statistics
    expected = piece.function(*(mine[role] for role in piece.inputs))
    found = torch.compile(piece.function, backend=backend, fullgraph=True)(*(theirs[role] for role in piece.inputs))
    assert len(found) == len(expected) > 0
    for role, one, other in zip(piece.outputs, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5, msg=lambda text, role=role: f"{role}: {text}")


METHODS = [name for name in fxcurv.methods() if name not in ("adahessian", "hessian_free", "kfac_rnn")]
"""Not those whose program calls the model, and the one that takes the eigenvectors of eigenvectors' products."""
QUICK = {("kfac", 2), ("adam", 0), ("ekfac", 1), ("shampoo", 2)}
DUE: tuple[frozenset[str], ...] = (frozenset(), frozenset({"statistics"}), frozenset({"statistics", "refresh"}))


@pytest.mark.parametrize(
    ("method", "due"),
    [pytest.param(*c, marks=() if c in QUICK else SLOW) for c in itertools.product(METHODS, range(len(DUE)))],
)
def test_a_slice_is_one_graph(method: str, due: int) -> None:
    model = transformed(method)
    compiled_equals_eager(model, model._engine.lowered.slice(DUE[due]), "aot_eager")


@SLOW
@pytest.mark.parametrize("due", range(len(DUE)))
def test_inductor_compiles_a_slice(due: int) -> None:
    model = transformed("kfac")
    compiled_equals_eager(model, model._engine.lowered.slice(DUE[due]), "inductor")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
@pytest.mark.parametrize("method", ["kfac", pytest.param("ekfac", marks=SLOW)])
def test_the_tapped_forward_is_one_graph(method: str, backend: str) -> None:
    """Outputs, gradients of parameters and, as gradients of the slots, statistics: one graph forward, one backward."""
    model = transformed(method, disable=("defer",))  # a deferred tap is no part of the graph
    x, y = torch.randn(6, 2, 3, 3), torch.randint(0, 4, (6,))
    forward, leaves = model._forwards.find(model._engine, (x,), {})

    def run(*inputs: Tensor) -> Tensor:
        return forward.runner(model._engine.model, *inputs)

    def delivered(call: Callable[..., Tensor]) -> list[Tensor]:
        model.zero_grad()
        output = call(*forward.extras(model._engine, forward.tapped, None), *leaves)
        F.cross_entropy(output, y).backward()
        gradients = [x.grad for x in (*model._engine.statistics.slots.values(), *model.parameters())]
        return [output, *(gradient for gradient in gradients if gradient is not None)]

    expected = delivered(run)
    found = delivered(torch.compile(run, backend=backend, fullgraph=True))
    assert len(expected) > len(list(model.parameters())) + 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# Generated kernels ----------------------------------------------------------------------------------------------------


def on_fake_gpu(operand: Any) -> Any:
    """The operand as a fake CUDA tensor of the same strides, under the fake mode in force."""
    if isinstance(operand, Tensor):
        return torch.empty_strided(operand.shape, operand.stride(), dtype=operand.dtype, device="cuda")
    if isinstance(operand, (list, tuple)):
        return [on_fake_gpu(item) for item in operand]
    return operand


def kernels() -> list[Any]:
    """One variant of every family."""
    pytest.importorskip("triton")
    from fxcurv.kernels.triton import FAMILIES

    found = []
    for family in FAMILIES.values():
        variants = [variant for variant in family.variants() if variant.run]
        chosen = next((variant for variant in variants if variant.quick), variants[0])
        found.append(pytest.param(family.name, chosen.name, id=family.name))
    return found


def specialised(family_name: str, variant_name: str) -> tuple[Any, Any]:
    from fxcurv.kernels.triton import FAMILIES, specialise

    family = FAMILIES[family_name]
    variant = next(variant for variant in family.variants() if variant.name == variant_name)
    return specialise(family, variant.geometry), variant.operands()


def shapes(result: Any) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in (result if isinstance(result, (tuple, list)) else [result])]


def test_operands_survive_the_way_through_the_dispatcher() -> None:
    from fxcurv.kernels.triton import library

    x, y, z = torch.zeros(2), torch.ones(3), torch.zeros(())
    tensors: list[Tensor] = []
    operands = [x, [y, z], 0.5, True, "scale(x0, 0.5)", [1, 2], None, object()]
    layout = "[" + ", ".join(library._lay_out(operand, tensors) for operand in operands) + "]"
    first, (second, third), *rest = library._operands(layout, tensors)
    assert first is x and second is y and third is z
    assert rest == [0.5, True, "scale(x0, 0.5)", [1, 2], None, None]


@pytest.mark.parametrize(("family", "variant"), kernels())
def test_a_generated_kernel_is_part_of_one_graph(family: str, variant: str) -> None:
    """Dynamo takes it in without a break, as one operation of known shape and without loading or starting anything."""
    from fxcurv.kernels.triton import FAMILIES

    kernel, operands = specialised(family, variant)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def step(*given: Any) -> Any:
        result = kernel(*given)
        return [x.neg() for x in result] if isinstance(result, (tuple, list)) else result.neg()

    with FakeTensorMode():
        inputs = on_fake_gpu(operands)
        result = torch.compile(step, backend=backend, fullgraph=True)(*inputs)
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and targets.count(torch.ops.fxcurv.generated) == 1
    assert shapes(result) == shapes(FAMILIES[family].naive(*operands))


@pytest.mark.parametrize(("family", "variant"), kernels())
def test_a_generated_kernel_comes_apart_where_a_graph_is_lowered(family: str, variant: str) -> None:
    """What a backend such as Inductor sees are the Triton kernels themselves."""
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
    from torch.fx.experimental.proxy_tensor import make_fx

    from fxcurv.kernels.triton.library import trace

    kernel, operands = specialised(family, variant)
    with FakeTensorMode():
        tensors: list[Tensor] = []
        from fxcurv.kernels.triton import library

        layout = "[" + ", ".join(library._lay_out(x, tensors) for x in on_fake_gpu(operands)) + "]"
        graph = make_fx(lambda *given: trace(kernel.source.key, layout, list(given)))(*tensors).graph
    assert any(node.target is triton_kernel_wrapper_mutation for node in graph.nodes)
