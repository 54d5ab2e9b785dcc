"""``dery demo``: the whole path on the zoo that comes with dery, each command line shown."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dery_cli.commands._options import (
    DeviceOption,
    Result,
    SeedOption,
    WorkspaceOption,
    command,
)
from dery_cli.runtime.terminal import Terminal, use_terminal
from dery_cli.sizes import parse_size, show_count

MAX_PARAMS = "400k"


@command
def demo(
    terminal: Terminal,
    context: typer.Context,
    max_params: Annotated[
        str, typer.Option("--max-params", metavar="SIZE", help="Budget of the assembly.")
    ] = MAX_PARAMS,
    steps: Annotated[
        int, typer.Option("--steps", help="Updates of each of the three fine-tunings.")
    ] = 150,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> Result:
    """Take ten small pretrained networks apart and build a new one under a budget.

    The donors learnt pictures of clothes; the target is 300 labelled handwritten digits, with 1,497
    held out. Runs the six commands in one process, in a new temporary folder unless --workspace
    names one, and compares the assembly with the best whole donor under the same budget and with
    its own architecture from scratch.
    """
    parse_size(max_params, "--max-params")
    folder = workspace or Path(tempfile.mkdtemp(prefix="dery-demo-"))
    dery = context.find_root().command

    def run_line(words: list[str]) -> Any:
        return dery.main(args=words, prog_name="dery", standalone_mode=False)

    run = _Runner(run_line, terminal, folder, seed, device)
    started = time.monotonic()
    run("zoo add --manifest demo")
    run("embed --data demo:")
    run("sim")
    run("partition")
    assembled = run(f"assemble --max-params {max_params}")
    tune = f"finetune --steps {steps}"
    rows = [_row("assembly", run(f"{tune} --name assembly"), run.seconds)]
    whole = next((r for r in assembled["comparison"] if r["role"] == "best whole model"), None)
    if whole is not None:
        donor = whole["blocks"][0][0]
        rows.append(
            _row("best whole model", run(f"{tune} --donor {donor} --data demo:"), run.seconds)
        )
    rows.append(_row("from scratch", run(f"{tune} --scratch --name scratch"), run.seconds))
    seconds = time.monotonic() - started
    use_terminal(terminal)
    _show(terminal, rows, max_params, steps, seconds)
    terminal.say(f"everything is in {folder}; the assembly loads with")
    terminal.say(f'  dery_cli.load_assembly("{folder / "runs" / "assembly"}")')
    return {
        "workspace": str(folder),
        "budget": assembled["budget"],
        "commands": run.lines,
        "rows": rows,
        "seconds": seconds,
    }


class _Runner:
    """Runs command lines in this process and shows them."""

    def __init__(
        self,
        dery: Callable[[list[str]], Any],
        terminal: Terminal,
        folder: Path,
        seed: int,
        device: str | None,
    ) -> None:
        self._dery, self._terminal, self._folder = dery, terminal, folder
        self._seed, self._device = seed, device
        self.lines: list[str] = []
        self.seconds = 0.0

    def __call__(self, line: str) -> dict[str, Any]:
        """Run ``dery LINE`` and give its result."""
        words = [*shlex.split(line), "--workspace", str(self._folder)]
        name = words[0]
        if self._seed and name not in ("zoo", "sim"):
            words += ["--seed", str(self._seed)]
        if self._device and name not in ("zoo", "partition"):
            words += ["--device", self._device]
        shown = shlex.join(["dery", *words])
        self.lines.append(shown)
        self._terminal.say(f"\n$ {shown}", style="bold cyan")
        flags = [
            flag
            for flag, wanted in (
                ("--json", self._terminal.json),
                ("--quiet", self._terminal.quiet),
                ("--verbose", self._terminal.verbose),
            )
            if wanted
        ]
        started = time.monotonic()
        result = self._dery([*words, *flags])
        self.seconds = time.monotonic() - started
        use_terminal(self._terminal)
        assert isinstance(result, dict)
        return result


def _row(role: str, run: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "role": role,
        "network": run["start"],
        "params": run["params"],
        "flops": run["flops"],
        "top1_untrained": run["test_top1_before"],
        "top1_finetuned": run["test_top1"],
        "seconds": seconds,
    }


def _show(
    terminal: Terminal, rows: list[dict[str, Any]], budget: str, steps: int, seconds: float
) -> None:
    terminal.say()
    terminal.table(
        f"1,497 held-out digits, at most {budget} params, {steps} updates on 300 labelled digits",
        ["", "network", "params", "multiply-adds", "top-1 untrained", "fine-tuned", "seconds"],
        [
            [
                row["role"],
                row["network"],
                show_count(row["params"]),
                show_count(row["flops"]),
                f"{row['top1_untrained']:.4f}",
                f"{row['top1_finetuned']:.4f}",
                f"{row['seconds']:.1f}",
            ]
            for row in rows
        ],
        highlight=0,
    )
    terminal.say(f"{seconds:.0f} s in all")
