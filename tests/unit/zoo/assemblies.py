"""Small assemblies of the demo's donors with random weights, as if ``dery assemble`` made them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import pytest
import torch

from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.stitching.fit import StitchFit
from dery_cli.io.records import Artifact
from dery_cli.types import BlockRef, Donor, StemKind, StitchKind
from dery_cli.zoo import networks
from dery_cli.zoo.networks import LoadedAssembly, build_network, describe_network, loaded
from dery_cli.zoo.registry import Zoo, prepare_donor
from dery_cli.zoo.schemas import ASSEMBLY

NETWORKS = {
    "mixed": (("resnet", 0, 4), ("vit_cls", 5, 8)),
    "cut": (("mobilenetv3", 0, 4), ("resnet", 5, 7)),
    "vit": (("vit_avg", 0, 6),),
    "swin": (("swin", 0, 9),),
    "fresh": (("resnet", 0, 1), ("mobilenetv3", 2, 5)),
}
"""Blocks by donor: a stitch into tokens, one that ends before its donor does, whole donors, and one
behind the paper's fresh stem, which leaves nothing of its first block."""
SHA = "0" * 64


@contextlib.contextmanager
def dissected_once() -> Iterator[None]:
    """Donors are built anew each time, but traced once: that takes a second each."""
    found: dict[str, Dissection] = {}

    def dissect_donor(model, card, spec, plugin):
        if str(spec) not in found:
            found[str(spec)] = real(model, card, spec, plugin)
        return found[str(spec)].on(model)

    real = networks.dissect_donor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "dissect_donor", dissect_donor)
        yield


@functools.cache
def donor(name: str) -> Donor:
    return prepare_donor(f"demo/{name}", name=name, pretrained=False)[0]


@functools.cache
def description(name: str) -> dict[str, object]:
    refs = [BlockRef(*block) for block in NETWORKS[name]]
    return describe_network(
        Zoo([donor(ref.donor) for ref in refs]),
        refs,
        [None, *(StitchFit(StitchKind.LINEAR, 0.5, None) for _ in refs[1:])],
        classes=["one", "two", "three"],
        crop=0.95,
        sets=None,
        stem=StemKind.PAPER if name == "fresh" else StemKind.DONOR,
    )


def assembly(name: str, *, licences: Sequence[str] = (), target: str = "demo") -> LoadedAssembly:
    """One of ``NETWORKS``; its parameters differ from those a fresh model would have."""
    network = description(name)
    if licences:
        blocks = [
            block | {"license": licence}
            for block, licence in zip(network["blocks"], licences, strict=True)
        ]
        network = network | {"blocks": blocks}
    module = build_network(network, seed=7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    data = {
        "network": network,
        "params": sum(p.numel() for p in module.parameters()),
        "flops": 1000,
        "target": target,
        "target_skip_bad": False,
        "split": {"fraction": 0.0, "seed": 0, "digest": SHA},
        "fitted_on": "all",
        "name": name,
        "budget": "at most 400.00k params",
        "held_out": None,
        "test_top1": 0.9,
    }
    record = Artifact(
        kind=ASSEMBLY,
        parents={"target": SHA},
        options={"target_samples": 1, "fit_samples": 1, "data": target},
        seed=0,
        data=data,
    )
    return loaded(module, record)
