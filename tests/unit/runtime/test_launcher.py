"""What a launcher's environment means, and who of several processes speaks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dery_cli.runtime.launcher import alone_by_mistake, is_follower, launched

CLEAN = {
    name: ""
    for names in ("WORLD_SIZE RANK", "PMI_SIZE PMI_RANK", "MASTER_PORT ACCELERATE_USE_CPU")
    for name in names.split()
}


@pytest.mark.parametrize(
    ("environment", "several", "follower"),
    [
        ({}, False, False),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False, False),
        ({"RANK": "3"}, False, False),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True, False),
        ({"WORLD_SIZE": "2", "RANK": "1"}, True, True),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, True, True),
    ],
)
def test_which_process_this_is(monkeypatch, environment, several, follower):
    for name, value in {**CLEAN, **environment}.items():
        monkeypatch.setenv(name, value)
    assert (launched(), is_follower()) == (several, follower)


def test_one_process_that_should_be_several_is_told(monkeypatch):
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)
    assert alone_by_mistake() is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "torchrun --nproc-per-node N" in alone_by_mistake()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert alone_by_mistake() is None


@pytest.mark.parametrize(("rank", "objects"), [("0", 1), ("1", 0)])
def test_only_the_main_process_answers(monkeypatch, tmp_path, rank, objects):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    done = subprocess.run(
        [sys.executable, "-m", "dery_cli", "finetune", "--mode", "half", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.count("\n") == objects
    assert ("mode is 'half'" in done.stderr) == bool(objects)
    assert objects or not done.stderr
