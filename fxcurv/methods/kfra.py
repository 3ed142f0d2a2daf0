"""KFRA: K-FAC whose output factors are pushed back from layer to layer as one averaged matrix."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.kflr import DEFAULTS, with_own_length
from fxcurv.methods.method import Method
from fxcurv.methods.parts.recursion import Backwards, Recursive
from fxcurv.methods.registry import published


@published("kfra", papers=(65,), **DEFAULTS)
def kfra(o: SimpleNamespace) -> Method:
    """KFRA: the Gauss-Newton output factor of a layer from that of the next one, in one product of matrices.

    As in "kflr" the block is kron(G, A), but only the last layer's G is measured, G_L = E[H] for outputs f = s_L. Then
    G_l = (W^T G_{l+1} W) .* E[f' f'^T], W the next layer's weight without its bias, f' the slopes of the function
    between, read off the next layer's input (1 - a^2 for tanh, a (1 - a) for the sigmoid, 1[a > 0] for the ReLU). The
    expectation inside the product is the approximation: exact for linear nets, and for one nonlinear layer before an
    output whose H is the same for all examples.

    It needs layers in a row: each linear, on one axis, its output behind tanh, sigmoid, relu, leaky_relu, softplus or
    nothing read by the next layer alone, at most max_factor_dim wide. Any other layer (a convolution, a branch, another
    function) gets KFLR's G from columns, and a warning names it; norm layers keep exact unit-wise blocks. Damping, step
    and all hyper-parameters are those of "kflr".

    Cost: G of a layer takes d_out_next d_out (d_out_next + d_out) and n d_out^2 for the slopes, whatever the number of
    outputs; columns go back to the last layer only. Choose it over kflr for many outputs and plain deep networks; over
    kfac for a G without noise.

    Source: Botev, Ritter & Barber 2017, section 3; defaults as in "kflr".
    """
    if o.sharing != "expand":
        raise FxcurvError("'kfra' goes back through the rows of each layer: leave sharing='expand', or choose 'kflr'.")
    return replace(with_own_length("kfra", o), scope=Backwards(), estimate=Recursive())
