"""``dery finetune`` in two processes: one voice, the numbers of one, no one left waiting."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from dery_cli.training import checkpoint as ckpt
from tests.conftest import run_dery

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node 2"
ACCELERATE = "accelerate.commands.launch --multi-gpu --num-processes 2 --main-process-port 0"


@pytest.fixture
def ws(pipeline, tmp_path):
    shutil.copytree(pipeline.root, tmp_path / "ws")
    return tmp_path / "ws"


def start(ws: Path, line: str, launcher: str = TORCHRUN, program: Path | None = None):
    """``dery LINE`` in two processes."""
    what = ["-m", "dery_cli"] if program is None else [str(program)]
    words = [*launcher.split(), *what, *line.split(), "--workspace", str(ws), "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outcome(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, json.loads(out), err


def test_one_process_speaks_and_writes(ws, pipeline):
    line = "finetune --teacher best --steps 4 --report-every 2 --valid-fraction 0.2 --name two "
    line += f"--donor demo__resnext --data {pipeline.data}"
    code, told, err = outcome(start(ws, line))
    assert code == 0, err
    warning = "see only their own process's part of each batch"
    assert re.match(rf"\d+ batch norms \(blocks\.\d\.\S+, \.\.\.\) {warning}", told["warnings"][0])
    assert len(told["warnings"]) == 1
    assert err.count(warning) == 1
    assert err.count("comparing teachers") == err.count("images/s") == 1
    assert json.loads((ws / "runs" / "two" / "run.log.json").read_text())["processes"] == 2
    lines = (ws / "runs" / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == [2, 4]


@pytest.mark.slow
def test_the_numbers_are_those_of_one_process_without_batch_norm(ws):
    """ConvNeXt has none, nor dropout; the crop's shift is left out."""
    line = (
        "finetune --donor demo__swin --data demo --steps 6 --effort 0 --report-every 3 "
        "--crop-padding 0 --valid-fraction 0.2 --name"
    )
    assert run_dery(*line.split(), "one", "--workspace", str(ws)).code == 0
    for name, launcher in (
        ("two", TORCHRUN),
        ("two --grad-accum 2", TORCHRUN),
        ("three", ACCELERATE),
    ):
        code, told, err = outcome(start(ws, f"{line} {name}", launcher))
        assert code == 0, err
        assert told["warnings"] == []
        folder = ws / "runs" / name.split()[0]
        assert json.loads((folder / "run.log.json").read_text())["processes"] == 2
        one, two = (load_file(f / "model.safetensors") for f in (ws / "runs" / "one", folder))
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert (value - two[key]).abs().max() <= 1e-5, (name, key)


FAULTS = """
import errno, os, sys
from dery_cli.cli import main
from dery_cli.data.sets import ImageDataset
from dery_cli.errors import DeryError
from dery_cli.training import checkpoint

what, rank, drawn, draw = sys.argv.pop(1), os.environ["RANK"], 0, ImageDataset.__getitem__

def broken(self, index):
    global drawn
    drawn += 1
    if rank == "1" and drawn == 100:
        if what == "die":
            os._exit(7)
        if what == "image":
            raise DeryError("cannot read the image 7.png: torn", "replace or remove that file")
        if what == "bug":
            {}["nothing"]
    return draw(self, index)

def full(path):
    if "last-000004" in str(path):
        raise OSError(errno.ENOSPC, "No space left on device")

ImageDataset.__getitem__ = broken
if what == "disk":
    checkpoint.sync = full
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("image", "cannot read the image 7.png: torn"),
        ("bug", "KeyError in another process: 'nothing'"),
        ("die", "another process of this run has ended or hangs"),
        ("disk", "last-000004/checkpoint.json: the disk is full"),
    ],
)
def test_when_one_process_fails_all_end_and_the_main_one_says_why(ws, tmp_path, what, message):
    (tmp_path / "faults.py").write_text(FAULTS)
    line = f"{what} finetune --steps 40 --effort 0 --report-every 2 --name two"
    # a collective would wait for half an hour
    code, told, err = outcome(start(ws, line, program=tmp_path / "faults.py"), timeout=120)
    assert code == 1
    assert message in told["error"]["message"]
    assert ("KeyError: 'nothing'" in err) == (what == "bug")  # its traceback
    run_dir = ws / "runs" / "two"
    assert ckpt.load_checkpoint(ckpt.find_checkpoint(run_dir, "last")).step < 8
    assert not (run_dir / "run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
@pytest.mark.parametrize("to", ["launcher", "group", "second"])
def test_a_signal_saves_in_all_processes(ws, number, word, to):
    """A terminal sends it to the group, and the launcher then once more to its processes."""
    line = "finetune --steps 300 --effort 0 --report-every 300 --name two"
    process = start(ws, line)
    run_dir = ws / "runs" / "two"
    while ckpt.find_checkpoint(run_dir, "last") is None:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(1.0)
    if to == "group":
        os.killpg(process.pid, number)
    elif to == "launcher":
        process.send_signal(number)
    else:
        second = max(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        second.send_signal(number)
    code, told, _ = outcome(process)
    assert code != 0
    assert told["error"]["code"] == word
    assert 0 < ckpt.load_checkpoint(ckpt.find_checkpoint(run_dir, "last")).step < 300
    assert not (run_dir / "run.json").exists()
