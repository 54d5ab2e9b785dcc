"""Tables fit their width, and every cell of them can still be read."""

from __future__ import annotations

import random

import pytest
from rich.cells import cell_len

from dery_cli.runtime.tables import draw_table, fold, is_number
from dery_cli.runtime.terminal import Terminal

NETWORK = "demo__convnext[0:1] ~ demo__convnext[1:2] + demo__efficientnet[3:4] + demo__vit[2:9]"
ROLES = [["picked", NETWORK, "66.74k", "0.9633"], ["best slice", "demo__x[0:9]", "1.2M", "-"]]
COLUMNS = ["", "network: donor[first node:last node]", "multiply-adds", "test top-1 untrained"]


def texts(columns, rows, width, title=None):
    lines = [line.text for line in draw_table(title, columns, rows, width)]
    assert max(map(cell_len, lines)) <= width, lines
    return lines


def test_a_table_that_fits_is_a_line_a_row():
    lines = texts(["donor", "params"], [["a", "1.20M"], ["longer", "3"]], 80, "of a zoo")
    assert lines == [
        "of a zoo",
        "donor   params",
        "──────────────",
        "a        1.20M",
        "longer       3",
        "",
    ]


def test_a_long_network_has_lines_of_its_own():
    lines = texts(COLUMNS, ROLES, 60)
    picked = next(i for i, line in enumerate(lines) if line.startswith("picked"))
    assert lines[picked].split() == ["picked", "66.74k", "0.9633"]
    below = lines[picked + 1 : lines.index(next(x for x in lines if x.startswith("best")))]
    assert all(line.startswith("  ") for line in below)
    assert " ".join(line.strip() for line in below) == NETWORK


@pytest.mark.parametrize("width", [40, 60, 80, 160])
@pytest.mark.parametrize("seed", range(8))
def test_no_line_is_too_wide_and_no_figure_is_cut(width, seed):
    draw = random.Random(seed)
    columns = [
        f"column of figures {n}" if n % 3 else f"words-{n}" for n in range(draw.randint(2, 14))
    ]
    rows = [
        [
            f"{draw.random() * 10 ** draw.randint(0, 5):.4f}k"
            if n % 3
            else " ".join(f"demo__{draw.random():.9f}" for _ in range(draw.randint(1, 9)))
            for n in range(len(columns))
        ]
        for _ in range(5)
    ]
    lines = texts(columns, rows, width)
    words = {word for line in lines for word in line.split()}
    for row in rows:
        for n, cell in enumerate(row):
            if n % 3:
                assert cell in words


def test_a_heading_folds_at_its_hyphen_whatever_stands_below():
    rows = [["demo__resnet.rotation", "0.92", "1.50M", "4 of 10: 0.9333"]]
    lines = texts(["donor", "cross-entropy", "multiply-adds", "best node"], rows, 58)
    words = [word for line in lines[:2] for word in line.split()]
    assert words == ["cross-", "multiply-", "donor", "entropy", "adds", "best", "node"]


def test_many_columns_come_in_parts_that_name_their_rows():
    classes = [f"class-{n}" for n in range(40)]
    rows = [[name, *(str(m * 100 + n) for n in range(40))] for m, name in enumerate(classes)]
    lines = texts(["", *classes], rows, 80)
    assert sum(line.startswith("class-7 ") for line in lines) > 2
    shown = {word for line in lines for word in line.split()}
    assert all(cell in shown for row in rows for cell in row)


def test_wide_characters_count_twice_and_one_endless_word_folds():
    lines = texts(["image", "class", "score"], [["/tmp/" + "長" * 90, "猫", "0.9000"]], 50)
    assert "".join(lines).replace(" ", "").count("長") == 90
    assert any("猫" in line and "0.9000" in line for line in lines)
    assert fold("ab cd", 2) == ["ab", "cd"]


ASSEMBLED = [
    "", COLUMNS[1], "params", "multiply-adds", "grad_norm", "held out", "tuned", "test as built"
]  # fmt: skip
"""Headings of ``dery assemble`` with a wide proxy."""


