"""Methods that read gradients alone: SGD, Adam and Shampoo against torch and dense recomputation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcurv
from tests.methods.nets import convnet, mlp
from tests.methods.oracle import step, transform

pytestmark = pytest.mark.usefixtures("float64")


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8) -> list[Tensor]:
    """Parameters after every step of a fixed stream of batches."""
    generator = torch.Generator().manual_seed(1)
    path = []
    for _ in range(steps):
        x = torch.randn(4, 2, 5, 5, generator=generator)
        y = torch.randint(0, 3, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return path


def twins() -> tuple[nn.Module, nn.Module]:
    a, b = convnet(), convnet()
    b.load_state_dict(a.state_dict())
    return a, b


def assert_same_path(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert (ours[-1] - ours[0]).norm() > 1e-3


@pytest.mark.parametrize("momentum, decay", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
def test_sgd_is_torch_sgd(momentum: float, decay: float) -> None:
    """Decay is decoupled, so with it the reference is a decay by hand followed by torch's step."""
    ours, theirs = twins()
    model = fxcurv.transform(ours, "sgd")
    reference = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=momentum)
    if decay:

        def shrink(*_: object) -> None:
            with torch.no_grad():
                for p in theirs.parameters():
                    p.mul_(1 - 0.05 * decay)

        reference.register_step_pre_hook(shrink)
    mine = fxcurv.optimizer(model, lr=0.05, momentum=momentum, weight_decay=decay)
    assert_same_path(train(model, mine), train(theirs, reference))


@pytest.mark.parametrize("betas, epsilon", [((0.9, 0.999), 1e-8), ((0.8, 0.95), 1e-3)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_torch_adam(betas: tuple[float, float], epsilon: float, decay: float) -> None:
    ours, theirs = twins()
    model = fxcurv.transform(ours, "adam", beta1=betas[0], beta2=betas[1], epsilon=epsilon)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=betas, eps=epsilon, weight_decay=decay)
    assert_same_path(train(model, fxcurv.optimizer(model, lr=0.01, weight_decay=decay)), train(theirs, reference))


def test_adam_as_a_preconditioner_of_a_torch_optimizer() -> None:
    ours, theirs = twins()
    model = fxcurv.transform(ours, "adam")
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    sgd.register_step_pre_hook(lambda *_: model.precondition_() and None)
    assert_same_path(train(model, sgd), train(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3)))


def root(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0) ** power) @ vectors.T


def dense_shampoo(grams: list[Tensor], gradient: Tensor, epsilon: float) -> Tensor:
    """The direction as one dense matrix: Kronecker product of the modes' inverse roots, times vec(G)."""
    kept = [(mode, h) for mode, h in enumerate(grams) if gradient.shape[mode] > 1]
    matrix = torch.ones(1, 1)
    for mode, size in enumerate(gradient.shape):
        found = dict(kept).get(mode)
        part = torch.eye(size) if found is None else root(found + epsilon * torch.eye(size), -0.5 / len(kept))
        matrix = torch.kron(matrix, part)
    return (matrix @ gradient.flatten()).reshape(gradient.shape)


@pytest.mark.parametrize("average", ["sum", "ema"])
@pytest.mark.parametrize("every", [1, 3])
def test_shampoo_against_dense_kronecker_roots(average: str, every: int) -> None:
    net = convnet()
    model = fxcurv.transform(net, "shampoo", epsilon=1e-2, average=average, ema=0.6, solve_every=every)
    grams: dict[str, list[Tensor]] = {}
    frozen: dict[str, list[Tensor]] = {}
    for k in range(5):
        x, y = torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients = {n: p.grad.clone() for n, p in net.named_parameters()}
        model.precondition_()
        for name, g in gradients.items():
            new = [torch.tensordot(g, g, dims=([m for m in range(g.ndim) if m != mode],) * 2) for mode in range(g.ndim)]
            old = grams.get(name, [torch.zeros_like(h) for h in new])
            grams[name] = [a + b if average == "sum" else 0.6 * a + 0.4 * b for a, b in zip(old, new, strict=True)]
            if k % every == 0:
                frozen[name] = grams[name]
            torch.testing.assert_close(net.get_parameter(name).grad, dense_shampoo(frozen[name], g, 1e-2))


def test_shampoo_of_a_vector_is_full_matrix_adagrad() -> None:
    """Check (1)."""
    net = nn.Sequential(nn.Linear(3, 4))
    model = fxcurv.transform(net, "shampoo", epsilon=1e-3, solve_every=1)
    total = 1e-3 * torch.eye(4)
    for _ in range(4):
        model.zero_grad()
        (model(torch.randn(5, 3)) ** 3).mean().backward()
        g = net[0].bias.grad.clone()
        total = total + torch.outer(g, g)
        model.precondition_()
        torch.testing.assert_close(net[0].bias.grad, root(total, -0.5) @ g)


def test_first_shampoo_step_orthogonalises_the_gradient() -> None:
    """Check (2): epsilon towards 0, L^-1/4 G R^-1/4 = U V^T."""
    net, x, y = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(8, 4), torch.randn(8, 3)
    taken = step(net, "shampoo", x, lambda f: F.mse_loss(f, y), epsilon=1e-14)
    u, _, vh = torch.linalg.svd(taken.gradient["0.weight"], full_matrices=False)
    torch.testing.assert_close(taken.direction["0.weight"], u @ vh, rtol=1e-5, atol=1e-6)


def test_wide_modes_of_shampoo_are_diagonal() -> None:
    net, x, y = nn.Sequential(nn.Linear(5, 3, bias=False)), torch.randn(8, 5), torch.randn(8, 3)
    taken = step(net, "shampoo", x, lambda f: F.mse_loss(f, y), epsilon=1e-3, max_factor_dim=4)
    g = taken.gradient["0.weight"]
    left, right = root(g @ g.T + 1e-3 * torch.eye(3), -0.25), (g.square().sum(0) + 1e-3) ** -0.25
    torch.testing.assert_close(taken.direction["0.weight"], left @ g * right)


@pytest.mark.parametrize("method", ["sgd", "adam", "shampoo", "foof", "diag", "kfac", "ekfac", "adahessian"])
def test_every_method_trains_with_its_defaults(method: str) -> None:
    net, x, y = mlp(4, 8, 3), torch.randn(32, 4), torch.randint(0, 3, (32,))
    model = fxcurv.transform(net, method, example_inputs=(x,), loss="cross_entropy", proofs=False)
    rate = {"adam": 0.02, "foof": 0.1, "adahessian": 0.15, "shampoo": 0.05}.get(method, 0.1)
    opt = fxcurv.optimizer(model, lr=rate)
    losses = []
    for _ in range(40):
        opt.zero_grad()
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        model.backward(loss, outputs)
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_transform_is_lazy_about_capture_for_gradient_methods() -> None:
    """A forward that no front-end traces is no obstacle to a method that reads gradients only."""

    class Branchy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if float(x.sum()) > 0 else -self.fc(x)

    model = transform(Branchy(), "shampoo", torch.ones(3, 2))
    model(torch.ones(3, 2)).sum().backward()
    assert model.precondition_().step == 0
