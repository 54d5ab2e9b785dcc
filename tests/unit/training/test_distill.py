"""The loss with and without a teacher."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dery_cli.errors import UsageError
from dery_cli.training.checkpoint import find_checkpoint, load_checkpoint
from dery_cli.training.distill import Objective, Teacher, Trainee, make_trainee, soft_loss
from dery_cli.training.loop import finetune
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.types import InputSpec
from tests.unit.training.standins import CLASSES, Assembly, images


def config(**changes):
    return FinetuneConfig(**{"steps": 1, **changes})


def test_soft_loss_by_hand():
    logits, taught = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    # At T = 2 both are softmax(1, 0) = (0.7311, 0.2689), mirrored.
    p = torch.tensor([1 / (1 + torch.e), torch.e / (1 + torch.e)])
    expected = 4 * (p * (p / p.flip(0)).log()).sum()
    assert soft_loss(logits, taught, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert soft_loss(taught, taught, 2.0).item() == 0.0


def test_without_a_teacher_it_is_the_smoothed_cross_entropy():
    pixels, labels = images(12).tensors
    model = Assembly(norm=False)
    logits = model(pixels)
    for smoothing in (0.0, 0.2):
        loss = Objective(config(label_smoothing=smoothing), 3)(Trainee(model), pixels, labels)
        expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected)


def test_mixed_images_have_mixed_labels():
    pixels, labels = images(12).tensors
    seen = []

    def trainee(x):
        seen.append(x.clone())
        return logits

    logits = torch.randn(12, 3)
    torch.manual_seed(0)
    loss = Objective(config(mixup=1.0, label_smoothing=0.0), 3)(trainee, pixels.clone(), labels)
    lam = ((seen[0] - pixels.flip(0)) / (pixels - pixels.flip(0)))[0].median()
    one_hot = functional.one_hot(labels, 3).float()
    target = lam * one_hot + (1 - lam) * one_hot.flip(0)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_logits_and_features_of_the_teacher_are_weighed_in():
    pixels, labels = images(12).tensors
    model, teacher = Assembly(norm=False), Assembly(norm=False, seed=5, width=6).eval()
    settings = config(
        distill_logits=0.3, distill_temperature=3.0, distill_features=2.0, label_smoothing=0.0
    )
    trainee = make_trainee(model, settings, teacher)
    loss = Objective(settings, 3, teacher)(trainee, pixels, labels)
    feat = model.blocks[1](model.stitches["1"](model.blocks[0](pixels)))
    taught = teacher.blocks[1](teacher.stitches["1"](teacher.blocks[0](pixels)))
    goal = (taught - taught.mean(1, keepdim=True)) / (
        taught.var(1, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    mapped = feat @ trainee.adapter.weight.T + trainee.adapter.bias
    expected = (
        0.7 * functional.cross_entropy(model(pixels), labels)
        + 0.3 * soft_loss(model(pixels), teacher(pixels), 3.0)
        + 2.0 * ((mapped - goal) ** 2).mean()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_the_teacher_sees_the_images_its_own_way():
    own = InputSpec(image_size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    other = InputSpec(image_size=(16, 16), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    raw = torch.full((2, 3, 8, 8), 0.25)

    def normal(x, spec):
        return (x - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]

    teacher = Teacher(nn.Identity(), student=own, teacher=other)
    expected = normal(torch.full((2, 3, 16, 16), 0.25), other)
    torch.testing.assert_close(teacher(normal(raw, own)), expected)
    gray = InputSpec(image_size=(8, 8), mean=(0.5,), std=(0.5,), in_chans=1)
    seen = Teacher(nn.Identity(), student=own, teacher=gray)(normal(raw, own))
    torch.testing.assert_close(seen, torch.full((2, 1, 8, 8), -0.5))
    colour = Teacher(nn.Identity(), student=gray, teacher=own)(seen)
    torch.testing.assert_close(colour, normal(raw, own))


def test_a_teacher_that_cannot_teach_is_refused():
    pixels, labels = images(12).tensors
    other = Assembly(5).eval()
    model = Assembly()
    with pytest.raises(UsageError, match="the teacher tells 5 classes apart, the target has 3"):
        Objective(config(), 3, other)(make_trainee(model, config(), other), pixels, labels)
    features = config(distill_logits=0.0, distill_features=1.0)
    loss = Objective(features, 3, other)(make_trainee(model, features, other), pixels, labels)
    assert loss.isfinite()
    with pytest.raises(UsageError, match="distill_logits and distill_features are 0"):
        make_trainee(model, config(distill_logits=0.0), other)
    with pytest.raises(UsageError, match="Identity has no linear layer `head`"):
        make_trainee(model, features, nn.Identity())


def test_a_network_with_other_outputs_is_refused():
    pixels, labels = images(12).tensors
    with pytest.raises(UsageError, match=r"the network gives \(3,\) numbers an image"):
        Objective(config(), 4)(Trainee(Assembly()), pixels, labels)


def test_distillation_resumes_to_the_bit_and_leaves_the_teacher_alone(tmp_path):
    teacher = Assembly(5, seed=3)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    settings = FinetuneConfig(
        steps=8, batch_size=16, report_every=4, distill_logits=0.0, distill_features=1.0
    )

    def run(folder, **options):
        finetune(
            Assembly(), images(), None, settings, tmp_path / folder,
            classes=CLASSES, device="cpu", teacher=teacher, **options,
        )  # fmt: skip
        return load_checkpoint(find_checkpoint(tmp_path / folder, "last"))

    whole = run("whole")
    asked = iter(range(10))
    run("parts", stop=lambda: next(asked) >= 5)
    parts = run("parts", resume=True)
    assert set(whole.tensors) == {"model", "ema", "adapter", "optimizer"}
    for stem, named in whole.tensors.items():
        assert all(torch.equal(value, parts.tensors[stem][name]) for name, value in named.items())
    initial = make_trainee(Assembly(), settings, teacher).adapter.weight
    assert not torch.equal(whole.tensors["adapter"]["weight"], initial)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
