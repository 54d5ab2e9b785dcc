"""Recipes: where a key stands, and what is said of a wrong one."""

from __future__ import annotations

import pytest

from dery_cli.stages.recipe.config import key_lines, shipped_recipes
from tests.conftest import run_dery

GOOD = """\
data = "demo:"
[[zoo]]
specs = [
  "demo/resnet",
]
[embed]
samples = 64
[[assemble]]
max-params = "300k,400k"
[finetune]
steps = 8
"""


def test_lines_of_keys_tables_and_what_only_looks_like_one():
    text = 'a = """\n[x]\nb = 1\n"""\n[[t]] # one\nk = [\n 1,\n]\n[[t]]\nk.l = 2\ni = {j = 3}\n'
    found = key_lines(text)
    assert found == {
        ("a",): 1,
        ("t", 0): 5,
        ("t", 0, "k"): 6,
        ("t", 1): 9,
        ("t", 1, "k"): 10,
        ("t", 1, "k", "l"): 10,
        ("t", 1, "i"): 11,
        ("t", 1, "i", "j"): 11,
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max-params", "max_parms", ":9: assemble.max_parms is no option of assemble; did you"),
        ("[embed]", "[embde]", ":6: embde is no table or key of a recipe; did you mean embed?"),
        ("300k,400k", "300k,4x", ":9: assemble.max-params: --max-params"),
        ("300k,400k", "300k,300k", ":9: assemble.max-params: the budget 300k is listed twice"),
        ("steps = 8", "steps = 'x'", ":11: finetune.steps: "),
        ("steps = 8", "no-scratch = 1", ":11: finetune.no-scratch is no option of finetune"),
        ("steps = 8", "scratch = 1", ":11: finetune.scratch is 1; it must be true or false"),
        ("steps = 8", "resume = true", ":11: finetune.resume has no place in a recipe"),
        ("steps = 8", "steps = [8]", ":11: finetune.steps takes one value, not a list"),
        ("steps = 8", "crop-scale = [1]", ":11: finetune.crop-scale takes a list of 2 values"),
        ("samples = 64", "crop = 3", ":7: embed.crop: --crop is 3"),
        ('data = "demo:"', "data = 3", ":1: data is 3; it must be a text"),
        ('data = "demo:"', "seed = -1", ":6: embed: --data is missing"),
        ('data = "demo:"', 'data = "demo:"\nseed = -1', ":2: seed of embed: --seed is -1"),
        ("[finetune]", "[[finetune]]\n[[finetune]]", "a second time, after finetune"),
        ("[embed]", "[[embed]]\n[[embed]]", ":7: embed[1] is a second one"),
        ("[embed]", "[embed", "recipe.toml is not TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line_before_anything_runs(tmp_path, old, new, said):
    (tmp_path / "recipe.toml").write_text(GOOD.replace(old, new, 1))
    found = run_dery("run", "recipe.toml", "--json", cwd=tmp_path)
    assert found.code == 2
    assert said in found.json["error"]["message"]
    assert not (tmp_path / ".dery").exists()


def test_each_budget_is_a_line_and_each_assembly_is_fine_tuned(tmp_path):
    (tmp_path / "recipe.toml").write_text("seed = 3\n" + GOOD)
    found = run_dery("run", "recipe.toml", "--dry-run", "--json", cwd=tmp_path)
    assert found.code == 0, found.stderr
    assert [step["command"] for step in found.json["result"]["steps"]] == [
        "dery zoo add -- demo/resnet",
        "dery embed --samples 64 --data demo: --seed 3",
        "dery assemble --max-params 300k --name default-300k --seed 3",
        "dery assemble --max-params 400k --name default-400k --seed 3",
        "dery finetune --steps 8 --assembly default-300k --name default-300k --seed 3",
        "dery finetune --steps 8 --assembly default-400k --name default-400k --seed 3",
    ]
    assert not (tmp_path / ".dery").exists()


def test_the_recipes_that_ship_are_right(tmp_path):
    assert sorted(shipped_recipes()) == ["demo", "paper", "timm-small"]
    for name, steps in (("demo", 7), ("paper", 4 + 3 * 5), ("timm-small", 4 + 3 * 2)):
        words = [] if name == "demo" else ["--data", "images"]
        found = run_dery("run", name, *words, "--dry-run", "--json", cwd=tmp_path)
        assert found.code == 0, found.stderr
        assert len(found.json["result"]["steps"]) == steps
        lacking = run_dery("run", name, "--json", cwd=tmp_path) if words else None
        assert lacking is None or "--data is missing" in lacking.json["error"]["message"]
    assert "demo, paper, timm-small" in run_dery("run", "nosuch", cwd=tmp_path).stderr
