"""Options of ``dery report``."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from dery_cli.errors import UsageError
from dery_cli.sizes import check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the page shows, and where it goes.

    Args:
        to: The page.
        figures: Folder for each figure as SVG and PNG; None for none.
        name: Of the assembly, and of the run where there is one.
        images: Show the confusion matrix and example images, for which the network is run.
        force: Replace a page that is there.
        device: Where to compute; None for the best that is there.
    """

    to: Path = Path("report.html")
    figures: Path | None = None
    name: str = "default"
    images: bool = True
    force: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "assembly")
        if any(importlib.util.find_spec(name) is None for name in ("jinja2", "matplotlib")):
            raise UsageError(
                "dery report needs jinja2 and matplotlib", "pip install 'dery-cli[report]'"
            )
        if self.to.exists() and not self.force:
            raise UsageError(f"{self.to} is there already", "--force, or another --to")
