"""Spellings of batch and instance norms: normalisations of channels with running statistics or those of the data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn

from fxcurv.layers.norm import channels_of, first_result, norm_match, operands_of
from fxcurv.layers.spelling import Match, Site, spelling
from fxcurv.layers.view import Refused

aten = torch.ops.aten


def _module_statistics(at: Site, running: bool) -> tuple[fx.Node, ...]:
    """Nodes of the module's running statistics where it normalises with them."""
    names = [f"{at.node.target}.{name}" for name in ("running_mean", "running_var")] if running else []
    return tuple(at.attribute(name) for name in names)


@spelling(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_module(at: Site, input: Any) -> Match:
    module = at.module
    running = not module.training and module.running_mean is not None
    fields: dict[str, Any] = {"kind": "batch_norm", "eps": module.eps, "running": running}
    operands = (at.own("weight"), at.own("bias"))
    return norm_match(at, input, (module.num_features,), *operands, aux=_module_statistics(at, running), **fields)


@spelling(nn.SyncBatchNorm)
def _synchronised(at: Site, input: Any) -> Match:
    if at.module.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise Refused("belongs to a SyncBatchNorm, which normalises over the batches of several processes")
    return _batch_module(at, input)


@spelling(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_module(at: Site, input: Any) -> Match:
    module = at.module
    running = not module.training and module.track_running_stats
    fields: dict[str, Any] = {"kind": "instance_norm", "eps": module.eps, "running": running}
    operands, rank = (at.own("weight"), at.own("bias")), module._get_no_batch_dim()
    aux = _module_statistics(at, running)
    return norm_match(at, input, (module.num_features,), *operands, aux=aux, rank=rank, **fields)


def _channelwise(
    at: Site,
    x: Any,
    statistics: tuple[Any, ...],
    weight: Any,
    bias: Any,
    own: Any,
    eps: float,
    kind: str = "batch_norm",
    y: fx.Node | None = None,
) -> Match:
    """A batch or instance norm; ``own``: whether it normalises with the statistics of its data."""
    if not isinstance(own, bool):
        raise Refused("is used by a normalisation whose mode the graph computes")
    channels = channels_of(at, weight, bias)
    fields: dict[str, Any] = {"kind": kind, "eps": eps, "running": not own}
    aux = () if own else statistics
    return norm_match(at, x, (channels,), *operands_of(at, weight, bias, channels), y=y, aux=aux, **fields)


@spelling(F.batch_norm)
def _batch_function(
    at: Site,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Match:
    return _channelwise(at, input, (running_mean, running_var), weight, bias, training, eps)


@spelling(F.instance_norm)
def _instance_function(
    at: Site,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: Any = True,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Match:
    return _channelwise(at, input, (running_mean, running_var), weight, bias, use_input_stats, eps, "instance_norm")


@spelling(aten.batch_norm.default)
def _batch_aten(
    at: Site, input: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: float, *_: Any
) -> Match:
    return _channelwise(at, input, (mean, var), weight, bias, training, eps)


@spelling(aten.instance_norm.default)
def _instance_aten(
    at: Site, input: Any, weight: Any, bias: Any, mean: Any, var: Any, own: Any, momentum: Any, eps: float, *_: Any
) -> Match:
    return _channelwise(at, input, (mean, var), weight, bias, own, eps, "instance_norm")


@spelling(torch.native_batch_norm, aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
@spelling(aten._native_batch_norm_legit_functional.default)
def _batch_native(
    at: Site, input: Any, weight: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: float
) -> Match:
    return _channelwise(at, input, (mean, var), weight, bias, training, eps, y=first_result(at))


@spelling(aten._native_batch_norm_legit.no_stats)
def _batch_without_statistics(
    at: Site, input: Any, weight: Any, bias: Any, training: Any, momentum: Any, eps: float
) -> Match:
    return _channelwise(at, input, (), weight, bias, True, eps, y=first_result(at))


@spelling(aten._native_batch_norm_legit_no_training.default)
def _batch_inference(
    at: Site, input: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: Any, eps: float
) -> Match:
    return _channelwise(at, input, (mean, var), weight, bias, False, eps, y=first_result(at))
