"""Proxies that look at gradients of weights.

All take the network in eval mode (batch norm with its statistics, no dropout), the weights of its
convolutions and linear maps, and a fresh seeded head on its pre-logits where a loss is needed; the
head's own weights do not count. Values a batch gives are averaged over the few batches.

Legend: N images of a batch, w a weight, g its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dery_cli.core.training_free.inputs import ProxyInputs, stated
from dery_cli.core.training_free.passes import gradients, losses, trainable_copy, weights_of

_ABDELFATTAH = "as in Abdelfattah et al.: Zero-Cost Proxies for Lightweight NAS, ICLR 2021"


def _mean_over_batches(
    inputs: ProxyInputs, name: str, score: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """The sum over weights of ``score(w, g)``, averaged over the few batches."""
    found = []
    with trainable_copy(inputs.network) as network:
        weights = weights_of(network)
        if not weights:
            return math.nan
        for loss in losses(inputs, network, name):
            pairs = zip(weights, gradients(loss, weights), strict=True)
            found.append(sum(float(score(w.detach(), g)) for w, g in pairs))
    return sum(found) / len(found) if found else math.nan


@stated(
    source=f"{_ABDELFATTAH} (arXiv 2101.08134)",
    cost="one forward and backward pass of the few images",
    reads_labels=True,
)
def grad_norm(inputs: ProxyInputs) -> float:
    """Sum over weights of the Euclidean norm of the gradient of the loss: sum ||g||.

    Raises:
        ValueError: There are no labels.
    """
    return _mean_over_batches(inputs, "grad_norm", lambda _, g: torch.linalg.vector_norm(g))


@stated(
    source=f"Lee, Ajanthan, Torr: SNIP, ICLR 2019 (arXiv 1810.02340); {_ABDELFATTAH}",
    cost="one forward and backward pass of the few images",
    reads_labels=True,
)
def snip(inputs: ProxyInputs) -> float:
    """Sum of the weights' connection sensitivities: sum |w g|.

    Raises:
        ValueError: There are no labels.
    """
    return _mean_over_batches(inputs, "snip", lambda w, g: (w * g).abs().sum())


@stated(
    source="Li, Yang, Bhardwaj, Marculescu: ZiCo, ICLR 2023 (arXiv 2301.11300)",
    cost="one forward and backward pass of the few images",
    reads_labels=True,
)
def zico(inputs: ProxyInputs) -> float:
    """Sum over weights (layers) of log sum E|g| / sqrt(Var g), over the few batches.

    A number whose gradient does not vary is left out, and so is a layer without any other. NaN
    where there are not two batches, or no layer is left.

    Raises:
        ValueError: There are no labels.
    """
    with trainable_copy(inputs.network) as network:
        weights = weights_of(network)
        moments = [_Moments(w) for w in weights]
        count = 0
        for loss in losses(inputs, network, "zico"):
            count += 1
            for moment, g in zip(moments, gradients(loss, weights), strict=True):
                moment.add(g, count)
    if count < 2:
        return math.nan
    found = [score for moment in moments if (score := moment.score(count)) is not None]
    return sum(found) if found else math.nan


class _Moments:
    """Running mean, mean magnitude and squared deviations of gradients (Welford)."""

    def __init__(self, like: Tensor) -> None:
        self._mean = torch.zeros_like(like, requires_grad=False)
        self._size, self._squares = torch.zeros_like(self._mean), torch.zeros_like(self._mean)

    def add(self, g: Tensor, count: int) -> None:
        away = g - self._mean
        self._mean += away / count
        self._squares += away * (g - self._mean)
        self._size += g.abs()

    def score(self, count: int) -> float | None:
        """Log of the sum of E|g| / sqrt(Var g); None where nothing varies."""
        varies = self._squares > 0
        if not varies.any():
            return None
        std = (self._squares[varies].cpu().double() / count).sqrt()
        total = float((self._size[varies].cpu().double() / count / std).sum())
        return math.log(total) if total > 0 else None


@stated(
    source=f"Turner, Crowley, O'Boyle, Storkey, Gray: BlockSwap, ICLR 2020 (arXiv 1906.04113), "
    f"after Theis et al. 2018; {_ABDELFATTAH}",
    cost="one forward and backward pass of the few images",
    reads_labels=True,
)
def fisher(inputs: ProxyInputs) -> float:
    """Fisher information of the channels behind convolutions and linear maps.

    Of each channel c of such a layer's output a, with loss L: 1/(2N) sum over images of
    (sum over positions of a dL/da) squared; summed over channels and layers.

    Raises:
        ValueError: There are no labels.
    """
    found = []
    with trainable_copy(inputs.network, weights=False) as network:
        outputs: list[tuple[Tensor, int]] = []

        def keep(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            # the copy goes on, so that nothing overwrites what is kept
            kept = output if output.requires_grad else output.detach().requires_grad_(True)
            outputs.append((kept, 1 if isinstance(module, nn.modules.conv._ConvNd) else -1))
            return kept.clone()

        layers = [m for m in network.modules() if isinstance(m, _LAYERS)]
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            for loss in losses(inputs, network, "fisher"):
                if not outputs:
                    return math.nan
                grads = torch.autograd.grad(loss, [a for a, _ in outputs], allow_unused=True)
                found.append(
                    sum(
                        _channel_information(a.detach(), g, axis)
                        for (a, axis), g in zip(outputs, grads, strict=True)
                        if g is not None
                    )
                )
                outputs.clear()
        finally:
            for hook in hooks:
                hook.remove()
    return sum(found) / len(found) if found else math.nan


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def _channel_information(a: Tensor, g: Tensor, axis: int) -> float:
    product = a * g
    if a.ndim > 2:
        product_NCG = product.movedim(axis, 1).flatten(2)
        product = product_NCG.sum(2)
    return float(0.5 * product.square().mean(0).sum())


@stated(
    source=f"Tanaka, Kunin, Yamins, Ganguli: SynFlow, NeurIPS 2020 (arXiv 2006.05467); "
    f"{_ABDELFATTAH}",
    cost="one forward and backward pass of one image in double precision, without data",
    reads_labels=False,
)
def synflow(inputs: ProxyInputs) -> float:
    """Log of the synaptic flow: log sum |w dR/dw|, R the sum of the pre-logits.

    In double precision, with the magnitudes of all parameters, one image of ones, and batch norms
    left out; layer norms stay, without which attention would square the flow at every layer. NaN
    where it leaves double precision.
    """
    first = next(iter(inputs.few_batches()), None)
    if first is None:
        return math.nan
    shape = first[0].shape[1:]
    with trainable_copy(inputs.network) as network, _WithoutBatchNorms():
        network = network.cpu().double()
        with torch.no_grad():
            for tensor in network.parameters():
                tensor.abs_()
        weights = weights_of(network)
        if not weights:
            return math.nan
        flow = network(torch.ones(1, *shape, dtype=torch.float64)).sum()
        pairs = zip(weights, gradients(flow, weights), strict=True)
        total = sum(float((w.detach() * g).abs().sum()) for w, g in pairs)
    return math.log(total) if 0 < total < math.inf else math.nan


class _WithoutBatchNorms(TorchFunctionMode):
    """Batch norms give back what they get, whether they are modules or functions."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.batch_norm:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))
