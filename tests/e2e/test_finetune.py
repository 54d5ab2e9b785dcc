"""``dery finetune`` on real networks: its options, its teacher, and what goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dery_cli.core.stitching.probe import fit_classifier
from dery_cli.data.samples import choose_samples
from dery_cli.data.sets import open_data
from dery_cli.data.splits import stratified_holdout
from dery_cli.io.journal import Transaction
from dery_cli.training import checkpoint as ckpt
from dery_cli.training import rate_finder
from dery_cli.training.runlog import run_lock
from dery_cli.zoo.transforms import EvalTransform
from tests.conftest import make_images, run_dery
from tests.e2e.conftest import DONORS, edit_json, snapshot


def tune(copied, line):
    """``dery finetune`` that has to succeed; gives the JSON object."""
    outcome = copied("finetune", *line.split(), "--json")
    assert outcome.code == 0, outcome.stderr
    return outcome.json


def refused(copied, line, code):
    """``dery finetune`` that has to fail; gives the error."""
    outcome = copied("finetune", *line.split(), "--json")
    assert outcome.code == code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    return outcome.json["error"]


def record(root, name):
    return json.loads((root / "runs" / name / "run.json").read_text())


OPTIONS = {
    "mode": "stitch-then-full",
    "steps": 2,
    "stitch_fraction": 0.5,
    "batch_size": 32,
    "grad_accum": 2,
    "optimizer": "sgd",
    "lr": 0.01,
    "min_lr": 0.0001,
    "block_lr_scale": 0.5,
    "layer_decay": 0.9,
    "weight_decay": 0.01,
    "warmup": 0.2,
    "clip_grad": 0.0,
    "batch_norm": "fixed",
    "label_smoothing": 0.2,
    "ema_decay": 0.0,
    "mixup": 0.1,
    "cutmix": 0.2,
    "randaugment": 5,
    "crop_scale": [0.5, 1.0],
    "hflip": 0.25,
    "distill_logits": 0.4,
    "distill_temperature": 3.0,
    "distill_features": 0.2,
    "mixed_precision": "no",
    "report_every": 1,
    "seed": 3,
    "valid_fraction": 0.2,
    "teacher": "demo__mobilenetv3",
}


def test_every_option_reaches_the_run(copied, tmp_path):
    words = []
    for name, value in OPTIONS.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    tune(copied, " ".join(["--name", "all", *words]))
    options = record(tmp_path / "ws", "all")["options"]
    assert {name: options[name] for name in OPTIONS} == OPTIONS
    saved = ckpt.load_checkpoint(tmp_path / "ws" / "runs" / "all" / "last-000002")
    assert "ema" not in saved.tensors
    assert "adapter" in saved.tensors


def test_a_row_a_report_under_one_heading(copied):
    outcome = copied(
        "finetune", "--steps", "4", "--report-every", "2", "--valid-fraction", "0.2", "--name", "t"
    )
    lines = [line.split() for line in outcome.stderr.splitlines()]
    head = next(i for i, words in enumerate(lines) if words[:2] == ["epoch", "update"])
    assert lines[head - 1] == ["train", "valid", "valid", "time"]  # 80 columns fold them
    assert lines[head] == ["epoch", "update", "lr", "loss", "loss", "top-1", "images/s", "left"]
    rows = lines[head + 1 : head + 3]
    assert [row[1] for row in rows] == ["2/4", "4/4"]
    assert all(len(row) == 8 for row in rows)
    assert rows[1][7] == "0:00"
    assert sum(words[:1] == ["epoch"] for words in lines) == 1


def test_a_whole_donor_is_fitted_once_and_not_for_a_run_that_is_there(copied):
    line = (
        "finetune --donor demo__resnext --data DATA --steps 1 --effort 0 --workers 1 --name whole"
    )
    first = copied(*line.split())
    assert first.code == 0
    assert "fitting demo__resnext" in first.stderr
    again = copied(*line.split())
    assert "the run 'whole' is up to date" in again.stdout
    assert "fitting" not in again.stderr


# the rate

TRIED = "--steps 6 --batch-size 16 --report-every 2"
"""On folds: there are no validation images."""


def test_a_rate_that_was_found_is_not_searched_for_again(copied, tmp_path, monkeypatch):
    slower = functools.partial(dataclasses.replace, lr=1e-3)
    monkeypatch.setattr(rate_finder, "choose", lambda trials: slower(trials[0]))
    whole = tune(copied, f"{TRIED} --name whole")["result"]
    assert whole["rate"]["trials"][0]["lr"] == 3e-3
    assert whole["rate"]["lr"] == 1e-3
    assert whole["rate"]["admitted"]
    assert whole["best"]["step"] == 6
    line = json.loads((tmp_path / "ws/runs/whole/metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["lr"] < 1.1e-3
    sync = ckpt.sync

    def full(path):
        if "last-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(ckpt, "sync", full)
    refused(copied, f"{TRIED} --name parts", 1)
    monkeypatch.setattr(ckpt, "sync", sync)
    monkeypatch.setattr(rate_finder, "trial", None)
    tune(copied, f"{TRIED} --name parts --resume")
    for name in ("model.safetensors", "metrics.jsonl", "run.json", "rates.json"):
        one, other = (tmp_path / "ws/runs" / run / name for run in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes(), name


def test_a_start_that_no_rate_improves_is_kept(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(rate_finder, "choose", lambda trials: None)
    tune(copied, "--steps 1 --effort 0 --name kept")  # its checkpoints are replaced
    answer = tune(copied, f"{TRIED} --name kept")
    assert answer["warnings"] == [
        "no rate that was tried made the network better on images it had not seen: "
        "the start is kept as it is; --lr trains all the same"
    ]
    result = answer["result"]
    assert (result["kept_start"], result["best"]["steps"]) == (True, 0)
    assert result["test_top1"] == result["test_top1_before"]
    run_dir, assembly = tmp_path / "ws/runs/kept", tmp_path / "ws/assemblies/default"
    one, other = (load_file(folder / "model.safetensors") for folder in (run_dir, assembly))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert ckpt.find_checkpoint(run_dir, "last") is None
    assert not (run_dir / "metrics.jsonl").read_text()
    assert "is up to date" in copied("finetune", *TRIED.split(), "--name", "kept").stdout


def test_what_is_tried_is_shown(copied):
    outcome = copied("finetune", *TRIED.split(), "--name", "shown")
    assert outcome.code == 0
    shown = " ".join(outcome.stdout.split())
    assert "rates tried for " in shown
    assert "images held out of the fit, in folds; the start tells 0." in shown
    assert "rate blocks updates images top-1 gain +-" in shown
    assert re.search(r"3\.0e-03 x 1 6 \d\d 0\.", shown)


def test_a_rate_that_is_given_is_not_searched_for(copied):
    assert "rate" not in tune(copied, "--steps 1 --lr 0.001 --name given")["result"]
    error = refused(copied, "--steps 1 --lr 0.001 --effort 1 --name given", 2)
    assert "--lr and --effort exclude each other" in error["message"]


# the teacher


def probes(data, indices):
    """Accuracy of every donor's closed-form head on these digits, from timm's own pre-logits."""
    import dery_demo

    found = {}
    labels = torch.tensor([data.train.labels[i] for i in indices])
    for name in DONORS:
        model = dery_demo.zoo.build(name, pretrained=True)
        transform = EvalTransform(dery_demo.zoo.card(name).input, 0.95)
        x = torch.stack([transform(data.train.image(i)) for i in indices])
        with torch.no_grad():
            feat_NC = model.forward_head(model.forward_features(x), pre_logits=True)
        found[f"demo__{name}"] = fit_classifier(feat_NC, labels, 10).accuracy
    return found


def test_the_best_teacher_is_found_on_the_images_that_are_trained_on(copied, pipeline, tmp_path):
    data = open_data(str(pipeline.data))
    line = "--teacher best --steps 2 --valid-fraction 0.2 --name taught"
    told = tune(copied, line)["result"]["teacher"]
    kept, _ = stratified_holdout(data.train.labels, fraction=0.2, seed=0)
    expected = probes(data, list(choose_samples(kept, data.train.labels, len(kept), 0)))
    assert told["name"] == max(expected, key=expected.get)
    assert told["probe_accuracy"] == pytest.approx(max(expected.values()), abs=1 / len(kept))
    zoo = json.loads((tmp_path / "ws" / "zoo.json").read_text())["data"]["donors"]
    hashes = {donor["name"]: donor["weights_sha256"] for donor in zoo}
    assert told["sha256"] == hashes[told["name"]]
    # another rate is another run, the same again is up to date without a pass over the donors
    again = copied("finetune", *line.split())
    assert "the run 'taught' is up to date" in again.stdout
    assert "comparing" not in again.stderr
    assert "teacher" in record(tmp_path / "ws", "taught")["parents"]
    used = {block["donor"] for block in pipeline.results["assemble"]["network"]["blocks"]}
    other = next(name for name in hashes if name not in {*used, told["name"]})
    assert copied("zoo", "remove", other).code == 0
    again = copied("finetune", *line.split())
    assert "comparing teachers" in again.stderr
    assert f"teacher: {told['name']}, the best of {len(DONORS) - 1} donors" in again.stdout


@pytest.mark.slow
def test_a_donor_and_a_network_of_the_workspace_teach(copied, tmp_path):
    base = "--steps 3 --effort 0 --report-every 3"
    alone = tune(copied, f"{base} --name alone")["result"]
    assert "teacher" not in alone
    for teacher in ("demo__vit_cls", "runs/default", "assemblies/default"):
        name = teacher.partition("/")[0]
        line = f"{base} --name {name} --teacher {teacher} --distill-features 1"
        taught = tune(copied, line)["result"]
        assert taught["teacher"]["name"] == teacher
        parents = record(tmp_path / "ws", name)["parents"]
        assert parents["teacher"] == taught["teacher"]["sha256"]
        assert taught["test_loss"] != alone["test_loss"]


@pytest.mark.slow
def test_a_teacher_is_part_of_what_is_resumed(copied):
    line = "--steps 2 --effort 0 --name taught --distill-logits 0.3"
    tune(copied, f"{line} --teacher demo__mobilenetv3")
    error = refused(copied, f"{line} --teacher demo__resnext --resume", 2)
    assert "was trained with the teacher demo__mobilenetv3" in error["message"]
    assert "now demo__resnext" in error["message"]
    error = refused(copied, "--steps 2 --effort 0 --name taught --resume", 2)
    assert "now None" in error["message"]
    tune(copied, f"{line} --teacher demo__mobilenetv3 --resume")


def test_teachers_that_are_refused(copied, tmp_path):
    before = snapshot(tmp_path / "ws")
    error = refused(copied, "--teacher demo__resnxt", 2)
    assert error["message"] == "no donor named 'demo__resnxt' in the zoo"
    assert "demo__resnext" in error["hint"]
    error = refused(copied, "--teacher runs/nosuch", 2)
    assert "there is no runs/nosuch" in error["message"]
    assert "assemblies/default, runs/default" in error["hint"]
    assert snapshot(tmp_path / "ws") == before
    make_images(tmp_path / "pets", ["cat", "dog"], 10)
    tune(copied, "--donor demo__mobilenetv3 --data ./pets --steps 1 --effort 0 --name pets")
    error = refused(copied, "--teacher runs/pets", 2)
    assert error["message"].startswith("the teacher runs/pets tells other classes apart")
    assert "new cat, dog missing 0, 1, 2 ..." in error["message"]


# bad input


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--batch-size 15 --grad-accum 2", "a batch of 15 does not divide"),
        ("--optimizer adamx", "timm has no optimizer 'adamx'"),
    ],
)
def test_what_cannot_be_is_refused_before_teachers_are_compared(copied, line, text):
    outcome = copied("finetune", "--teacher", "best", "--name", "x", *line.split())
    assert outcome.code == 2
    assert text in outcome.stderr
    assert "comparing teachers" not in outcome.stderr


def test_a_launchers_precision_is_the_runs(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    tune(copied, "--steps 1 --effort 0 --name half")
    assert record(tmp_path / "ws", "half")["options"]["mixed_precision"] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    error = refused(copied, "--steps 1 --effort 0 --name half --resume", 2)
    assert "was trained with mixed_precision bf16, now no" in error["message"]


@pytest.fixture
def stopped(copied, tmp_path, monkeypatch):
    """A run of 8 updates that met a full disk at the sixth."""
    sync = ckpt.sync

    def full(path):
        if "last-000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(ckpt, "sync", full)
    error = refused(copied, f"{RUN} --name parts", 1)
    monkeypatch.undo()
    assert "last-000006" in error["message"]
    assert "the disk is full" in error["message"]
    assert "--resume" in error["hint"]
    return tmp_path / "ws" / "runs" / "parts"


RUN = "--steps 8 --report-every 2 --valid-fraction 0.2"


@pytest.mark.parametrize("flag", ["--resume", ""])
def test_after_a_full_disk_the_run_goes_on_to_the_same_bytes(copied, tmp_path, stopped, flag):
    assert ckpt.find_checkpoint(stopped, "last").name == "last-000004"
    assert not (stopped / "run.json").exists()
    told = tune(copied, f"{RUN} --name parts {flag}")["warnings"]
    assert told == ([] if flag else ["going on from update 4 of 8"])
    assert tune(copied, f"{RUN} --name whole")["warnings"] == []
    whole = tmp_path / "ws" / "runs" / "whole"
    for name in ("model.safetensors", "metrics.jsonl", "run.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_disk_that_is_full_at_the_very_end_does_not_cost_the_run(copied, tmp_path, monkeypatch):
    def full(work, name, tensors):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Transaction, "write_tensors", full)
    error = refused(copied, "--steps 2 --effort 0 --name parts", 1)
    monkeypatch.undo()
    assert "run.json: the disk is full" in error["message"]
    assert "--resume" in error["hint"]
    monkeypatch.setattr(torch.Tensor, "backward", None)  # nothing is left to train
    tune(copied, "--steps 2 --effort 0 --name parts --resume")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / "ema.safetensors").unlink(), "ema.safetensors is missing"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"x"),
            "model.safetensors was altered or cut short: sha256",
        ),
        (
            lambda f: edit_json(f / "checkpoint.json", lambda d: d.update(version=9)),
            "was written by a newer dery (format 9",
        ),
        (lambda f: (f / "checkpoint.json").unlink(), "checkpoint.json is missing"),
    ],
    ids=["missing", "altered", "newer", "no-record"],
)
def test_a_damaged_checkpoint_is_not_resumed(copied, stopped, damage, text):
    damage(stopped / "last-000004")
    before = snapshot(stopped)
    error = refused(copied, f"{RUN} --name parts --resume", 1)
    assert text in error["message"]
    assert error["hint"]
    assert snapshot(stopped) == before


def test_other_options_replace_an_unfinished_run_and_say_so(copied, stopped):
    told = tune(copied, "--steps 2 --effort 0 --name parts")["warnings"]
    assert len(told) == 1
    assert told[0].startswith(f"the unfinished run in {stopped} is replaced: ")
    assert (
        tune(copied, "--steps 3 --effort 0 --name parts")["warnings"] == []
    )  # that one was finished


def test_a_damaged_checkpoint_is_begun_anew_without_resume(copied, tmp_path, stopped):
    (stopped / "last-000004" / "model.safetensors").write_bytes(b"x")
    told = tune(copied, f"{RUN} --name parts")["warnings"]
    assert "is replaced: " in told[0]
    assert "model.safetensors was altered or cut short" in told[0]
    tune(copied, f"{RUN} --name whole")
    whole = tmp_path / "ws" / "runs" / "whole"
    assert (stopped / "run.json").read_bytes() == (whole / "run.json").read_bytes()


@pytest.mark.slow
def test_other_options_do_not_resume(copied, stopped):
    error = refused(copied, f"{RUN} --name parts --resume --lr 0.1", 2)
    assert "was trained with lr 0.003, now 0.1" in error["message"]
    error = refused(copied, f"{RUN} --name parts --resume --scratch", 2)
    assert "came of another start: " in error["message"]
    assert ", from scratch" in error["message"]
    error = refused(copied, "--teacher runs/parts --name taught", 4)
    assert error["message"].startswith("no assembly or finished run in ")
    assert error["hint"] == "dery finetune --name parts --resume"
    error = refused(copied, f"{RUN} --name never --resume", 2)
    assert "holds no checkpoint to resume from" in error["message"]


def test_two_runs_on_one_folder(copied, tmp_path):
    with run_lock(tmp_path / "ws" / "runs" / "busy"):
        error = refused(copied, f"{RUN} --name busy", 1)
    assert "another process is fine-tuning in" in error["message"]
    assert "--name" in error["hint"]


def test_a_loss_that_is_not_finite_names_the_update_and_the_checkpoint(copied, tmp_path):
    line = "--steps 9 --report-every 1 --lr 2e9 --clip-grad 0 --warmup 0 --name wild"
    error = refused(copied, line, 1)
    step = error["details"]["step"]
    assert f"at update {step} of 9" in error["message"]
    assert error["details"]["checkpoint"].endswith(f"last-{step - 1:06d}")
    assert ckpt.load_checkpoint(tmp_path / "ws" / "runs" / "wild" / f"last-{step - 1:06d}")


def test_finite_weights_whose_loss_is_not_are_no_result(copied, tmp_path):
    line = "--steps 1 --lr 2e9 --clip-grad 0 --warmup 0 --valid-fraction 0 --name wild"
    error = refused(copied, line, 1)
    assert error["message"].startswith("after 1 updates the loss on the test images is ")
    assert "--lr" in error["hint"]
    assert not (tmp_path / "ws" / "runs" / "wild" / "run.json").exists()


def test_with_validation_images_a_network_never_ends_worse_than_it_came(copied):
    line = "--steps 1 --lr 2e9 --clip-grad 0 --warmup 0 --valid-fraction 0.2 --name wild"
    result = tune(copied, line)["result"]
    assert result["best"]["step"] == 0
    assert result["test_top1"] == result["test_top1_before"]


def test_fewer_images_than_a_batch_and_one_class(copied, tmp_path):
    make_images(tmp_path / "few", ["cat", "dog"], 10)
    told = tune(copied, "--donor demo__mobilenetv3 --data ./few --steps 1 --effort 0 --name few")
    assert told["warnings"] == [
        "16 training images are fewer than a batch of 64: it was reduced to 16"
    ]
    make_images(tmp_path / "one", ["cat"], 10)
    error = refused(copied, "--donor demo__mobilenetv3 --data ./one --steps 1 --name one", 2)
    assert "only one class folder with images" in error["message"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_run_resumes_to_the_same_bytes(
    copied, tmp_path, pipeline, number, code
):
    line = shlex.split(
        "finetune --steps 60 --effort 0 --batch-size 8 --report-every 60 --name parts "
        "--workspace ws"
    )
    run_dir = tmp_path / "ws" / "runs" / "parts"
    with subprocess.Popen(
        [sys.executable, "-m", "dery_cli", *line, "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while ckpt.find_checkpoint(run_dir, "last") is None:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert json.loads(out)["ok"] is False
    assert "Traceback" not in err
    assert 0 < ckpt.load_checkpoint(ckpt.find_checkpoint(run_dir, "last")).step < 60
    for more in (["--resume"], ["--name", "whole"]):
        assert run_dery(*line, *more, cwd=tmp_path).code == 0
    whole = run_dir.with_name("whole")
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes()


def test_curves_change_nothing_of_the_run(copied, tmp_path):
    pytest.importorskip("tensorboard")
    line = "--steps 2 --effort 0 --name curves"
    tune(copied, line)
    before = snapshot(tmp_path / "ws")
    outcome = copied("finetune", *line.split(), "--tensorboard")
    assert "is up to date" in outcome.stdout
    folder = tmp_path / "ws" / "runs" / "curves" / "tensorboard"
    assert len(list(folder.iterdir())) == 1
    after = snapshot(tmp_path / "ws")
    assert before == {name: data for name, data in after.items() if "tensorboard" not in name}


@pytest.mark.parametrize("damage", ["delete", "flip"])
def test_a_run_whose_best_weights_are_lost_begins_anew(copied, tmp_path, damage):
    line = "--steps 6 --report-every 2 --batch-size 8 --valid-fraction 0.2 --effort 0 --name lost"
    first = tune(copied, line)["result"]
    folder = tmp_path / "ws" / "runs" / "lost"
    (folder / "run.json").unlink()
    (best,) = folder.glob("best-*")
    if damage == "delete":
        shutil.rmtree(best)
    else:
        weights = best / "model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    again = copied("finetune", *line.split(), "--json")
    assert again.code == 0, again.stderr
    assert "begun anew" in " ".join(again.json["warnings"])
    assert best.name in " ".join(again.json["warnings"])
    assert again.json["result"]["best"] == first["best"]
    assert again.json["result"]["test_top1"] == first["test_top1"]
