"""Both front-ends against the plain model: outputs, gradients, buffers and random draws are equal bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from fxcurv.capture import Call, Runner, capture, propagate
from fxcurv.errors import FxcurvError
from tests.capture.nets import NETS, build
from tests.capture.oracle import assert_same

SYMBOLIC = [name for name in NETS if name != "ema"]
EXPORT = [name for name in NETS if name != "quantised"]


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic(name):
    model, args, kwargs = build(name)
    assert_same(model, Runner(capture(model, Call.of(model, args, kwargs), "symbolic")), args, kwargs)


@pytest.mark.parametrize("name", EXPORT)
def test_export(name):
    model, args, kwargs = build(name)
    assert_same(model, Runner(capture(model, Call.of(model, args, kwargs), "export")), args, kwargs)


OPEN_NAMES = ("convnet", "tied", "attention", "checkpoint", "recurrent")
OPEN = [("export", name) for name in OPEN_NAMES]


@pytest.mark.parametrize(("frontend", "name"), [*OPEN, *(("symbolic", name) for name in (*OPEN_NAMES, "constants"))])
def test_new_batch_size(name, frontend):
    model, args, kwargs = build(name)
    runner = Runner(capture(model, Call.of(model, args, kwargs), frontend))
    assert_same(model, runner, tuple(torch.cat([a, a.roll(1), a[:1]]).detach() for a in args), kwargs)


def test_batch_size_that_export_fixed_is_known():
    model, (x,), _ = build("constants")  # len(x) is a plain number to export
    captured = capture(model, Call.of(model, (x,)), "export")
    assert captured.sizes == ((3, 8),) and not captured.accepts([torch.cat([x, x])])


def test_new_sequence_length():
    model, (tokens,), _ = build("tied")
    captured = capture(model, Call.of(model, (tokens,)), "symbolic")
    assert captured.accepts([tokens[:, :4]])
    assert_same(model, Runner(captured), (tokens.repeat(1, 2),), {})
    exported = capture(model, Call.of(model, (tokens,)), "export")
    assert exported.sizes == ((None, None),)
    assert_same(model, Runner(exported), (tokens[:2, :4].contiguous(),), {})
    long = tokens.repeat(1, 3)  # beyond the 16 positions that the model has
    assert not exported.accepts([long])
    with pytest.raises(FxcurvError, match=r"assumes inputs of sizes \(\(None, None\),\) .* got \(3, 21\); capture"):
        Runner(exported)(model, long)


def test_statistics_of_batch_norm_move_once_and_dropout_is_fresh():
    model, args, _ = build("dropout")
    for frontend in ("symbolic", "export"):
        twin = copy.deepcopy(model)
        runner = Runner(capture(twin, Call.of(twin, args), frontend))
        first, second = runner(twin, *args), runner(twin, *args)
        assert twin.bn1.num_batches_tracked.item() == 2
        assert not torch.equal(first, second)


UNTOUCHED_BY_EXPORT = (
    "convnet",
    "dropout",
    "tied",
    "constants",
    "modes",
    "recurrent",
    "parametrised",
    "ema",
)


@pytest.mark.parametrize(
    ("frontend", "name"), [("symbolic", name) for name in NETS] + [("export", name) for name in UNTOUCHED_BY_EXPORT]
)
def test_model_is_not_touched(name, frontend):
    model, args, kwargs = build(name)
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    try:
        captured = capture(model, Call.of(model, args, kwargs), frontend)
        propagate(captured, model, Call.of(model, args, kwargs).leaves)
    except FxcurvError:
        assert (name, frontend) == ("ema", "symbolic")
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
        for key, value in vars(module).items():
            assert value is attributes[path][key], key
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_tensors_assigned_after_capture_are_used(frontend):
    model, args, _ = build("convnet")
    runner = Runner(capture(model, Call.of(model, args), frontend))
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}, assign=True)
    assert_same(model, runner, args, {})


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_get_attr_targets_are_parameter_names(frontend):
    model, args, _ = build("functional")
    captured = capture(model, Call.of(model, args), frontend)
    targets = {node.target for node in captured.graph.nodes if node.op == "get_attr"}
    assert targets == {"w", "b", "v.0"} and not captured.constants


@pytest.mark.parametrize("frontend", ["symbolic", "export"])
def test_plain_tensor_attribute_is_read_from_the_model(frontend):
    model, args, _ = build("constants")
    runner = Runner(capture(model, Call.of(model, args), frontend))
    model.plain = torch.full_like(model.plain, 3.0)
    assert_same(model, runner, args, {})


def test_export_keeps_no_assertion_about_the_example():
    model, args, _ = build("modes")
    targets = [str(node.target) for node in capture(model, Call.of(model, args), "export").graph.nodes]
    assert any("linear" in target for target in targets) and not any("assert" in target for target in targets)


def test_export_refuses_an_autograd_function():
    model, args, _ = build("quantised")
    with pytest.raises(FxcurvError, match="cannot capture the autograd function RoundStraightThrough"):
        capture(model, Call.of(model, args), "export")


def test_checkpointing_is_noted():
    for name in ("checkpoint", "checkpoint_reentrant"):
        model, args, _ = build(name)
        for frontend in ("symbolic", "export"):
            notes = capture(model, Call.of(model, args), frontend).notes
            assert notes == ("activation checkpointing is inlined on statistic steps",)
    assert capture(*(lambda m, a, k: (m, Call.of(m, a)))(*build("mlp"))).notes == ()


def test_auto_falls_back_to_export():
    model, args, _ = build("ema")
    captured = capture(model, Call.of(model, args))
    assert captured.frontend == "export"
    assert_same(model, Runner(captured), args, {})
    with pytest.raises(FxcurvError, match="assigns a value computed from its input to self.ema"):
        capture(model, Call.default(model))
    assert capture(*(lambda m, a, k: (m, Call.of(m, a)))(*build("mlp"))).frontend == "symbolic"
