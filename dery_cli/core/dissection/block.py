"""A block: the stretch of a donor between two nodes, as a module that trains."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dery_cli.core.dissection.steps import Runner, Step, with_drops
from dery_cli.types import Node


class Block(nn.Module):
    """The stretch of a donor between two nodes, with the donor's modules under their own names.

    ``forward(x)`` takes the tensor of the first node and returns that of the last. Parameters,
    buffers and submodules are the donor's own objects until the block is deep-copied. ``units`` is
    the donor's unit that each parameter belongs to, by name; ``units_of`` tells them.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: Sequence[Step],
        source: int,
        finish: Finish,
        *,
        copy_input: bool,
        units: Mapping[str, int] | None = None,
        reorder: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> None:
        super().__init__()
        self._steps = with_drops(steps, finish.values)
        self._source, self._finish, self._copy_input = source, finish, copy_input
        self._enter_order, self._leave_order = reorder
        self._unit_by_name = units or {}
        _borrow(self, model, self._steps)
        self.training = model.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._enter_order is not None:
            x = x[:, self._enter_order.to(x.device)]
        elif self._copy_input:
            x = x.clone()
        env: dict[int, Any] = {self._source: x}
        modules = Lookup(self)
        Runner(self._steps, modules).run(env, x.shape[0], x.device, self.training)
        result: torch.Tensor = self._finish(env)
        if self._leave_order is not None:
            result = result[:, self._leave_order.to(x.device)]
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of a block, run with the block's own modules: from one place in it to the next.

    The stretches of a block in a row give what the block gives, and what is alive between them. A
    stretch holds no module, so that the block's parameters keep their names and their one owner.

    Args:
        node: What comes out.
        steps: To be run.
        source: Value that goes in.
        finish: How the result is made.
        copy_input: Whether a step would change its input in place.
        reorder: Orders of tokens on entering and on leaving.
    """

    node: Node
    steps: Sequence[Step]
    source: int
    finish: Finish
    copy_input: bool = False
    reorder: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def __call__(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        enter, leave = self.reorder
        if enter is not None:
            x = x[:, enter.to(x.device)]
        elif self.copy_input:
            x = x.clone()
        env: dict[int, Any] = {self.source: x}
        Runner(self.steps, Lookup(block)).run(env, x.shape[0], x.device, block.training)
        result: torch.Tensor = self.finish(env)
        return result if leave is None else result[:, leave.to(x.device)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Stretch:
        return self  # never changed

    def uses(self, name: str) -> bool:
        """Whether it needs the parameter or buffer of this name."""
        owner, _, leaf = name.rpartition(".")
        for step in self.steps:
            if step.start < 0:
                if step.path == owner and step.keys[0] == leaf:
                    return True
                below = f"{step.path}.{step.keys[0]}" if step.path else str(step.keys[0])
                if name.startswith(f"{below}."):
                    return True
            elif step.target is None and name.startswith(f"{step.path}."):
                return True
        return False


def units_of(block: nn.Module) -> Mapping[str, int]:
    """The donor's unit that each parameter of a block belongs to, by name; empty where unknown."""
    found: Mapping[str, int] = getattr(block, "_unit_by_name", {})
    return found


class Lookup(Mapping[str, nn.Module]):
    """Submodules by dotted name, the module itself under the empty one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, path: str) -> nn.Module:
        return self.module.get_submodule(path)

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self.module.named_modules())

    def __len__(self) -> int:
        return sum(1 for _ in self.module.modules())


@dataclasses.dataclass(frozen=True)
class Finish:
    """How a block's result is made of the values at its end.

    Args:
        values: Usually one; several where a classifier has several inputs, to be concatenated.
        vector: Whether the result is the pre-logits vector: a map is averaged over its positions,
            so that (N, C) comes out.
    """

    values: tuple[int, ...]
    vector: bool = False

    def __call__(self, env: Mapping[int, Any]) -> Any:
        if not self.vector:
            return env[self.values[0]]
        parts = [env[value] for value in self.values]
        parts = [p.flatten(2).mean(2) if p.ndim > 2 else p for p in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _borrow(block: nn.Module, model: nn.Module, steps: Sequence[Step]) -> None:
    """Hang the donor's modules and tensors that ``steps`` use into ``block`` under their names."""
    # a dict, not a set: the order of parameters, and with it every sum over them, must be fixed
    whole = dict.fromkeys(step.path for step in steps if step.target is None and step.start >= 0)
    for path in sorted(whole, key=lambda p: p.count(".")):
        if not any(path.startswith(f"{other}.") for other in whole if other != path):
            parent, _, name = path.rpartition(".")
            _nest(block, parent).add_module(name, model.get_submodule(path))
    for step in steps:
        if step.start >= 0 or any(f"{step.path}.".startswith(f"{path}.") for path in whole):
            continue
        name, owner = step.keys[0], model.get_submodule(step.path)
        keeper, item = _nest(block, step.path), getattr(owner, step.keys[0])
        if isinstance(item, nn.Parameter):
            keeper.register_parameter(name, item)
        elif name in owner._buffers:
            persistent = name not in owner._non_persistent_buffers_set
            keeper.register_buffer(name, item, persistent=persistent)
        elif isinstance(item, nn.Module):
            keeper.add_module(name, item)
        else:
            setattr(keeper, name, copy.copy(item))


def _nest(block: nn.Module, path: str) -> nn.Module:
    module = block
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module._modules[name]  # type: ignore[assignment]
    return module
