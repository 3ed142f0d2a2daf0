"""Every damping scheme with every Kronecker method: its dense definition, or a refusal that names the others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.errors import FxcurvError
from fxcurv.ir.program import Builder
from fxcurv.ir.types import Psd
from fxcurv.methods.facts import Facts
from fxcurv.methods.parts.damp import PiSplit
from fxcurv.methods.parts.schemes import FACTORED, SCHEMES, SPECTRAL
from tests.methods import test_kfac_rnn as rnn
from tests.methods.nets import convnet, mlp
from tests.methods.oracle import Step, corrected, step

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:fisher='ggn' runs")]

DAMPING, FLOOR = 0.03, 1e-3
ALLOWED: dict[str, tuple[str, ...]] = {
    "kfac": tuple(SCHEMES),
    "kfac_rnn independent": tuple(SCHEMES),
    "kfac_rnn symmetric": FACTORED,
    "kfac_rnn stationary": FACTORED,
    "gnn_ng": ("pi", "sqrt", *SPECTRAL),
    "ekfac": SPECTRAL,
    "tkfac": ("sqrt", *SPECTRAL),
    "tekfac": SPECTRAL,
    "foof": SPECTRAL,
}
"""By method, and by temporal= for kfac_rnn."""


def options_of(method: str) -> dict[str, Any]:
    name, _, temporal = method.partition(" ")
    own = {"tkfac": {"conv_damping": "fixed"}, "tekfac": {"conv_damping": "fixed"}, "gnn_ng": {"ema": 0.0}}
    return {"method": name, **({"temporal": temporal} if temporal else own.get(name, {}))}


def taken(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Step:
    options = {"damping": DAMPING, "trace_floor": FLOOR, "kl_clip": None, **options}
    method = options.pop("method")
    if method != "foof":
        options.setdefault("loss", "cross_entropy")
    return step(net, method, x, lambda f: F.cross_entropy(f, y), **options)


def images(groups: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return convnet(groups), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4,))


def spectral(scheme: str, block: Tensor, damping: float = DAMPING, floor: float = FLOOR) -> Tensor:
    """The inverse of a dense block as a scheme damps it: a function of the block alone, whatever its eigenvectors."""
    values, vectors = torch.linalg.eigh(block)
    if scheme == "relative":
        damping = damping * max(float(block.trace()), floor) / len(block)
    inverse = 1 / (values + damping) if scheme != "floor" else 1 / values.clamp(min=damping)
    if scheme == "mask":
        inverse = torch.where(values > 1e-10 * values.max(), inverse, torch.zeros(()))
    return vectors @ (inverse.unsqueeze(1) * vectors.T)


def factored(scheme: str, a: Tensor, g: Tensor, repeats: float, damping: float = DAMPING) -> Tensor:
    """The same of two factors, G a sum over ``repeats`` rows of a loss term."""
    pi = {
        "pi": math.sqrt((a.trace() / len(a)) / (g.trace() / len(g))),
        "sqrt": 1.0,
        "replicated": 1 / math.sqrt(repeats),
    }[scheme]
    root = math.sqrt(damping)
    a, g = a + pi * root * torch.eye(len(a)), g + root / pi * torch.eye(len(g))
    return torch.kron(torch.linalg.inv(g), torch.linalg.inv(a))


def inverses(method: str, scheme: str, factors: dict[str, Tensor], groups: int, repeats: float, d_out: int) -> Tensor:
    """(groups, d, d) by the definition, from the factors that the model reports."""
    found = []
    for k in range(groups):
        own = {part: value[k] if groups > 1 else value for part, value in factors.items() if value.ndim}
        if method == "foof":
            inverse = spectral(scheme, own["A"])
            found.append(torch.kron(torch.eye(d_out), inverse))
        elif "S" in own:
            found.append(spectral(scheme, corrected(own)))
        else:
            scale = 1 / own["A"].trace() if method == "tkfac" else torch.ones(())
            a, g = own["A"] * scale.sqrt(), own["G"] * scale.sqrt()
            found.append(factored(scheme, a, g, repeats) if scheme in FACTORED else spectral(scheme, torch.kron(g, a)))
    return torch.stack(found)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", ALLOWED)
def test_definition_or_refusal(method: str, scheme: str, groups: int) -> None:
    net, x, y = images(groups)
    options = options_of(method)
    if scheme not in ALLOWED[method]:
        listed = ", ".join(name for name in SCHEMES if name in ALLOWED[method])
        with pytest.raises(FxcurvError, match=f"'{scheme}' has no place in this method; choose one of {listed}\\.$"):
            taken(net, x, y, **options, damping_scheme=scheme)
        return
    done = taken(net, x, y, **options, damping_scheme=scheme)
    for name, size, repeats in (("0", groups, 25.0), ("2", 1, 4.0), ("5", 1, 1.0)):
        gradient, direction = done.pair(name, size)
        inverse = inverses(options["method"], scheme, done.factors(name), size, repeats, gradient.shape[1])
        expected = torch.einsum("gxy,gy->gx", inverse, gradient.flatten(1)).reshape(gradient.shape)
        torch.testing.assert_close(direction, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scheme", FACTORED)
@pytest.mark.parametrize("temporal", ["symmetric", "stationary"])
def test_chains_are_of_damped_factors(temporal: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix of test_kfac_rnn, with C0 damped as the scheme says: 6 steps, each a loss term or all of them one."""
    net, x, y = rnn.Smoothed(), rnn.sequences(), rnn.targets()

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    done = rnn.step(net, x, user, loss="mse", fisher="ggn", temporal=temporal, damping_scheme=scheme)
    repeats = max(x.shape[0] * x.shape[1] / done.info.terms, 1.0)

    def damped(factors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        root = rnn.DAMPING**0.5
        ratio = (factors["A"].trace() / len(factors["A"])) / (factors["G"].trace() / len(factors["G"]))
        pi = {"pi": float(ratio.sqrt()), "sqrt": 1.0, "replicated": repeats**-0.5}[scheme]
        return factors["A"] + pi * root * torch.eye(len(factors["A"])), factors["G"] + root / pi * torch.eye(
            len(factors["G"])
        )

    monkeypatch.setattr(rnn, "damped", damped)
    for name in ("first", "second"):
        symmetric = temporal == "symmetric"
        V = rnn.covariances(done.factors(name), rnn.STEPS if symmetric else 600, symmetric)
        weights = [1 - d / rnn.STEPS for d in range(rnn.STEPS)] if symmetric else [1.0] * len(V)
        rnn.check_solves(rnn.summed(V, weights), done, name)


@pytest.mark.parametrize("scheme", ["pi", "replicated"])
def test_replication_is_the_averaged_split_and_pi_does_not_feel_it(scheme: str) -> None:
    """U = (1/T) (G/T + sqrt(damping/T)/pi I)^-1 V (A + pi sqrt(damping/T) I)^-1, pi = 1 or of the averaged factors."""
    net, x, y = images()
    done = taken(net, x, y, method="kfac", damping_scheme=scheme, fisher="ggn")
    plain = taken(net, x, y, method="kfac", damping_scheme="sqrt", fisher="ggn")
    for name, repeats in (("0", 25), ("2", 4), ("5", 1)):
        a, g = done.factors(name)["A"], done.factors(name)["G"] / repeats
        pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g))) if scheme == "pi" else 1.0
        root = math.sqrt(DAMPING / repeats)
        (v,), (u,) = done.pair(name)
        left = torch.linalg.solve(g + root / pi * torch.eye(len(g)), v)
        torch.testing.assert_close(u, torch.linalg.solve(a + root * pi * torch.eye(len(a)), left.T).T / repeats)
        if scheme == "replicated":
            same = (u - plain.pair(name)[1][0]).norm() < 1e-12 * u.norm()
            assert same == (repeats == 1)


