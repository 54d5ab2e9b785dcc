"""A run's state as named tensors and JSON, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dery_cli.errors import DeryError, UsageError
from dery_cli.io.schema import (
    any_text,
    fields,
    integer,
    list_of,
    number,
    optional,
    plain_object,
    row,
)
from dery_cli.training import checkpoint as ckpt
from dery_cli.training.optim import AveragedWeights
from dery_cli.training.recipe import NUMBERS_DO_NOT_DEPEND_ON, FinetuneConfig

_STATE = fields(
    {
        "run": fields(
            {
                "config": plain_object,
                "classes": list_of(any_text),
                "images": integer(1),
                "labels_sha256": any_text,
                "teacher": optional(any_text),
                "origin": plain_object,
            }
        ),
        "steps": integer(1),
        "random": plain_object,
        "loss": row(number(), integer(0)),
        "best": fields({}, {"step": integer(0)}, more=optional(number())),
        "guard": row(integer(0), integer(0), list_of(number()), list_of(number())),
        "fixed_norms": list_of(any_text),
        "optimizer": fields({"plain": plain_object, "param_groups": list_of(plain_object)}),
        "scaler": optional(plain_object),
    }
)
"""What a checkpoint of the last update says beside its tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What training changes, and a checkpoint holds.

    Args:
        model: The network.
        ema: Its averaged weights, or None.
        adapter: The map to a teacher's features, or None.
        optimizer: Over all of these that are trained.
        scaler: Of the gradients in fp16, or None.
    """

    model: nn.Module
    ema: AveragedWeights | None
    adapter: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None

    @property
    def evaluated(self) -> nn.Module:
        """The network with the weights that are scored and kept."""
        return self.model if self.ema is None else self.ema.module

    @property
    def is_finite(self) -> bool:
        """Whether all parameters are."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())

    def _modules(self) -> dict[str, nn.Module]:
        averaged = None if self.ema is None else self.ema.module
        named = {"model": self.model, "ema": averaged, "adapter": self.adapter}
        return {stem: module for stem, module in named.items() if module is not None}

    def save(self, run_dir: Path, step: int, state: Mapping[str, Any]) -> None:
        """Write the checkpoint ``last-<step>`` with ``state`` beside the tensors.

        Raises:
            DeryError: It could not be written; the checkpoint before is as it was.
        """
        tensors = {stem: module.state_dict() for stem, module in self._modules().items()}
        tensors["optimizer"], plain = pack_optimizer(self.optimizer)
        scaler = None if self.scaler is None else self.scaler.state_dict()
        ckpt.save_checkpoint(
            run_dir, "last", step, tensors, {**state, "optimizer": plain, "scaler": scaler}
        )

    def load(
        self, run_dir: Path, identity: Mapping[str, Any], *, step: int | None = None
    ) -> ckpt.Checkpoint:
        """Take everything from the last checkpoint, or a step's, which must be of the same run.

        Raises:
            UsageError: There is none, or it is of other data or options.
            DeryError: It or the best one is damaged, or of another network.
        """
        folder = ckpt.find_checkpoint(run_dir, "last")
        if step is not None:
            folder = ckpt.checkpoint_folder(run_dir, "last", step)
        if folder is None:
            raise UsageError(f"{run_dir} holds no checkpoint to resume from", "leave out --resume")
        saved = ckpt.load_checkpoint(folder, state=_STATE)
        check_identity(saved.state["run"], identity, folder)
        if (best := saved.state["best"].get("step")) is not None:  # the run would end with it
            ckpt.load_checkpoint(ckpt.checkpoint_folder(run_dir, "best", best), only="model")
        for stem, module in self._modules().items():
            load_strict(module, saved.tensors.get(stem, {}), folder / f"{stem}.safetensors")
        try:
            optimizer = saved.tensors["optimizer"]
            unpack_optimizer(self.optimizer, optimizer, saved.state["optimizer"])
            if self.scaler is not None and saved.state["scaler"]:
                self.scaler.load_state_dict(saved.state["scaler"])
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
            raise DeryError(
                f"{folder} is of another optimizer: {type(error).__name__}: {error}",
                f"rerun: {ckpt.BEGIN_ANEW}",
            ) from error
        return saved


