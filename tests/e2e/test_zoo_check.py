"""``dery zoo check``: what keeps the contract passes, what breaks it is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dery_cli import testing
from dery_cli.types import InputSpec, ModelCard
from tests.conftest import run_dery

CHECKS = ["card", "build", "nodes", "blocks", "costs", "training", "save"]


class Unit(nn.Module):
    """A residual unit of a tiny network."""

    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(torch.relu(self.norm(self.conv(x))))


class Tiny(nn.Module):
    def __init__(self, unit=Unit):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.units = nn.Sequential(unit(), unit(), unit())
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.units(self.stem(x)).mean((2, 3)))


INPUT = InputSpec(image_size=(16, 16))


@dataclasses.dataclass
class Zoo:
    """A plugin of one model, to be broken in one place at a time."""

    unit: type = Unit
    input: InputSpec = INPUT
    before: object = None

    def list_models(self):
        return ["tiny"]

    def card(self, model):
        if model != "tiny":
            raise KeyError(model)
        return ModelCard(input=self.input)

    def build(self, model, *, pretrained, image_size=None):
        if self.before is not None:
            self.before()
        return Tiny(self.unit).eval()


def failure(zoo):
    report = testing.check_model(zoo, "tiny")
    assert not report.ok
    return f"{report.failures[0].name}: {report.failures[0].detail}"


def test_a_model_that_keeps_the_contract():
    report = testing.check_plugin(Zoo())[0]
    assert [check.name for check in report.checks] == CHECKS
    assert report.anatomy.num_units == 3
    assert (report.layouts(), report.strides(), report.tokens()) == (["NCHW"], [2.0], [])
    assert report.whole_only is None


def test_the_image_size_is_the_one_asked_for():
    report = testing.check_model(Zoo(), "tiny", 24)
    assert report.ok
    assert report.input.image_size == (24, 24)
    assert report.anatomy.nodes[1].grid == (12, 12)


def spec(**changes):
    return dataclasses.replace(INPUT, **changes)


def use_network():
    import socket

    socket.create_connection(("127.0.0.1", 9), timeout=1)


class Noisy(Unit):
    """Draws a constant when it is built, and keeps it in no buffer."""

    def __init__(self):
        super().__init__()
        self.gain = float(torch.rand(1, device="cpu")) + 0.5

    def forward(self, x):
        return super().forward(x) * self.gain


class Forgetful(Unit):
    """Changes a buffer in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class Crashing(Unit):
    def forward(self, x):
        if self.training:
            raise RuntimeError("cannot train")
        return super().forward(x)