def repeats_of(done: Step) -> list[float]:
    return [float(value) for key, value in done.model.state_dict().items() if key.endswith(".repeats")]


@pytest.mark.parametrize(("options", "samples"), [({}, 1), ({}, 2), ({"disable": ("sink",)}, 1)])
def test_rows_of_a_loss_term_are_counted(options: dict[str, Any], samples: int) -> None:
    net, x, y = images()
    done = taken(net, x, y, method="kfac", damping_scheme="replicated", fisher_samples=samples, **options)
    assert repeats_of(done) == [25.0, 4.0, 1.0]


def test_reduced_positions_and_losses_of_positions_repeat_nothing() -> None:
    net, x, y = images()
    done = taken(net, x, y, method="kfac", damping_scheme="replicated", sharing="reduce")
    assert repeats_of(done) == [1.0, 1.0, 1.0]
    net, x, y = nn.Sequential(nn.Conv2d(2, 3, 1)), torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4, 5, 5))
    done = taken(net, x, y, method="kfac", damping_scheme="replicated")
    assert repeats_of(done) == [1.0]


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("relative", "mask")])
def test_strong_damping_gives_the_gradient(scheme: str) -> None:
    """Sheet, Damping (a): lambda U -> V; the cross terms of factored damping vanish as 1 / sqrt(lambda)."""
    net, x, y = images()
    done = taken(net, x, y, method="kfac", damping_scheme=scheme, damping=1e16)
    for name, gradient in done.gradient.items():
        torch.testing.assert_close(done.direction[name] * 1e16, gradient, rtol=1e-6, atol=1e-9)


