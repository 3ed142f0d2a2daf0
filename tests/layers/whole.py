"""The exposed graph of a recurrent network beside torch's own modules, for the tests of networks, cells and packing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxcurv.capture import Call, Runner, capture
from fxcurv.layers.detect import detect
from fxcurv.layers.layer import Detection

NETS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


class Net(nn.Module):
    """A recurrent network; all that it returns."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = NETS[kind](3, 4, **options)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        y, states = self.rnn(x, hx)
        return (y, states[0], states[1]) if isinstance(self.rnn, nn.LSTM) else (y, states)


def covered(model: nn.Module, detection: Detection) -> float:
    """Share of the parameters' elements."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes[name] for layer in detection.layers for name in layer.params) / sum(sizes.values())


def assert_same(model: nn.Module, args: tuple[Any, ...], frontend: str = "symbolic") -> Detection:
    """Values and layouts of the outputs and all gradients of the exposed graph are the model's own, draws included."""
    leaves = tree_leaves(args)
    trained = [leaf.requires_grad_() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    call = Call.of(model, args)
    captured = capture(model, call, frontend)
    detection = detect(captured, model)
    assert not detection.uncovered
    assert covered(model, detection) == 1.0
    wanted = [*trained, *model.parameters()]
    torch.manual_seed(3)
    expected = tree_leaves(model(*args))
    torch.manual_seed(3)
    found = tree_leaves(Runner(captured)(model, *call.leaves))
    pairs = [(e, f) for e, f in zip(expected, found, strict=True) if isinstance(e, Tensor)]
    columns = [torch.randn_like(e) for e, _ in pairs if e.requires_grad]
    gradients = []
    for outputs in zip(*pairs, strict=True):
        kept = [output for output in outputs if output.requires_grad]
        gradients.append(torch.autograd.grad(kept, wanted, columns))
    for e, f in pairs:
        assert e.stride() == f.stride()
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    for e, f in zip(*gradients, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)
    return detection
