"""Options of ``dery export``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from dery_cli.errors import UsageError
from dery_cli.sizes import check_above, check_at_least, check_between, check_one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of ``dery export``.

    Args:
        to: The folder to write.
        format: One of ``FORMATS``.
        fuse: Fold batch norms into the convolutions before them.
        int8: Quantise to eight bits, calibrated on training images.
        max_drop: Points of top-1 on test images that ``int8`` may cost.
        data: Spec of the images to compare on; None for what the network was made for.
        skip_bad: Leave out images that cannot be decoded.
        images: So many are compared, and as many calibrated on.
        tolerance: Largest relative difference between the original and what was exported.
        force: Replace an earlier export.
    """

    to: Path
    format: str
    fuse: bool = False
    int8: bool = False
    max_drop: float = 1.0
    data: str | None = None
    skip_bad: bool = False
    images: int = 256
    tolerance: float = 1e-3
    force: bool = False

    FORMATS: ClassVar[tuple[str, ...]] = ("safetensors", "torch-export", "onnx", "executorch")

    def __post_init__(self) -> None:
        check_one_of("--format", self.format, self.FORMATS)
        check_at_least("--images", self.images)
        check_above("--tolerance", self.tolerance)
        check_between("--max-drop", self.max_drop, 0, 100)
        if self.int8 and self.format != "onnx":
            raise UsageError("--int8 goes with --format onnx", "dery export --format onnx --int8")
        if self.fuse and self.format == "safetensors":
            raise UsageError(
                "--fuse changes the graph, and --format safetensors holds weights alone",
                "use another --format",
            )
