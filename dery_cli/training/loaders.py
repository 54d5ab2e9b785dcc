"""Batches for all processes of a run, and the score of the network on the validation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dery_cli.core.scoring import score_batch
from dery_cli.data.batches import ErrorItems, collate, raise_errors
from dery_cli.training.evaluate import Tally, check_logits, evaluating
from dery_cli.training.plan import Plan
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.training.sampling import SeededDataset, StreamSampler
from dery_cli.training.signals import ignore_in_worker


def train_loader(
    accelerator: Accelerator,
    dataset: Dataset[Any],
    plan: Plan,
    config: FinetuneConfig,
    step: int,
) -> Any:
    """Micro-batches from update ``step`` to the end, this process's part of each."""
    sampler = StreamSampler(
        plan.images,
        batch_size=plan.micro_batch,
        start=step * config.grad_accum,
        stop=plan.steps * config.grad_accum,
        seed=config.seed,
    )
    seeded = SeededDataset(dataset, config.seed)
    return accelerator.prepare_data_loader(
        DataLoader(seeded, batch_sampler=sampler, **_options(accelerator, config))
    )


def valid_loader(
    accelerator: Accelerator, dataset: Dataset[Any], plan: Plan, config: FinetuneConfig
) -> Any:
    """The validation images in order, this process's part of each batch.

    Twice the images of a micro-batch: that many fit where there are gradients as well.
    """
    size = 2 * plan.micro_batch
    return accelerator.prepare_data_loader(
        DataLoader(ErrorItems(dataset), batch_size=size, **_options(accelerator, config))
    )


def _options(accelerator: Accelerator, config: FinetuneConfig) -> dict[str, Any]:
    return {
        "num_workers": config.workers,
        "collate_fn": collate,
        "worker_init_fn": ignore_in_worker,
        "pin_memory": accelerator.device.type == "cuda",
        "generator": torch.Generator(),  # else iterating draws from the global one
    }


def score(
    accelerator: Accelerator, network: nn.Module, loader: Any, classes: Sequence[str]
) -> dict[str, float]:
    """Loss and top-1 over the validation images of all processes."""
    if accelerator.num_processes > 1:
        # Each process's batch norms have seen other images: the main process's count.
        for buffer in network.buffers():
            broadcast(buffer)
    tally = Tally(len(classes))
    with evaluating(network), accelerator.autocast():
        for images_BCHW, labels_B in raise_errors(loader):
            logits_BK = network(images_BCHW)
            check_logits(logits_BK, len(classes))
            stats = score_batch(logits_BK, labels_B)
            tally.add(accelerator.gather_for_metrics(stats))
    return {"valid_loss": tally.mean_loss, "valid_top1": tally.top1}
