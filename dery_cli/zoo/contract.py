"""The contract of the plugins' door for one model, as checks that run in order.

``dery_cli.testing`` is the way in.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.errors import DeryError
from dery_cli.types import Anatomy, ModelCard
from dery_cli.zoo.plugin import ZooPlugin, explain
from dery_cli.zoo.registry import Spec, check_card, dissect_donor

REL_ERROR = 1e-5
TRAIN_REL_ERROR = 1e-3
"""In training mode batch norms of two images amplify the last bit."""
FLOPS_REL_ERROR = 1e-3
_BATCH = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One part of the contract: what was found, or in one line why it is not kept."""

    name: str
    ok: bool
    detail: str


class ContractError(Exception):
    """A part of the contract is not kept; the message is the one line that says how."""


class Contract:
    """The checks of one model in order; each leaves behind what the next ones need."""

    def __init__(self, plugin: ZooPlugin, name: str, size: tuple[int, int] | None) -> None:
        self._plugin, self._name, self._size = plugin, name, size
        self.card: ModelCard | None = None
        self.anatomy: Anatomy | None = None
        self.whole_only: str | None = None

    def run(self) -> Iterator[Check]:
        needed: list[tuple[str, Callable[[], str]]] = [
            ("card", self._card),
            ("build", self._build),
            ("nodes", self._nodes),
            ("blocks", self._blocks),
        ]
        others = [("costs", self._costs), ("training", self._training), ("save", self._save)]
        for name, check in (*needed, *others):
            result = self._one(name, check)
            yield result
            if not result.ok and (name, check) in needed:
                return

    @staticmethod
    def _one(name: str, check: Callable[[], str]) -> Check:
        try:
            return Check(name=name, ok=True, detail=check())
        except (ContractError, DeryError) as error:
            return Check(name=name, ok=False, detail=str(error))
        except Exception as error:  # the plugin's own, whatever it is
            return Check(name=name, ok=False, detail=explain(error))

    def _card(self) -> str:
        card = self._plugin.card(self._name)
        if not isinstance(card, ModelCard):
            raise ContractError(f"card() gives a {type(card).__name__}, not a ModelCard")
        with contextlib.suppress(KeyError):
            self._plugin.card("no such model / of this plugin")
            raise ContractError("card() of an unknown model must raise KeyError")
        if self._size is not None:
            card = dataclasses.replace(
                card, input=dataclasses.replace(card.input, image_size=self._size)
            )
        try:
            check_card(card)
        except ValueError as error:
            raise ContractError(str(error)) from error
        self.card = card
        return f"licence {card.license}; task {card.task}"

    def _build(self) -> str:
        with torch.device("meta"):
            twin = self._construct(seed=0)
        stray = [name for name, tensor in twin.named_parameters() if not tensor.is_meta]
        if stray:
            raise ContractError(f"under torch.device('meta') the parameter {stray[0]} has data")
        self._model = self._construct(seed=0)
        shapes = [
            {name: tuple(tensor.shape) for name, tensor in m.state_dict().items()}
            for m in (twin, self._model)
        ]
        if shapes[0] != shapes[1]:
            raise ContractError("the model built on the meta device has other parameters")
        if self._model.training:
            raise ContractError("build() must give the model in eval mode")
        if count_params(self._model) == 0:
            raise ContractError("the model has no parameters")
        return f"{count_params(self._model):,} parameters; needs neither weights nor network"

    def _construct(self, seed: int) -> nn.Module:
        torch.default_generator.manual_seed(seed)
        with mock.patch.object(socket.socket, "connect", _refuse):
            model = self._plugin.build(self._name, pretrained=False, image_size=self._size)
        if not isinstance(model, nn.Module):
            raise ContractError(f"build() gives a {type(model).__name__}, not an nn.Module")
        return model.float()

    def _dissect(self, model: nn.Module, warn: Callable[[str], None] | None = None) -> Dissection:
        assert self.card is not None
        return dissect_donor(model, self.card, Spec("", self._name), self._plugin, warn=warn)

    def _nodes(self) -> str:
        assert self.card is not None
        _randomise(self._model)
        reasons: list[str] = []
        self._dissection = self._dissect(self._model, reasons.append)
        self.anatomy = anatomy = self._dissection.anatomy
        generator = torch.Generator().manual_seed(1)
        spec = self.card.input
        self._x = torch.randn(_BATCH, spec.in_chans, *spec.image_size, generator=generator)
        self._parts = [self._dissection.block(i, i + 1) for i in range(anatomy.num_units)]
        if reasons:
            self.whole_only = reasons[0].partition("whole model only: ")[2]
            return f"whole only: {self.whole_only}"
        return f"{len(anatomy.nodes)} nodes, {anatomy.num_units} units"

    def _blocks(self) -> str:
        assert self.anatomy is not None
        self._model.eval()
        with torch.no_grad():
            donor, how = _pre_logits(self._model, self._dissection, self._x)
            chain = _chain(self._parts, self._x)
            own = self._dissection.features(self._x)
            for node, mine, theirs in zip(self.anatomy.nodes, chain, own, strict=True):
                if tuple(mine.shape[1:]) != node.shape:
                    raise ContractError(
                        f"node {node.index} ({node.name}) is said to be {node.shape}, "
                        f"not {tuple(mine.shape[1:])}"
                    )
                _compare(f"node {node.index} ({node.name})", mine, theirs, REL_ERROR)
        self._result = chain[-1]
        error = _compare("the blocks in a row", chain[-1], donor, REL_ERROR)
        return f"in a row they give {how}, relative error {error:.1e}"

    def _costs(self) -> str:
        assert self.anatomy is not None
        anatomy, dissection = self.anatomy, self._dissection
        for i, part in enumerate(self._parts):
            found = count_params(part)
            if found != anatomy.params(i, i + 1):
                raise ContractError(
                    f"unit {i + 1} has {found:,} params, its node says {anatomy.params(i, i + 1):,}"
                )
        params = anatomy.params(0, anatomy.num_units)
        parts = (params, dissection.classifier_params, dissection.unused_params)
        total = count_params(self._model)
        if sum(parts) != total:
            raise ContractError(f"params {parts} do not add up to {total:,}")
        flops = anatomy.flops(0, anatomy.num_units) + dissection.classifier_flops
        reference = count_flops(self._model, self._x)
        if abs(flops - reference) > FLOPS_REL_ERROR * reference:
            raise ContractError(f"FLOPs add up to {flops:,}, torch's counter says {reference:,}")
        return f"{params:,} params and {flops:,} multiply-adds add up"

    def _training(self) -> str:
        state = {name: value.clone() for name, value in self._model.state_dict().items()}
        try:
            return self._trains(state)
        finally:  # the next check finds the model as this one found it
            self._model.load_state_dict(state)
            self._model.eval()
            for part in self._parts:
                part.eval()

    def _trains(self, state: dict[str, Tensor]) -> str:
        if not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise ContractError("no parameter requires a gradient; build() must leave that on")
        donor = self._train(lambda x: _pre_logits(self._model, self._dissection, x)[0], state)
        blocks = self._train(lambda x: _chain(self._parts, x)[-1], state)
        _compare("in training mode the output", blocks.output, donor.output, TRAIN_REL_ERROR)
        lost = sorted(donor.grads.keys() - blocks.grads.keys())
        if lost:
            raise ContractError(f"{lost[0]} and {len(lost) - 1} more get no gradient in the blocks")
        if donor.grads:
            mine, theirs = (
                torch.cat([run.grads[name].flatten() for name in donor.grads])
                for run in (blocks, donor)
            )
            _compare("the gradients", mine, theirs, TRAIN_REL_ERROR)
        for name, value in donor.buffers.items():
            other = blocks.buffers[name]
            if value.is_floating_point():
                _compare(f"after a step in training mode {name}", other, value, TRAIN_REL_ERROR)
            elif not torch.equal(value, other):
                raise ContractError(f"after a step in training mode {name} differs")
        self._model.load_state_dict(state)
        self._model.eval()
        for part in self._parts:
            part.eval()
        with torch.no_grad():
            if not torch.equal(_chain(self._parts, self._x)[-1], self._result):
                raise ContractError("after training mode, eval mode is not what it was")
        moved = [n for n, v in self._model.state_dict().items() if not torch.equal(v, state[n])]
        if moved:
            raise ContractError(f"in eval mode {moved[0]} changes")
        return f"{len(donor.grads)} tensors get their gradients; the mode is followed"

    def _train(self, forward: Callable[[Tensor], Tensor], state: dict[str, Tensor]) -> _Trained:
        self._model.load_state_dict(state)
        self._model.zero_grad(set_to_none=True)
        self._model.train()
        for part in self._parts:
            part.train()
        torch.default_generator.manual_seed(2)
        y = forward(self._x)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (y * weight).sum().backward()  # type: ignore[no-untyped-call]
        grads = {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None}
        buffers = {name: value.clone() for name, value in self._model.named_buffers()}
        self._model.zero_grad(set_to_none=True)
        return _Trained(y.detach(), grads, buffers)

    def _save(self) -> str:
        again = self._construct(seed=4)
        other = self._dissect(again)
        if self.anatomy != other.anatomy:
            raise ContractError("a second build dissects into other nodes")
        count = 0
        copies = []
        for i, part in enumerate(self._parts):
            state = {n: v.detach().clone().contiguous() for n, v in part.state_dict().items()}
            copied = copy.deepcopy(other.block(i, i + 1)).eval()
            copied.load_state_dict(load(save(state)), strict=True)
            copies.append(copied)
            count += len(state)
        with torch.no_grad():
            result = _chain(copies, self._x)[-1]
        if not torch.equal(result, self._result):
            error = _relative(result, self._result)
            raise ContractError(
                f"after saving and loading, the output differs (relative error {error:.1e}): "
                "some state is in no parameter or persistent buffer"
            )
        return f"{count} tensors go through safetensors, equal bits come out"