@pytest.mark.parametrize(
    ("zoo", "reason"),
    [
        (Zoo(input=spec(mean=(0.5,))), "card: the card needs a mean for each"),
        (Zoo(input=spec(std=(1.0, 0.0, 1.0))), "card: the card needs a positive std"),
        (Zoo(input=spec(interpolation="magic")), "card: the card's interpolation is 'magic'"),
        (Zoo(input=spec(image_size=(0, 16))), "card: the card's image_size is (0, 16)"),
        (Zoo(before=use_network), "build(pretrained=False) must not use the network"),
        (Zoo(unit=Noisy), "save: after saving and loading, the output differs"),
        (Zoo(unit=Forgetful), "training: in eval mode units.0.count changes"),
        (Zoo(unit=Crashing), "training: RuntimeError: cannot train"),
        (Zoo(input=spec(in_chans=1, mean=(0.5,), std=(0.5,))), "nodes: Tiny does not run on an"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_breaks_the_contract_is_named(zoo, reason):
    assert reason in failure(zoo)
    with pytest.raises(AssertionError, match="the contract of dery's zoo plugins is broken:\ntiny"):
        testing.check_plugin(zoo)


def test_build_must_give_eval_mode_and_card_must_refuse():
    class Training(Zoo):
        def build(self, model, *, pretrained, image_size=None):
            return super().build(model, pretrained=pretrained).train()

    class Anything(Zoo):
        def card(self, model):
            return super().card("tiny")

    assert failure(Training()) == "build: build() must give the model in eval mode"
    assert failure(Anything()) == "card: card() of an unknown model must raise KeyError"


def test_a_wrong_block_is_found(monkeypatch):
    """The reference is the donor's own pass: a block that leaves its unit out does not equal it."""
    from dery_cli.core.dissection.dissect import Dissection

    whole = Dissection.block
    monkeypatch.setattr(
        Dissection, "block", lambda self, i, j: nn.Identity() if i == 1 else whole(self, i, j)
    )
    assert failure(Zoo()).startswith("blocks: node 2 (units.1): relative error")


def test_wrong_costs_are_found(monkeypatch):
    from dery_cli.zoo import contract

    monkeypatch.setattr(contract, "count_flops", lambda *_: 10)
    assert "costs: FLOPs add up to" in failure(Zoo())


def test_the_command_prints_and_reports(tmp_path):
    line = ["zoo", "check", "demo/mobilenetv3", "demo/vit_cls"]
    outcome = run_dery(*line, "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    models = outcome.json["result"]["models"]
    assert [m["spec"] for m in models] == ["demo/mobilenetv3", "demo/vit_cls"]
    for model in models:
        assert model["ok"] is True
        assert model["units"] == len(model["anatomy"]["nodes"]) - 1
        assert [check["name"] for check in model["checks"]] == CHECKS
    assert models[1]["layouts"] == ["NLC"]
    assert models[1]["strides"] == [8.0]
    assert models[1]["tokens"] == [19]
    assert "19 (3 prefix)" in outcome.stderr
    assert not (tmp_path / ".dery").exists()


def test_a_failing_model_exits_1(monkeypatch, tmp_path):
    import dery_demo

    build = type(dery_demo.zoo).build
    monkeypatch.setattr(
        type(dery_demo.zoo),
        "build",
        lambda self, model, **options: build(self, model, **options).train(),
    )
    outcome = run_dery("zoo", "check", "demo/mobilenetv3", "--json", cwd=tmp_path)
    assert outcome.code == 1
    error = outcome.json["error"]
    assert error["message"] == (
        "1 of 1 models break the contract: demo/mobilenetv3: "
        "build: build() must give the model in eval mode"
    )
    assert error["details"]["failed"] == ["demo/mobilenetv3"]
    assert error["details"]["models"][0]["ok"] is False


def test_whole_only_is_no_failure(monkeypatch):
    import dery_cli.core.dissection.dissect as module

    real = module.dissect

    def refuse(model, example, *, nodes=None, whole=False):
        if not whole:
            raise module.DissectError("Tiny is one knot")
        return real(model, example, whole=True)

    monkeypatch.setattr(module, "dissect", refuse)
    report = testing.check_model(Zoo(), "tiny")
    assert report.ok, report.failures
    assert report.whole_only == "Tiny is one knot"
    assert report.anatomy.num_units == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("zoo check", "nothing to check"),
        ("zoo check resnet", "'resnet' is not a model spec"),
        ("zoo check demo/nosuch", "the plugin 'demo' has no model 'nosuch'"),
        ("zoo check --all nosuch", "no such zoo plugin: nosuch"),
        ("zoo check demo/resnet --image-size 0", "--image-size is 0"),
    ],
)
def test_wrong_usage_exits_2(line, message, tmp_path):
    outcome = run_dery(*line.split(), "--json", cwd=tmp_path)
    assert outcome.code == 2
    assert message in outcome.json["error"]["message"]


def test_a_failure_in_training_is_the_only_one():
    """The checks after it find the model as it was before."""

    class Frozen(Zoo):
        def build(self, model, *, pretrained, image_size=None):
            built = super().build(model, pretrained=pretrained)
            return built.requires_grad_(False)

    for zoo, reason in (
        (Frozen(), "no parameter requires a gradient; build() must leave that on"),
        (Zoo(unit=Crashing), "RuntimeError: cannot train"),
    ):
        (report,) = [testing.check_model(zoo, name) for name in zoo.list_models()]
        assert [check.name for check in report.failures] == ["training"]
        assert reason in report.failures[0].detail


class Asking(Unit):
    """Its forward asks for numbers, which a trace has not."""

    def forward(self, x):
        return super().forward(x) * (2 if bool(x.mean() > 0) else 1)


def test_a_model_that_cannot_be_traced_keeps_the_contract_as_a_whole():
    (report,) = testing.check_plugin(Zoo(unit=Asking))
    assert "Tiny cannot be traced" in report.whole_only
    assert report.anatomy.num_units == 1
