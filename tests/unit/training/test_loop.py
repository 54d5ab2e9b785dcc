"""The loop as a whole: what it trains, that it resumes to the bit, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dery_cli.errors import DeryError, UsageError
from dery_cli.training import checkpoint as ckpt
from dery_cli.training.guard import LossGuard
from dery_cli.training.loop import finetune
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.training.runlog import run_lock
from tests.unit.training.standins import (
    CLASSES,
    Assembly,
    Noisy,
    images,
    lines,
    same,
    weights_of,
)


def run(tmp_path, model=None, train=None, valid="same", **changes):
    options = {
        name: changes.pop(name)
        for name in ("resume", "progress", "stop", "teacher", "classes", "origin")
        if name in changes
    }
    settings = {"steps": 12, "batch_size": 16, "report_every": 4, **changes}
    train = images() if train is None else train
    return finetune(
        Assembly() if model is None else model,
        train,
        images(30, seed=2) if valid == "same" else valid,
        FinetuneConfig(**settings),
        tmp_path,
        device="cpu",
        **{"classes": CLASSES, **options},
    )


def everything(run_dir):
    """All a checkpoint holds, for comparing two runs."""
    loaded = ckpt.load_checkpoint(ckpt.find_checkpoint(run_dir, "last"))
    return loaded.tensors, loaded.state, (run_dir / "metrics.jsonl").read_bytes()


def assert_same_run(one, other):
    (tensors, state, metrics), (tensors_2, state_2, metrics_2) = everything(one), everything(other)
    assert tensors.keys() == tensors_2.keys()
    for stem in tensors:
        assert same(tensors[stem], tensors_2[stem]), stem
    assert state == state_2
    assert metrics == metrics_2
    best, best_2 = (ckpt.find_checkpoint(path, "best") for path in (one, other))
    assert best.name == best_2.name
    assert same(weights_of(one), weights_of(other))


def test_it_learns_and_the_model_ends_with_the_best_weights(tmp_path):
    model = Assembly()
    result = run(tmp_path, model, steps=80, lr=0.01, report_every=20)
    assert result.finished
    assert result.best["valid_top1"] > 0.9
    assert result.best["valid_top1"] == max(line["valid_top1"] for line in result.history)
    assert list(result.history) == lines(tmp_path)
    assert [line["step"] for line in result.history] == [20, 40, 60, 80]
    assert set(result.history[0]) == {
        "step", "epoch", "lr", "train_loss", "valid_loss", "valid_top1"
    }  # fmt: skip
    assert same(model.state_dict(), weights_of(tmp_path, "best"))
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        pixels, labels = images(30, seed=2).tensors
        top1 = (model(pixels).argmax(1) == labels).float().mean().item()
    assert top1 == pytest.approx(result.best["valid_top1"])


def test_one_update_is_the_one_written_by_hand(tmp_path):
    """AdamW's first update, from the smoothed cross entropy of a whole batch."""
    train, model = images(12), Assembly(norm=False)
    wanted = Assembly(norm=False)
    pixels, labels = train.tensors
    loss = functional.cross_entropy(wanted(pixels), labels, label_smoothing=0.1)
    loss.backward()
    with torch.no_grad():
        for name, p in wanted.named_parameters():
            decay = 0.05 if p.ndim > 1 else 0.0
            lr = 0.01 * (0.5 if name.startswith("blocks.") else 1.0)
            p -= lr * decay * p + lr * p.grad / (p.grad.abs() + 1e-8)
    result = run(
        tmp_path, model, train, None, steps=1, batch_size=12, lr=0.01, block_lr_scale=0.5,
        ema_decay=None, clip_grad=None,
    )  # fmt: skip
    assert result.history[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    whole, parts = Assembly(norm=False), Assembly(norm=False)
    run(tmp_path / "whole", whole)
    run(tmp_path / "parts", parts, grad_accum=4)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for line, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_frozen_blocks_keep_their_bits_batch_norm_included(tmp_path):
    model, before = Assembly(), Assembly().state_dict()
    run(tmp_path, model, mode="frozen")
    after = model.state_dict()
    blocks = {name for name in before if name.startswith("blocks.")}
    assert any("running_mean" in name for name in blocks)
    assert all(torch.equal(before[name], after[name]) for name in blocks)
    assert not any(torch.equal(before[n], after[n]) for n in before if n not in blocks)


def test_stitch_then_full_frees_the_blocks_after_its_first_phase(tmp_path):
    before = Assembly().state_dict()
    seen = []

    def look(progress):
        seen.append(torch.equal(model.blocks[0][0].weight, before["blocks.0.0.weight"]))

    model = Assembly()
    result = run(tmp_path, model, mode="stitch-then-full", stitch_fraction=0.5, progress=look)
    assert seen == [True] * 6 + [False] * 6
    assert result.history[-1]["lr"] < result.history[0]["lr"]


def pretrained():
    """As if the first block had been trained: its batch norm has statistics."""
    model = Assembly()
    model.blocks[0][1].running_mean += 0.5
    return model


def test_fixed_batch_norms_train_but_keep_their_statistics(tmp_path):
    before, model = pretrained().state_dict(), pretrained()
    run(tmp_path, model, valid=None, batch_norm="fixed")
    after = model.state_dict()
    assert torch.equal(before["blocks.0.1.running_mean"], after["blocks.0.1.running_mean"])
    assert torch.equal(before["blocks.0.1.running_var"], after["blocks.0.1.running_var"])
    assert not torch.equal(before["blocks.0.1.weight"], after["blocks.0.1.weight"])
    assert not torch.equal(before["blocks.1.1.running_mean"], after["blocks.1.1.running_mean"])


def stop_after(updates):
    asked = iter(range(10**6))
    return lambda: next(asked) >= updates


STOPPED_AT = [
    (5, {}),
    (4, {"workers": 2}),
    (7, {"mixup": 0.5, "cutmix": 0.5, "grad_accum": 2}),
    (9, {"mode": "stitch-then-full", "stitch_fraction": 0.5}),
    (6, {"mode": "stitch-then-full", "stitch_fraction": 0.5}),
    (3, {"ema_decay": None, "optimizer": "sgd", "layer_decay": 0.7}),
    (1, {"mode": "frozen", "mixed_precision": "bf16"}),
    (0, {"valid": None}),
    (8, {"batch_norm": "fixed", "make": pretrained}),
    (5, {"optimizer": "lamb"}),  # counts its steps in a tensor of its groups
    (5, {"optimizer": "adafactorbv"}),  # has momentum in bfloat16, and a type among its options
    (7, {"optimizer": "lookahead_adamw"}),
]


@pytest.mark.parametrize(("updates", "changes"), STOPPED_AT)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, updates, changes):
    changes = {**changes, "train": Noisy(images())}
    make = changes.pop("make", Assembly)
    run(tmp_path / "whole", make(), **changes)
    torch.rand(7)  # whatever the caller draws in between
    first = run(tmp_path / "parts", make(), stop=stop_after(updates), **changes)
    assert (first.finished, first.steps) == (False, updates)
    second = run(tmp_path / "parts", Assembly(seed=9), resume=True, **changes)
    assert second.finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_loading_processes_do_not_change_the_numbers(tmp_path):
    for workers in (0, 2):
        changes = {"train": Noisy(images()), "mixup": 0.3, "workers": workers}
        run(tmp_path / str(workers), Assembly(), **changes)
    tensors, _, metrics = everything(tmp_path / "0")
    tensors_2, _, metrics_2 = everything(tmp_path / "2")
    assert metrics == metrics_2
    assert all(same(tensors[stem], tensors_2[stem]) for stem in tensors)


