"""Eva and Eva-f: K-FAC and FOOF with vectors in place of matrices."""

from __future__ import annotations

from types import SimpleNamespace

from fxcurv.methods.method import Method, Source
from fxcurv.methods.parts.rankone import MeanRows, ShermanMorrison
from fxcurv.methods.parts.rescale import rescaling
from fxcurv.methods.parts.scope import Layers
from fxcurv.methods.parts.track import EMA
from fxcurv.methods.registry import published


@published("eva", papers=(13,), damping=0.03, ema=0.05, kl_clip=1e-3, rescale="kl")
def eva(o: SimpleNamespace) -> Method:
    """Eva: the curvature of a layer is the rank-one product of its mean input and its mean output gradient.

    With abar and gbar the means of a layer's inputs (a constant 1 for the bias) and of its output gradients over
    examples and positions, the block is C = kron(gbar gbar^T, abar abar^T), and the damped inverse is in closed form:

        U = (C + damping I)^-1 V = [V - (gbar^T V abar) / (damping + |abar|^2 |gbar|^2) gbar abar^T] / damping.

    Nothing is factorised, so statistics and solve are new in every step. gbar is on the scale of the mean loss's own
    gradient, as backward leaves it (not multiplied by the batch size), and damping belongs to that scale: the same
    curvature is weaker for a larger batch. Near a minimum gbar vanishes, which the output gradients' second moment does
    not; there U is V / damping, and the length of a step is the rescaling's. ema: weight of the OLD vectors, so small
    that they belong to the last batches (the paper writes the weight 0.95 of the new ones). rescale: "kl" bounds
    lr^2 sum <U, V> by kl_clip over all layers; "match" gives all directions together the length of the gradient (the
    paper's setting for fine-tuning, its clip of 0); "graft" each layer's; "none". Norm layers get the same formula for
    every unit, a weight that is also an embedding the vectors of its use as a projection. sharing="reduce" sums output
    gradients over positions where "expand" takes their mean. Needs ``loss.backward()`` and no loss object.

    Cost: n (d_in + d_out) flops a layer for statistics, 6 d_in d_out for the direction; memory d_in + d_out, where kfac
    has d_in^2 + d_out^2 and its factorisations. Choose it over kfac where factors do not fit or a refresh is too dear,
    over sgd for its adaptive step length; leave out the layer before a large softmax (``skip=``), as the paper does.

    Source: Zhang, Shi & Li 2023 (Eva), section 3: the update, ema = 1 - 0.95 and kl_clip 1e-3. The damping of 0.03 is
    the paper's for CIFAR (1e-3 for ImageNet). Statistics come from the whole batch, where the paper allows a part of
    it.
    """
    return Method(
        name="eva",
        source=Source("empirical"),
        scope=Layers(exact_norms=False),
        estimate=MeanRows(),
        track=EMA(),
        solve=ShermanMorrison(),
        rescale=rescaling(o),
    )


@published("eva_f", papers=(13,), damping=0.03, ema=0.05, kl_clip=1e-3, rescale="kl")
def eva_f(o: SimpleNamespace) -> Method:
    """Eva-f: FOOF with the mean input in place of the inputs' second moment.

    U = V (abar abar^T + damping I)^-1 = [V - (V abar) abar^T / (damping + |abar|^2)] / damping, abar the mean input
    over examples and positions. It is foof with A := abar abar^T: the part of the gradient along the mean input, which
    all examples have in common, is damped, and the others are not. Unlike eva's its curvature does not fade near a
    minimum, and damping is on the scale of the inputs. ema, rescale, norms and tied weights as in eva. Needs nothing
    but the gradient and the layers' inputs.

    Cost: n d_in flops a layer for statistics, 6 d_in d_out for the direction; memory d_in. Choose it over foof where
    d_in^2 numbers a layer are too many, over eva where output gradients average out.

    Source: Zhang, Shi & Li 2023, section 3.3 and the authors' prototype, which drops 1/damping and divides by
    sqrt(sum <U, V>); here the clip of eva stands in its place. Defaults are eva's: published ones are not known.
    """
    return Method(
        name="eva_f",
        source=Source("empirical"),
        scope=Layers(exact_norms=False),
        estimate=MeanRows(outputs=False),
        track=EMA(),
        solve=ShermanMorrison(),
        rescale=rescaling(o),
    )
