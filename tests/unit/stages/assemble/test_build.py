"""What a proxy is given of a target: all images, and a few of every class."""

from __future__ import annotations

import types
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from dery_cli.data.target import Target
from dery_cli.stages.assemble.build import Builder
from dery_cli.stages.assemble.candidates import Candidate, ranked
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.training.closed_form import FittedBuilder
from dery_cli.types import BlockRef, InputSpec

CLASSES, EACH = 5, 40


class Images:
    """Every image is its index."""

    def view(self, spec, indices):
        return torch.tensor(list(indices)).float()[:, None].split(7)


def builder(seed, *, labelled=True):
    labels = [index // EACH for index in range(CLASSES * EACH)] if labelled else None
    data = types.SimpleNamespace(
        train=types.SimpleNamespace(labels=labels),
        classes=[str(k) for k in range(CLASSES)] if labelled else None,
    )
    target = Target(
        data=data,
        indices=tuple(range(CLASSES * EACH)),  # in the order of classes
        fit_indices=(0, 1),
        crop=1.0,
        batch_size=7,
        device=torch.device("cpu"),
        workers=0,
    )
    zoo = {"a": types.SimpleNamespace(input=InputSpec(image_size=(1, 1)))}
    config = AssembleConfig(proxy_batches=2, proxy_batch_size=10, seed=seed)
    return Builder(zoo, None, Images(), target, config, Path("unused"))


def few(seed, **options):
    given = builder(seed, **options).proxy_inputs(nn.Identity(), "a")
    return [(x[:, 0].int().tolist(), k) for x, k in given.few_batches()]


def test_the_few_images_are_of_all_classes_alike_and_shuffled_by_the_seed():
    batches = few(0)
    assert [len(images) for images, _ in batches] == [10, 10]
    chosen = [index for images, _ in batches for index in images]
    assert Counter(index // EACH for index in chosen) == dict.fromkeys(range(CLASSES), 4)
    assert [k for _, labels in batches for k in labels.tolist()] == [i // EACH for i in chosen]
    assert chosen != sorted(chosen)
    assert len({index // EACH for index in batches[0][0]}) > 2  # no batch of one class
    assert few(0)[0][0] == batches[0][0]
    assert few(1)[0][0] != batches[0][0]


def test_without_labels_they_are_some_of_all():
    batches = few(0, labelled=False)
    assert [k for _, k in batches] == [None, None]
    assert len({index for images, _ in batches for index in images}) == 20


def test_all_images_are_there_too():
    given = builder(0).proxy_inputs(nn.Identity(), "a")
    assert sum(len(x) for x in given.batches()) == len(given.labels) == CLASSES * EACH


def test_a_score_that_is_none_ranks_last(monkeypatch):
    built = types.SimpleNamespace(network=nn.Identity(), fits=(None,))
    monkeypatch.setattr(FittedBuilder, "stitched", lambda *_: built)

    def scored(value):
        candidate = Candidate(
            refs=(BlockRef("a", 0, 1),), sets=None, params=1, flops=1, program_score=None
        )
        return builder(0).score(candidate, lambda inputs: value)

    entries = [scored(value) for value in (float("nan"), -5.0, float("inf"), 2.0)]
    assert [entry.proxy for entry in ranked(entries)] == [2.0, -5.0, float("-inf"), float("-inf")]
