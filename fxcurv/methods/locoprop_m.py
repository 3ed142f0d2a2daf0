"""LocoProp-M: every layer is fitted to a target of its own by the matching loss of its activation."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.locoprop_s import locoprop_s
from fxcurv.methods.method import Method
from fxcurv.methods.parts.local import LocalProblems, local_method
from fxcurv.methods.registry import published

DEFAULTS = {k: v for k, v in locoprop_s.defaults.items() if k not in ("solve",)}


@published("locoprop_m", papers=(10,), **DEFAULTS)
def locoprop_m(o: SimpleNamespace) -> Method:
    """LocoProp-M: LocoProp-S with targets behind the activation and the convex loss that matches it.

    With f the activation behind a product s_i = W a_i and F its integral, grad F = f, the target is
    y_i = f(s_i) - gamma dL/ds_i and the local loss sum_i F(W a_i) - y_i . (W a_i) + |W - W_t|^2 / (2 eta): the Bregman
    divergence of F but for a constant, convex in W. Its gradient at W = W_t - D is
    gamma V + sum_i (f((W_t - D) a_i) - f(W_t a_i)) a_i^T - D/eta, V the layer's gradient. F is log cosh for tanh,
    softplus for the sigmoid, relu^2/2 for the ReLU, log sum exp for the softmax (cross-entropy to the target). First
    step and scale are those of "locoprop_s", and so are all hyper-parameters (there is no solve).

    f is the one function that the layer's output goes through (tanh, sigmoid, relu, leaky_relu, softplus; none: the
    identity, which is locoprop_s). At the model's output it is the loss's own, softmax for cross-entropy and the
    sigmoid for binary cross-entropy, if loss= is given. Anything else (a sum, a pooling, another function) is fitted by
    the squared loss, and a warning names these layers.

    Cost: the input rows of the batch are kept, and a step of the inner method takes two products with them,
    4 n d_in d_out for n rows. Choose it over locoprop_s where activations saturate: a squared loss moves a product far
    where its activation no longer changes.

    Source: Amid, Anil & Warmuth 2022, sections 3-5; all defaults are those of the authors' notebook.
    """
    return local_method("locoprop_m", o, LocalProblems(True, o.inner, int(o.inner_steps)))
