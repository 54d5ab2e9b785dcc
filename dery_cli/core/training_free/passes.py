"""Forward and backward passes for proxies, on a copy: the network that is scored is not changed.

Legend: N images of a batch, C pre-logits, K classes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from dery_cli.core.training_free.inputs import ProxyInputs

HEAD_SEED = 0
"""Of the fresh head that a loss needs: the same for all networks of one width."""


@contextlib.contextmanager
def trainable_copy(network: nn.Module, *, weights: bool = True) -> Iterator[nn.Module]:
    """A block in which gradients are taken, of a copy in eval mode.

    Activations that would overwrite what a gradient needs do not work in place in the copy.

    Args:
        network: Not changed.
        weights: Whether its parameters get gradients.
    """
    with torch.inference_mode(False), torch.enable_grad():
        twin = copy.deepcopy(network).eval().requires_grad_(weights)
        for module in twin.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        yield twin


def fresh_head(num_inputs: int, num_classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (K, C) and bias (K) of a linear classifier as torch initialises it, seeded."""
    generator = torch.Generator().manual_seed(HEAD_SEED)
    bound = num_inputs**-0.5
    weight_KC = torch.rand(num_classes, num_inputs, generator=generator) * 2 - 1
    bias_K = torch.rand(num_classes, generator=generator) * 2 - 1
    return (bound * weight_KC).to(like), (bound * bias_K).to(like)


def losses(inputs: ProxyInputs, network: nn.Module, name: str) -> Iterator[Tensor]:
    """The mean cross entropy of each of the few batches, under a fresh head.

    Args:
        inputs: The few batches, with labels.
        network: The copy to run.
        name: Of the proxy, for the message.

    Raises:
        ValueError: There are no labels.
    """
    head: tuple[Tensor, Tensor] | None = None
    for x, label_N in inputs.labelled_batches(name):
        y_NC = network(x.clone() if x.is_inference() else x)
        if head is None:
            assert inputs.num_classes is not None
            head = fresh_head(y_NC.shape[1], inputs.num_classes, y_NC)
        yield functional.cross_entropy(functional.linear(y_NC, *head), label_N)


def weights_of(network: nn.Module) -> list[nn.Parameter]:
    """The weights of convolutions and linear maps: matrices that are called a weight.

    Norms, biases and position embeddings are none. By name and not by module, since a block may
    hold a donor's weight without the module around it.
    """
    return [
        param
        for name, param in network.named_parameters()
        if param.ndim >= 2 and name.rpartition(".")[2].endswith("weight")
    ]


def gradients(loss: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    """Of each weight; zero where the loss does not depend on it."""
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
