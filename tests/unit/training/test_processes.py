"""Signals, a kill, and several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dery_cli.training import checkpoint as ckpt
from dery_cli.training.loop import finetune
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.training.signals import Interruption
from tests.unit.training.standins import (
    CLASSES,
    Assembly,
    Noisy,
    images,
    in_a_child,
    lines,
    weights_of,
)

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the children: another number of threads may change the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(run_dir, *, pause=0.0, tell=None, resume=False, **changes):
    """Train; ``tell`` gets a byte for every update."""

    def progress(_):
        if tell is not None:
            os.write(tell, b".")
        time.sleep(pause)

    settings = {"batch_size": 16, "report_every": 100, "steps": 40, **changes}
    return finetune(
        Assembly(),
        Noisy(images()),
        images(30, seed=2),
        FinetuneConfig(**settings),
        run_dir,
        classes=CLASSES,
        device="cpu",
        resume=resume,
        progress=progress,
    )


def start(run_dir, updates, **changes):
    """Train in a child; returns its id after so many updates."""
    read, write = os.pipe()
    child = in_a_child(lambda: run(run_dir, tell=write, **changes) and None)
    os.close(write)
    with open(read, "rb", buffering=0) as told:
        for _ in range(updates):
            assert told.read(1) == b".", "the child ended early"
    return child


def last(run_dir):
    return ckpt.load_checkpoint(ckpt.find_checkpoint(run_dir, "last"))


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGTERM, 2)],
    ids=["ctrl-c", "sigterm", "ctrl-c-loading", "sigterm-loading"],
)
def test_a_signal_saves_a_checkpoint_that_resumes_to_the_bit(tmp_path, number, workers):
    """Sent to the whole group, loading processes included, as a terminal does."""
    child = start(tmp_path / "parts", 3, pause=0.05, workers=workers)
    os.killpg(child, number)
    status = os.waitpid(child, 0)[1]
    if number == signal.SIGINT:
        assert os.waitstatus_to_exitcode(status) == 77  # KeyboardInterrupt
    else:
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM  # 143 in a shell
    assert 3 <= last(tmp_path / "parts").step < 40
    run(tmp_path / "parts", resume=True, workers=workers)
    run(tmp_path / "whole", workers=workers)
    parts, whole = last(tmp_path / "parts").tensors, last(tmp_path / "whole").tensors
    for stem, named in whole.items():
        assert all(torch.equal(value, parts[stem][name]) for name, value in named.items())
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_second_signal_does_not_wait(tmp_path):
    child = start(tmp_path, 1, pause=60)
    for _ in range(2):
        os.kill(child, signal.SIGINT)
        time.sleep(0.3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


def test_of_signals_that_a_launcher_repeats_only_the_first_counts():
    with Interruption(repeated=True) as interruption:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            signal.raise_signal(number)
        assert interruption.received == signal.SIGTERM
    with Interruption():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_killed_at_any_moment_resumes(tmp_path):
    step = 0
    for trial in range(4):
        child = start(tmp_path, 2, report_every=1, steps=1000, resume=trial > 0)
        time.sleep(0.05 * trial)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached = last(tmp_path).step
        assert reached > step
        step = reached
        assert weights_of(tmp_path, "best").keys() == Assembly().state_dict().keys()
        told = [line["step"] for line in lines(tmp_path)]
        assert told[:step] == list(range(1, step + 1))


HELD = """
import sys
from pathlib import Path
import torch
from torch.utils.data import TensorDataset
from dery_cli.training import signals
from dery_cli.training.loop import finetune
from dery_cli.training.recipe import FinetuneConfig
from tests.unit.training.standins import CLASSES, Assembly, images

class Buggy(TensorDataset):
    def __getitem__(self, index):
        return {}["nothing"]

signals.WORKER_SECONDS = 1
try:
    finetune(Assembly(), Buggy(*images().tensors), None, FinetuneConfig(steps=2, workers=1),
             Path(sys.argv[1]), classes=CLASSES, device="cpu")
except KeyError as error:
    held = error
    print(len(__import__("multiprocessing").active_children()), flush=True)
"""


def test_loading_processes_that_a_traceback_holds_do_not_keep_python_from_exiting(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", HELD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


PROGRAM = """
import json, sys, warnings
from pathlib import Path
from dery_cli.training.loop import finetune
from dery_cli.training.recipe import FinetuneConfig
from tests.unit.training.standins import CLASSES, Assembly, images

settings = {"batch_size": 16, "report_every": 4, "lr": 0.01}
half = iter(range(100))

def train(name, *, norm=False, stop=None, resume=False, **changes):
    finetune(
        Assembly(norm=norm), images(), images(31, seed=2),
        FinetuneConfig(**{**settings, **changes}), Path(sys.argv[1]) / name,
        classes=CLASSES, device="cpu", stop=stop, resume=resume,
    )

train("full", steps=8)
phases = {"steps": 8, "grad_accum": 2, "mode": "stitch-then-full", "stitch_fraction": 0.5}
train("phases", **phases, stop=lambda: next(half) >= 5)
train("phases", **phases, resume=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    train("norm", norm=True, steps=1)
print([str(w.message) for w in caught if "batch norm" in str(w.message)])
"""


@pytest.mark.slow
def test_two_processes_agree_with_one_at_the_same_global_batch(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = {}
    for count, launcher in (("one", []), ("two", two)):
        command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(tmp_path / count)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        told[count] = done.stdout
    for name in ("full", "phases"):
        one, two_ = (last(tmp_path / count / name).tensors for count in ("one", "two"))
        for key, value in one["model"].items():
            torch.testing.assert_close(value, two_["model"][key], rtol=1e-5, atol=1e-5, msg=key)
        pairs = zip(lines(tmp_path / "one" / name), lines(tmp_path / "two" / name), strict=True)
        for line, other in pairs:
            assert line == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert told["one"] == "[]\n"
    assert "2 batch norms (blocks.0.1, ...) see only their own process" in told["two"]
