"""Where a convolution reads: one axis at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Convolution(Protocol):
    """What a patch Gram needs to know of a convolution's form (see ``fxcurv.layers.conv.ConvForm``)."""

    @property
    def groups(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def bias(self) -> bool: ...
    @property
    def scale(self) -> float: ...
    @property
    def kernel(self) -> tuple[int, ...]: ...
    @property
    def stride(self) -> tuple[int, ...]: ...
    @property
    def dilation(self) -> tuple[int, ...]: ...
    @property
    def pads(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def mode(self) -> str: ...


@dataclass(frozen=True)
class Axis:
    """One spatial axis with zeros around it: output q reads pixel ``q * stride + tap * dilation - low``.

    size: pixels. kernel: taps. low, high: zeros before and after.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    low: int
    high: int

    @property
    def reach(self) -> int:
        """Distance between the first and the last tap."""
        return self.dilation * (self.kernel - 1)

    @property
    def outputs(self) -> int:
        """Output positions."""
        return max(0, (self.size + self.low + self.high - self.reach - 1) // self.stride + 1)


def axes_of(form: Convolution, sizes: tuple[int, ...], padded: bool = False) -> tuple[Axis, ...]:
    """The axes of a convolution of an image of ``sizes``; padded: its border is already part of the image."""
    pads = ((0, 0),) * len(sizes) if padded else form.pads
    parts = zip(sizes, form.kernel, form.stride, form.dilation, pads, strict=True)
    return tuple(Axis(size, kernel, stride, dilation, *pad) for size, kernel, stride, dilation, pad in parts)
