"""``dery eval``: an assembly or a run on test images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dery_cli.commands._options import (
    DataOption,
    DeviceOption,
    Result,
    SkipBadOption,
    WorkersOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.data.sets import ImageDataset, open_checked
from dery_cli.errors import StaleError, UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import check_at_least

SPLITS = ("test", "train")


@command
def evaluate(
    terminal: Terminal,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[WHAT]",
            help="runs/NAME, assemblies/NAME or a folder; the run 'default', else the assembly.",
        ),
    ] = None,
    data: DataOption = None,
    skip_bad: SkipBadOption = False,
    split: Annotated[str, typer.Option("--split", help="Which images: test or train.")] = "test",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images a batch.")] = 256,
    confusion: Annotated[
        bool, typer.Option("--confusion", help="Print the confusion matrix too.")
    ] = False,
    workspace: WorkspaceOption = None,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
) -> Result:
    """Report top-1 and top-5 accuracy, accuracy per class, and images per second."""
    if split not in SPLITS:
        raise UsageError(f"--split is '{split}'", f"choose from {', '.join(SPLITS)}")
    check_at_least("--batch-size", batch_size)
    folder = _find(open_workspace(workspace), what)

    from dery_cli.data.batches import as_dataset
    from dery_cli.data.classes import check_classes
    from dery_cli.data.samples import SEEN, held_out_anew
    from dery_cli.runtime.devices import pick_device
    from dery_cli.training.evaluate import evaluate as score
    from dery_cli.zoo.networks import load_assembly

    assembly = load_assembly(folder)
    if assembly.classes is None:
        raise UsageError(
            f"{folder} has no head: it was made without labels", "dery assemble --data SPEC"
        )
    target = assembly.record.data
    skip_bad = skip_bad or (data is None and target.get("target_skip_bad", False))
    dataset = open_checked(terminal, data or target["target"], skip_bad=skip_bad)
    check_classes(dataset, assembly.classes)
    images = dataset.test if split == "test" else dataset.train
    if dataset.classes is None:
        raise UsageError(f"{dataset.spec} has no labels", "give class folders")
    if images is None:
        raise UsageError(f"{dataset.spec} has no test images", "--split train")
    if split == "test" and held_out_anew(assembly.record, dataset):
        terminal.warn(f"the images of {dataset.spec} changed since the network was trained: {SEEN}")
    with terminal.progress("evaluating", len(images)) as bar:
        result = score(
            assembly.network,
            as_dataset(ImageDataset(images, assembly.transform)),
            classes=assembly.classes,
            batch_size=batch_size,
            device=pick_device(device),
            workers=workers,
            progress=lambda done, _total: bar.update(done),
        )
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.4f}"
    terminal.say(
        f"top-1 {result.top1:.4f}{top5} on {result.images} {split} images of {dataset.spec}, "
        f"loss {result.loss:.4f}, {result.images_per_second:.0f} images/s"
    )
    terminal.table(
        None,
        ["class", "images", "accuracy"],
        [
            [name, sum(row), None if value is None else f"{value:.4f}"]
            for name, row, value in zip(
                result.classes, result.confusion, result.per_class, strict=True
            )
        ],
    )
    if confusion:
        terminal.table(
            "confusion: a row per true class, a column per answer",
            ["", *result.classes],
            [[n, *row] for n, row in zip(result.classes, result.confusion, strict=True)],
        )
    return {"folder": str(folder), "data": dataset.spec, "split": split, **result.to_json()}


def _find(space: Workspace, what: str | None) -> Path:
    if what is None:
        for path in (space.run("default"), space.assembly("default").parent):
            if (path / "run.json").is_file() or (path / "assembly.json").is_file():
                return path
        raise StaleError(f"no run or assembly 'default' in {space.root}", "dery assemble")
    for path in (Path(what), space.root / what):
        if path.is_dir():
            return path
    raise UsageError(
        f"no such run or assembly: {what}", "give runs/NAME, assemblies/NAME or a folder"
    )
