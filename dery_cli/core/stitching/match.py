"""Training an assembly's stitches, without labels, to give what its last donor would.

After "Revisiting Model Stitching" (arXiv 2603.12433): the stitches alone are trained so that the
network's pre-logits match those of the donor of its last block on the same images. Blocks keep
their weights and their batch-norm statistics.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from dery_cli.core.numerics import double
from dery_cli.core.stitching.network import AssembledNetwork

MATCH_STEPS = 150
MATCH_LR = 3e-3
MATCH_BATCH = 64
HOLD_OUT = 5
"""Every so many-th image is not trained on: it tells whether the training helped."""


@dataclasses.dataclass(frozen=True)
class Match:
    """What a training of the stitches came to.

    Args:
        before: R2 of the network's pre-logits on the images held out, before.
        after: The same afterwards; where it was not better, the stitches are as they were.
        kept: Whether the trained stitches were kept.
    """

    before: float
    after: float
    kept: bool


def match_features(
    network: AssembledNetwork,
    x_NCHW: Tensor,
    wanted_NC: Tensor,
    *,
    steps: int = MATCH_STEPS,
    lr: float = MATCH_LR,
    batch_size: int = MATCH_BATCH,
    seed: int = 0,
) -> Match:
    """Train ``network.stitches`` in place; the network is in eval mode before and after.

    Args:
        network: An assembly; a head is not used.
        x_NCHW: Normalised images.
        wanted_NC: Pre-logits of the last block's donor for the same images, as it sees them.
        steps: Updates (Adam, cosine to 0).
        lr: Learning rate it begins with.
        batch_size: Images an update.
        seed: Of the order of the images.

    Raises:
        ValueError: The network has no stitch, or there are fewer than two images.
    """
    if not network.stitches or len(x_NCHW) < 2:
        raise ValueError("matching needs a network with stitches, and images")
    held_out_N = torch.arange(len(x_NCHW)) % HOLD_OUT == HOLD_OUT - 1
    held_out_N[-1] = True
    train_x, train_y = x_NCHW[~held_out_N], wanted_NC[~held_out_N]
    test_x, test_y = x_NCHW[held_out_N], wanted_NC[held_out_N]
    scale = train_y.var(0, correction=0).sum().clamp(min=1e-12)
    before = _r2(network, test_x, test_y, batch_size)
    start = {name: tensor.clone() for name, tensor in network.stitches.state_dict().items()}
    required = {name: p.requires_grad for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    trained = list(network.stitches.parameters())
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        if len(order) < min(batch_size, len(train_x)):
            order = torch.randperm(len(train_x), generator=generator).tolist()
        now, order = order[:batch_size], order[batch_size:]
        error = functional.mse_loss(
            network.forward_features(train_x[now]), train_y[now], reduction="sum"
        )
        optimizer.zero_grad()
        (error / (scale * len(now))).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(required[name])
        parameter.grad = None
    after = _r2(network, test_x, test_y, batch_size)
    kept = after > before
    if not kept:
        network.stitches.load_state_dict(start)
    return Match(before, after, kept)


def _r2(network: AssembledNetwork, x_NCHW: Tensor, wanted_NC: Tensor, batch_size: int) -> float:
    """Share of the variance of the wanted features that the network explains."""
    with torch.no_grad():
        given_NC = torch.cat([network.forward_features(x) for x in torch.split(x_NCHW, batch_size)])
    spread = double(wanted_NC - wanted_NC.mean(0)).square().sum()
    error = double(given_NC - wanted_NC).square().sum()
    return 1 - float(error / spread) if spread > 0 else 0.0
