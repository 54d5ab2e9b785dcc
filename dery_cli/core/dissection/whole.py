"""A donor that cannot be traced, as one single unit: its own forward, up to the classifier.

Where a forward asks for numbers (``if x.mean() > 0``, ``float(buffer)``) or hands the image to code
that torch does not see, no steps can be written down that hold for every image. The model itself
still runs; all that is needed is what its classifier is given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dery_cli.core.dissection.block import Finish, Stretch
from dery_cli.core.dissection.classifier import classifier_ops
from dery_cli.core.dissection.dissect import DissectError, Dissection
from dery_cli.core.dissection.trace import Trace, record
from dery_cli.types import Anatomy, Layout, Node


def dissect_whole(model: nn.Module, example: torch.Tensor) -> Dissection:
    """Take a model as one unit, by running a copy of it on one random image.

    Args:
        model: Any image model with numbers in it, classifier included; left as it is.
        example: (N, C, H, W), a normalised input; only shape, type and device matter.

    Returns:
        Node 0 is the image, node 1 the vector the classifier sees.

    Raises:
        DissectError: It does not run, or ends in something else than a vector an image.
    """
    kind, shape = type(model).__name__, (1, *example.shape[1:])
    try:
        trace = record(model, shape, example.dtype, train=False, count=True, device=example.device)
        heads = _heads(trace)
        block = WholeBlock(model, heads)
        with torch.no_grad():
            vector = copy.deepcopy(block).eval()(_image(shape, example))
    except Exception as error:  # whatever the model's forward raises
        reason = str(error).strip().splitlines()
        raise DissectError(
            f"{kind} does not run on an input of shape {shape}: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error
    if vector.ndim != 2:
        raise DissectError(
            f"{kind} ends in a tensor of shape {tuple(vector.shape)}, not in one vector per image"
        )
    return WholeDissection(model, block, trace, heads, vector.shape[1])


def _image(shape: tuple[int, ...], example: torch.Tensor) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(example.device, example.dtype)


def _heads(trace: Trace) -> list[str]:
    """The classifier's modules, in the order in which they are called; empty where they are none.

    The model's output stands for the vector then.
    """
    owners = [op.owner for op in classifier_ops(trace)]
    plain = all(isinstance(owner.module, (nn.Linear, nn.Conv2d)) and owner.path for owner in owners)
    return list(dict.fromkeys(owner.path for owner in owners)) if plain else []


class _WholeStretch(Stretch):
    """The whole block."""

    def __call__(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = block(x)
        return result

    def uses(self, _name: str) -> bool:
        return True


class WholeDissection(Dissection):
    """See ``Dissection``; of two nodes."""

    def __init__(
        self, model: nn.Module, block: WholeBlock, trace: Trace, heads: Sequence[str], width: int
    ) -> None:
        self._model, self._block = model, block
        image = trace.values[trace.image].tensor
        size = (image.shape[2], image.shape[3])
        own = {id(p) for p in block.parameters()}
        self.classifier = tuple(n for n, p in model.named_parameters() if id(p) not in own)
        total = sum(p.numel() for p in model.parameters())
        params = sum(p.numel() for p in block.parameters())
        self.classifier_params, self.unused_params = total - params, 0
        at_heads = [op.flops for op in trace.ops if op.owner.path in heads]
        self.classifier_flops = sum(at_heads) // 2
        flops = sum(op.flops for op in trace.ops) // 2 - self.classifier_flops
        self.anatomy = Anatomy(
            nodes=(
                Node(
                    index=0,
                    name="input",
                    layout=Layout.NCHW,
                    shape=tuple(image.shape[1:]),
                    grid=size,
                ),
                Node(
                    index=1,
                    name="pre_logits",
                    layout=Layout.NC,
                    shape=(width,),
                    grid=(1, 1),
                    params=params,
                    flops=flops,
                ),
            ),
            method="whole",
        )

    def stretches(self, start: int, stop: int) -> list[Stretch]:
        self.block(start, stop)  # checks them
        node = self.anatomy.nodes[-1]
        return [_WholeStretch(node=node, steps=(), source=0, finish=Finish(()))]

    def block(self, start: int, stop: int) -> nn.Module:
        if (start, stop) != (0, 1):
            raise ValueError(f"no block between nodes {start} and {stop} of 2")
        return self._block

    def features(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield x
        yield self._block.train(self._model.training)(x)


class WholeBlock(nn.Module):
    """A model up to its classifier, with its modules and tensors under their own names."""

    def __init__(self, model: nn.Module, heads: Sequence[str]) -> None:
        super().__init__()
        net = _without(model, heads)
        self._parameters, self._buffers = net._parameters, net._buffers
        self._modules = net._modules
        self._non_persistent_buffers_set = net._non_persistent_buffers_set
        self._net = (net,)  # in a tuple, so that its modules are not listed twice
        self._heads = tuple(heads)
        self._unit_by_name = dict.fromkeys((name for name, _ in self.named_parameters()), 1)
        self.training = model.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        net = self._net[0]
        net.training = self.training
        output = net(x)
        seen = [net.get_submodule(path).taken() for path in self._heads]  # type: ignore[operator]
        ends = list({id(tensor): tensor for tensor in seen}.values())  # heads of one vector
        if not ends:
            ends = [output]
        return Finish(tuple(range(len(ends))), vector=True)(dict(enumerate(ends)))  # type: ignore[no-any-return]


class _End(nn.Module):
    """In a classifier's place: keeps what it would have seen."""

    def __init__(self, width: int, *, last: bool) -> None:
        super().__init__()
        self._width, self._last = width, last
        self._seen: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._seen = x
        shape = list(x.shape)
        shape[-1 if self._last else 1] = self._width
        return x.new_zeros(shape)

    def taken(self) -> torch.Tensor:
        """What was seen, which is kept no longer."""
        seen, self._seen = self._seen, None
        return seen  # type: ignore[no-any-return]


def _without(model: nn.Module, heads: Sequence[str]) -> nn.Module:
    """The same model, its submodules the same objects, but with other modules for ``heads``."""
    made = _shallow(model)
    for path in heads:
        *parents, name = path.split(".")
        place = made
        for parent in parents:
            place._modules[parent] = _shallow(place.get_submodule(parent))
            place = place.get_submodule(parent)
        head = place.get_submodule(name)
        if isinstance(head, nn.Linear):
            place._modules[name] = _End(head.out_features, last=True)
        else:
            assert isinstance(head, nn.Conv2d)
            place._modules[name] = _End(head.out_channels, last=False)
    return made


def _shallow(module: nn.Module) -> nn.Module:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made
