"""LocoProp-S: every layer is fitted to a target of its own by the squared loss."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.errors import FxcurvError
from fxcurv.methods.method import Method
from fxcurv.methods.parts.local import LocalProblems, local_method
from fxcurv.methods.registry import published

SOLVES = ("iterate", "closed")


@published(
    "locoprop_s",
    papers=(10,),
    gamma=10.0,
    inner="rmsprop",
    inner_steps=10,
    inner_lr=1e-5,
    beta1=0.999,
    beta2=0.9,
    epsilon=1e-5,
    eta=None,
    solve="iterate",
    lr=1.0,
    momentum=0.0,
)
def locoprop_s(o: SimpleNamespace) -> Method:
    """LocoProp-S: one backward pass gives every layer a target, to which it is fitted for several cheap steps.

    The target of a product s_i = W a_i is s_i - gamma dL/ds_i, L the mean loss; with inputs and targets frozen each
    layer goes, on its own, inner_steps steps of a first-order method down its local loss
    sum_i |W a_i - target_i|^2 / 2 + |W - W_t|^2 / (2 eta), whose gradient at W = W_t - D is
    gamma V - D (H + I/eta) with V the layer's gradient and H = sum_i a_i a_i^T. The direction is D = W_t - W: SGD
    with lr=1 and no momentum, the defaults, makes W the local solution; a smaller lr goes part of the way.

    gamma: step of the targets, on the gradient of the mean loss (gamma/N on that of one of N terms). inner: "rmsprop"
    (rate inside the momentum, second moment from 1), "sgd", "momentum", "nesterov", "adam", "adagrad"; its slots go on
    from batch to batch. inner_lr: base rate, times max(1 - t/inner_steps, 0.25) in step t = 0, 1, ...; the authors warm
    it up and let it decay: set ``model.hyper["inner_lr"]``. beta1, beta2, epsilon: of the inner method (momentum, decay
    of the second moment). eta: proximal weight, None for none. solve: "iterate", or "closed" for the exact minimum
    D = gamma V (H + I/eta)^-1, which is FOOF's direction with its damping times the number of rows 1/eta.

    Rows are examples and positions, of a convolution its patches; norm layers and embeddings have local problems as
    well. Needs the batch's inputs and gradient alone, so ``loss.backward()`` is right. A parameter that no layer covers
    keeps its gradient: give it a learning rate of its own.

    Cost: the Gram of the inputs and inner_steps products of d_out d_in^2, no inverse; memory that of Adam (two slots;
    none for "sgd"). Choose it over sgd and adam where layers are badly conditioned and the batch is large; over foof to
    avoid the inverse, or with "closed" to have it without an average over batches.

    Source: Amid, Anil & Warmuth 2022, sections 3-4; all defaults are those of the authors' notebook (batches of 1000).
    Its weight decay of 1e-5 is left to the optimizer. Going by H instead of the rows is ours, and exact.
    """
    if o.solve not in SOLVES:
        raise FxcurvError(f"solve='{o.solve}' is unknown; choose one of {', '.join(SOLVES)}.")
    scope = LocalProblems(inner=o.inner, steps=int(o.inner_steps), closed=o.solve == "closed")
    return local_method("locoprop_s", o, scope)
