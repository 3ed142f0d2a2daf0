"""Loss objects: what fxcurv has to know about the function behind ``loss``.

The curvature of a network is J^T H J with H the Hessian of the loss in the *outputs*. The objects here
know H in closed form: how to multiply with it, factor it exactly, or draw vectors whose outer product
is H on average; and how many loss terms N the user's scalar was divided by. The *sum* over terms is
their unit everywhere; division by N is left to the caller.
"""

from fxcurv.losses.actor_critic import CategoricalActorCritic, GaussianActorCritic
from fxcurv.losses.base import Loss
from fxcurv.losses.cross_entropy import CrossEntropy
from fxcurv.losses.elementwise import BCE, MSE, Gaussian
from fxcurv.losses.euclidean import Euclidean
from fxcurv.losses.resolve import LOSSES, resolve_loss
from fxcurv.losses.semi_supervised import SemiSupervised, strength

__all__ = [
    "BCE",
    "LOSSES",
    "MSE",
    "CategoricalActorCritic",
    "CrossEntropy",
    "Euclidean",
    "Gaussian",
    "GaussianActorCritic",
    "Loss",
    "SemiSupervised",
    "resolve_loss",
    "strength",
]
