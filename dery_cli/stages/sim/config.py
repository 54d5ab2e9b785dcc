"""Options of ``dery sim``."""

from __future__ import annotations

import dataclasses
from typing import Any

from dery_cli.core.similarity.metric import MetricOptions
from dery_cli.errors import UsageError
from dery_cli.sizes import check_one_of, check_seed
from dery_cli.zoo.plugin import METRIC_GROUP, plugin_names

USES = {
    "cka": ("minibatch", "biased"),
    "rbf_cka": ("minibatch", "biased", "bandwidth"),
    "lr": ("projection",),
    "ridge": ("penalty", "folds"),
}
"""What a built-in metric's result depends on beside the features; a plugin's may depend on all."""

DIRECTIONAL = ("lr", "ridge")
"""Of the built-in metrics those in which sim(i, j) may differ from sim(j, i)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimConfig:
    """Options of ``dery sim``; None where the metric's default is taken.

    Args:
        memory: Bytes that may be in use at once.
    """

    metric: str = "cka"
    minibatch: int | None = None
    biased: bool | None = None
    bandwidth: float | None = None
    projection: int | None = None
    penalty: float | None = None
    folds: int | None = None
    memory: int = MetricOptions.memory
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        check_one_of("--metric", self.metric, tuple(plugin_names(METRIC_GROUP)))
        check_seed(self.seed)
        given = self._given()
        for name in given:
            if name not in USES.get(self.metric, given):
                users = [other for other, used in USES.items() if name in used]
                raise UsageError(
                    f"--{name} is no option of the metric {self.metric}",
                    f"it belongs to {' and '.join(users)}",
                )

    @property
    def built_in(self) -> bool:
        """Whether the metric is one of dery's own."""
        return self.metric in USES

    def _given(self) -> dict[str, Any]:
        names = dict.fromkeys(name for used in USES.values() for name in used)
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def metric_options(self, samples: int) -> MetricOptions:
        """The metric's options for so many samples, but for memory and device.

        Raises:
            UsageError: One is out of its range.
        """
        given = self._given()
        if "minibatch" not in given:
            least = 2 if self.biased else 4
            given["minibatch"] = max(least, min(MetricOptions.minibatch, samples))
        return MetricOptions(seed=self.seed, **given)

    def recorded(self, options: MetricOptions) -> dict[str, Any]:
        """Those of the options that the result depends on; the seed only where it draws."""
        known = dataclasses.asdict(options)
        del known["memory"], known["device"]
        draws = not self.built_in or (self.metric == "lr" and options.projection is not None)
        used = [*USES.get(self.metric, known), *(["seed"] if draws else [])]
        return {name: known[name] for name in used}