def test_multiples_of_the_identity_show_the_cross_term() -> None:
    """Sheet, Damping (b): with A = e_A I and G = e_G I factored damping adds 2 sqrt(damping e_A e_G) to the whole's."""
    net = nn.Sequential(nn.Linear(3, 2, bias=False))
    x, y = torch.linalg.qr(torch.randn(3, 3))[0] * 1.3, torch.randn(3, 2)

    def user(f: Tensor) -> Tensor:
        return F.mse_loss(f, y)

    for scheme, cross in (("pi", True), ("eigenvalue", False)):
        done = step(net, "kfac", x, user, loss="mse", fisher="ggn", damping=DAMPING, damping_scheme=scheme)
        a, g = done.factors("0")["A"], done.factors("0")["G"]
        torch.testing.assert_close(a, a[0, 0] * torch.eye(3))
        torch.testing.assert_close(g, g[0, 0] * torch.eye(2))
        product = float(a[0, 0] * g[0, 0])
        total = product + DAMPING + (2 * math.sqrt(DAMPING * product) if cross else 0.0)
        torch.testing.assert_close(done.direction["0.weight"] * total, done.gradient["0.weight"])


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof"])
def test_trace_floor_bounds_relative_damping(method: str) -> None:
    net, x, y = images()
    done = taken(net, x, y, method=method, damping_scheme="relative", trace_floor=1e4)
    for name in "025":
        (v,), (u,) = done.pair(name)
        factors = done.factors(name)
        size = len(factors["A"]) * (1 if method == "foof" else len(factors["G"]))
        added = DAMPING * 1e4 / size
        if method == "foof":
            expected = torch.linalg.solve(factors["A"] + added * torch.eye(len(factors["A"])), v.T).T
        else:
            block = corrected(factors) if method == "ekfac" else torch.kron(factors["G"], factors["A"])
            expected = torch.linalg.solve(block + added * torch.eye(size), v.flatten()).reshape(v.shape)
        torch.testing.assert_close(u, expected)


def test_a_mask_takes_the_null_space_out_of_the_step() -> None:
    """Four examples leave most of a layer's block empty: no step there, however small the damping."""
    net, x, y = images()
    done = taken(net, x, y, method="kfac", damping_scheme="mask", damping=1e-12)
    free = taken(net, x, y, method="kfac", damping_scheme="eigenvalue", damping=1e-12)
    block = torch.kron(done.factors("5")["G"], done.factors("5")["A"])
    values, vectors = torch.linalg.eigh(block)
    null = vectors[:, values < 1e-10 * values.max()]
    assert 0 < null.shape[1] < len(block)
    assert (null.T @ done.pair("5")[1].flatten()).norm() < 1e-6 * done.pair("5")[1].norm()
    assert done.pair("5")[1].isfinite().all() and free.pair("5")[1].isfinite().all()