def test_another_seed_is_another_run(tmp_path):
    for seed in (0, 1):
        run(tmp_path / str(seed), Assembly(), seed=seed)
    assert lines(tmp_path / "0") != lines(tmp_path / "1")


def test_the_callers_random_state_and_the_models_modes_are_kept(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = Assembly.__new__(Assembly)
    state = torch.get_rng_state()
    model.__init__()
    torch.set_rng_state(state)
    model.head.bias.requires_grad_(False)
    run(tmp_path, model)
    assert torch.equal(torch.rand(2), expected)
    assert not model.head.bias.requires_grad
    assert model.head.weight.requires_grad


def test_a_killed_run_goes_on_from_its_last_report_without_double_lines(tmp_path):
    """Killed after the metrics line and the best weights, before the checkpoint."""

    class KilledError(Exception):
        pass

    def die(progress):
        if progress.step == 10:
            raise KilledError

    run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", progress=die)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "epoch": 2.1}\n{"step": 1')
    ckpt.save_checkpoint(tmp_path / "killed", "best", 12, {"model": {}}, {})
    result = run(tmp_path / "killed", resume=True)
    assert [line["step"] for line in result.history] == [4, 8, 12]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run(tmp_path)
    before = everything(tmp_path)
    model = Assembly(seed=4)
    result = run(tmp_path, model, resume=True)
    assert result.finished
    assert len(result.history) == 3
    assert before[1:] == everything(tmp_path)[1:]
    assert same(model.state_dict(), weights_of(tmp_path))


def test_a_fresh_run_replaces_the_one_before(tmp_path):
    run(tmp_path, steps=12)
    result = run(tmp_path, steps=8)
    assert [line["step"] for line in lines(tmp_path)] == [4, 8]
    assert result.last_dir.name == "last-000008"
    assert len(ckpt.checkpoints(tmp_path, "last")) == len(ckpt.checkpoints(tmp_path, "best")) == 1


def test_without_validation_data_the_last_weights_are_the_best(tmp_path):
    model = Assembly()
    result = run(tmp_path, model, valid=None)
    assert (result.best_step, result.best) == (12, {})
    assert same(weights_of(tmp_path, "best"), weights_of(tmp_path, "last"))


def test_progress_tells_every_update(tmp_path):
    seen = []
    run(tmp_path, progress=seen.append)
    assert [p.step for p in seen] == list(range(1, 13))
    assert [p.step for p in seen if p.report] == [4, 8, 12]
    assert seen[-1].eta == 0.0
    assert all(p.eta > 0 for p in seen[:-1])
    assert seen[2].epoch == pytest.approx(3 * 16 / 90)


class Diverging(nn.Module):
    """Logits become infinite at some batches of training."""

    def __init__(self, *batches):
        super().__init__()
        self.head = nn.Linear(3 * 64, 3)
        self.calls, self.batches = 0, batches

    def forward(self, x):
        self.calls += self.training
        return self.head(x.flatten(1)) * (math.inf if self.calls in self.batches else 1.0)


def test_a_loss_that_is_not_finite_goes_back_to_the_last_good_checkpoint(tmp_path):
    with pytest.warns(UserWarning, match="the loss is nan at update 7: going back to update 4"):
        result = run(tmp_path, Diverging(7), ema_decay=None)
    assert result.finished
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 12]


