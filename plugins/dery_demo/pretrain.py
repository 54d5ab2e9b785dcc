"""Pretrain the demo donors on Fashion-MNIST and publish their weights. Resumable; no pickle.

``python -m dery_demo.pretrain`` trains what is not yet trained and continues what was cut off.
``python -m dery_demo.pretrain --publish`` writes the finished donors' half-precision weights into
the package, with ``weights/index.json`` (the cards) and the zoo manifest made from it.

Fashion-MNIST is read from its four ``.gz`` files, for example those of Debian's package
``dataset-fashion-mnist``, or torchvision's ``FashionMNIST/raw`` folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from dery_demo import publish
from dery_demo.donors import DONORS, IMAGE_SIZE, MEAN, STD, DemoDonor
from dery_demo.make_data import load_fashion, resize_images

BATCH = 128
MAX_SHIFT = 3  # pixels an image is moved at most, each way


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one donor is trained.

    Args:
        epochs: Passes over the 60,000 training images.
        lr: Peak learning rate of AdamW, then cosine to 0.
        weight_decay: On weight matrices only.
        smoothing: Label smoothing.
        warmup: Share of the steps in which the rate rises.
        channels_last: Convolutions run faster so on a CPU.
    """

    epochs: int = 4
    lr: float = 3e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    warmup: float = 0.1
    channels_last: bool = True


TOKENS = TrainConfig(epochs=7, lr=2e-3, channels_last=False)
CONFIGS: dict[str, TrainConfig] = {
    "resnet": TrainConfig(epochs=6),
    "convnext": TrainConfig(epochs=6),
    "vit_cls": TOKENS,
    "vit_avg": TOKENS,
    "swin": TOKENS,
    "regnet": TrainConfig(epochs=3),
    "efficientnet": TrainConfig(epochs=3),
    # On little data its accuracy jumps because batch norm's running statistics lag the weights, not
    # because training does: with momentum 0.01 and 2,000 images eval mode gave 0.37 where batch
    # statistics gave 0.77. timm's default 0.1 and a rate that ends at zero are enough.
    "mobilenetv3": TrainConfig(epochs=5),
    "resnet.rotation": TrainConfig(epochs=3),
}


@dataclasses.dataclass(frozen=True)
class Images:
    """Grey images (N, 32, 32) as bytes and their labels (N)."""

    pixels_NHW: Tensor
    labels_N: Tensor


def load_images(root: Path, split: str) -> Images:
    """Fashion-MNIST's ``train`` or ``test`` images, resized to the donors' input size."""
    pixels, labels = load_fashion(root, split)
    resized = resize_images(pixels, IMAGE_SIZE)
    return Images(torch.from_numpy(resized), torch.from_numpy(labels.astype(np.int64)))


def to_input(pixels_NHW: Tensor) -> Tensor:
    """Normalised network input (N, 3, 32, 32) from bytes (N, 32, 32)."""
    grey = (pixels_NHW.float() / 255.0 - MEAN) / STD
    return grey.unsqueeze(1).expand(-1, 3, -1, -1)


