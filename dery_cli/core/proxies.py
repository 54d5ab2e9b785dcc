"""Training-free proxies: scores of an untrained network that stand for its accuracy after training.

Each takes the network (pre-logits out), a few batches of real images of the target data, and their
labels where there are any; larger is better. Proxies of other packages enter by the entry-point
group ``dery.proxies``, as these do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from dery_cli.core.numerics import double
from dery_cli.core.scoring import network_outputs
from dery_cli.core.stitching.probe import probe_accuracy

_ACTIVATIONS = ("relu", "relu6", "gelu", "silu", "swish", "mish", "hardswish", "elu", "leakyrelu")


@dataclasses.dataclass(frozen=True)
class ProxyInputs:
    """What a proxy may look at.

    Args:
        network: Images to pre-logits (N, C), in eval mode.
        batches: Starts a pass over normalised image batches.
        labels: Class index of each image, in order, or None.
        num_classes: Number of classes, or None without labels.
    """

    network: nn.Module
    batches: Callable[[], Iterable[Tensor]]
    labels: Sequence[int] | None
    num_classes: int | None


def probe(inputs: ProxyInputs) -> float:
    """Cross-validated accuracy of the closed-form classifier on the pre-logits.

    Raises:
        ValueError: There are no labels.
    """
    if inputs.labels is None or inputs.num_classes is None:
        raise ValueError("the proxy 'probe' needs labels")
    x_NC = network_outputs(inputs.network, inputs.batches())
    return probe_accuracy(x_NC, torch.tensor(list(inputs.labels)), inputs.num_classes)


def naswot(inputs: ProxyInputs, *, batches: int = 5, batch_size: int = 32) -> float:
    """Log-determinant of the kernel of binary activation codes (Mellor et al., ICML 2021).

    Code: the sign of every activation layer's input. Mean over ``batches`` batches of
    ``batch_size`` images. Networks without an activation layer score minus infinity.
    """
    kernels: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        code_ND = (args[0].flatten(1) > 0).float()
        agree_NN = code_ND @ code_ND.T + (1 - code_ND) @ (1 - code_ND).T
        kernels.append(double(agree_NN))

    layers = [m for m in inputs.network.modules() if _is_activation(m)]
    # an in-place activation would have overwritten its input before the hook sees it
    inplace = [m for m in layers if getattr(m, "inplace", False)]
    for layer in inplace:
        layer.inplace = False  # type: ignore[assignment]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    scores = []
    try:
        with torch.no_grad():
            for x in _rebatched(inputs.batches(), batch_size, batches):
                kernels.clear()
                inputs.network(x)
                if kernels:
                    kernel_NN = torch.stack(kernels).sum(0)
                    scores.append(float(torch.linalg.slogdet(kernel_NN)[1]))
    finally:
        for hook in hooks:
            hook.remove()
        for layer in inplace:
            layer.inplace = True  # type: ignore[assignment]
    return sum(scores) / len(scores) if scores else -math.inf


def params(inputs: ProxyInputs) -> float:
    """Number of parameters: the baseline every proxy has to beat."""
    return float(sum(p.numel() for p in inputs.network.parameters()))


def _is_activation(module: nn.Module) -> bool:
    return type(module).__name__.lower().startswith(_ACTIVATIONS) and not list(module.children())


def _rebatched(batches: Iterable[Tensor], size: int, count: int) -> Iterable[Tensor]:
    images: list[Tensor] = []
    given = 0
    for batch in batches:
        images.extend(batch)
        while len(images) >= size and given < count:
            yield torch.stack(images[:size])
            images = images[size:]
            given += 1
        if given == count:
            return
    if given == 0 and len(images) > 1:
        yield torch.stack(images)
