"""Which donors the demo zoo holds, and what each was trained to do."""

from __future__ import annotations

import dataclasses

from dery_demo import architectures

FASHION_CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""Fashion-MNIST's classes in label order."""

IMAGE_SIZE = (32, 32)
"""Height and width every donor was trained at."""

MEAN = 0.286
STD = 0.339
"""Mean and standard deviation of Fashion-MNIST's training pixels at 32 x 32, the same for the three
channels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoDonor:
    """One model of the demo zoo.

    Args:
        construct: Builds the architecture with random weights.
        family: The architecture's family, for people.
        task: ``classes`` (Fashion-MNIST's ten) or ``rotation`` (which of four quarter turns).
        fixed_size: The grid is part of the weights, so no other image size is accepted.
    """

    construct: architectures.Constructor
    family: str
    task: str = "classes"
    fixed_size: bool = False

    @property
    def num_classes(self) -> int:
        return len(FASHION_CLASSES) if self.task == "classes" else 4

    @property
    def task_text(self) -> str:
        """The task in words, as a model card says it."""
        if self.task == "classes":
            return "Fashion-MNIST classification, 10 classes"
        return "Fashion-MNIST rotation prediction, self-supervised, 4 quarter turns"


DONORS: dict[str, DemoDonor] = {
    "mobilenetv3": DemoDonor(construct=architectures.mobilenetv3, family="MobileNetV3"),
    "resnext": DemoDonor(construct=architectures.resnext, family="ResNeXt"),
    "vit_cls": DemoDonor(construct=architectures.vit_cls, family="ViT", fixed_size=True),
    "vit_avg": DemoDonor(construct=architectures.vit_avg, family="ViT", fixed_size=True),
    "resnet": DemoDonor(construct=architectures.resnet, family="ResNet"),
    "resnet.rotation": DemoDonor(construct=architectures.resnet, family="ResNet", task="rotation"),
    "convnext": DemoDonor(construct=architectures.convnext, family="ConvNeXt"),
    "swin": DemoDonor(construct=architectures.swin, family="Swin", fixed_size=True),
    "efficientnet": DemoDonor(construct=architectures.efficientnet, family="EfficientNetV2"),
    "regnet": DemoDonor(construct=architectures.regnet, family="RegNetY"),
}
"""Every donor by its name in ``demo/NAME``, smallest architecture first."""
