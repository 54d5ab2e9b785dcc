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

from dery_cli.core.scoring import network_outputs
from dery_cli.data.batches import ImageBatches
from dery_cli.data.classes import check_classes
from dery_cli.data.sets import DataSet, open_checked
from dery_cli.data.splits import read_image
from dery_cli.errors import DeryError, StaleError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.files import not_written, replace_text
from dery_cli.runtime.devices import pick_device
from dery_cli.runtime.printable import printable
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.report.config import ReportConfig
from dery_cli.stages.report.drawn import Drawn, quiet
from dery_cli.stages.report.facts import (
    commands,
    comparison,
    donors,
    facts,
    licence_warnings,
    provenance,
    refusal,
)
from dery_cli.stages.report.figures import draw_network, draw_sets, draw_similarity, draw_zoo
from dery_cli.stages.report.gather import Gathered, gather
from dery_cli.stages.report.outcomes import (
    draw_confusion,
    draw_costs,
    draw_foreseen,
    draw_training,
)
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
        with quiet():
            drawn = list(_draw_all(found))
        bar.advance()
        confused: list[dict[str, str]] = []
        if config.images:
            try:
                shown = _confusion(terminal, space, found, config)
            except DeryError as error:
                missing.append(f"confusion: {error.message}")
            else:
                if isinstance(shown, str):
                    missing.append(f"confusion: {shown}")
                else:
                    place = next((n for n, one in enumerate(drawn) if one.name == "zoo"))
                    drawn.insert(place, shown[0])
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


def _draw_all(found: Gathered) -> Iterator[Drawn]:
    """Every figure that there is something for, in the order of the page."""
    record = found.assembly
    if record is not None:
        yield draw_network(found.zoo, record)
        entries = found.candidates
        built = (draw_costs(entries, record.data["comparison"]), draw_foreseen(entries))
        yield from (one for one in built if one is not None)
    if found.metrics:
        yield draw_training(found.metrics)
    yield draw_zoo(found.zoo)
    if found.similarity is not None:
        yield draw_similarity(found.similarity.result, found.similarity.index)
    if found.partition is not None:
        yield draw_sets(found.partition)


def _page(
    found: Gathered, drawn: list[Drawn], confused: list[dict[str, str]], missing: list[str]
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    record = found.assembly
    title = "model zoo" if record is None else record.data["name"]
    subtitle = f"{len(found.zoo)} donors"
    if record is not None:
        subtitle = (
            f"assembled of {len(found.zoo)} donors for {record.data['target']}, "
            f"within a budget of {record.data['budget']}"
        )
    return environment.get_template("page.html").render(
        title=printable(title),
        subtitle=printable(subtitle),
        facts=list(facts(found)),
        refusal=refusal(found),
        conflicts=licence_warnings(found),
        comparison=[] if record is None else list(comparison(record)),
        figures=[
            {
                "name": one.name,
                "heading": one.heading,
                "words": printable(one.words),
                "svg": one.svg(),
            }
            for one in drawn
        ],
        donors=list(donors(found.zoo)),
        confused=confused,
        commands=[printable(line).split(" ") for line in commands(found)],
        provenance=[(printable(name), printable(value)) for name, value in provenance(found)],
        missing=[printable(words) for words in missing],
    )


def _confusion(
    terminal: Terminal, space: Workspace, found: Gathered, config: ReportConfig
) -> tuple[Drawn, list[dict[str, str]]] | str:
    """The confusion matrix of the run, or of the assembly, and images of its worst confusions.

    Returns:
        Them, or why there is none.
    """
    record = found.run or found.assembly
    if record is None:
        return "there is no network"
    folder = space.run(config.name) if found.run is not None else space.assembly(config.name).parent
    assembly = load_assembly(folder)
    data = open_checked(terminal, record.data["target"], skip_bad=record.data["target_skip_bad"])
    if assembly.classes is None:
        return "the network has no head: it was made without labels"
    if data.test is None or data.test.labels is None:
        return f"{data.spec} has no labelled test images"
    check_classes(data, assembly.classes)
    logits_NK = _outputs(assembly, data, pick_device(config.device))
    label_N = np.array([int(label) for label in data.test.labels])
    guess_N = logits_NK.argmax(1).numpy()
    count = len(assembly.classes)
    confusion_KK = np.zeros((count, count), dtype=np.int64)
    np.add.at(confusion_KK, (label_N, guess_N), 1)
    shots = _shots(data, assembly.classes, label_N, guess_N, confusion_KK)
    with quiet():
        matrix = draw_confusion(confusion_KK.tolist(), assembly.classes)
    return matrix, list(shots)


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