@pytest.mark.filterwarnings("ignore:the loss is nan")
def test_a_loss_that_stays_not_finite_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(DeryError) as error:
        run(tmp_path, Diverging(*range(7, 99)), ema_decay=None)
    assert error.value.message == (
        f"the loss is nan at update 5 of 12; the last good checkpoint is {tmp_path}/last-000004"
    )
    assert error.value.details == {"step": 5, "checkpoint": f"{tmp_path}/last-000004"}
    assert ckpt.load_checkpoint(tmp_path / "last-000004").step == 4


def test_weights_that_break_before_the_loss_are_not_saved(tmp_path):
    """From the eighth update on gradients are NaN; its loss is not, and then a report is due."""
    model, calls = Assembly(), itertools.count(1)
    model.head.weight.register_hook(lambda grad: grad * (math.nan if next(calls) >= 8 else 1.0))
    with (
        pytest.warns(UserWarning, match="the weights are not finite at update 8: going back"),
        pytest.raises(DeryError) as error,
    ):
        run(tmp_path, model)
    assert error.value.message.startswith("the loss is nan at update 6 of 12")
    assert error.value.details == {"step": 6, "checkpoint": f"{tmp_path}/last-000004"}
    assert [line["step"] for line in lines(tmp_path)] == [4]
    for named in ckpt.load_checkpoint(tmp_path / "last-000004").tensors.values():
        assert all(value.isfinite().all() for value in named.values())


def test_labels_out_of_range_and_one_class_are_refused_before_anything_is_written(tmp_path):
    pixels, labels = images().tensors
    for wrong, text in ((labels + 1, "have a label 3"), (labels * 0, "are of one class")):
        with pytest.raises(UsageError, match=text):
            run(tmp_path / "run", train=TensorDataset(pixels, wrong))
    with pytest.raises(UsageError, match="head tells 3 classes apart, the data have 4"):
        run(tmp_path / "run", classes=("a", "b", "c", "d"))
    with pytest.raises(UsageError, match="does not divide"):
        run(tmp_path / "run", batch_size=15, grad_accum=2)
    assert not (tmp_path / "run").exists()


def test_fewer_images_than_a_batch_shrink_it_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="9 training images are fewer than a batch of 16"):
        assert run(tmp_path, train=images(9)).batch_size == 9


class Torn(TensorDataset):
    """One image cannot be read."""

    def __getitem__(self, index):
        if index == 5:
            raise DeryError("cannot read the image 5.png: torn", "replace or remove that file")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("which", ["train", "valid"])
def test_an_image_that_cannot_be_read_is_named_without_a_traceback(tmp_path, workers, which):
    with pytest.raises(DeryError) as error:
        run(tmp_path, **{which: Torn(*images(30).tensors)}, workers=workers)
    assert error.value.message == "cannot read the image 5.png: torn"
    assert error.value.hint == "replace or remove that file"


