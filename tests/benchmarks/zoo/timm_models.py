"""timm: one small model of each family, at the smallest image size that the family takes."""

from __future__ import annotations

from typing import Any

import torch

from zoo.sample import Sample

LIBRARY = "timm"

# Name: (image side, further arguments). Families with relative positions or attention maps need theirs given.
_LIST: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}),
    "resnet26d": (64, {}),
    "resnext50_32x4d": (64, {}),
    "seresnet18": (64, {}),
    "ecaresnet26t": (64, {}),
    "skresnet18": (64, {}),
    "resnetv2_50": (64, {}),
    "resnetv2_50x1_bit": (64, {}),
    "res2net50_26w_4s": (64, {}),
    "resnest14d": (64, {}),
    "efficientnet_b0": (64, {}),
    "tf_efficientnetv2_b0": (64, {}),
    "mobilenetv3_small_100": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mnasnet_100": (64, {}),
    "ghostnet_100": (64, {}),
    "regnety_002": (64, {}),
    "regnetx_002": (64, {}),
    "repvgg_a0": (64, {}),
    "nf_resnet26": (64, {}),
    "dm_nfnet_f0": (64, {}),
    "densenet121": (64, {}),
    "dla34": (64, {}),
    "hrnet_w18_small": (64, {}),
    "inception_v3": (96, {}),
    "inception_v4": (96, {}),
    "xception41": (64, {}),
    "vovnet39a": (64, {}),
    "cspresnet50": (64, {}),
    "selecsls42": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "convmixer_768_32": (28, {}),
    "vit_tiny_patch16_224": (64, {"img_size": 64, "depth": 3}),
    "vit_relpos_small_patch16_224": (64, {"img_size": 64, "depth": 3}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 3}),
    "deit3_small_patch16_224": (64, {"img_size": 64, "depth": 3}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 3}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}),
    "beitv2_base_patch16_224": (64, {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}),
    "cait_xxs24_224": (64, {"img_size": 64, "depth": 3}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "gmixer_12_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "xcit_nano_12_p16_224": (64, {"img_size": 64, "depth": 3}),
    "coat_tiny": (64, {"img_size": 64}),
    "coatnet_nano_rw_224": (64, {"img_size": 64}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
    "levit_128s": (64, {"img_size": 64}),
    "pit_ti_224": (64, {"img_size": 64}),
    "poolformer_s12": (64, {}),
    "poolformerv2_s12": (64, {}),
    "crossvit_tiny_240": (240, {}),
    "twins_svt_small": (64, {}),
    "visformer_tiny": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "tnt_s_legacy_patch16_224": (64, {"img_size": 64}),
    "convit_tiny": (64, {"img_size": 64}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "fastvit_t8": (64, {}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "davit_tiny": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "nest_tiny": (64, {"img_size": 64}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "sequencer2d_s": (64, {"img_size": 64}),
    "inception_next_tiny": (64, {}),
    "hgnetv2_b0": (64, {}),
    "tiny_vit_5m_224": (224, {}),
    "repvit_m0_9": (64, {}),
    "starnet_s1": (64, {}),
}


def names() -> tuple[str, ...]:
    """The list, without what the installed version does not know."""
    import timm

    known = set(timm.list_models())
    return tuple(name for name in _LIST if name in known)


def sample(name: str) -> Sample:
    """A listed model, or any other of timm at the size that it is configured for, for 10 classes."""
    import timm

    side, options = _LIST.get(name, (0, {}))
    if name.startswith("convmixer"):
        return Sample(timm.models.convmixer.ConvMixer(64, 3, 7, 7, num_classes=10), (torch.randn(2, 3, side, side),))
    model = timm.create_model(name, pretrained=False, num_classes=10, **options)
    side = side or model.pretrained_cfg["input_size"][-1]
    return Sample(model, (torch.randn(2, 3, side, side),))
