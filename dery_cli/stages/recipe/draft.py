"""A recipe written from what lies in a folder and what the machine has."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dery_cli.data.folders import IMAGE_SUFFIXES
from dery_cli.errors import UsageError
from dery_cli.io.files import replace_text
from dery_cli.runtime.devices import pick_device
from dery_cli.sizes import show_count

CHECKPOINTS = (".pth", ".pt", ".safetensors")
_DEEPEST, _MOST_FOLDERS = 4, 20_000
"""Levels below the folder that are looked at, and folders in all."""
_PARTS = ("train", "training")
_OTHER_PARTS = ("test", "testing", "val", "valid", "validation")
_NO_DATA = "path/to/images"
FIRST_ZOO = (
    "timm/resnet18.a1_in1k",
    "timm/mobilenetv3_large_100.ra_in1k",
    "timm/regnety_008.pycls_in1k",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a draft is written from.

    Args:
        images: Folders of class folders, and how many classes each has, the most first.
        checkpoints: Files of weights, and the timm architecture that a config beside them names.
        device: The best there is.
        cores: Of the CPU.
        free: Bytes of disk.
    """

    images: dict[str, int]
    checkpoints: dict[str, str | None]
    device: str
    cores: int
    free: int


def look_around(root: Path) -> Found:
    """What a folder and the machine have; hidden folders and links to folders are passed over."""
    images: dict[str, int] = {}
    checkpoints: dict[str, str | None] = {}
    pictured: dict[Path, int] = {}
    for folder, files in _walk(root):
        if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in files):
            pictured[folder.parent] = pictured.get(folder.parent, 0) + 1
        for name in sorted(files):
            if Path(name).suffix.lower() in CHECKPOINTS:
                path = folder / name
                checkpoints[path.relative_to(root).as_posix()] = _architecture(folder)
    for folder, classes in pictured.items():
        if classes > 1 and folder.name.lower() not in _OTHER_PARTS:
            whole = folder.parent if folder.name.lower() in _PARTS and folder != root else folder
            images[whole.relative_to(root).as_posix()] = classes
    return Found(
        images=dict(sorted(images.items(), key=lambda item: (-item[1], item[0]))),
        checkpoints=checkpoints,
        device=str(pick_device(None)),
        cores=os.cpu_count() or 1,
        free=shutil.disk_usage(root).free,
    )


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for count, (place, folders, files) in enumerate(os.walk(root)):
        folder = Path(place)
        deep = len(folder.relative_to(root).parts) >= _DEEPEST
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        yield folder, files
        if count >= _MOST_FOLDERS:
            return


def _architecture(folder: Path) -> str | None:
    """What timm's ``config.json`` beside a checkpoint calls its architecture."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def draft(found: Found) -> str:
    """The text of a recipe."""
    return "\n".join([*_head(found), "", *_zoo(found), "", *_stages()]) + "\n"


def _head(found: Found) -> list[str]:
    free = show_count(found.free)
    lines = [
        "# Written by dery init. Look first: dery run RECIPE --dry-run",
        "# Tables are called like the commands, and hold their options: dery COMMAND --help.",
        f"# Here: {found.device}, {found.cores} cores, {free} bytes of disk free.",
        "",
    ]
    best, *others = [*found.images] or [_NO_DATA]
    if not found.images:
        lines.append("# No folder of class folders was found: put yours here, or demo: for digits.")
    else:
        lines.append(f"# {found.images[best]} classes.")
    lines.append(f"data = {_text(best)}")
    lines += [f"# data = {_text(o)} # {found.images[o]} classes" for o in others[:5]]
    lines.append(f"device = {_text(found.device)}")
    lines.append('# workspace = ".dery"')
    return [*lines, "# seed = 0"]


def _zoo(found: Found) -> list[str]:
    lines = ["# Pretrained models; their weights are fetched unless a library has them.", "[[zoo]]"]
    lines += ["specs = [", *(f"  {_text(spec)}," for spec in FIRST_ZOO), "]"]
    for path, architecture in found.checkpoints.items():
        mark = "" if architecture else "# "
        if not architecture:
            lines += ["", "# A checkpoint that was found: say which architecture it is of."]
        else:
            lines.append("")
        spec = f"timm/{architecture or 'ARCHITECTURE'}"
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in Path(path).stem.lower())
        lines += [f"{mark}[[zoo]]", f"{mark}specs = [{_text(spec)}]"]
        lines += [f"{mark}weights = {_text(path)}", f"{mark}as = {_text(name)}"]
    return lines


def _stages() -> list[str]:
    return [
        "[embed]",
        "samples = 1024 # images that the models are compared on",
        "",
        "[sim]",
        "",
        "[partition]",
        "",
        "# An assembly for each budget: default-5m, default-10m. Another target is another table:",
        '# [[assemble]], with data = "FOLDER" and a name of its own.',
        "[[assemble]]",
        'max-params = "5M,10M"',
        '# max-flops = "1G,2G"',
        "# effort = 8 # less is faster",
        "",
        "# Each assembly is fine-tuned.",
        "[finetune]",
        "epochs = 20",
        "",
        "[eval]",
        "",
        "# [export]",
        '# format = "onnx"',
        '# to = "exported"',
        "",
        "# [report]",
        '# to = "report.html"',
    ]


def _text(text: str) -> str:
    """A TOML string: JSON's are, but for the delete character."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def write_draft(path: Path, text: str, *, force: bool) -> None:
    """Write a recipe.

    Raises:
        UsageError: There is one already, and ``force`` is not given.
        DeryError: It cannot be written.
    """
    if path.exists() and not force:
        raise UsageError(f"{path} is there already", "--force, or another name")
    replace_text(path, text)
