"""The demo stage: the command lines from ``zoo add`` to three fine-tunings, and what they came to.

It knows the other commands by their lines and results alone; who runs a line is given.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dery_cli.runtime.terminal import Terminal, use_terminal
from dery_cli.stages.demo.config import DemoConfig

WHOLE = "best whole donor"
BUILT_ANEW = {"the same with an adapter": "adapter", "best slice": "slice"}
"""Controls that are assemblies of their own, and their names: same labels, updates and options."""

EFFORT = 4.0
TRIALS = 0.4
"""Less than by default, of searching and of trying rates, so that it takes minutes; the same for
all that is compared."""

RunLine = Callable[[Sequence[str]], Any]
"""Runs ``dery WORDS`` and gives its result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """A network before and after fine-tuning.

    Args:
        role: What it is there for.
        network: In words.
        params: Parameters.
        flops: Multiply-adds for one image.
        top1_untrained: On test images, as it was built.
        top1_finetuned: On test images, in the end.
        seconds: The fine-tuning took.
    """

    role: str
    network: str
    params: int
    flops: int
    top1_untrained: float
    top1_finetuned: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo came to.

    Args:
        budget: As ``assemble`` says it.
        commands: The lines that were run.
        rows: The assembly, its controls (the best whole donor within the budget, if there is one,
            plain and with an adapter, the best slice), and its architecture from scratch.
        seconds: In all.
    """

    budget: str
    commands: list[str]
    rows: list[Tuned]
    seconds: float


def run_demo(terminal: Terminal, folder: Path, config: DemoConfig, run_line: RunLine) -> Demo:
    """Run all commands in a workspace folder."""
    run = _Runner(terminal, folder, config, run_line)
    started = time.monotonic()
    run("zoo add --manifest demo")
    run("embed --data demo:")
    run("sim")
    run("partition")
    assembled = run(f"assemble --max-params {config.max_params} --effort {EFFORT:g}")
    rows = [run.tune("assembly", "--name assembly")]
    compared = {row["role"]: row for row in assembled["comparison"]}
    if whole := compared.get(WHOLE):
        donor = whole["blocks"][0][0]
        rows.append(run.tune(WHOLE, f"--donor {donor} --data demo:"))
    for role, name in BUILT_ANEW.items():
        if control := compared.get(role):
            network = shlex.quote(control["network"])
            run(f"assemble --max-params {config.max_params} --blocks {network} --name {name}")
            rows.append(run.tune(role, f"--assembly {name}"))
    rows.append(run.tune("from scratch", "--scratch --name scratch"))
    return Demo(
        budget=assembled["budget"],
        commands=run.lines,
        rows=rows,
        seconds=time.monotonic() - started,
    )


class _Runner:
    """Runs command lines in the demo's workspace, and shows them."""

    def __init__(
        self, terminal: Terminal, folder: Path, config: DemoConfig, run_line: RunLine
    ) -> None:
        self._terminal, self._folder = terminal, folder
        self._config, self._run_line = config, run_line
        self.lines: list[str] = []

    def __call__(self, line: str) -> dict[str, Any]:
        """Run ``dery LINE`` and give its result."""
        words = [*shlex.split(line), "--workspace", str(self._folder)]
        name = words[0]
        if self._config.seed and name not in ("zoo", "sim"):
            words += ["--seed", str(self._config.seed)]
        if self._config.device and name not in ("zoo", "partition"):
            words += ["--device", self._config.device]
        shown = shlex.join(["dery", *words])
        self.lines.append(shown)
        self._terminal.say()
        self._terminal.say(f"$ {shown}", style="bold cyan")
        flags = {
            "--json": self._terminal.json,
            "--quiet": self._terminal.quiet,
            "--verbose": self._terminal.verbose,
        }
        result = self._run_line([*words, *(flag for flag, wanted in flags.items() if wanted)])
        use_terminal(self._terminal)  # the command had one of its own
        assert isinstance(result, dict)
        return result

    def tune(self, role: str, options: str) -> Tuned:
        """Fine-tune."""
        started = time.monotonic()
        result = self(f"finetune --steps {self._config.steps} --effort {TRIALS:g} {options}")
        return Tuned(
            role=role,
            network=result["start"],
            params=result["params"],
            flops=result["flops"],
            top1_untrained=result["test_top1_before"],
            top1_finetuned=result["test_top1"],
            seconds=time.monotonic() - started,
        )
