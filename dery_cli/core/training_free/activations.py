"""Proxies of what a network does with different images: codes of activations, input Jacobians.

Legend: N images of a batch, D numbers of an image or units of a layer, C pre-logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dery_cli.core.numerics import double
from dery_cli.core.training_free.inputs import ProxyInputs, stated
from dery_cli.core.training_free.passes import trainable_copy

_ATEN = torch.ops.aten
_ACTIVATIONS = frozenset(
    {
        _ATEN.relu,
        _ATEN.relu_,
        _ATEN.hardtanh,  # ReLU6
        _ATEN.hardtanh_,
        _ATEN.leaky_relu,
        _ATEN.leaky_relu_,
        _ATEN._prelu_kernel,
        _ATEN.elu,
        _ATEN.elu_,
        _ATEN.gelu,
        _ATEN.silu,
        _ATEN.silu_,
        _ATEN.mish,
        _ATEN.mish_,
        _ATEN.hardswish,
        _ATEN.hardswish_,
    }
)
"""Rectifiers and their smooth kin: the sign of the input says which of two regimes a unit is in."""


class _Codes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, over activations, how many units of two images agree in sign.

    Activations are met where they are computed, so that functions count as modules do, and in-place
    ones are seen before they overwrite their input.

    Args:
        images: Of the batch, the first dimension; tensors with another are no images' own.
    """

    def __init__(self, images: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._images = images
        self.kernel_NN: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._overloadpacket in _ACTIVATIONS and len(args[0]) == self._images:
            self._add(args[0])
        return func(*args, **(kwargs or {}))

    def _add(self, x: Tensor) -> None:
        code_ND = (x.flatten(1) > 0).float()
        agree_NN = code_ND @ code_ND.T + (1 - code_ND) @ (1 - code_ND).T
        agree_NN = double(agree_NN).cpu()
        self.kernel_NN = agree_NN if self.kernel_NN is None else self.kernel_NN + agree_NN


@stated(
    source="Mellor, Turner, Storkey, Crowley: Neural Architecture Search without Training, "
    "ICML 2021 (arXiv 2006.04647)",
    cost="one forward pass of the few images",
    reads_labels=False,
)
def naswot(inputs: ProxyInputs) -> float:
    """Log-determinant of the kernel of binary activation codes: log |K|, K_ij the units that agree.

    A unit's bit is the sign of its activation's input: for ReLU whether it is active, for GELU,
    SiLU, Hardswish and their like the same question, as the DeRy paper's code asks it too. Mean
    over the few batches. A network without an activation scores minus infinity.
    """
    scores = []
    with torch.no_grad():
        for x, _ in inputs.few_batches():
            with _Codes(len(x)) as codes:
                inputs.network(x)
            if codes.kernel_NN is not None:
                scores.append(float(torch.linalg.slogdet(codes.kernel_NN)[1]))
    return sum(scores) / len(scores) if scores else -math.inf


JACOV_K = 1e-5
"""Added to eigenvalues, as its authors do."""


@stated(
    source="Mellor, Turner, Storkey, Crowley: Neural Architecture Search without Training, first "
    "version (arXiv 2006.04647v1); as in Abdelfattah et al., ICLR 2021 (arXiv 2101.08134)",
    cost="one forward and backward pass of the few images",
    reads_labels=False,
)
def jacov(inputs: ProxyInputs) -> float:
    """How little the input Jacobians of different images correlate.

    J_n is the gradient, with respect to image n, of the sum of its pre-logits; with v the
    eigenvalues of the correlation matrix of J's rows, the score is -sum(log(v + k) + 1/(v + k)),
    k = 1e-5. Mean over the few batches. NaN where an image's gradient is constant.
    """
    scores = []
    with trainable_copy(inputs.network, weights=False) as network:
        for x, _ in inputs.few_batches():
            x_NCHW = x.clone().requires_grad_(True)
            (jacobian_NCHW,) = torch.autograd.grad(network(x_NCHW).sum(), x_NCHW)
            corr_NN = torch.corrcoef(double(jacobian_NCHW.flatten(1)))
            if not corr_NN.isfinite().all():
                return math.nan
            v_N = torch.linalg.eigvalsh(corr_NN)
            scores.append(-float((torch.log(v_N + JACOV_K) + 1 / (v_N + JACOV_K)).sum()))
    return sum(scores) / len(scores) if scores else math.nan
