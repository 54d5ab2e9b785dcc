"""Options of ``dery demo``."""

from __future__ import annotations

import dataclasses

from dery_cli.sizes import parse_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of ``dery demo``.

    Args:
        max_params: Budget of the assembly, as people write it.
        steps: Updates of each fine-tuning.
    """

    max_params: str = "400k"
    steps: int = 150
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        parse_size(self.max_params, "--max-params")