@dataclasses.dataclass(frozen=True)
class _Trained:
    """One step in training mode: output, gradients and buffers by name."""

    output: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def _refuse(*_: Any) -> None:
    raise ConnectionRefusedError("build(pretrained=False) must not use the network")


def _chain(parts: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    values = [x]
    for part in parts:
        values.append(part(values[-1]))
    return values


def _pre_logits(model: nn.Module, dissection: Dissection, x: Tensor) -> tuple[Tensor, str]:
    """What the donor itself gives its classifier, found apart from the dissection's trace.

    Returns:
        The (N, C) vector, and in words what it is.
    """
    owners = dict.fromkeys(name.rpartition(".")[0] for name in dissection.classifier)
    caught: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and not any(args[0] is seen for seen in caught):
            caught.append(args[0])

    handles = [model.get_submodule(owner).register_forward_pre_hook(keep) for owner in owners]
    try:
        output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    if owners and not caught:  # its classifier is a bare parameter
        return list(dissection.features(x))[-1], "what the model's own pass gives"
    if not owners:
        caught = [output[0] if isinstance(output, (tuple, list)) else output]
    pooled = [v.flatten(2).mean(2) if v.ndim > 2 else v for v in caught]
    return torch.cat(pooled, dim=1), "the classifier's input" if owners else "the model's output"


def _relative(mine: Tensor, theirs: Tensor) -> float:
    scale = float(theirs.double().norm())
    return float((mine.double() - theirs.double()).norm()) / (scale or 1.0)


def _compare(what: str, mine: Tensor, theirs: Tensor, limit: float) -> float:
    if mine.shape != theirs.shape:
        raise ContractError(
            f"{what}: shape {tuple(mine.shape)}, the model's own is {tuple(theirs.shape)}"
        )
    error = _relative(mine, theirs)
    if not error <= limit:
        raise ContractError(f"{what}: relative error {error:.1e}, above {limit:.0e}")
    return error


def _randomise(model: nn.Module) -> None:
    """Give parameters that start as one constant, and running statistics, values of their own.

    Norms that start as the identity and branches that start at zero would hide a mistake.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                noise = torch.randn(parameter.shape, generator=generator)
                gain = 0.5 + torch.rand(parameter.shape, generator=generator)
                parameter.mul_(gain).add_(noise, alpha=0.1 if parameter.ndim <= 1 else 0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