@pytest.mark.parametrize(
    ("method", "scheme"), [(name, scheme) for name in ("kfac", "ekfac", "tkfac", "foof") for scheme in ALLOWED[name]]
)
def test_wide_factors_are_damped_as_diagonals(method: str, scheme: str) -> None:
    net, x, y = images()
    done = taken(net, x, y, **options_of(method), damping_scheme=scheme, max_factor_dim=4)
    factors = {part: torch.diag_embed(value) if value.ndim == 1 else value for part, value in done.factors("0").items()}
    assert not (factors["A"] - torch.diag(factors["A"].diagonal())).any()
    (v,), (u,) = done.pair("0")
    inverse = inverses(method, scheme, factors, 1, 25.0, len(v))[0]
    torch.testing.assert_close(u.flatten(), inverse @ v.flatten(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sizes", [(4,), (3, 2), (3, 4, 2)])
def test_k_factors_are_damped_evenly(sizes: tuple[int, ...]) -> None:
    """f_i = c_i u_i with mean diagonal 1 of u_i: the product of c^(1/k) (u_i + (damping/c)^(1/k) I), c = prod c_i."""
    draws = [torch.randn(d, d) for d in sizes]
    factors = [x @ x.T * 3.0**i for i, x in enumerate(draws)]
    b = Builder()
    nodes = {f"M{i}": b.input("state", f"M{i}", Psd((d, d), torch.float64)) for i, d in enumerate(sizes)}
    for part, node in PiSplit().split(b, Facts((), {}, torch.float64), nodes).items():
        b.give("info", part, node)
    program = b.finish()
    given = {**{f"M{i}": f for i, f in enumerate(factors)}, "damping": torch.tensor(DAMPING)}
    inputs = [given[node.meta["role"].key] for node in program.placeholders]
    shares = dict(zip(nodes, fx.Interpreter(fx.GraphModule({}, program.graph)).run(*inputs), strict=True))
    damped, expected = torch.ones(1, 1), torch.ones(1, 1)
    k, scales = len(sizes), [f.trace() / len(f) for f in factors]
    c = math.prod(float(s) for s in scales)
    for f, s, part in zip(factors, scales, nodes, strict=True):
        eye = torch.eye(len(f))
        damped = torch.kron(damped, f + shares[part] * eye)
        expected = torch.kron(expected, c ** (1 / k) * (f / s + (DAMPING / c) ** (1 / k) * eye))
    torch.testing.assert_close(damped, expected)


def test_two_factors_in_general_are_the_trace_norm_split() -> None:
    net, x, y = images()
    done = taken(net, x, y, method="kfac", damping_scheme="pi")
    a, g = done.factors("2")["A"], done.factors("2")["G"]
    pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g)))
    c_a, c_g = float(a.trace() / len(a)), float(g.trace() / len(g))
    assert c_a * math.sqrt(DAMPING / (c_a * c_g)) == pytest.approx(pi * math.sqrt(DAMPING))


@pytest.mark.parametrize("off", ["sink", "batch", "fuse", "defer", "reference"])
@pytest.mark.parametrize("scheme", ["replicated", "floor", "relative", "mask"])
def test_passes_change_nothing(scheme: str, off: str) -> None:
    torch.manual_seed(0)
    net, x, y = mlp(4, 4, 4, 4, 4, 4, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    options: dict[str, Any] = {"backend": "reference"} if off == "reference" else {"disable": (off,)}
    plain = taken(net, x, y, method="kfac", damping_scheme=scheme)
    switched = taken(net, x, y, method="kfac", damping_scheme=scheme, **options)
    for name, direction in plain.direction.items():
        torch.testing.assert_close(switched.direction[name], direction, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["kfac", "ekfac", "tkfac", "tekfac", "foof", "kfac_rnn", "gnn_ng"])
def test_unknown_scheme_is_refused(method: str) -> None:
    with pytest.raises(FxcurvError, match="'tikhonov' is unknown; choose one of"):
        fxcurv.transform(mlp(2, 2), method, loss="mse" if method != "foof" else None, damping_scheme="tikhonov")