def test_two_runs_on_one_folder(tmp_path):
    with run_lock(tmp_path), pytest.raises(DeryError, match="another process is fine-tuning in"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr": 0.5}, "was trained with lr 0.001, now 0.5"),
        ({"train": images(60)}, "was trained with other data: images 90, now 60"),
        ({"classes": ("x", "y", "z")}, "was trained with other data: classes"),
        ({"origin": {"start": "b"}}, "came of another start: None, now b"),
        (
            {"train": TensorDataset(images().tensors[0], images().tensors[1].flip(0))},
            "was trained with other data: labels_sha256",
        ),
    ],
)
def test_resuming_with_other_options_or_data_is_refused(tmp_path, changes, text):
    run(tmp_path, stop=stop_after(3))
    with pytest.raises(UsageError) as error:
        run(tmp_path, resume=True, **changes)
    assert text in error.value.message


def test_resuming_another_network_or_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no checkpoint to resume from"):
        run(tmp_path, resume=True)
    run(tmp_path, stop=stop_after(3))
    with pytest.raises(DeryError, match=r"model\.safetensors is of another network: with blocks"):
        run(tmp_path, Assembly(width=4), resume=True)


def test_a_damaged_checkpoint_is_not_resumed(tmp_path):
    run(tmp_path, stop=stop_after(3))
    path = ckpt.find_checkpoint(tmp_path, "last") / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DeryError, match=r"optimizer\.safetensors was altered or cut short"):
        run(tmp_path, resume=True)


def test_fp16_on_a_cpu_is_refused(tmp_path):
    """Accelerate computes in fp32 there and does not say so."""
    with pytest.raises(UsageError, match="no training in fp16 on a CPU"):
        run(tmp_path / "run", mixed_precision="fp16")
    assert not (tmp_path / "run").exists()


def test_accumulation_bounds_the_images_at_once_in_validation_too(tmp_path):
    model, sizes = Assembly(), []
    model.head.register_forward_hook(lambda head, x, _: sizes.append(len(x[0])))
    run(tmp_path, model, grad_accum=4, ema_decay=None)
    assert max(sizes) == 2 * 16 // 4


def test_the_precision_of_one_run_does_not_stick_to_the_next(tmp_path):
    run(tmp_path / "bf16", mixed_precision="bf16")
    run(tmp_path / "none")
    run(tmp_path / "no", mixed_precision="no")
    assert lines(tmp_path / "none") == lines(tmp_path / "no")
    assert lines(tmp_path / "none") != lines(tmp_path / "bf16")


def wild(tmp_path, **changes):
    """A rate that throws the network far off, and so does a third of it."""
    told = []
    settings = {"steps": 40, "lr": 30.0, "warmup": 0, "clip_grad": 0.0, "report_every": 10}
    options = {**settings, "batch_size": 16, **changes}
    stop = options.pop("stop", None)
    resume = options.pop("resume", None)
    result = finetune(
        Assembly(norm=False),
        images(),
        images(30, seed=2),
        FinetuneConfig(**options),
        tmp_path,
        device="cpu",
        classes=CLASSES,
        warn=told.append,
        stop=stop,
        resume=resume,
    )
    return result, told


def test_a_loss_that_rises_goes_back_to_a_lower_rate(tmp_path):
    result, told = wild(tmp_path)
    assert result.finished
    risen = [line for line in told if "the loss rose to" in line]
    assert risen
    assert "going back to update" in risen[0]
    assert "a rate of 1/3 of what was asked for" in risen[0]
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 40]
    rates = [line["lr"] for line in lines(tmp_path)]
    assert rates[-1] < 10


def test_a_run_that_went_back_resumes_to_the_bit(tmp_path):
    wild(tmp_path / "one")
    for updates in (5, 9, 17, 25):
        seen = itertools.count()

        def stop(seen=seen, updates=updates):
            return next(seen) >= updates

        folder = tmp_path / f"at-{updates}"
        cut, _ = wild(folder, stop=stop)
        assert not cut.finished
        wild(folder)
        assert_same_run(tmp_path / "one", folder)


def test_the_start_is_kept_where_nothing_beats_it(tmp_path):
    model = Assembly()
    run(tmp_path / "good", model, steps=80, lr=0.01, report_every=20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(
        tmp_path / "worse", model, steps=4, lr=3.0, clip_grad=0.0, warmup=0, report_every=2
    )
    assert result.best_step == 0
    assert same(model.state_dict(), before)
    assert all(line["valid_top1"] <= result.best["valid_top1"] for line in result.history)


def test_a_guard_wants_a_rise_far_above_the_start():
    guard = LossGuard(10)
    for loss in [2.0] * 20 + [9.0]:  # one bad batch
        guard.add(loss)
    assert not guard.risen
    for _ in range(7):
        guard.add(4.2)
    assert not guard.risen
    for _ in range(8):
        guard.add(4.4)  # above 2.0 + log 10
    assert guard.risen
    again = LossGuard(10, guard.first, guard.recent)
    assert again.risen
    assert again.start == guard.start == 2.0
    fine = LossGuard(10)
    for step in range(100):
        fine.add(7.0 - 0.05 * step)
    assert not fine.risen
