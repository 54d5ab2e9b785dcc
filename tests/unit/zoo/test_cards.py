"""Cards of plugins are checked at the door, and speak for the plugin's own weights alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dery_cli.types import InputSpec, ModelCard
from dery_cli.zoo import registry
from dery_cli.zoo.plugin import BrokenPluginError
from dery_cli.zoo.registry import check_card, prepare_donor, resolve

GOOD = ModelCard(input=InputSpec(image_size=(32, 32)), license="MIT", metrics={"top1": 0.5})


def changed(**fields):
    return dataclasses.replace(GOOD, input=dataclasses.replace(GOOD.input, **fields))


def test_a_good_card_passes():
    check_card(GOOD)
    check_card(changed(in_chans=1, mean=(0.5,), std=(0.5,)))


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (changed(image_size=32), "image_size is 32, not (height, width)"),
        (changed(image_size=(32, 32, 3)), "image_size is (32, 32, 3)"),
        (changed(image_size=(32, 0)), "image_size is (32, 0)"),
        (changed(image_size=(32.0, 32)), "image_size is (32.0, 32)"),
        (changed(in_chans=4, mean=(0.5,) * 4, std=(0.5,) * 4), "in_chans is 4; images have 3"),
        (changed(in_chans=True), "in_chans is True"),
        (changed(interpolation="lanczos"), "interpolation is 'lanczos'; known are nearest"),
        (changed(mean=(0.5,)), "a mean for each of 3 channels, not (0.5,)"),
        (changed(mean=(0.5, 0.5, float("nan"))), "a mean for each of 3 channels"),
        (changed(std=(0.5, 0.5, 0.0)), "a positive std for each of 3 channels"),
        (changed(std="0.5"), "a positive std for each of 3 channels"),
        (dataclasses.replace(GOOD, license=None), "license is None, not a text"),
        (dataclasses.replace(GOOD, metrics={"top1": "0.8"}), "metrics are {'top1': '0.8'}"),
        (dataclasses.replace(GOOD, input=(32, 32)), "input is a tuple, not an InputSpec"),
    ],
)
def test_a_bad_card_is_refused_and_the_plugin_named(monkeypatch, card, said):
    class Plugin:
        def list_models(self):
            return ["m"]

        def card(self, model):
            return card

        def build(self, model, *, pretrained, image_size=None):
            raise AssertionError

    monkeypatch.setattr(registry, "find_plugin", lambda *_, **__: Plugin())
    with pytest.raises(BrokenPluginError) as caught:
        resolve(registry.Spec("birds", "m"))
    assert "the plugin 'birds' fails at card('m')" in caught.value.message
    assert said in caught.value.message


def test_a_card_does_not_speak_for_other_weights():
    donor, _ = prepare_donor("timm/test_resnet", pretrained=False)
    assert (donor.card.license, donor.card.task, donor.card.source) == ("unknown",) * 3
    assert dict(donor.card.metrics) == {}


@pytest.mark.parametrize("kind", [torch.float16, torch.float64, torch.bfloat16])
def test_other_precisions_are_used_in_single_precision(kind):
    class Plugin:
        def build(self, model, *, pretrained, image_size=None):
            return torch.nn.Linear(2, 2).to(kind)

    model = registry.build_model(
        registry.Spec("birds", "m"), Plugin(), pretrained=True, image_size=None
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
