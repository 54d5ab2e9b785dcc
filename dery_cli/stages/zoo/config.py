"""Options of ``dery zoo add`` and ``dery zoo check``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dery_cli.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddConfig:
    """Options of ``dery zoo add``.

    Args:
        specs: Models to add.
        name: Of the donor, where there is a single spec.
        weights: Local checkpoint, where there is a single spec.
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
    manifest: str | None = None
    image_size: int | None = None
    pretrained: bool = True
    allow_partial: bool = False
    offline: bool = False

    def __post_init__(self) -> None:
        if (self.name or self.weights) and len(self.specs) != 1:
            raise UsageError("--as and --weights go with a single SPEC", f"got {len(self.specs)}")
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
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"--image-size is {self.image_size}", "give a side in pixels")
