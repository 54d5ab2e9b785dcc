"""The processes of a run: which device, which precision, who holds the folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from timm.layers import convert_sync_batchnorm
from torch import nn

from dery_cli.errors import DeryError, UsageError
from dery_cli.runtime.processes import launched_on_cpus
from dery_cli.training.optim import batch_norms
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.training.runlog import run_lock


def make_accelerator(config: FinetuneConfig, device: str | torch.device | None) -> Accelerator:
    """Accelerate's view of the processes, the device and the precision.

    Raises:
        UsageError: The device is not there, or cannot compute in that precision.
    """
    chosen = None if device is None else torch.device(device)
    if chosen is not None and chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"there is no device {device}", "use --device cpu")
        if chosen.index is not None:
            torch.cuda.set_device(chosen)
    # Accelerate keeps one state a process: an earlier run may have had another device or precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(
            cpu=launched_on_cpus() if chosen is None else chosen.type == "cpu",
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.grad_accum,
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
            rng_types=[],
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        raise UsageError(
            f"cannot train on {device or 'this device'} in {config.mixed_precision}: {error}",
            "use --mixed-precision no",
        ) from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would compute in fp32 and not say so
        raise UsageError("there is no training in fp16 on a CPU", "use --mixed-precision bf16")
    return accelerator


@contextlib.contextmanager
def locked(accelerator: Accelerator, run_dir: Path) -> Iterator[None]:
    """Hold the run's folder in the main process; the others fail with it."""
    failure: DeryError | None = None
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                stack.enter_context(run_lock(run_dir))
            except DeryError as error:
                failure = error
        if accelerator.num_processes > 1:
            flag = torch.tensor([float(failure is not None)], device=accelerator.device)
            if accelerator.reduce(flag, reduction="sum").item() and failure is None:
                failure = DeryError(f"another process is fine-tuning in {run_dir}")
        if failure is not None:
            raise failure
        yield


def share_batch_norms(
    accelerator: Accelerator, trainee: nn.Module, warn: Callable[[str], None]
) -> None:
    """Let batch norms see the whole batch of all processes, or warn that they cannot."""
    norms = batch_norms(trainee)
    if not norms or accelerator.num_processes == 1:
        return
    if accelerator.device.type == "cuda":
        convert_sync_batchnorm(trainee)
        return
    first = norms[0].removeprefix("model.")
    warn(
        f"{len(norms)} batch norms ({first}, ...) see only their own process's part of each batch "
        "on the CPU: the numbers depend on the number of processes"
    )


def agree_on_signal(accelerator: Accelerator, received: int | None) -> int | None:
    """The signal that any of the processes received, for all of them to act on."""
    own = torch.tensor([received or 0], device=accelerator.device)
    return int(accelerator.gather(own).max()) or None
