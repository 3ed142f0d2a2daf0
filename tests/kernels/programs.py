"""A small model with every family of layers, transformed for a method, for tests of what slices ask of a device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxcurv
from fxcurv.passes.lower import Lowered, Slice
from fxcurv.runtime.module import CurvatureModule


class Everything(nn.Module):
    """Convolution, batch and layer norm, linear layers, embedding and an LSTM, all small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch_norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.tokens, self.lstm = nn.Embedding(7, 5), nn.LSTM(5, 4, batch_first=True)
        self.norm, self.hidden, self.head = nn.LayerNorm(16), nn.Linear(16, 6, bias=False), nn.Linear(6, 3)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        seen = torch.relu(self.batch_norm(self.conv(images))).mean((2,)).flatten(1)
        read = self.lstm(self.tokens(words))[0][:, -1]
        return self.head(torch.tanh(self.hidden(self.norm(torch.cat([seen, read], 1)))))


def everything(method: str, backend: str = "auto", **options: object) -> CurvatureModule:
    """:class:`Everything` transformed."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 2, 4, 4), torch.randint(0, 7, (4, 3))
    net = Everything()
    return fxcurv.transform(net, method, example_inputs=inputs, loss="cross_entropy", backend=backend, **options)


def slices(lowered: Lowered) -> list[Slice]:
    """The slice that a step runs, for every set of cadences that it finds due, outermost last."""
    sets = [frozenset[str](), frozenset({"statistics"}), frozenset(lowered.program.cadences)]
    return [lowered.slice(due, bundled=True) for due in dict.fromkeys(sets)]
