"""torchvision: classification, segmentation, video and optical flow as they are, detection without its box sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.sample import Sample

LIBRARY = "torchvision"

# Side of the images where 64 is too small or the architecture fixes it.
_SIDE = {"inception_v3": 96, "vit_b_16": 32, "vit_b_32": 64}
_OPTIONS: dict[str, dict[str, Any]] = {
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "googlenet": {"aux_logits": True, "init_weights": False},
}  # fmt: skip
_CLASSIFICATION = (
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "squeezenet1_1", "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "regnet_x_400mf",
    "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t",
)  # fmt: skip
_SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
_DETECTION = ("resnet18_fpn", "mobilenet_v3_large_fpn", "retinanet_heads", "rpn_head", "ssd_heads")
_VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v2_s", "swin3d_t")


def names() -> tuple[str, ...]:
    """The list."""
    return _CLASSIFICATION + _SEGMENTATION + _DETECTION + _VIDEO


class _Parts(nn.Module):
    """A backbone with feature pyramid and the heads of a detector that work on its features."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Any:
        return self.head(list(self.backbone(images).values()))


def _detection(name: str) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

    if name == "mobilenet_v3_large_fpn":
        return mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6)
    if name == "ssd_heads":
        whole = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
        return _Parts(whole.backbone, whole.head)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    if name == "retinanet_heads":
        return _Parts(backbone, detection.retinanet.RetinaNetHead(backbone.out_channels, 3, 5))
    if name == "rpn_head":
        return _Parts(backbone, detection.rpn.RPNHead(backbone.out_channels, 3))
    return backbone


def _vit(side: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=side, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )


def _swin(name: str) -> Sample:
    from torchvision.models import swin_transformer as swin
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    sizes = {"embed_dim": 32, "depths": [1, 2], "num_heads": [2, 4], "num_classes": 10}
    if name.startswith("swin3d"):
        model: nn.Module = SwinTransformer3d([2, 4, 4], window_size=[4, 4, 4], **sizes)
        return Sample(model, (torch.randn(2, 3, 4, 32, 32),))
    second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if "v2" in name else {}
    model = swin.SwinTransformer([4, 4], window_size=[4, 4], **sizes, **second)
    return Sample(model, (torch.randn(2, 3, 64, 64),))


def _maxvit() -> Sample:
    from torchvision.models import MaxVit

    model = MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.1, num_classes=10)
    return Sample(model, (torch.randn(2, 3, 64, 64),))


def _video(name: str) -> Sample:
    """Clips of 4 frames of 32 x 32, or the smallest that survive the strides."""
    from torchvision import models
    from torchvision.models.video import mvit

    if name.startswith("mvit"):
        blocks = [
            mvit.MSBlockConfig(heads, 32, 32, [3, 3, 3], [3, 3, 3], [1, stride, stride], [1, 2, 2])
            for heads, stride in ((1, 1), (2, 2))
        ]
        second = name == "mvit_v2_s"
        model: nn.Module = mvit.MViT(
            (32, 32), 4, blocks, residual_pool=second, residual_with_cls_embed=False, rel_pos_embed=second,
            proj_after_attn=second, num_classes=10, stochastic_depth_prob=0.1,
        )  # fmt: skip
        return Sample(model, (torch.randn(2, 3, 4, 32, 32),))
    model = models.get_model(name, weights=None, num_classes=10)
    if name == "s3d":  # its pooling window asks for 224 x 224
        model.avgpool = nn.AdaptiveAvgPool3d(1)
        return Sample(model, (torch.randn(2, 3, 8, 64, 64),))
    return Sample(model, (torch.randn(2, 3, 4, 32, 32),))


def sample(name: str) -> Sample:
    """A listed model, or any other that ``torchvision.models.get_model`` knows, for 10 classes."""
    from torchvision import models

    if name in _DETECTION:
        return Sample(_detection(name), (torch.randn(2, 3, 64, 64),))
    if name.startswith("vit_"):
        return Sample(_vit(_SIDE.get(name, 32)), (torch.randn(2, 3, _SIDE.get(name, 32), _SIDE.get(name, 32)),))
    if name == "maxvit_t":
        return _maxvit()
    if name.startswith("swin"):
        return _swin(name)
    if name in models.list_models(models.segmentation):
        model = models.get_model(
            name, weights=None, weights_backbone=None, num_classes=5, **({} if "lraspp" in name else {"aux_loss": True})
        )
        return Sample(model, (torch.randn(2, 3, 64, 64),))
    if name in models.list_models(models.video):
        return _video(name)
    model = models.get_model(name, weights=None, num_classes=10, **_OPTIONS.get(name, {}))
    side = _SIDE.get(name, 64)
    return Sample(model, (torch.randn(2, 3, side, side),))
