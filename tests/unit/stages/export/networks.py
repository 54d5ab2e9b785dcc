"""Assemblies made in a moment of demo donors: stitches and head fitted on its images, a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dery_cli.core.assembly.notation import parse_network
from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.stitching.head import fit_head
from dery_cli.core.stitching.network import NetworkBuilder
from dery_cli.data.batches import ImageStore
from dery_cli.data.sets import open_data
from dery_cli.io.journal import transaction
from dery_cli.io.records import Artifact
from dery_cli.zoo.networks import MODEL_FILE, describe_network
from dery_cli.zoo.registry import Zoo, prepare_donor
from dery_cli.zoo.schemas import ASSEMBLY

CROP = 0.95


def write_assembly(
    folder: Path, network: str, *, target: str = "demo", samples: int = 96, head: bool = True
) -> Path:
    """Write an assembly of demo donors as ``dery assemble`` would.

    Args:
        folder: Of the assembly.
        network: Such as ``resnext[0:4] + swin[3:]``; a name is that of a demo donor.
        target: Data spec; stitches and head are fitted on its training images.
        samples: So many of them.
        head: Fit one.
    """
    names = sorted({piece.split("[")[0] for piece in network.replace("~", "+").split(" + ")})
    prepared = {name: prepare_donor(f"demo/{name}", name=name) for name in names}
    zoo = Zoo(donor for donor, _ in prepared.values())
    refs = parse_network(network, {name: zoo[name].anatomy for name in names})
    data = open_data(target)
    indices = list(range(0, len(data.train), max(1, len(data.train) // samples)))[:samples]
    device = torch.device("cpu")
    store = ImageStore(data.train, indices, crop=CROP, batch_size=samples, device=device)
    builder = NetworkBuilder(
        {name: dissection for name, (_, dissection) in prepared.items()},
        lambda name: store.view(zoo[name].input, indices),
    )
    built = builder.build(refs)
    module = built.network.copy()
    first = zoo[refs[0].donor].input
    if head:
        labels = [int(data.train.labels[index]) for index in indices]
        fit_head(module, store.view(first, indices), labels, len(data.classes))
    described = describe_network(
        zoo, refs, built.fits, classes=data.classes if head else None, crop=CROP, sets=None
    )
    record: dict[str, Any] = {
        "network": described,
        "params": count_params(module),
        "flops": count_flops(module, torch.zeros(1, first.in_chans, *first.image_size)),
        "target": data.spec,
        "target_skip_bad": False,
        "name": network,
        "budget": "params <= 400k",
        "test_top1": None,
    }
    with transaction(folder / "assembly.json") as work:
        work.write_tensors(MODEL_FILE, module.eval().state_dict())
        work.commit(
            Artifact(
                kind=ASSEMBLY,
                parents={"target": "0" * 64},
                options={"target_samples": samples},
                seed=0,
                data=record,
            )
        )
    return folder
