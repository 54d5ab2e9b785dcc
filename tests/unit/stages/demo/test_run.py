"""The demo's lines, run by a runner that only writes them down."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from dery_cli.errors import UsageError
from dery_cli.runtime.terminal import Terminal, current_terminal, use_terminal
from dery_cli.stages.demo.config import DemoConfig
from dery_cli.stages.demo.run import run_demo

TUNED = {
    "start": "b[0:2]",
    "params": 7,
    "flops": 9,
    "test_top1_before": 0.5,
    "test_top1": 0.75,
}


class Recorder:
    """Gives every command the result it would have; with or without a whole model that fits."""

    def __init__(self, *, whole: bool) -> None:
        self.lines: list[list[str]] = []
        self.whole = whole

    def __call__(self, words):
        use_terminal(Terminal())  # as a command does
        self.lines.append(list(words))
        if words[0] == "finetune":
            return TUNED
        comparison = [{"role": "picked", "blocks": [["a", 0, 1], ["b", 1, 2]]}]
        if self.whole:
            comparison.append({"role": "best whole donor", "blocks": [["b", 0, 2]]})
            adapted = {"role": "the same with an adapter", "network": "b[0:1] ~ b[1:2]"}
            comparison.append(adapted)
        return {"budget": "at most 300.00k params", "comparison": comparison}


def demo(config, *, whole=True, **flags):
    terminal, recorder = Terminal(**flags), Recorder(whole=whole)
    with redirect_stdout(io.StringIO()):
        found = run_demo(terminal, Path("ws"), config, recorder)
    assert current_terminal() is terminal
    return found, recorder.lines


def test_the_commands_in_their_order():
    found, lines = demo(DemoConfig(max_params="300k", steps=5), quiet=True)
    assert [" ".join(words) for words in lines] == [
        "zoo add --manifest demo --workspace ws --quiet",
        "embed --data demo: --workspace ws --quiet",
        "sim --workspace ws --quiet",
        "partition --workspace ws --quiet",
        "assemble --max-params 300k --effort 4 --workspace ws --quiet",
        "finetune --steps 5 --effort 0.4 --name assembly --workspace ws --quiet",
        "finetune --steps 5 --effort 0.4 --donor b --data demo: --workspace ws --quiet",
        "assemble --max-params 300k --blocks b[0:1] ~ b[1:2] --name adapter --workspace ws --quiet",
        "finetune --steps 5 --effort 0.4 --assembly adapter --workspace ws --quiet",
        "finetune --steps 5 --effort 0.4 --scratch --name scratch --workspace ws --quiet",
    ]
    assert found.commands[2] == "dery sim --workspace ws"  # as they may be typed again
    assert found.budget == "at most 300.00k params"
    assert [row.role for row in found.rows] == [
        "assembly", "best whole donor", "the same with an adapter", "from scratch",
    ]  # fmt: skip
    assert (found.rows[0].params, found.rows[0].top1_finetuned) == (7, 0.75)


def test_seed_and_device_go_to_the_commands_that_take_them():
    _, lines = demo(DemoConfig(seed=3, device="cpu"))
    seeded = {words[0] for words in lines if "--seed" in words}
    placed = {words[0] for words in lines if "--device" in words}
    assert seeded == {"embed", "partition", "assemble", "finetune"}
    assert placed == {"embed", "sim", "assemble", "finetune"}


def test_without_a_whole_model_within_the_budget_there_is_no_such_row():
    found, _ = demo(DemoConfig(), whole=False)
    assert [row.role for row in found.rows] == ["assembly", "from scratch"]


def test_a_wrong_budget_is_seen_at_once():
    with pytest.raises(UsageError, match="--max-params: '3Q' is not a size"):
        DemoConfig(max_params="3Q")