def test_the_comparison_of_an_assembly_is_one_table_of_80_columns():
    figures = ["213.92k", "12.62M", "12298.4691", "0.2442", "0.3103", "0.2455"]
    roles = ["picked", "the same with an adapter", "best of the paper's space"]
    lines = texts(ASSEMBLED, [[role, NETWORK, *figures] for role in roles], 80)
    assert sum(line.startswith("─") for line in lines) == 1
    assert sum(line.split()[-6:] == figures for line in lines) == 3
    words = [word for line in lines[: lines.index("  " + COLUMNS[1])] for word in line.split()]
    assert sorted(words) == sorted(
        ["params", "multiply-", "adds", "grad_norm", "held", "out", "tuned", "test", "as", "built"]
    )


def test_names_of_rows_fold_at_words_before_figures_come_apart():
    rows = [["best of the paper's space", *["1000.00k"] * 6]]
    lines = texts(["", *(f"figure {n}" for n in range(6))], rows, 76)
    assert sum(line.startswith("─") for line in lines) == 1
    assert [line[:16].strip() for line in lines[-3:-1]] == ["best of the", "paper's space"]


def test_a_long_name_of_a_row_stands_whole_above_its_figures():
    name = "timm/vit_base_patch16_clip_224.laion2b_ft_in12k_in1k"
    rows = [[name, "whole only", *["1000.00k"] * 4], ["timm/short", "ok", *["1"] * 4]]
    lines = texts(["model", "result", *(f"count {n}" for n in range(4))], rows, 80)
    at = lines.index(name)
    assert lines[at + 1].startswith("  whole only")
    assert lines[at + 1].split()[2:] == ["1000.00k"] * 4
    assert lines[at + 2] == "timm/short"
    assert sum(line.startswith("─") for line in lines) == 1


def test_words_below_a_row_share_a_line_where_they_fit():
    columns = ["", "network", "licences", "data", *(f"figure {n}" for n in range(6))]
    rows = [
        ["assemblies/default", NETWORK[:47], "Apache-2.0", "/data/letters", *["0.123456"] * 6],
        ["runs/b", NETWORK[:22], "MIT", "-", *["0.123456"] * 6],
    ]
    lines = texts(columns, rows, 80)
    assert [line.split() for line in lines if "Apache" in line] == [
        [*NETWORK[:47].split(), "Apache-2.0", "/data/letters"]
    ]
    head = next(line for line in lines if "licences" in line)
    assert all(line.index("MIT") == head.index("licences") for line in lines if "MIT" in line)


def test_one_tall_cell_does_not_send_all_rows_below():
    rows = [["versions", "fine", "word " * 30], *([f"check {n}", "fine", "well"] for n in range(9))]
    lines = texts(["what", "state", ""], rows, 60)
    assert len([line for line in lines if line.startswith("check")]) == 9
    assert all(line.split()[-2:] == ["fine", "well"] for line in lines if line[:5] == "check")


@pytest.mark.parametrize("text", ["1", "-", "1.2M", "+3.0%", "8.5 ms", "3x32x32", "-0.1"])
def test_figures(text):
    assert is_number(text)


@pytest.mark.parametrize("text", ["10 donors", "a1", "", "4 sets of the blocks"])
def test_words(text):
    assert not is_number(text)


@pytest.mark.parametrize(("columns", "most"), [(None, 80), ("60", 60), ("200", 200)])
def test_what_is_no_terminal_has_80_columns_or_those_it_asks_for(
    capsys, monkeypatch, columns, most
):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    Terminal().table("t", COLUMNS, ROLES)
    widest = max(map(cell_len, capsys.readouterr().out.splitlines()))
    assert most / 2 < widest <= most


def test_no_color_is_honoured(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    Terminal().warn("mind")
    assert "\x1b[33m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal().warn("mind")
    assert "33" not in capsys.readouterr().err
