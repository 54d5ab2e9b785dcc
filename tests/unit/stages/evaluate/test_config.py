"""Which network ``dery eval`` takes."""

from __future__ import annotations

import pytest

from dery_cli.errors import StaleError, UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.stages.evaluate.config import find_network


def test_the_run_is_taken_before_the_assembly(tmp_path):
    space = Workspace(tmp_path)
    with pytest.raises(StaleError, match="no run or assembly 'default'"):
        find_network(space, None)
    assembly, run = tmp_path / "assemblies" / "default", tmp_path / "runs" / "default"
    assembly.mkdir(parents=True)
    (assembly / "assembly.json").touch()
    run.mkdir(parents=True)  # begun, and not finished
    assert find_network(space, None) == assembly
    (run / "run.json").touch()
    assert find_network(space, None) == run


def test_a_name_in_the_workspace_or_a_folder(tmp_path, monkeypatch):
    space = Workspace(tmp_path / "ws")
    (tmp_path / "ws" / "runs" / "one").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_network(space, "runs/one") == tmp_path / "ws" / "runs" / "one"
    assert find_network(space, "elsewhere").resolve() == tmp_path / "elsewhere"
    with pytest.raises(UsageError, match="no such run or assembly: runs/two"):
        find_network(space, "runs/two")
