"""The example model files keep the contract of ``fxcurv compile`` and ``fxcurv train``, and their main() runs."""

from __future__ import annotations

import importlib.util
import math
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcurv
from fxcurv.losses import resolve_loss

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL_FILES = ("mnist_autoencoder", "digits_cnn", "char_gpt", "recurrent_text")


def load(name: str) -> ModuleType:
    """An example, loaded from its path as the command line loads a model file."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=MODEL_FILES)
def example(request: pytest.FixtureRequest) -> ModuleType:
    return load(request.param)


def first_batches(example: Any, epoch: int, n: int = 2) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    return list(islice(example.batches(epoch), n))


def test_example_inputs_give_finite_outputs(example: Any) -> None:
    outputs = example.build_model()(*example.example_inputs)
    assert torch.isfinite(outputs).all()


def test_batches_fit_the_model_and_the_loss(example: Any) -> None:
    (inputs, targets), _ = first_batches(example, epoch=0)
    assert [x.shape[1:] for x in inputs] == [x.shape[1:] for x in example.example_inputs]
    assert [x.dtype for x in inputs] == [x.dtype for x in example.example_inputs]
    assert math.isfinite(resolve_loss(example.loss).value(example.build_model()(*inputs), targets).item())


def test_the_epoch_alone_decides_the_batches(example: Any) -> None:
    first = first_batches(example, epoch=3)
    torch.rand(7)  # the global generator must not matter
    again, other = first_batches(example, epoch=3), first_batches(example, epoch=4)
    for (inputs, targets), (inputs2, targets2) in zip(first, again, strict=True):
        torch.testing.assert_close((inputs, targets), (inputs2, targets2), rtol=0, atol=0)
    assert not torch.equal(first[0][0][0], other[0][0][0])
    assert not torch.equal(first[0][0][0], first[1][0][0])


def test_the_model_is_a_function_of_the_global_seed(example: Any) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(example.build_model().parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_symbolic_trace_serves_other_shapes(example: Any) -> None:
    model = example.build_model()
    traced = fx.symbolic_trace(model)
    (inputs, _), _ = first_batches(example, epoch=0)
    for args in (example.example_inputs, inputs):
        torch.testing.assert_close(traced(*args), model(*args), rtol=0, atol=0)


def test_evaluate_changes_nothing(example: Any) -> None:
    model = example.build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = example.evaluate(model)
    assert scores and all(math.isfinite(score) for score in scores.values())
    assert model.training and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(("method", "optimizer"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_plain_torch_trains_with_the_settings(example: Any, method: str, optimizer: type) -> None:
    """A few steps with the tuned settings lower the loss of the batches that they were taken on."""
    model = example.build_model()
    opt = optimizer(model.parameters(), **example.settings[method])
    loss = resolve_loss(example.loss)
    data = first_batches(example, epoch=0, n=6)

    def mean_loss() -> float:
        return sum(loss.value(model(*inputs), targets).item() for inputs, targets in data) / len(data)

    before = mean_loss()
    for inputs, targets in data:
        opt.zero_grad()
        loss.value(model(*inputs), targets).backward()
        opt.step()
    assert mean_loss() < 0.95 * before


@pytest.mark.parametrize("method", ["kfac", "ekfac", "foof", "diag", "shampoo", "adahessian", "hessian_free"])
def test_every_method_trains_with_its_settings(method: str) -> None:
    """With the example's settings, and its learning rate under the method's default hyper-parameters."""
    example: Any = load("digits_cnn")
    tuned = dict(example.settings[method])
    rate = tuned.pop("lr")
    for options in {tuple(tuned.items()), ()}:
        torch.manual_seed(0)
        model = fxcurv.transform(example.build_model(), method, loss=example.loss, **dict(options))
        opt = fxcurv.optimizer(model, lr=rate)
        losses: list[float] = []

        def closure(model: Any, opt: Any, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
            opt.zero_grad()
            outputs = model(*inputs)
            loss = torch.nn.functional.cross_entropy(outputs, targets)
            model.backward(loss, outputs)
            return loss

        for inputs, targets in first_batches(example, epoch=0, n=3 if method == "hessian_free" else 10):
            losses.append(float(opt.step(partial(closure, model, opt, inputs, targets)).detach()))
        assert losses[-1] < 0.97 * losses[0] and max(losses) < 2 * losses[0]


def test_the_output_bias_is_the_logit_of_the_mean_image() -> None:
    module: Any = load("mnist_autoencoder")
    model = module.build_model()
    mean = module.digits()[0].mean(dim=0)
    torch.testing.assert_close(model[-1].bias.sigmoid(), mean.clamp(1e-3, 1 - 1e-3), rtol=1e-4, atol=1e-5)
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [1000, 500, 250, 30, 250, 500, 1000, 784]


def test_the_traced_gpt_serves_shorter_texts_and_looks_back_only() -> None:
    model = load("char_gpt").build_model()
    (numbers,), _ = first_batches(load("char_gpt"), epoch=0)[0]
    traced = fx.symbolic_trace(model)
    torch.testing.assert_close(traced(numbers[:3, :11]), model(numbers)[:3, :, :11], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(fxcurv, "transform"), reason="fxcurv.transform does not exist yet")
def test_main_trains(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example.main(steps=4)
    assert len(losses) == 4 and all(math.isfinite(value) for value in losses)
    assert losses[-1] < losses[0]
    assert "held-out" in capsys.readouterr().out


def test_recurrent_kfac_beats_sgd_with_momentum_at_equal_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Both with the best of their settings; the text is made up, the network an ``nn.LSTM``."""
    module: Any = load("recurrent_text")
    module.GRID = {name: module.GRID[name] for name in ("sgd", "kfac_rnn")}
    losses = module.compare()
    assert losses["kfac_rnn"] < 0.9 * losses["sgd"]
    assert "the best of 4 settings" in capsys.readouterr().out


def test_the_made_up_text_agrees_and_closes_its_brackets() -> None:
    module: Any = load("recurrent_text")
    train, held_out = module.text()
    letters = "".join(module.CHARACTERS[i] for i in train.tolist())
    opened: list[str] = []
    for character in letters[: letters.rindex(".")]:
        if character in "([":
            opened.append(character)
        elif character in ")]":
            assert "([".index(opened.pop()) == ")]".index(character)
    assert not opened and len(held_out) == module.HELD_OUT
    for subject, right, wrong in (("cat", "sees", "see"), ("cats", "see", "sees")):
        assert f". the {subject} {right} the" in letters and f". the {subject} {wrong} the" not in letters


def test_natural_gradient_on_the_karate_club(capsys: pytest.CaptureFixture[str]) -> None:
    """As good as Adam and far better than SGD, from four labels; a lower loss than either at that accuracy."""
    pytest.importorskip("torch_geometric")
    module: Any = load("karate_club")
    assert int(module.club().known.sum()) == 4 and len(module.club().labels) == 34
    module.RATES = {"sgd": (0.3, 1.0), "adam": (0.01,), "gnn_ng": (0.03,)}
    best = module.main(starts=3)
    (_, sgd), (slow, adam), (loss, accuracy) = (best[method] for method in ("sgd", "adam", "gnn_ng"))
    assert accuracy > 0.7 and accuracy > sgd + 0.1 and accuracy > adam - 0.1 and loss < 0.2 * slow
    assert capsys.readouterr().out.count("accuracy") == 4
