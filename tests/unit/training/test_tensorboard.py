"""Curves are the lines of metrics.jsonl, each once."""

from __future__ import annotations

import pytest

from dery_cli.errors import DeryError
from dery_cli.training.runlog import append_metrics, rewind_metrics
from dery_cli.training.tensorboard import Curves

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def curves(run_dir):
    found = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    return {
        tag: [(point.step, pytest.approx(point.value, rel=1e-6)) for point in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def line(step, **more):
    return {"step": step, "epoch": step / 10, "lr": 0.1 / step, "train_loss": 2.0 / step, **more}


def test_a_resumed_run_has_each_point_once(tmp_path):
    first = Curves(tmp_path)
    for step in (10, 20, 30):
        append_metrics(tmp_path, line(step, valid_loss=float("nan"), valid_top1=0.5))
        first.update()
    first.close()
    rewind_metrics(tmp_path, 20)  # killed; the last checkpoint is of update 20
    second = Curves(tmp_path)
    append_metrics(tmp_path, line(30, valid_loss=0.25, valid_top1=0.75))
    second.update()
    append_metrics(tmp_path, line(40))
    second.close()
    assert curves(tmp_path) == {
        "loss/train": [(10, 0.2), (20, 0.1), (30, 2 / 30), (40, 0.05)],
        "loss/valid": [(30, 0.25)],
        "top1/valid": [(10, 0.5), (20, 0.5), (30, 0.75)],
        "lr": [(10, 0.01), (20, 0.005), (30, 0.1 / 30), (40, 0.0025)],
        "epoch": [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)],
    }


def test_curves_that_cannot_be_written_end_the_run_with_a_message(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    append_metrics(tmp_path, line(10))
    with pytest.raises(DeryError, match=r"could not write .*tensorboard"):
        Curves(tmp_path).update()
