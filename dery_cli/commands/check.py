"""``dery zoo check``: prove that models keep the contract of the plugins' door."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dery_cli.commands._options import Result, command
from dery_cli.commands._tables import (
    COST_COLUMNS,
    NODE_COLUMNS,
    cost_cells,
    node_cells,
    whole_cost_cells,
)
from dery_cli.errors import DeryError
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import show_range
from dery_cli.stages.zoo.check import check_models
from dery_cli.stages.zoo.config import CheckConfig

if TYPE_CHECKING:
    from dery_cli.zoo.check import Report


@command
def check(
    terminal: Terminal,
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPEC...", help="plugin/name[.tag], such as timm/resnet18"),
    ] = None,
    all_of: Annotated[
        str | None,
        typer.Option("--all", metavar="PLUGIN", help="Check every model of this plugin."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="Input side in pixels; the model's own else.")
    ] = None,
) -> Result:
    """Prove on random weights that models can be taken apart, costed, trained and saved.

    For each model: its card; it builds without weights and network; its blocks in a row equal it;
    params and multiply-adds add up; it trains as a whole and in blocks alike; its weights survive
    a file. Exit code 1 if any check fails. A model that cannot be cut is reported as 'whole only':
    it serves as a whole donor.

    For example: dery zoo check timm/resnet18
    """
    config = CheckConfig(specs=tuple(specs or ()), all_of=all_of, image_size=image_size)
    reports = check_models(terminal, config)
    _show(terminal, reports, details=all_of is None)
    results = [{"spec": spec, **report.to_json()} for spec, report in reports.items()]
    failed = [spec for spec, report in reports.items() if not report.ok]
    if failed:
        raise DeryError(
            f"{len(failed)} of {len(reports)} models break the contract: {failed[0]}"
            f"{f' and {len(failed) - 1} more' if len(failed) > 1 else ''}: "
            f"{_why(reports[failed[0]])}",
            details={"models": results, "failed": failed},
        )
    return {"models": results, "failed": []}


def _why(report: Report) -> str:
    return "; ".join(f"{c.name}: {c.detail}" for c in report.failures)


def _show(terminal: Terminal, reports: dict[str, Report], *, details: bool) -> None:
    for spec, report in reports.items():
        if details:
            _nodes(terminal, spec, report)
            for found in report.checks:
                state = "ok    " if found.ok else "FAILED"
                terminal.say(f"{state} {found.name}: {found.detail}")
            terminal.say()
    terminal.table(
        None,
        ["model", "result", "units", "layout", "stride", "tokens", *COST_COLUMNS],
        [_row(spec, report) for spec, report in reports.items()],
    )
    for spec, report in reports.items():
        if not report.ok:
            terminal.warn(f"{spec} breaks the contract: {_why(report)}")
        elif report.whole_only is not None:
            terminal.say(f"{spec} is whole only: {report.whole_only}")


def _row(spec: str, report: Report) -> list[object]:
    result = "FAILED" if not report.ok else "ok" if report.whole_only is None else "whole only"
    anatomy = report.anatomy
    if anatomy is None:
        return [spec, result, *[None] * 6]
    return [
        spec,
        result,
        anatomy.num_units,
        "/".join(report.layouts()) or None,
        show_range(report.strides()),
        show_range(report.tokens()),
        *whole_cost_cells(anatomy),
    ]


def _nodes(terminal: Terminal, spec: str, report: Report) -> None:
    if report.anatomy is None or report.input is None:
        return
    height, width = report.input.image_size
    terminal.table(
        f"{spec} at {height}x{width}",
        [*NODE_COLUMNS, "stride", "tokens", *COST_COLUMNS],
        [
            [
                *node_cells(node),
                f"{height / node.grid[0]:g}" if node.layout != "NC" else None,
                f"{node.shape[0]}" + (f" ({p} prefix)" if (p := node.num_prefix_tokens) else "")
                if node.layout == "NLC"
                else None,
                *cost_cells(node.params, node.flops),
            ]
            for node in report.anatomy.nodes
        ],
    )
