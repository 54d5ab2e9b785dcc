"""A pack of real donors: written, measured by its own script, used by ``assemble``."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

FEW = ("--fit-samples", "16", "--target-samples", "40", "--effort", "0.5")


@pytest.fixture
def one_donor(dery):
    """A workspace of a single small donor."""
    assert dery("zoo", "add", "demo/resnext").code == 0
    return dery


def test_a_full_disk_leaves_the_earlier_pack_and_nothing_else(one_donor, tmp_path, monkeypatch):
    earlier = tmp_path / "parts"
    earlier.mkdir()
    (earlier / "pack.json").write_text('{"schema": "dery/latency-pack/1"}')
    before = {path.name for path in tmp_path.iterdir()}
    saved, left = onnx.save, [3]

    def save(model, path):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(model, path)

    monkeypatch.setattr(onnx, "save", save)
    outcome = one_donor("latency", "pack", "parts", "--classes", "10", "--force", "--json")
    assert outcome.code == 1
    assert "the disk is full" in outcome.json["error"]["message"]
    assert {path.name for path in tmp_path.iterdir()} == before
    assert [path.name for path in earlier.iterdir()] == ["pack.json"]


def test_what_is_no_pack_is_not_replaced(one_donor, tmp_path):
    (tmp_path / "parts").mkdir()
    outcome = one_donor("latency", "pack", "parts", "--classes", "10")
    assert outcome.code == 2
    assert "is there already" in outcome.stderr
    outcome = one_donor("latency", "pack", "parts", "--classes", "10", "--force")
    assert outcome.code == 2
    assert "no folder that dery latency pack wrote" in outcome.stderr


@pytest.mark.slow
def test_times_of_another_machine_hold_a_budget(copied, tmp_path):
    """The sum of a network's parts is what the budget holds, and stands beside its whole time."""
    made = copied("latency", "pack", str(tmp_path / "parts"), "--network", "default", "--json")
    assert made.code == 0, made.stderr
    words = [sys.executable, "-I", str(tmp_path / "parts" / "measure.py"), "--repeats", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "default: whole" in done.stdout
    file = tmp_path / "parts" / "latency.json"
    times = json.loads(file.read_text())
    budget = sum(times["times_ns"][key] for key in times["networks"]["default"]["parts"])
    line = ("assemble", "--latency-from", str(file), *FEW, "--name", "there", "--json")
    found = copied(*line, "--max-latency", f"{2 * budget / 1e6:.3f}ms")
    assert found.code == 0, found.stderr
    result = found.json["result"]
    assert 0 < result["latency_ns"] <= 2 * budget
    assert "default" in found.stderr
    tight = copied(*line, "--max-latency", "1us")
    assert tight.code == 3
