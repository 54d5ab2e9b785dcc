"""Figures of a report, and command lines read off records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import numpy as np
import torch

from dery_cli.core.similarity.metric import Similarity
from dery_cli.stages.report.drawn import quiet
from dery_cli.stages.report.facts import FLAGS, command_line
from dery_cli.stages.report.figures import draw_similarity
from dery_cli.stages.report.outcomes import draw_confusion, draw_foreseen, draw_training, frontier

GOLDEN = Path(__file__).parents[3] / "golden" / "options.txt"


def test_the_frontier_is_what_no_other_beats_in_both():
    points = [(3, 0.5), (1, 0.2), (2, 0.6), (2, 0.1), (4, 0.6), (5, 0.9)]
    assert list(frontier(points)) == [(1, 0.2), (2, 0.6), (5, 0.9)]


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_options_that_are_shown_are_options_of_the_command(command):
    line = next(x for x in GOLDEN.read_text().splitlines() if x.startswith(f"dery {command}:"))
    known = {part for word in line.split() for part in word.split("/")}
    assert {f"--{name.replace('_', '-')}" for name in FLAGS[command]} <= known


def test_a_command_line_may_be_typed_again():
    held = {
        "budget": {"max_params": 400000, "min_params": None, "max_latency": 8_000_000},
        "require": ["a[0:2]", "b"],
        "match": True,
        "data": "my images",
    }
    assert command_line("assemble", held, 3) == (
        "dery assemble --max-params 400000 --max-latency 8000us --data 'my images' "
        "--require 'a[0:2]' --require b --match --seed 3"
    )


def test_class_names_are_text_in_the_matrix():
    names = ["$\\frac$", '<b id="x">&', "\x1b[31m", "猫"]
    with quiet():
        text = draw_confusion((np.eye(4, dtype=int) * 3).tolist(), names).svg()
    assert "<b " not in text
    assert "\x1b" not in text
    assert "$\\frac$" in text
    assert "猫" in text


def test_every_pair_of_24_donors_tells_how_alike_they_are():
    names = [f"zoo__model_{n}" for n in range(24)]
    index = tuple((name, node) for name in names for node in range(1, 19))
    sim_PP = torch.rand(len(index), len(index), generator=torch.Generator().manual_seed(0))
    found = Similarity(metric="cka", sim_PP=sim_PP, numer_PP=sim_PP, unit_P=torch.ones(len(index)))
    with quiet():
        drawn = draw_similarity(found, index)
        text = drawn.svg()
    assert len(re.findall("<title>", text)) == 24 * 24
    assert text.count("opacity: 0.004") >= 24 * 24  # painted, or pointing would miss them
    assert "model_23" in text
    assert len(text) < 1_000_000
    with quiet():
        assert draw_similarity(found, index).svg() == text


def test_tau_is_told_where_there_are_enough_to_rank():
    entries = [
        {"network": f"n{n}", "predicted": 0.1 * n, "proxy": 0.2 * n, "params": 1, "flops": 1}
        for n in range(4)
    ]
    with quiet():
        assert draw_foreseen(entries[:2]) is None
        drawn = draw_foreseen([*entries, {**entries[0], "predicted": None}])
        level = draw_foreseen([{**entry, "proxy": 0.5} for entry in entries])
    assert drawn is not None
    assert "tau 1.00" in drawn.words
    assert level is not None
    assert "nan" not in level.words


def test_curves_need_no_validation_images():
    with quiet():
        alone = draw_training([{"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": None}])
        both = draw_training([{"step": 1, "train_loss": 2.0, "valid_top1": 0.5}])
    assert "no validation" in alone.words
    assert any("validation top-1 0.5000" in words for words in both.titles.values())
