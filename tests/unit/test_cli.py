"""The command line's surface: options, exit codes, the one JSON object, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from dery_cli import cli
from dery_cli.errors import DeryError, InfeasibleError, StaleError, UsageError
from dery_cli.runtime.launcher import Dismissed
from tests.conftest import run_dery

GOLDEN = Path(__file__).parents[1] / "golden"


def _options() -> str:
    lines = []

    def walk(command, name):
        for sub_name, sub in sorted(getattr(command, "commands", {}).items()):
            walk(sub, f"{name} {sub_name}")
        if not hasattr(command, "commands"):
            options = sorted("/".join([*p.opts, *p.secondary_opts]) for p in command.params)
            lines.append(f"{name}: {' '.join(options)}")

    walk(typer.main.get_command(cli.app), "dery")
    return "\n".join(lines) + "\n"


def test_a_new_option_is_a_decision():
    """Run with DERY_UPDATE_GOLDEN=1 to accept the present options."""
    path = GOLDEN / "options.txt"
    if os.environ.get("DERY_UPDATE_GOLDEN"):
        path.write_text(_options())
    assert _options() == path.read_text()


def test_every_option_has_a_help_text():
    def walk(command, name):
        assert command.help, name
        for sub_name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{name} {sub_name}")
        for param in command.params:
            if param.param_type_name == "option":
                assert getattr(param, "help", None), f"{name} {param.name}"

    walk(typer.main.get_command(cli.app), "dery")


def test_the_version(capsys):
    import dery_cli

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"dery {dery_cli.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (DeryError("it broke", "mend it"), 1, "failed"),
        (UsageError("wrong", "right"), 2, "usage"),
        (InfeasibleError("too small", "larger", details={"excess": 7}), 3, "infeasible"),
        (StaleError("too old", "dery sim"), 4, "stale"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_exit_codes(monkeypatch, error, code, word):
    def broken(*_):
        raise error

    monkeypatch.setattr("dery_cli.commands.zoo.read_zoo", broken)
    outcome = run_dery("zoo", "list", "--json")
    assert outcome.code == code
    assert outcome.json["ok"] is False
    assert outcome.json["result"] is None
    assert outcome.json["error"]["code"] == word
    if isinstance(error, DeryError):
        assert outcome.json["error"]["message"] == error.message
        assert outcome.json["error"]["hint"] == error.hint
        assert f"error: {error.message}" in outcome.stderr
    if code == 3:
        assert outcome.json["error"]["details"] == {"excess": 7}
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(("over", "code"), [(Dismissed(4), 4), (Dismissed(0), 0), (Dismissed(), 1)])
def test_a_dismissed_process_ends_in_silence(monkeypatch, over, code):
    def dismissed(*_):
        raise over

    monkeypatch.setattr("dery_cli.commands.zoo.read_zoo", dismissed)
    outcome = run_dery("zoo", "list", "--json")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (code, "", "")


def test_numbers_that_json_has_not_become_null(monkeypatch):
    def broken(*_):
        details = {"loss": float("nan"), "seen": [1.5, float("inf"), (-float("inf"),)], "n": 2}
        raise DeryError("it broke", details=details)

    monkeypatch.setattr("dery_cli.commands.zoo.read_zoo", broken)
    outcome = run_dery("zoo", "list", "--json")
    told = json.loads(outcome.stdout, parse_constant=pytest.fail)
    assert told["error"]["details"] == {"loss": None, "seen": [1.5, None, [None]], "n": 2}


def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug(*_):
        return {}["nothing"]

    monkeypatch.setattr("dery_cli.commands.zoo.read_zoo", bug)
    outcome = run_dery("zoo", "list", "--json")
    assert outcome.code == 1
    assert outcome.json["error"]["code"] == "bug"
    assert "Traceback" in outcome.stderr
    assert "KeyError: 'nothing'" in outcome.stderr


def test_no_arguments_print_the_help(capsys):
    assert cli.run([]) == 2
    assert "assemble" in capsys.readouterr().out


def test_json_keeps_stdout_for_the_object(tmp_path):
    outcome = run_dery("zoo", "list", "--json", cwd=tmp_path)
    assert outcome.stdout.count("\n") == 1
    assert outcome.json["result"] == {"donors": []}
    assert "the zoo is empty" in outcome.stderr
    plain = run_dery("zoo", "list", cwd=tmp_path)
    assert "the zoo is empty" in plain.stdout
    assert run_dery("zoo", "list", "--quiet", cwd=tmp_path).stdout == ""


SLEEPER = """
import sys, time
import dery_cli.commands.zoo as zoo
def slow(*_):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
zoo.read_zoo = slow
from dery_cli.cli import main
main(["zoo", "list", "--json"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number, code):
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert json.loads(out)["ok"] is False
    assert "Traceback" not in err


LEAVING = """
import atexit, sys
class Large:
    def __del__(self):
        print("taken apart")
large = Large()
import dery_cli.__main__ as command
sys.argv[1:] = {words}
atexit.register(print, "not the first")
command.main()
"""


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["zoo", "lisp"], 2)])
def test_a_command_that_is_over_ends_at_once_with_its_code(words, code):
    """What modules hold is not taken apart: that takes a second of torch, and no signal in it."""
    script = LEAVING.format(words=words) + "import time\ntime.sleep(60)\n"
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30
    )
    assert made.returncode == code, made.stderr
    assert "taken apart" not in made.stdout
    assert ("dery " in made.stdout) == (code == 0)


def test_what_a_library_leaves_for_the_end_is_done():
    script = LEAVING.format(words=["--version"]).replace(
        "command.main()", "run = command.main\nimport dery_cli.cli as cli\nmain = cli.main\n"
        "def last():\n    atexit.register(print, 'done')\n    main()\ncli.main = last\nrun()"
    )  # fmt: skip
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    assert made.stdout.splitlines()[1:] == ["done"]


def test_python_m_is_the_same_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dery_cli", "zoo", "list", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["command"] == "zoo list"


def test_the_readme_names_no_option_that_is_not_there():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    known = set(re.findall(r"--?[a-zA-Z][a-z-]*", _options()))
    known |= {
        "--all",
        "--assemble",
        "--budgets",
        "--count",
        "--letters",
        "--paths",
        "--full",
        "--scale",
        "--seeds",
        "--ways",
        "--zoo",
    }  # of benches
    known |= {"--most"}  # of the sweep
    known |= {"--install-completion"}  # of typer
    known |= {"--cpu", "--multi-gpu", "--nproc-per-node", "--num-processes"}  # of launchers
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme))
    assert used - known == set()


def test_names_beyond_ascii_where_python_reads_names_as_ascii(tmp_path):
    ascii_alone = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    made = subprocess.run(
        [sys.executable, "-m", "dery_cli", "sim", "-w", tmp_path / "caf\u00e9", "--json"],
        env={**os.environ, **ascii_alone},
        capture_output=True,
        check=False,
    )
    assert made.returncode == 4, made.stderr
    assert "caf\u00e9" in json.loads(made.stdout)["error"]["message"]
    assert made.stderr.isascii()


def test_running_a_command_leaves_the_callers_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(["zoo", "plugins", "--json"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_workspace_whose_path_is_no_text(tmp_path):
    for place in ("caf\udce9", "~nobody-of-that-name/x"):
        outcome = run_dery("zoo", "list", "--json", "-w", place, cwd=tmp_path)
        assert outcome.code == 2
        assert outcome.stdout.isascii()
        assert outcome.json["error"]["message"].startswith("the workspace ")