def pack_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state dict: tensors by dotted names, the rest as JSON.

    Tensors of its state are ``<parameter index>.<key>``, those of its groups (LAMB counts its steps
    there) ``group.<group index>.<key>``. A type is an option that the optimizer has anyway.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            where = tensors if isinstance(value, torch.Tensor) else plain
            where[f"{index}.{key}"] = value
    groups: list[dict[str, Any]] = []
    for index, group in enumerate(state["param_groups"]):
        groups.append({})
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                tensors[f"group.{index}.{key}"] = value
            elif not isinstance(value, torch.dtype):
                groups[-1][key] = value
    return tensors, {"plain": plain, "param_groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    data: Mapping[str, Any],
) -> None:
    """Load what ``pack_optimizer`` gave; tuples that JSON made lists become tuples again."""
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, data["param_groups"], strict=True):
        for key, value in saved.items():
            group[key] = tuple(value) if isinstance(value, list) and key != "params" else value
    for name, value in {**tensors, **data["plain"]}.items():
        index, _, key = name.partition(".")
        if index == "group":
            index, _, key = key.partition(".")
            groups[int(index)][key] = value
        else:
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for index, own in optimizer.state_dict()["state"].items():
        for key, value in state[index].items():
            if isinstance(value, torch.Tensor):  # torch gave it the parameter's type
                own[key] = own[key].to(value.dtype)


def load_strict(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Load a state dict that must fit name by name and shape by shape.

    Raises:
        DeryError: It does not; names what differs.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(tensors))
    unknown = sorted(set(tensors) - set(own))
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or unknown or shapes:
        parts = [
            f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in (("without", missing), ("with unknown", unknown), ("with", shapes))
            if names
        ]
        raise DeryError(
            f"{source} is of another network: {'; '.join(parts)}",
            f"rerun: {ckpt.BEGIN_ANEW}",
        )
    module.load_state_dict(tensors)


def run_identity(
    config: FinetuneConfig,
    classes: Sequence[str],
    labels: Sequence[int] | None,
    *,
    images: int,
    teacher: str | None,
    origin: Mapping[str, str],
) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run.

    Args:
        config: How.
        classes: Class names in label order.
        labels: Of the training images, or None where the data do not tell them.
        images: Training images.
        teacher: Which it is, or None.
        origin: What the run comes of, by name.
    """
    text = json.dumps(None if labels is None else list(labels))
    return {
        "config": config.to_json(),
        "classes": list(classes),
        "images": images,
        "labels_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "teacher": teacher,
        "origin": dict(origin),
    }


def check_identity(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume with other data, start, teacher or options than the checkpoint's.

    Raises:
        UsageError: Names the first that differs, with both values.
    """
    for what in ("classes", "images", "labels_sha256"):
        if saved[what] != own[what]:
            raise UsageError(
                f"{folder} was trained with other data: {what} {_short(saved[what])}, "
                f"now {_short(own[what])}",
                "resume with the same data, or leave out --resume",
            )
    for what, value in own["origin"].items():
        if (before := saved.get("origin", {}).get(what)) != value:
            raise UsageError(
                f"{folder} came of another {what}: {before}, now {value}",
                "resume what was begun, or leave out --resume",
            )
    if saved["teacher"] != own["teacher"]:
        raise UsageError(
            f"{folder} was trained with the teacher {saved['teacher']}, now {own['teacher']}",
            "resume with the same --teacher, or leave out --resume",
        )
    for name, value in own["config"].items():
        if name not in NUMBERS_DO_NOT_DEPEND_ON and saved["config"].get(name) != value:
            raise UsageError(
                f"{folder} was trained with {name} {saved['config'].get(name)}, now {value}",
                "resume with the same options, or leave out --resume",
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
