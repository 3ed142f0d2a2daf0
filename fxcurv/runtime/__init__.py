"""The run time: transformed modules, their steps, and optimizers."""

from fxcurv.runtime.info import StepInfo
from fxcurv.runtime.module import CurvatureModule
from fxcurv.runtime.optimizer import CurvatureOptimizer, optimizer
from fxcurv.runtime.transform import transform

__all__ = ["CurvatureModule", "CurvatureOptimizer", "StepInfo", "optimizer", "transform"]
