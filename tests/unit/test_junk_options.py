"""Every option of every command with junk, alone and in pairs: refused by name, or it works.

The workspace is empty, so what is accepted ends where a stage before is missing, at the latest.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator

import pytest
import typer

from dery_cli import cli
from tests.conftest import run_dery

DERY = typer.main.get_command(cli.app)
JUNK = (
    "", " ", "-1", "0", "nan", "inf", "1e999", "9" * 30, "1.5", "abc", "30Q", "../x", "/dev/null",
    "a,b", "[red]x[/]", "\x1b[31mred", "\u65e5\u672c", "-", "--", "x" * 300,
)  # fmt: skip
LEFT_OUT = {"demo", "run", "init", "doctor", "status", "push"}
"""They work in an empty folder: minutes of it, or writing files."""
GIVEN = {
    "eval": "runs/a",
    "predict": "a b.png",
    "compare": "a b",
    "embed": "--data nowhere",
    "export": "a --to out --format safetensors",
    "latency pack": "parts",
    "zoo add": "demo/nobody",
    "zoo check": "demo/nobody",
    "zoo rank": "--data nowhere",
    "zoo remove": "a",
    "zoo show": "a",
}
"""What commands ask for before they look at their options."""
PAIRS = 80


def leaves(command=DERY, name: str = "") -> Iterator[tuple[str, object]]:
    for sub_name, sub in getattr(command, "commands", {}).items():
        yield from leaves(sub, f"{name} {sub_name}".strip())
    if not hasattr(command, "commands") and name not in LEFT_OUT:
        yield name, command


def options(command) -> list[str]:
    """Those that take one value, by their long names."""
    found = []
    for parameter in command.params:
        names = [one for one in parameter.opts if one.startswith("--")]
        if names and not parameter.is_flag and parameter.nargs == 1 and names[0] != "--workspace":
            found.append(names[0])
    return found


def ask(name: str, chosen: list[tuple[str, str]], where) -> None:
    words = [*name.split(), *shlex.split(GIVEN.get(name, ""))]
    words += [f"{option}={junk}" for option, junk in chosen]
    outcome = run_dery(*words, "--json", cwd=where)
    told = f"dery {' '.join(words)!r}: {outcome.stderr[-300:]}"
    assert "Traceback" not in outcome.stderr, told
    assert outcome.code in (0, 1, 2, 3, 4), told
    assert "\x1b[31mred" not in outcome.stdout + outcome.stderr, told
    answer = outcome.json
    assert answer["ok"] == (outcome.code == 0), told
    if outcome.code == 2:
        text = f"{answer['error']['message']} {answer['error']['hint']}"
        named = {option for option, _ in chosen}
        known = {one for one in named if one in text or one.strip("-").replace("-", "_") in text}
        typed = GIVEN.get(name, "").replace("/", " ").split()
        typed += [repr(junk) if not junk.strip() else repr(junk)[1:-1][:40] for _, junk in chosen]
        assert known or any(word in text for word in typed), told


COMMANDS = dict(leaves())


@pytest.mark.parametrize("name", COMMANDS)
def test_junk_alone(name, tmp_path):
    for option in options(COMMANDS[name]):
        generator = random.Random(f"{name} {option}")
        for junk in generator.sample(JUNK, 3):
            ask(name, [(option, junk)], tmp_path)


def test_junk_in_pairs(tmp_path):
    generator = random.Random(1)
    several = [name for name in COMMANDS if len(options(COMMANDS[name])) > 1]
    for _ in range(PAIRS):
        name = generator.choice(several)
        pair = generator.sample(options(COMMANDS[name]), 2)
        ask(name, [(option, generator.choice(JUNK)) for option in pair], tmp_path)
