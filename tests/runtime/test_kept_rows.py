"""``weight_gradients=False``: the same steps in another order of products, and no weight gradient in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxcurv
from fxcurv.errors import FxcurvError


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(n, 20, generator=draw, dtype=torch.float64), torch.randint(4, (n,), generator=draw)


class Net(nn.Module):
    """Wide layers of every spelling that can be kept, with a norm between them, and a narrow head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.norm, self.b = nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 40, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(25, 40) / 6), nn.Parameter(torch.zeros(25))
        self.c, self.head = nn.Linear(25, 30), nn.Linear(30, 4)
        self.c.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(self.norm(torch.tanh(self.a(x)))))
        x = torch.tanh(F.linear(bias=self.bias, weight=self.weight, input=x))
        return self.head(torch.tanh(self.c(x)))


def transformed(net: nn.Module | None = None, method: str = "kfac", *, weight_gradients: bool = False, **options: Any):
    options = {"damping": 0.1, "factor_every": 2, "solve_every": 2} | options
    net = Net().double() if net is None else net
    return fxcurv.transform(
        net, method, example_inputs=batch()[:1], loss="cross_entropy", weight_gradients=weight_gradients, **options
    )


def kept(model: Any) -> list[str]:
    return list(model._engine.row_layers)


def step(model: Any, optimizer: Any, n: int = 8) -> None:
    x, y = batch(n)
    optimizer.zero_grad()
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    model.precondition_()
    optimizer.step()


def trained(steps: int = 4, n: int = 8, **options: Any) -> tuple[Any, list[Tensor]]:
    model = transformed(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    for _ in range(steps):
        step(model, optimizer, n)
    return model, [p.detach().clone() for p in model.parameters()]


def agree(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kfac", {}),
        ("kfac", {"fisher": "empirical", "kl_clip": None}),
        ("kfac", {"fisher": "ggn", "damping_scheme": "sqrt"}),
        ("kfac", {"damping_scheme": "eigenvalue"}),
        ("ekfac", {}),
        ("foof", {}),
        ("kfac", {"frontend": "export"}),
    ],
)
def test_steps_are_the_same(method: str, options: dict[str, Any]) -> None:
    model, mine = trained(method=method, **options)
    assert sorted(kept(model)) == ["a", "b", "c", "weight"]
    agree(mine, trained(method=method, weight_gradients=True, **options)[1])


@pytest.mark.parametrize("n", [1, 7, 500])
def test_any_number_of_rows_is_right(n: int) -> None:
    agree(trained(n=n)[1], trained(n=n, weight_gradients=True)[1])


def test_no_weight_gradient_between_backward_and_step() -> None:
    model = transformed()
    x, y = batch()
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    for name, p in model.named_parameters():
        wants = name not in ("a.weight", "b.weight", "weight", "c.weight") and p.requires_grad
        assert (p.grad is not None) == wants, name
    model.precondition_()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not model._engine.rows.arrived


def test_only_where_it_is_cheaper() -> None:
    wide, x = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).double(), batch(400)[0]
    many = fxcurv.transform(wide, "kfac", example_inputs=(x,), loss="cross_entropy", weight_gradients=False)
    assert kept(many) == []
    # 8 rows of 30 -> 4: 8 (16 + 31^2) steps against 4 * 31 * 35; and with a KL clip 8 * 4 * 31 more.
    for clip, expected in ((None, ["0"]), (1e-3, ["0"])):
        few = fxcurv.transform(wide, "kfac", example_inputs=(x[:8],), loss="mse", weight_gradients=False, kl_clip=clip)
        assert kept(few) == expected
    narrow = nn.Sequential(nn.Linear(20, 10)).double()
    chosen = {}
    for clip in (None, 1e-3):  # 21 * 10 * 31 = 6510 against 12 * (100 + 441) = 6492, or 2520 more
        model = fxcurv.transform(
            nn.Sequential(narrow, nn.LayerNorm(10)).double(),
            "kfac", example_inputs=(x[:12],), loss="mse", weight_gradients=False, kl_clip=clip,
        )  # fmt: skip
        chosen[clip] = kept(model)
    assert chosen == {None: ["0.0"], 1e-3: []}


@pytest.mark.parametrize("before", [0, 1])  # finished steps: in the second one no statistics are due
def test_accumulation_and_an_abandoned_step(before: int) -> None:
    def run(weight_gradients: bool) -> list[Tensor]:
        model = transformed(weight_gradients=weight_gradients)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(before):
            step(model, optimizer)
        x, y = batch(12)
        for part in (slice(0, 5), slice(5, 12)):  # given up
            out = model(x[part])
            model.backward(F.cross_entropy(out, y[part]), out)
        optimizer.zero_grad()
        for part in (slice(0, 8), slice(8, 12)):
            out = model(x[part])
            model.backward(F.cross_entropy(out, y[part]) * len(y[part]) / 12, out)
        model.precondition_()
        optimizer.step()
        return list(model.parameters())

    agree(run(False), run(True))


