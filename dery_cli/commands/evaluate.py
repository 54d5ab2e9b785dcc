"""``dery eval``: an assembly or a run on test images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dery_cli.commands import _completion
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
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_decimals
from dery_cli.stages.evaluate.config import EvaluateConfig, find_network

if TYPE_CHECKING:
    from dery_cli.training.evaluate import EvalResult


@command
def evaluate(
    terminal: Terminal,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[WHAT]",
            help="runs/NAME, assemblies/NAME or a folder; the run 'default', else the assembly.",
            autocompletion=_completion.networks,
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
    """Report top-1 and top-5 accuracy, accuracy per class, and images per second.

    For example: dery eval runs/default --data photos
    """
    config = EvaluateConfig(
        data=data,
        skip_bad=skip_bad,
        split=split,
        batch_size=batch_size,
        device=device,
        workers=workers,
    )
    space = open_workspace(workspace)
    folder = find_network(space, what)
    from dery_cli.stages.evaluate.run import evaluate_network

    found = evaluate_network(terminal, folder, config)
    result = found.result
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.4f}"
    if what is None and folder != space.run("default") and space.run("default").is_dir():
        terminal.warn(f"the run 'default' is unfinished or gone: this is {folder}")
    terminal.say(
        f"{folder}: top-1 {result.top1:.4f}{top5} on {result.images} {split} images of "
        f"{found.data}, "
        f"loss {result.loss:.4f}, {result.images_per_second:.0f} images/s"
    )
    _show_classes(terminal, result, confusion=confusion)
    return {
        "folder": str(folder),
        "data": found.data,
        "split": split,
        **result.to_json(),
    }


def _show_classes(terminal: Terminal, result: EvalResult, *, confusion: bool) -> None:
    rows = zip(result.classes, result.confusion, result.per_class, strict=True)
    terminal.table(
        None,
        ["class", "images", "accuracy"],
        [[name, sum(row), show_decimals(top1)] for name, row, top1 in rows],
    )
    if confusion:
        terminal.table(
            "confusion: a row per true class, a column per answer",
            ["", *result.classes],
            [[n, *row] for n, row in zip(result.classes, result.confusion, strict=True)],
        )
