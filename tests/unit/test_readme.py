"""Every line that README and the commands' help show is one that ``dery`` takes."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from dery_cli import cli
from dery_cli.commands._options import Checked, checking
from tests.conftest import make_images, run_dery
from tests.pages import PAGES

ROOT = Path(__file__).parents[2]
BENCHES = ROOT / "tests" / "bench"
DERY = typer.main.get_command(cli.app)
AT_ONCE = {"demo", "init", "zoo check", "zoo plugins"}
"""Commands that open no workspace before they begin: only their words are read here."""


COMMANDS = ("dery ", "torchrun ", "python ", "bench_", "letters.py", "make ", "pytest ", "pip ")
INSTALLED = "pipx install dery-cli"
"""What nothing here can try."""


def indented() -> list[str]:
    """The command lines of README that stand by themselves; its tree of files is none."""
    text = re.sub(r"^```.*?^```$", "", PAGES.partition("\n## Files")[0], flags=re.M | re.S)
    return [re.split(r"\s+#", line)[0] for line in re.findall(r"^    (\w.*)$", text, re.M)]


def shown() -> list[str]:
    """Those, and what stands between backticks and begins like a command."""
    text = re.sub(r"^```.*?^```$", "", PAGES, flags=re.M | re.S).replace("\n", " ")
    ticked = re.findall(r"`([a-z_/-]+(?:\.py)? [^`]+)`", text)
    lines = [one.strip() for line in [*indented(), *ticked] for one in line.split(";")]
    return list(dict.fromkeys(line for line in lines if line.startswith(COMMANDS)))


def starting(*beginnings: str) -> list[str]:
    return [line for line in shown() if line.startswith(beginnings)]


def of_dery() -> Iterator[str]:
    """What follows ``dery``, one line for each of ``a|b``; without dots that stand for options."""
    for line in starting("dery ", "torchrun "):
        words = line.split("-m dery_cli ")[-1].removeprefix("dery ").removesuffix(" ...")
        several = re.search(r"\S+\|\S+", words)
        for one in several[0].split("|") if several else [""]:
            yield words.replace(several[0], one) if several else words


def examples() -> Iterator[tuple[str, str | None]]:
    """Every command, and the line that its help ends with."""

    def walk(command, name):
        for sub_name, sub in getattr(command, "commands", {}).items():
            yield from walk(sub, f"{name} {sub_name}".strip())
        if not hasattr(command, "commands"):
            found = re.search(r"For example: (dery .+)$", " ".join(command.help.split()))
            yield name, found[1] if found else None

    return walk(DERY, "")


def read(words: list[str]) -> str:
    """Have a line's words read by the parser of its command, whose name is returned."""
    command, name, rest = DERY, [], list(words)
    while hasattr(command, "commands"):
        name.append(rest.pop(0))
        command = command.commands[name[-1]]
    command.make_context(" ".join(name), rest)
    return " ".join(name)


def check(line: str) -> None:
    """Have a line read, and its values checked by its command, which then does nothing."""
    words = shlex.split(line)
    if read(words) not in AT_ONCE:
        with checking(), pytest.raises(Checked):
            DERY.main(args=words, prog_name="dery", standalone_mode=False)


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with what lines name: images, and a recipe as ``dery init`` writes it."""
    make_images(tmp_path / "photos", ["cat", "dog"], 2)
    assert run_dery("init", cwd=tmp_path).code == 0
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", list(of_dery()))
def test_readme_shows_lines_that_dery_takes(line, somewhere):
    if line.split() == ["embed"]:  # its dots stand for --data
        line += " --data photos"
    if line.startswith("--"):
        assert line == "--install-completion"  # of typer
        return
    check(line)


@pytest.mark.parametrize(("name", "line"), list(examples()), ids=lambda text: str(text)[:40])
def test_every_command_has_an_example_that_it_takes(name, line, somewhere):
    assert line is not None, f"the help of dery {name} has no example"
    assert line.startswith(f"dery {name}")
    check(line.removeprefix("dery "))


@pytest.mark.parametrize("line", starting("python tests/bench/", "bench_", "letters.py"))
def test_benches_that_readme_names_have_those_options(line):
    file, *words = shlex.split(line.removeprefix("python tests/bench/"))
    source = (BENCHES / file).read_text()
    options = [word for word in words if re.fullmatch(r"--[a-z-]+", word)]
    assert [option for option in options if f'"{option}"' not in source] == []


def test_what_else_readme_shows_is_there():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = re.findall(r"dery-cli\[(\w+)\]", PAGES)
    assert set(extras) <= told["project"]["optional-dependencies"].keys()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in starting("make ")} <= set(targets)
    scripts = {"python out/run.py image.png": "export", "python measure.py": "latency"}
    sweep = (ROOT / "tests" / "sweep" / "__main__.py").read_text()
    for line in starting("python "):
        if line.startswith("python -m tests.sweep"):
            assert all(f'"{word}"' in sweep for word in line.split() if word.startswith("--"))
        elif not line.startswith("python tests/"):
            folder = ROOT / "dery_cli" / "stages" / scripts[line] / "scripts"
            assert (folder / Path(line.split()[1]).name).is_file()
    [line] = starting("pytest ")
    assert (ROOT / line.split()[1]).is_dir()
    assert any(m.startswith(line.split()[-1]) for m in told["tool"]["pytest"]["ini_options"]["markers"])  # noqa: E501 # fmt: skip


def test_no_line_is_passed_over():
    assert [line for line in indented() if not line.startswith((*COMMANDS, INSTALLED))] == []
    assert len(indented()) > 45
    assert len(list(of_dery())) > 45