def test_a_summed_loss() -> None:
    def run(weight_gradients: bool) -> list[Tensor]:
        loss = nn.CrossEntropyLoss(reduction="sum")
        options = {"example_inputs": batch()[:1], "loss": loss, "weight_gradients": weight_gradients}
        model = fxcurv.transform(Net().double(), "kfac", damping=0.1, **options)
        x, y = batch()
        out = model(x)
        model.backward(loss(out, y), out)
        model.precondition_()
        return [p.grad for p in model.parameters() if p.grad is not None]

    agree(run(False), run(True))


def test_gradients_by_other_paths_count() -> None:
    def run(weight_gradients: bool) -> list[Tensor]:
        model = transformed(weight_gradients=weight_gradients)
        x, y = batch()
        out = model(x)
        loss = F.cross_entropy(out, y) + 0.1 * sum((p**2).sum() for p in model.parameters())
        model.backward(loss, out)
        model.eval()
        F.cross_entropy(model(x.sin()), y).backward()  # the plain module, with weight gradients
        model.precondition_()
        return [p.grad for p in model.parameters() if p.grad is not None]

    agree(run(False), run(True))


@pytest.mark.parametrize("where", ["x", "statistics"])
def test_a_bad_step_leaves_the_plain_gradient(where: str) -> None:
    model = transformed(solve_every=1, factor_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step(model, optimizer)
    reference = [p.detach().clone() for p in model.parameters()]
    x, y = batch()
    optimizer.zero_grad()
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    key = next(key for key in model._engine.statistics.sums if "gram(a.a)" in key)
    model._engine.statistics.sums[key].fill_(float("nan"))
    with pytest.warns(fxcurv.errors.FxcurvWarning, match="plain gradient"):
        info = model.precondition_()
    assert "a" in info.fallback
    plain = Net().double()
    with torch.no_grad():
        for p, value in zip(plain.parameters(), reference, strict=True):
            p.copy_(value)
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close(model.a.weight.grad, plain.a.weight.grad)
    torch.testing.assert_close(model.a.bias.grad, plain.a.bias.grad)


def test_an_input_changed_in_place_is_an_error() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.wide = nn.Linear(20, 30), nn.Linear(30, 30)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.wide(x)
            x.add_(1.0)
            return (x + y)[:, :4]

    model = transformed(Careless().double(), proofs=())
    assert "wide" in kept(model)
    x, y = batch()
    out = model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model.backward(F.cross_entropy(out, y), out)


def test_activation_checkpointing() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x))
            x = checkpoint(lambda h: torch.tanh(self.b(self.norm(h))), x, use_reentrant=False)
            return self.head(torch.tanh(self.c(torch.tanh(F.linear(x, self.weight, self.bias)))))

    def run(weight_gradients: bool) -> list[Tensor]:
        model = transformed(Checkpointed().double(), weight_gradients=weight_gradients)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            step(model, optimizer)
        return list(model.parameters())

    agree(run(False), run(True))


def test_torch_compile_has_weight_gradients() -> None:
    def run(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = transformed(fisher="empirical")
        forward, (x, y) = wrap(model), batch()
        F.cross_entropy(forward(x), y).backward()
        assert (model.a.weight.grad is None) == (forward is model)
        model.precondition_()
        return [p.grad for p in model.parameters() if p.grad is not None]

    agree(run(lambda m: torch.compile(m, backend="aot_eager")), run(lambda m: m))


def test_an_optimizer_and_a_saved_state() -> None:
    def run(weight_gradients: bool) -> list[Tensor]:
        model = transformed(weight_gradients=weight_gradients)
        optimizer = fxcurv.optimizer(model, lr=0.05, momentum=0.9)
        for i in range(4):
            if i == 2:
                states = model.state_dict(), optimizer.state_dict()
                model = transformed(weight_gradients=weight_gradients)
                optimizer = fxcurv.optimizer(model, lr=0.05, momentum=0.9)
                model.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
            x, y = batch()
            optimizer.zero_grad()
            out = model(x)
            model.backward(F.cross_entropy(out, y), out)
            optimizer.step()
        return list(model.parameters())

    agree(run(False), run(True))


def test_refusals() -> None:
    with pytest.raises(FxcurvError, match="pass example_inputs"):
        fxcurv.transform(Net(), "kfac", weight_gradients=False)
    model = transformed()
    x, y = batch()
    out = model(x)
    model.backward(F.cross_entropy(out, y), out)
    with pytest.raises(FxcurvError, match="GradScaler"):
        model.precondition_(torch.amp.GradScaler("cpu"))


def test_switched_off_by_name() -> None:
    assert kept(transformed(disable=("order",))) == []
    for one in (nn.Linear(20, 20, bias=False), nn.Sequential(nn.Linear(20, 20, bias=False))):
        model = transformed(one.double())
        assert len(kept(model)) < len(list(model.parameters())), "one gradient says when gradients are zeroed"


def test_hooks_that_come_later_still_run() -> None:
    model, calls = transformed(), []
    model.a.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step(model, optimizer)
    assert calls == [torch.Size([8, 30])]
