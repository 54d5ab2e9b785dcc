"""Options of ``dery zoo add`` and ``dery zoo check``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dery_cli.errors import UsageError
from dery_cli.sizes import check_between
from dery_cli.zoo.manifest import LARGEST_SIDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddConfig:
    """Options of ``dery zoo add``.

    Args:
        specs: Models to add.
        name: Of the donor, where there is a single spec.
        weights: Local checkpoint, where there is a single spec.
        weights_key: Which of the state dicts in it.
        license: Of the weights, where there is a single spec; what the plugin says where None.
        task: What they were trained on; the same.
        source: Where they come from; the same.
        manifest: A list of further models, or None.
        image_size: Input side in pixels; the model's own where None.
        pretrained: Load weights, or leave them random.
        allow_partial: Load of ``weights`` what fits.
        offline: Fetch nothing.

    Raises:
        UsageError: These do not go together.
    """

    specs: tuple[str, ...] = ()
    name: str | None = None
    weights: Path | None = None
    weights_key: str | None = None
    license: str | None = None
    task: str | None = None
    source: str | None = None
    manifest: str | None = None
    image_size: int | None = None
    pretrained: bool = True
    allow_partial: bool = False
    offline: bool = False

    def __post_init__(self) -> None:
        told = (self.name, self.weights, self.license, self.task, self.source)
        if any(value is not None for value in told) and len(self.specs) != 1:
            raise UsageError(
                "--as, --weights, --license, --task and --source go with a single SPEC",
                f"got {len(self.specs)}",
            )
        if self.weights_key is not None and self.weights is None:
            raise UsageError("--weights-key goes with --weights")
        if self.image_size is not None:
            check_between("--image-size", self.image_size, 1, LARGEST_SIDE)
        if not self.specs and self.manifest is None:
            raise UsageError(
                "nothing to add", "dery zoo add SPEC..., or dery zoo add --manifest demo"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Options of ``dery zoo check``.

    Args:
        specs: Models to check.
        all_of: Check every model of this plugin too.
        image_size: Input side in pixels; the model's own where None.

    Raises:
        UsageError: The side is no side.
    """

    specs: tuple[str, ...] = ()
    all_of: str | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_between("--image-size", self.image_size, 1, LARGEST_SIDE)
