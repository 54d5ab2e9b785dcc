"""Parameter groups, freezing, the schedule and the averaged weights."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn

from dery_cli import dissect
from dery_cli.core.stitching.network import AssembledNetwork
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.errors import UsageError
from dery_cli.training import optim
from dery_cli.training.plan import learning_rate, make_plan
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.types import Layout, Node
from tests.unit.training.standins import Assembly, same


def groups_of(model, **changes):
    groups = optim.parameter_groups(model, FinetuneConfig(steps=10, **changes))
    return {name: group for group in groups for name in group["names"]}


def test_norms_biases_and_embeddings_get_no_weight_decay():
    model = Assembly()
    model.blocks[0].pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
    model.blocks[0].class_token = nn.Parameter(torch.zeros(1, 1, 8))  # torchvision's ViT
    model.blocks[1].layer_scale = nn.Parameter(torch.ones(8, 1, 1))  # torchvision's ConvNeXt
    model.blocks[1].attention_biases = nn.Parameter(torch.ones(8, 4))  # LeViT
    groups = groups_of(model, weight_decay=0.3)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.3}
    assert decayed == {"blocks.0.0.weight", "blocks.1.0.weight", "stitches.1.weight", "head.weight"}
    assert {g["weight_decay"] for n, g in groups.items() if n not in decayed} == {0.0}


def test_a_stitchs_bias_a_position_gets_no_weight_decay():
    grid = Node(index=1, name="", layout=Layout.NCHW, shape=(4, 6, 6), grid=(6, 6))
    tokens = Node(
        index=1, name="", layout=Layout.NLC, shape=(10, 8), grid=(3, 3), num_prefix_tokens=1
    )
    stitch = Stitch(grid, tokens)
    assert {name for name, p in stitch.named_parameters() if optim.decays(name, p)} == {
        "channels.weight",
        "prefix.weight",
    }


def test_what_a_model_itself_excludes_from_weight_decay_is_respected():
    model = Assembly()
    model.no_weight_decay = lambda: {"head.weight"}
    assert groups_of(model)["head.weight"]["weight_decay"] == 0.0


def test_blocks_have_a_rate_of_their_own():
    groups = groups_of(Assembly(), block_lr_scale=0.1)
    assert {g["lr_scale"] for n, g in groups.items() if n.startswith("blocks.")} == {0.1}
    assert {g["lr_scale"] for n, g in groups.items() if not n.startswith("blocks.")} == {1.0}


@pytest.mark.parametrize(
    ("build", "cuts", "layers"),
    [
        (  # a stem of several modules, shortcuts with numbers in their names
            lambda: timm.create_model("test_resnet"),
            (0, 2, 4),
            ["conv1. bn1. layer1.", "layer2.", "layer3.", "layer4."],
        ),
        (
            lambda: timm.create_model("test_vit"),
            (0, 3, 6),
            ["cls_token pos_embed patch_embed. blocks.0.", "blocks.1.", "blocks.2.", "blocks.3.",
             "blocks.4.", "blocks.5. norm."],
        ),
        (  # torchvision hides the number in a word
            lambda: torchvision.models.VisionTransformer(32, 16, 3, 2, 8, 8),
            (0, 3),
            ["class_token conv_proj. encoder.pos_embedding encoder.layers.encoder_layer_0.",
             "encoder.layers.encoder_layer_1.", "encoder.layers.encoder_layer_2. encoder.ln."],
        ),
    ],
    ids=["resnet", "vit", "torchvision-vit"],
)  # fmt: skip
def test_layer_decay_counts_the_donors_units_back_from_the_head(build, cuts, layers):
    model = build()
    size = 32 if isinstance(model, torchvision.models.VisionTransformer) else 160
    found = dissect(model, torch.zeros(1, 3, size, size))
    assert found.anatomy.num_units == cuts[-1] == len(layers)
    blocks = [found.block(a, b) for a, b in itertools.pairwise(cuts)]
    network = AssembledNetwork(copy.deepcopy(blocks), [None] * len(blocks), nn.Linear(8, 3))
    scales = optim.layer_scales(network, 0.5)
    assert scales.keys() == {n for n, _ in network.named_parameters() if optim.is_block(n)}
    for name, scale in scales.items():
        own = name.split(".", 2)[2]
        (layer,) = (i for i, starts in enumerate(layers) if own.startswith(tuple(starts.split())))
        assert scale == 0.5 ** (len(layers) - layer), name


def test_a_block_that_tells_no_units_is_one_layer():
    scales = optim.layer_scales(Assembly(), 0.5)
    assert {name.split(".")[1]: scale for name, scale in scales.items()} == {"0": 0.25, "1": 0.5}


def test_frozen_leaves_blocks_out_of_the_optimizer():
    assert set(groups_of(Assembly(), mode="frozen")) == {
        "stitches.1.weight",
        "stitches.1.bias",
        "head.weight",
        "head.bias",
    }


def test_parameters_that_were_fixed_stay_fixed_and_nothing_to_train_is_an_error():
    model = Assembly()
    model.head.bias.requires_grad_(False)
    assert "head.bias" not in groups_of(model)
    with pytest.raises(UsageError, match="--mode full leaves no parameter to train"):
        groups_of(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("adamx", "timm has no optimizer 'adamx'"),
        ("fusedlamb", "the optimizer 'fusedlamb' cannot be used here: "),
        ("adahessian", "the optimizer 'adahessian' needs second derivatives"),
        ("lookahead_kronw", "the optimizer 'lookahead_kronw' keeps a state that"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_named(name, text):
    config = FinetuneConfig(steps=1, optimizer=name)
    with pytest.raises(UsageError) as error:
        optim.make_optimizer(optim.parameter_groups(Assembly(), config), config)
    assert error.value.message.startswith(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 40, "warmup": 0.1},
        {"steps": 40, "warmup": 0.0, "min_lr": 1e-5},
        {"steps": 1},
        {"steps": 60, "mode": "stitch-then-full", "stitch_fraction": 0.4, "block_lr_scale": 0.3},
    ],
)
def test_timms_schedule_follows_the_closed_form(changes):
    config = FinetuneConfig(lr=0.01, **changes)
    plan = make_plan(config, 100)
    groups = optim.parameter_groups(Assembly(), config)
    optimizer = optim.make_optimizer(groups, config)
    for phase in plan.phases:
        scheduler = optim.make_scheduler(optimizer, config, phase)
        for step in range(phase.start, phase.start + phase.steps):
            scheduler.step_update(step - phase.start)
            expected = learning_rate(config, phase, step)
            for group, made in zip(groups, optimizer.param_groups, strict=True):
                assert made["lr"] == pytest.approx(expected * group["lr_scale"], rel=1e-9)
                assert made["weight_decay"] == group["weight_decay"]


def test_frozen_blocks_are_in_eval_mode_and_get_no_gradient():
    model = Assembly()
    everything = frozenset(name for name, _ in model.named_parameters())
    optim.set_trainable(model, frozen=True, trainable=everything)
    optim.set_train_mode(model, frozen=True, fixed=frozenset())
    assert not any(p.requires_grad for p in model.blocks.parameters())
    assert all(p.requires_grad for p in model.head.parameters())
    assert not any(module.training for module in model.blocks.modules())
    assert model.training
    assert model.stitches["1"].training
    assert optim.batch_norms(model) == []
    optim.set_trainable(model, frozen=False, trainable=everything - {"head.bias"})
    optim.set_train_mode(model, frozen=False, fixed=frozenset(["blocks.0.1", "blocks.1.1"]))
    assert model.blocks[0][0].weight.requires_grad
    assert not model.head.bias.requires_grad
    assert model.blocks[1][5].training  # dropout
    assert optim.batch_norms(model) == []
    optim.set_train_mode(model, frozen=False, fixed=frozenset())
    assert optim.batch_norms(model) == ["blocks.0.1", "blocks.1.1"]


def test_only_batch_norms_of_pretrained_blocks_are_fixed():
    model = Assembly()
    model.stitches["1"] = nn.BatchNorm2d(8)
    model.stitches["1"].running_mean.fill_(1.0)
    model.blocks[1][1].running_var.fill_(2.0)
    assert optim.norms_to_fix(model, FinetuneConfig(steps=1, batch_norm="fixed")) == {"blocks.1.1"}
    assert optim.norms_to_fix(model, FinetuneConfig(steps=1, batch_norm="train")) == frozenset()


def test_averaged_weights_forget_the_first_ones_within_a_few_hundred_updates():
    model = nn.Linear(1, 1)
    ema = optim.make_ema(model, FinetuneConfig(steps=150, ema_decay=0.9))
    value = 0.0
    for step in range(1, 151):
        nn.init.constant_(model.weight, float(step))
        ema.update(model, step=step)
        decay = 0.0 if step == 1 else min(1 - step ** (-2 / 3), 0.9)
        value = decay * value + (1 - decay) * step
        assert ema.module.weight.item() == pytest.approx(value, rel=1e-5)
    assert value == pytest.approx(150 - 9, abs=0.01)  # the mean age at decay 0.9
    for none in (None, 0.0):
        assert optim.make_ema(model, FinetuneConfig(steps=1, ema_decay=none)) is None


def test_averaged_weights_are_timms_to_the_bit():
    """Through freezing, loading and counting buffers."""
    model = Assembly()
    own, timms = optim.AveragedWeights(model, 0.9), ModelEmaV3(model, decay=0.9, use_warmup=True)
    for step in range(1, 9):
        model.train()(torch.randn(4, 3, 8, 8))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        if step == 5:
            optim.set_trainable(model, frozen=True, trainable=frozenset())
            state = {name: value.clone() for name, value in own.module.state_dict().items()}
            for ema in (own, timms):
                ema.module.load_state_dict(state)
        own.update(model, step=step)
        timms.update(model, step=step)
        assert same(own.module.state_dict(), timms.module.state_dict())
    assert own.module.blocks[0][1].num_batches_tracked == 8
