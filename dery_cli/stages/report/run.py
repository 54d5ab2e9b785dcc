"""One page about an assembly: what ``dery report`` runs once its options are right."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
import torch

import dery_cli
from dery_cli.core.scoring import network_outputs
from dery_cli.data.batches import ImageBatches
from dery_cli.data.sets import DataSet, open_checked
from dery_cli.data.splits import read_image
from dery_cli.errors import DeryError, StaleError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.files import not_written, replace_text
from dery_cli.io.records import Artifact, library_versions
from dery_cli.runtime.devices import pick_device
from dery_cli.runtime.printable import printable
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_count, show_decimals
from dery_cli.stages.report.config import ReportConfig
from dery_cli.stages.report.figures import Drawn, draw_all, draw_confusion
from dery_cli.stages.report.gather import Gathered, gather
from dery_cli.zoo.networks import LoadedAssembly, load_assembly

CONFUSED = 12
"""Images of the worst confusions, at most two of each."""
THUMB = 96
"""Pixels a side."""
BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported:
    """What was written.

    Args:
        page: The page.
        bytes: Of the page.
        figures: Their names, in order.
        missing: What the page leaves out, and why.
    """

    page: Path
    bytes: int
    figures: list[str]
    missing: list[str]


def report(terminal: Terminal, space: Workspace, config: ReportConfig) -> Reported:
    """Gather, draw and write.

    Raises:
        StaleError: There is no zoo, or no assembly and no run of that name.
        DeryError: Something is damaged, or cannot be written.
    """
    found = gather(space, config.name)
    missing = list(found.missing)
    if found.assembly is None and found.run is None and config.name != "default":
        raise StaleError(f"there is no assembly or run '{config.name}'", "dery assemble")
    with terminal.progress("drawing", 2) as bar:
        drawn = draw_all(found)
        bar.advance()
        confused: list[dict[str, str]] = []
        if config.images:
            try:
                shown = _confusion(terminal, space, found, config)
            except DeryError as error:
                missing.append(f"confusion: {error.message}")
            else:
                if shown is not None:
                    drawn.append(shown[0])
                    confused = shown[1]
        bar.advance()
    text = _page(found, drawn, confused, missing)
    replace_text(config.to, text)
    if config.figures is not None:
        _write_figures(config.figures, drawn)
    return Reported(
        page=config.to,
        bytes=len(text.encode()),
        figures=[one.name for one in drawn],
        missing=missing,
    )


def _page(
    found: Gathered, drawn: list[Drawn], confused: list[dict[str, str]], missing: list[str]
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    record = found.assembly
    title = "model zoo" if record is None else record.data["name"]
    subtitle = f"{len(found.zoo)} donors"
    if record is not None:
        subtitle = f"assembled of {len(found.zoo)} donors for {record.data['target']}"
    return environment.get_template("page.html").render(
        title=printable(title),
        subtitle=printable(subtitle),
        facts=list(_facts(found)),
        conflicts=[printable(words) for words in _conflicts(found)],
        comparison=[] if record is None else list(_comparison(record)),
        budget="" if record is None else record.data["budget"],
        figures=[
            {
                "name": one.name,
                "heading": one.heading,
                "words": printable(one.words),
                "svg": one.svg(),
            }
            for one in drawn
        ],
        confused=confused,
        provenance=[(name, printable(value)) for name, value in _provenance(found)],
        missing=[printable(words) for words in missing],
    )


def _facts(found: Gathered) -> Iterator[tuple[str, str]]:
    if found.assembly is not None:
        data = found.assembly.data
        yield show_count(data["params"]), "parameters"
        yield show_count(data["flops"]), "multiply-adds an image"
        if data["test_top1"] is not None:
            yield f"{data['test_top1']:.4f}", "test top-1 untrained"
        learning = data["learning"]
        if learning is not None and learning["tau"] is not None:
            yield f"{learning['tau']:.2f}", "tau of foreseen and measured"
    if found.run is not None and found.run.data["test_top1"] is not None:
        yield f"{found.run.data['test_top1']:.4f}", "test top-1 fine-tuned"


def _comparison(record: Artifact) -> Iterator[dict[str, str]]:
    for row in record.data["comparison"]:
        yield {
            "role": row["role"],
            "network": printable(row["network"]),
            "params": show_count(row["params"]),
            "flops": show_count(row["flops"]),
            "trial": show_decimals(row["held_out"]) or "-",
            "test": show_decimals(row["test_top1"]) or "-",
        }


NO_COMMERCE, SHARE_ALIKE = ("-nc", "noncommercial", "non-commercial"), ("gpl", "-sa")


def _conflicts(found: Gathered) -> Iterator[str]:
    """What the licences of the network's donors ask for, as far as their names tell."""
    if found.assembly is None:
        return
    licences = found.assembly.data["licenses"]
    for licence, donors in licences.items():
        low = licence.lower()
        if any(word in low for word in NO_COMMERCE):
            yield f"{', '.join(donors)}: {licence} forbids commercial use"
        if any(word in low for word in SHARE_ALIKE):
            yield f"{', '.join(donors)}: {licence} asks for the same licence of what is made of it"
        if low in ("", "unknown"):
            yield f"{', '.join(donors)}: the licence is not known"
    if len(licences) > 1:
        yield f"parts under different licences meet: {', '.join(sorted(licences))}"


