"""Training-free proxies: scores of an untrained network that stand for its accuracy after training.

Each takes the network (pre-logits out), a few batches of real images of the target data, and their
labels where it reads any; larger is better. Proxies of other packages enter by the entry-point
group ``dery.proxies``, as these do. What a proxy is, what it costs and whether it reads labels
stands in its ``about``.
"""

from __future__ import annotations

from collections.abc import Callable

from dery_cli.core.training_free.activations import jacov, naswot
from dery_cli.core.training_free.gradients import fisher, grad_norm, snip, synflow, zico
from dery_cli.core.training_free.inputs import About, ProxyInputs, about
from dery_cli.core.training_free.plain import flops, params, probe

__all__ = [
    "PROXIES",
    "About",
    "ProxyInputs",
    "about",
    "fisher",
    "flops",
    "grad_norm",
    "jacov",
    "naswot",
    "params",
    "probe",
    "snip",
    "synflow",
    "zico",
]

PROXIES: dict[str, Callable[[ProxyInputs], float]] = {
    "fisher": fisher,
    "flops": flops,
    "grad_norm": grad_norm,
    "jacov": jacov,
    "naswot": naswot,
    "params": params,
    "probe": probe,
    "snip": snip,
    "synflow": synflow,
    "zico": zico,
}
"""By name, as the entry points have them."""
