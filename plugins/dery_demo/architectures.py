"""The demo donors' architectures: timm's own classes with small settings for 32 x 32 images.

Every constructor takes the number of classes and the input size and builds with random weights, on
whatever default device is current (``meta`` included). Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Size = tuple[int, int]
Constructor = Callable[[int, Size], "nn.Module"]


def resnet(num_classes: int, _image_size: Size) -> nn.Module:
    """ResNet with basic blocks; the stem keeps 16 x 16, so that four stages end at 2 x 2."""
    from timm.models.resnet import BasicBlock, ResNet
    from torch import nn

    block: Any = BasicBlock  # timm annotates the class as if it were an instance
    model = ResNet(
        block,
        layers=(1, 2, 3, 2),
        channels=(16, 32, 64, 128),
        stem_type="deep",
        stem_width=8,
        num_classes=num_classes,
    )
    model.add_module("maxpool", nn.Identity())
    return model


def resnext(num_classes: int, _image_size: Size) -> nn.Module:
    """ResNeXt: bottlenecks with eight groups; grids 8, 4, 2, 2."""
    from timm.models.resnet import Bottleneck, ResNet

    block: Any = Bottleneck  # as above
    return ResNet(
        block,
        layers=(2, 2, 3, 2),
        channels=(16, 32, 48, 72),
        cardinality=8,
        base_width=11,
        stem_type="deep",
        stem_width=12,
        output_stride=16,
        num_classes=num_classes,
    )


def regnet(num_classes: int, _image_size: Size) -> nn.Module:
    """RegNetY with squeeze-and-excitation; grids 8, 4, 2, 2."""
    from timm.models.regnet import RegNet, RegNetCfg

    cfg = RegNetCfg(w0=40, wa=36.0, wm=2.1, depth=11, group_size=16, se_ratio=0.25, stem_width=24)
    return RegNet(cfg, output_stride=16, num_classes=num_classes)


def _decode(stages: list[list[str]]) -> Any:
    from timm.models import _efficientnet_builder

    decode: Any = _efficientnet_builder.decode_arch_def  # timm leaves it untyped
    return decode(stages)


def mobilenetv3(num_classes: int, _image_size: Size) -> nn.Module:
    """MobileNetV3: depthwise bottlenecks, squeeze-and-excitation, hard swish; grids 16, 8, 4."""
    from timm.models.mobilenetv3 import MobileNetV3
    from torch import nn

    stages = [
        ["ds_r1_k3_s1_e1_c16"],
        ["ir_r2_k3_s2_e3_c24"],
        ["ir_r3_k3_s2_e3_c48_se0.25"],
        ["ir_r2_k3_s1_e3_c72_se0.25"],
        ["cn_r1_k1_s1_c192"],
    ]
    return MobileNetV3(
        _decode(stages),
        num_features=192,
        act_layer=nn.Hardswish,
        num_classes=num_classes,
    )


def efficientnet(num_classes: int, _image_size: Size) -> nn.Module:
    """EfficientNetV2: fused bottlenecks early, depthwise late; grids 8, 4, 2."""
    from timm.models.efficientnet import EfficientNet
    from torch import nn

    stages = [
        ["er_r1_k3_s2_e2_c24"],
        ["er_r2_k3_s2_e3_c48"],
        ["ir_r3_k3_s1_e4_c80_se0.25"],
        ["ir_r4_k3_s2_e4_c184_se0.25"],
    ]
    return EfficientNet(
        _decode(stages),
        stem_size=16,
        num_features=448,
        act_layer=nn.SiLU,
        num_classes=num_classes,
    )


def convnext(num_classes: int, _image_size: Size) -> nn.Module:
    """ConvNeXt with 4 x 4 patches; grids 8, 4, 2, 2."""
    from timm.models.convnext import ConvNeXt
    from torch import nn

    model = ConvNeXt(
        depths=(2, 2, 3, 2),
        dims=(40, 80, 112, 144),
        kernel_sizes=(5, 3, 3, 3),
        ls_init_value=None,
        num_classes=num_classes,
    )
    # instead of a third halving; timm's output_stride=16 pads by image size, which fx cannot trace
    model.get_submodule("stages.3.downsample").add_module("1", nn.Conv2d(112, 144, 1))
    return model


def _vit(
    num_classes: int, image_size: Size, *, dim: int, depth: int, heads: int, reg: int, cls: bool
) -> nn.Module:
    from timm.layers.hybrid_embed import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import ConvStem

    stem = ConvStem(channels=(dim // 4, dim // 2, dim))
    return VisionTransformer(
        img_size=image_size,
        patch_size=1,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=3.0,
        class_token=cls,
        reg_tokens=reg,
        global_pool="token" if cls else "avg",
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
        num_classes=num_classes,
    )


def vit_cls(num_classes: int, image_size: Size) -> nn.Module:
    """Vision transformer with a class token and two register tokens on a 4 x 4 grid."""
    return _vit(num_classes, image_size, dim=72, depth=8, heads=4, reg=2, cls=True)


def vit_avg(num_classes: int, image_size: Size) -> nn.Module:
    """Vision transformer with average pooling: no prefix tokens, a 4 x 4 grid."""
    return _vit(num_classes, image_size, dim=96, depth=6, heads=4, reg=0, cls=False)


def swin(num_classes: int, image_size: Size) -> nn.Module:
    """Swin transformer, channels last; grids 8, 4, 2."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=image_size,
        patch_size=4,
        embed_dim=40,
        depths=(2, 5, 2),
        num_heads=(2, 4, 8),
        window_size=4,
        drop_path_rate=0.0,
        num_classes=num_classes,
    )
