"""Coverage of dissection: one model of every timm family, and torchvision's classifiers.

    python tests/bench/bench_dissect.py [--all] [NAME...]

Each model is taken apart on the meta device (``ms`` of processor time), then rebuilt from its
blocks with random weights on the CPU; ``error`` is the largest relative difference between the
blocks in a row and the whole. ``params`` and ``flops`` say whether units and classifier add up to
the model and to torch's counter (the reference). Without ``--all``, every sixth family and eighth
torchvision model.
"""

from __future__ import annotations

import argparse
import time
import traceback

import timm
import torch
from torch import nn
from torchvision import models

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.dissection.dissect import DissectError, Dissection, dissect

SMALL = {
    "test": 0, "zepto": 1, "atto": 1, "femto": 2, "pico": 3, "nano": 3, "xxs": 3, "xxt": 3,
    "xxtiny": 3, "t0": 3, "s0": 3, "m0": 3, "b0": 3, "xs": 4, "tiny": 4, "ti": 4, "t": 4, "050": 3,
    "002": 3, "10": 3, "11": 4, "12": 5, "18": 4, "26": 5, "small": 5, "s": 5, "s1": 5, "mini": 5,
}  # fmt: skip
"""Words by which names promise a small model."""


def smallest(family: str) -> str:
    """The smallest of the four models of a timm module whose names promise least."""

    def promise(name: str) -> tuple[int, int, str]:
        return min((SMALL.get(word, 9) for word in name.split("_")), default=9), len(name), name

    sizes = {}
    for name in sorted(timm.list_models(module=family), key=promise)[:4]:
        with torch.device("meta"):
            sizes[name] = count_params(timm.create_model(name))
    return min(sizes, key=lambda name: (sizes[name], name))


def build(name: str) -> nn.Module:
    if name.startswith("torchvision/"):
        return models.get_model(name.removeprefix("torchvision/"), weights=None).eval()
    return timm.create_model(name).eval()


def shape(name: str) -> tuple[int, ...]:
    if name.startswith("torchvision/"):
        weights = list(models.get_model_weights(name.removeprefix("torchvision/")))
        size = weights[0].transforms().crop_size[0] if weights else 224
        return (3, size, size)
    return tuple(timm.models.get_pretrained_cfg(name).input_size)


def randomise(model: nn.Module) -> None:
    """Weights and statistics under which no branch is trivially zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
        for param in model.parameters():
            if param.ndim <= 1 or float(param.abs().max()) < 1e-3:
                param.add_(torch.randn(param.shape, generator=generator) * 0.1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    if not bool(torch.isfinite(b).all()):
        return float("nan")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@torch.no_grad()
def error(model: nn.Module, found: Dissection, images: torch.Tensor) -> float:
    """Largest relative difference: blocks in a row against one pass, and logits against whole."""
    last = found.anatomy.num_units
    truth = list(found.features(images))
    worst, x = 0.0, images
    for unit in range(last):
        x = found.block(unit, unit + 1)(x)
        worst = max(worst, relative(x, truth[unit + 1]))
    weights = [dict(model.named_parameters())[name] for name in found.classifier]
    matrices = [w for w in weights if w.ndim > 1]
    logits = model(images)
    if len(matrices) == 1 and matrices[0][0].numel() == x.shape[1] and logits.ndim == 2:
        bias = next((w for w in weights if w.ndim == 1), torch.zeros(()))
        if not any(
            isinstance(m, nn.ReLU) for m in getattr(model, "classifier", nn.Identity()).children()
        ):
            worst = max(worst, relative(x @ matrices[0].flatten(1).T + bias, logits))
    return worst


def row(family: str, name: str) -> tuple[bool, str]:
    size = shape(name)
    try:
        with torch.device("meta"):
            twin = build(name)
    except NotImplementedError:  # it computes its widths with tensors
        twin = build(name).to("meta")
    start = time.process_time()
    try:
        found = dissect(twin, torch.empty(1, *size, device="meta"))
    except DissectError as reason:
        return False, f"{family:26} {name:38} - {reason}"
    spent = 1000 * (time.process_time() - start)
    nodes = found.anatomy.nodes
    params = sum(n.params for n in nodes) + found.classifier_params + found.unused_params
    flops = sum(n.flops for n in nodes) + found.classifier_flops
    counted = count_flops(twin, torch.empty(1, *size))
    params_ok = params == count_params(twin)
    flops_ok = abs(flops - counted) <= 1e-3 * counted
    model = build(name)
    randomise(model)
    torch.manual_seed(0)
    off = error(model, dissect(model, torch.empty(1, *size)), torch.randn(2, *size))
    kinds = ",".join(dict.fromkeys(str(n.layout) for n in nodes[1:]))
    fine = params_ok and flops_ok and off <= 1e-5
    line = (
        f"{family:26} {name:38} {found.anatomy.num_units:5} {off:8.1e} "
        f"{'ok' if params_ok else 'OFF':>6} {'ok' if flops_ok else 'OFF':>5} {spent:6.0f}  {kinds}"
    )
    return fine, line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="models or timm families; torchvision/NAME")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    families = timm.list_modules()
    vision = [f"torchvision/{name}" for name in models.list_models(module=models)]
    chosen = [*families[:: 1 if options.all else 6], *vision[:: 1 if options.all else 8]]
    chosen = options.names or chosen
    print(
        f"{'family':26} {'model':38} {'units':>5} {'error':>8} {'params':>6} {'flops':>5} {'ms':>6}"
    )
    counts = {"timm": [0, 0], "torchvision": [0, 0]}
    exceptions = []
    for each in chosen:
        name = smallest(each) if each in families else each
        family = "torchvision" if name.startswith("torchvision/") else each
        try:
            fine, line = row(family, name)
        except Exception as bug:
            traceback.print_exc()
            fine, line = False, f"{family:26} {name:38} FAILED {type(bug).__name__}: {bug}"
        print(line, flush=True)
        tally = counts["torchvision" if family == "torchvision" else "timm"]
        tally[0] += fine
        tally[1] += 1
        if not fine:
            exceptions.append(line)
    for source, (good, total) in counts.items():
        print(f"{source}: {good} of {total} dissected, equal, and summing up")
    print("\n".join(["exceptions:", *exceptions]) if exceptions else "no exceptions")


if __name__ == "__main__":
    main()
