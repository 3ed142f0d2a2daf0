"""The kernel matrix of rows is the Gram matrix of per-example gradients, formed one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxcurv.errors import FxcurvError
from fxcurv.ir.op import OPS
from fxcurv.ir.types import Psd, Rows

SHAPES = [(4, 1, 1, 3, 2), (3, 5, 1, 2, 4), (2, 3, 3, 2, 2), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize(("b", "s", "groups", "i", "o"), SHAPES)
def test_inner_products_of_example_gradients(b: int, s: int, groups: int, i: int, o: int) -> None:
    a, g = torch.randn(b, s, groups, i, dtype=torch.float64), torch.randn(b, s, groups, o, dtype=torch.float64)
    found = OPS["row_kernel"](a, g).reshape(groups, b, b)
    for group in range(groups):
        gradients = [sum(torch.outer(g[m, t, group], a[m, t, group]) for t in range(s)).flatten() for m in range(b)]
        for m in range(b):
            for n in range(b):
                torch.testing.assert_close(found[group, m, n], gradients[m] @ gradients[n])


def test_autograd_agrees_for_a_shared_weight() -> None:
    """A linear layer at three positions: rows of a and g are those of the forward and backward pass."""
    layer = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    x, probe = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)

    def gradient(n: int) -> Tensor:
        return torch.autograd.grad((layer(x[n]).sin() * probe[n]).sum(), layer.weight)[0].flatten()

    jacobian = torch.stack([gradient(n) for n in range(5)])
    with torch.no_grad():
        g = layer(x).cos() * probe
    torch.testing.assert_close(OPS["row_kernel"](x.unsqueeze(2), g.unsqueeze(2)), jacobian @ jacobian.mT)


def test_examples_of_unknown_number_have_a_square_of_unknown_size() -> None:
    infer = OPS["row_kernel"].infer
    assert infer(Rows((None, None, 1, 5)), Rows((None, None, 1, 3))) == Psd((None, None))
    assert infer(Rows((7, None, 2, 5)), Rows((7, None, 2, 3), torch.float64)) == Psd((2, 7, 7), torch.float64)
    with pytest.raises(FxcurvError, match="'g' of op 'row_kernel'"):
        infer(Rows((7, None, 2, 5)), Rows((6, None, 2, 3)))