def augment(pixels_NHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to ``MAX_SHIFT`` pixels and mirrored at random."""
    count, height, width = pixels_NHW.shape
    padded = functional.pad(pixels_NHW, (MAX_SHIFT,) * 4)
    top, left = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def rotate(pixels_NHW: Tensor, turns_N: Tensor) -> Tensor:
    """Image i turned ``turns_N[i]`` quarter turns counter-clockwise."""
    turned = torch.stack([torch.rot90(pixels_NHW, k, (1, 2)) for k in range(4)])
    return turned[turns_N, torch.arange(len(turns_N))]


def train_batches(
    data: Images, donor: DemoDonor, epoch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's batches: a function of seed and epoch, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(data.labels_N), generator=generator)
    for index in torch.split(order, BATCH)[: len(order) // BATCH]:
        pixels = augment(data.pixels_NHW[index], generator)
        labels = data.labels_N[index]
        if donor.task == "rotation":
            labels = torch.randint(0, 4, (len(index),), generator=generator)
            pixels = rotate(pixels, labels)
        yield to_input(pixels), labels


@torch.no_grad()
def accuracy(model: nn.Module, data: Images, donor: DemoDonor) -> float:
    """Top-1 accuracy in eval mode; for the rotation task over all four turns of every image."""
    model.eval()
    correct = total = 0
    batches = zip(torch.split(data.pixels_NHW, 500), torch.split(data.labels_N, 500), strict=True)
    for pixels, labels in batches:
        if donor.task == "rotation":
            labels = torch.arange(4).repeat_interleave(len(pixels))
            pixels = rotate(pixels.repeat(4, 1, 1), labels)
        correct += int((model(to_input(pixels)).argmax(1) == labels).sum())
        total += len(labels)
    return correct / total


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear up over the warm-up, then down to 0 along a cosine; of the run's progress, 0 to 1."""
    if progress < config.warmup:
        return config.lr * max(progress, 1e-3) / config.warmup
    done = (progress - config.warmup) / (1.0 - config.warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def _save(
    path: Path, model: nn.Module, optimizer: torch.optim.AdamW, state: dict[str, object]
) -> None:
    tensors = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for key, value in slots.items():
            tensors[f"optimizer.{index}.{key}"] = value.contiguous()
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    os.replace(temporary, path)


@torch.no_grad()
def _restore(path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    weights = {}
    for key, value in load_file(path).items():
        kind, rest = key.split(".", 1)
        if kind == "model":
            weights[rest] = value
        else:
            index, slot = rest.split(".")
            if value.shape == params[int(index)].shape:
                # the fused step walks raw memory: moments need their parameter's strides
                value = torch.empty_like(params[int(index)]).copy_(value)
            slots.setdefault(int(index), {})[slot] = value
    model.load_state_dict(weights)
    optimizer.load_state_dict(
        {"state": slots, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def train(
    name: str, config: TrainConfig, data: tuple[Images, Images], out: Path, seed: int = 0
) -> float:
    """Train one donor, from its last finished epoch on; returns its accuracy on the test images."""
    donor = DONORS[name]
    train_data, test_data = data
    torch.manual_seed(seed)
    model = donor.construct(donor.num_classes, IMAGE_SIZE)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, config)
    path = out / f"{name}.safetensors"
    state = publish.checkpoint_state(path) or {"config": dataclasses.asdict(config), "epoch": 0}
    if state["config"] != dataclasses.asdict(config):
        raise SystemExit(
            f"{path} was trained with other settings; remove it or choose another --out"
        )
    if state["epoch"] > 0:
        _restore(path, model, optimizer)
    steps = len(train_data.labels_N) // BATCH
    for epoch in range(state["epoch"], config.epochs):
        start = time.monotonic()
        model.train()
        total_loss = seen_correct = 0.0
        for step, (inputs, labels) in enumerate(train_batches(train_data, donor, epoch, seed)):
            rate = learning_rate(config, (epoch + step / steps) / config.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if config.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            logits = model(inputs)
            loss = functional.cross_entropy(logits, labels, label_smoothing=config.smoothing)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total_loss += loss.item()
            seen_correct += (logits.argmax(1) == labels).float().mean().item()
        top1 = accuracy(model, test_data, donor)
        seconds = time.monotonic() - start
        state.update(epoch=epoch + 1, top1=top1, seconds=state.get("seconds", 0.0) + seconds)
        _save(path, model, optimizer, state)
        print(
            f"{name}: epoch {epoch + 1}/{config.epochs} loss {total_loss / steps:.3f} "
            f"train {seen_correct / steps:.4f} test {top1:.4f} {seconds:.0f} s",
            flush=True,
        )
    return float(state["top1"])


def main() -> None:
    """Parse the command line; train, or publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--donor", nargs="+", choices=list(DONORS), default=list(DONORS))
    parser.add_argument("--epochs", type=int, help="instead of the donor's own number")
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of the four .gz files",
    )
    parser.add_argument("--out", type=Path, default=Path("pretrain-runs"), help="checkpoints")
    parser.add_argument(
        "--publish", action="store_true", help="write finished donors into the package; no training"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    test = load_images(args.data_root, "test")
    if args.publish:
        for name in args.donor:
            path = args.out / f"{name}.safetensors"
            card = publish.publish(name, path, lambda model, donor: accuracy(model, test, donor))
            print(f"{name}: published, top-1 {card['top1']:.4f}")
        return
    data = load_images(args.data_root, "train"), test
    for name in args.donor:
        config = CONFIGS.get(name, TrainConfig())
        if args.epochs is not None:
            config = dataclasses.replace(config, epochs=args.epochs)
        train(name, config, data, args.out)


if __name__ == "__main__":
    main()
