"""Outputs that are full, closed or of another encoding, and signals at any moment: real processes.

No torch is imported in them: ``zoo list`` of an empty workspace is enough.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dery_cli.runtime.streams import Steady

DERY = f"{sys.executable} -m dery_cli"


def shell(line, tmp_path, **environment):
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("zoo list | true", 0, ""),
        ("zoo list --json | true", 0, "the zoo is empty"),
        ("zoo list >&-", 0, ""),
        ("zoo list --json >&-", 0, "the zoo is empty"),
        ("zoo list > /dev/full", 0, "could not write to standard output: No space left"),
        ("zoo list --json > /dev/full", 1, "could not write to standard output: No space left"),
        ("--help > /dev/full", 0, "could not write to standard output: No space left"),
        ("zoo show x 2> /dev/full", 2, ""),
        ("zoo show x >&- 2>&-", 2, ""),
    ],
)
def test_outputs_that_take_nothing(tmp_path, command, code, said):
    done = shell(f"{DERY} {command}", tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_encodings_that_lack_characters(tmp_path, encoding):
    done = shell(f"{DERY} zoo show 🐦 --json", tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["message"].startswith("no donor named '🐦'")
    assert "no donor named '\\U0001f426'" in done.stderr


def test_what_others_print_is_no_part_of_the_object(tmp_path):
    script = (
        "import os\n"
        "import dery_cli.commands.zoo as zoo\n"
        "read = zoo.read_zoo\n"
        "def loud(*given):\n"
        "    print('a plugin')\n"
        "    os.write(1, b'a solver\\n')\n"
        "    return read(*given)\n"
        "zoo.read_zoo = loud\n"
        "from dery_cli.cli import main\n"
        "main(['zoo', 'list', '--json'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["ok"] is True
    assert "a plugin" in done.stderr
    assert "a solver" in done.stderr


def test_a_steady_stream_keeps_quiet_after_a_failure(tmp_path):
    with open("/dev/full", "w") as full:
        stream = Steady(full)
        assert stream.write("x" * 10) == 10
        stream.flush()
        assert stream.lost.strerror == "No space left on device"
        stream.write("y")
        stream.flush()
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        stream = Steady(gone)
        stream.write("x")
        stream.flush()
        assert stream.failure is not None
        assert stream.lost is None  # nobody waits for it


SLOW = """
import ctypes, sys, time
import dery_cli.commands.zoo as zoo
def native():  # waits for a lock that it holds, and no signal gets it out of there
    lock = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
def tidying():
    try:
        time.sleep(60)
    finally:
        print("tidying", file=sys.stderr, flush=True)
        time.sleep(60)
def importing():
    import slow_module
def slow(*_):
    print("ready", file=sys.stderr, flush=True)
    {what}()
zoo.read_zoo = slow
from dery_cli.cli import main
main(["zoo", "list", "--json"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["native", "importing", "tidying"])
def test_signals_where_no_body_can_unwind(tmp_path, number, what):
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-c", SLOW.format(what=what)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr.readline() == "ready\n"
        time.sleep(0.3)  # now it is where it says
        started = time.monotonic()
        process.send_signal(number)
        if what == "tidying":
            assert process.stderr.readline() == "tidying\n"
            process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert time.monotonic() - started < 10
    assert json.loads(out)["error"]["code"] in ("interrupted", "terminated")
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.08, 0.2])
def test_signals_while_modules_are_imported(tmp_path, number, after):
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "dery_cli", "zoo", "list"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:  # wait until dery's own imports have begun
            if "dery_cli.runtime.startup" in line:
                break
        time.sleep(after - 0.08)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode in (128 + number, 0)
    assert "schema" not in out
    assert "Traceback" not in err
