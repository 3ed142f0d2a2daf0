"""Sampled sources are unbiased for the exact Gauss-Newton matrix, at the Monte-Carlo rate.

One datum is copied many times over: every copy draws its own labels, and the copies' mean is the estimate.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.nets import Attention, mlp
from tests.methods.oracle import as_function, ggn, jacobian, relative, transform

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 60
LossFn = Callable[[Tensor], Tensor]


def token_loss(y: Tensor) -> LossFn:
    return lambda f: F.cross_entropy(f, y.expand(f.shape[0], -1) if f.ndim == 3 else y.repeat(f.shape[0] // y.numel()))


def cases() -> dict[str, tuple[nn.Module, Tensor, str, LossFn, tuple[str, ...]]]:
    torch.manual_seed(3)
    y, tokens = torch.randint(0, 3, (4,)), torch.randn(1, 4, 3)
    numbers = torch.randn(1, 2)
    return {
        "rows": (
            mlp(3, 4, 3),
            torch.randn(1, 3),
            "cross_entropy",
            lambda f: F.cross_entropy(f, y[:1].expand(len(f))),
            ("0", "2"),
        ),
        "binary": (
            mlp(3, 4, 2),
            torch.randn(1, 3),
            "bce",
            lambda f: F.binary_cross_entropy_with_logits(f, numbers.sigmoid().expand_as(f)),
            ("0",),
        ),
        "squares": (mlp(3, 4, 2), torch.randn(1, 3), "mse", lambda f: F.mse_loss(f, numbers.expand_as(f)), ("0",)),
        "attention": (Attention(), tokens, "cross_entropy", token_loss(y), ("q", "k", "v", "head")),
        "attention flattened": (Attention(flat=True), tokens, "cross_entropy", token_loss(y), ("q", "v")),
    }


def estimates(
    net: nn.Module, x: Tensor, loss: str, user: LossFn, names: tuple[str, ...], copies: int, **options: object
) -> Tensor:
    """Diagonals of the named layers' blocks, one row for each of STEPS steps."""
    batch = x.expand(copies, *x.shape[1:]).contiguous()
    model = transform(net, "diag", batch, loss=loss, **options)
    rows = []
    for _ in range(STEPS):
        model.zero_grad()
        outputs = model(batch)
        model.backward(user(outputs), outputs)
        model.precondition_()
        rows.append(torch.cat([model.factors(name)["D"].flatten() for name in names]))
    return torch.stack(rows)


@pytest.mark.parametrize("fisher", ["mc", "ggn_signs"])
@pytest.mark.parametrize("case", ["rows", "binary", "squares", "attention", "attention flattened"])
def test_converges_to_the_exact_diagonal_at_the_square_root_rate(case: str, fisher: str) -> None:
    net, x, loss, user, names = cases()[case]
    exact = torch.cat([ggn(net, name, x, user).diagonal() for name in names])
    many = estimates(net, x, loss, user, names, 64, fisher=fisher)
    if fisher == "ggn_signs" and case == "rows":  # one term an example: nothing for a sign to cancel
        torch.testing.assert_close(many, exact.expand_as(many))
        return
    few = estimates(net, x, loss, user, names, 4, fisher=fisher, seed=7)
    random = few.std(0) > 1e-9 * exact.max()  # some entries depend on one term only, and are exact with signs
    torch.testing.assert_close(many[:, ~random], exact[~random].expand(STEPS, -1))
    z = (many.mean(0) - exact)[random] / (many.std(0)[random] / STEPS**0.5)
    assert z.abs().max() < 5
    assert z.square().mean().sqrt() < 2
    rate = float((few.std(0)[random] / many.std(0)[random]).square().mean().sqrt())
    assert 2.6 < rate < 6.0  # sqrt(64 / 4), give or take the error of 60 draws with few degrees of freedom


@pytest.mark.parametrize("flat", [False, True])
def test_exact_columns_give_the_dense_diagonal_of_attention(flat: bool) -> None:
    net, x, y = Attention(flat=flat), torch.randn(3, 4, 3), torch.randint(0, 3, (3, 4))

    def user(f: Tensor) -> Tensor:
        return F.cross_entropy(f, y.flatten() if flat else y)

    model = transform(net, "diag", x, loss="cross_entropy", fisher="ggn")
    outputs = model(x)
    model.backward(user(outputs), outputs)
    model.precondition_()
    for name in ("q", "k", "v", "head"):
        torch.testing.assert_close(model.factors(name)["D"].flatten(), ggn(net, name, x, user).diagonal())


def test_columns_over_all_positions_at_once_are_wrong_for_attention() -> None:
    """What the exact source must not do: C columns, each over every token, add the cross products of tokens."""
    net, x, y = Attention(flat=True), torch.randn(1, 4, 3), torch.randint(0, 3, (4,))
    exact = ggn(net, "q", x, lambda f: F.cross_entropy(f, y)).diagonal()
    j = jacobian(net, "q", x).reshape(4, 3, -1)
    p = torch.softmax(net(x).detach(), -1)
    roots = p.sqrt()[:, None] * (torch.eye(3) - p[:, :, None])  # roots[token, :, c]: sqrt(p_c) (e_c - p)
    right = torch.einsum("toc,tod->tcd", roots, j).square().sum((0, 1)) / 4
    torch.testing.assert_close(right, exact)
    assert relative(torch.einsum("toc,tod->cd", roots, j).square().sum(0) / 4, exact) > 0.5


@pytest.mark.parametrize("fisher", ["mc", "ggn_signs"])
def test_samples_are_averaged(fisher: str) -> None:
    """Eight draws in one step have an eighth of the variance of one, and the same mean."""
    net, x, loss, user, names = cases()["attention"]
    exact = ggn(net, "q", x, user).diagonal()
    drawn = [estimates(net, x, loss, user, ("q",), 2, fisher=fisher, fisher_samples=n) for n in (1, 8)]
    for rows in drawn:
        z = (rows.mean(0) - exact) / (rows.std(0) / STEPS**0.5)
        assert z.abs().max() < 5
    ratio = float((drawn[0].var(0) / drawn[1].var(0)).mean())
    assert 4.5 < ratio < 14


def test_output_factor_converges_to_that_of_exact_columns() -> None:
    """G of K-FAC on a token net: mean of many draws against explicit gradients of every column at every position."""
    net, x, loss, user, _ = cases()["attention"]
    batch = x.expand(256, -1, -1).contiguous()
    model = transform(net, "kfac", batch, loss=loss, fisher="mc")
    rows = []
    for _ in range(30):
        model.zero_grad()
        outputs = model(batch)
        model.backward(user(outputs), outputs)
        model.precondition_()
        rows.append(model.factors("v")["G"])
    call, matrix = as_function(net, "v")
    values = net.v(x).detach()

    def after(v: Tensor) -> Tensor:
        scores = torch.softmax(net.q(x) @ net.k(x).transpose(1, 2) / 3**0.5, -1)
        return net.head(scores @ v).reshape(-1)

    j = torch.func.jacrev(after)(values).detach().reshape(4, 3, 4, 3)  # token, class, position, feature
    p = torch.softmax(after(values).reshape(4, 3), -1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    exact = torch.einsum("tasi,tab,tbsj->ij", j, hessian, j) / 4
    drawn = torch.stack(rows)
    z = (drawn.mean(0) - exact) / (drawn.std(0) / 30**0.5)
    assert z.abs().max() < 5
    assert relative(drawn.mean(0), exact) < 0.05