def _provenance(found: Gathered) -> Iterator[tuple[str, str]]:
    yield "dery", dery_cli.__version__
    yield from library_versions().items()
    for what, record in (("assembly", found.assembly), ("run", found.run)):
        if record is not None:
            yield f"{what} sha256", record.sha256
            yield f"{what} seed", str(record.seed)
            yield (
                f"{what} options",
                ", ".join(
                    f"{name} {value}"
                    for name, value in record.options.items()
                    if value not in (None, [])
                ),
            )
    if found.assembly is not None:
        for licence, donors in found.assembly.data["licenses"].items():
            yield f"licence {licence}", ", ".join(donors)
        for block in found.assembly.data["network"]["blocks"]:
            yield f"weights of {block['donor']}", block["weights_sha256"]


def _confusion(
    terminal: Terminal, space: Workspace, found: Gathered, config: ReportConfig
) -> tuple[Drawn, list[dict[str, str]]] | None:
    """The confusion matrix of the run, or of the assembly, and images of its worst confusions."""
    record = found.run or found.assembly
    if record is None:
        return None
    folder = space.run(config.name) if found.run is not None else space.assembly(config.name).parent
    assembly = load_assembly(folder)
    data = open_checked(terminal, record.data["target"], skip_bad=record.data["target_skip_bad"])
    if assembly.classes is None or data.test is None or data.test.labels is None:
        return None
    logits_NK = _outputs(assembly, data, pick_device(config.device))
    label_N = np.array([int(label) for label in data.test.labels])
    guess_N = logits_NK.argmax(1).numpy()
    count = len(assembly.classes)
    confusion_KK = np.zeros((count, count), dtype=np.int64)
    np.add.at(confusion_KK, (label_N, guess_N), 1)
    shots = _shots(data, assembly.classes, label_N, guess_N, confusion_KK)
    return draw_confusion(confusion_KK.tolist(), assembly.classes), list(shots)


def _outputs(assembly: LoadedAssembly, data: DataSet, device: torch.device) -> torch.Tensor:
    assert data.test is not None
    batches = ImageBatches(
        data.test,
        range(len(data.test)),
        assembly.transform.input,
        crop=assembly.transform.crop,
        batch_size=BATCH,
        device=device,
    )
    return network_outputs(assembly.network.to(device), batches).cpu()


def _shots(
    data: DataSet,
    classes: tuple[str, ...],
    label_N: np.ndarray,
    guess_N: np.ndarray,
    confusion_KK: np.ndarray,
) -> Iterator[dict[str, str]]:
    """Two images of each of the most frequent confusions."""
    assert data.test is not None
    wrong_KK = confusion_KK - np.diag(np.diag(confusion_KK))
    order = np.argsort(-wrong_KK, axis=None, kind="stable")[: CONFUSED // 2]
    for true, answer in zip(*np.unravel_index(order, wrong_KK.shape), strict=True):
        if not wrong_KK[true, answer]:
            return
        places = np.flatnonzero((label_N == true) & (guess_N == answer))[:2]
        for place in places.tolist():
            image = read_image(data.test, place).convert("RGB")
            image.thumbnail((THUMB, THUMB))
            stream = io.BytesIO()
            image.save(stream, format="PNG")
            yield {
                "true": printable(classes[true]),
                "answer": printable(classes[answer]),
                "png": base64.b64encode(stream.getvalue()).decode(),
            }


def _write_figures(folder: Path, drawn: list[Drawn]) -> None:
    """Each figure as SVG and PNG.

    Raises:
        DeryError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one in drawn:
            standing = one.svg().replace("<svg ", '<svg color="#1c2330" ', 1)
            (folder / f"{one.name}.svg").write_text(standing, encoding="utf-8")
            (folder / f"{one.name}.png").write_bytes(one.png())
    except OSError as error:
        raise not_written(folder, error) from error
