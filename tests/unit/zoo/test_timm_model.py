"""Assemblies as timm models: what timm's own tests check of its models, and what is theirs."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import dery_cli.timm
from dery_cli import load_assembly
from dery_cli.errors import UsageError
from dery_cli.zoo.timm_folder import write_timm_folder
from tests.unit.zoo.assemblies import NETWORKS, assembly, description, dissected_once

CUT = ("cut", "mixed", "fresh")
WHOLE = ("swin", "vit")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with dissected_once():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("timm")
    for name in NETWORKS:
        write_timm_folder(assembly(name), base / name)
    return base


@pytest.fixture(params=[*CUT, *(pytest.param(n, marks=pytest.mark.slow) for n in WHOLE)])
def place(request, folders):
    return f"local-dir:{folders / request.param}"


def test_it_computes_what_the_assembly_computes(folders):
    for name in NETWORKS:
        network, _ = load_assembly(folders / name)
        model = timm.create_model(f"local-dir:{folders / name}", pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(model(IMAGES), network(IMAGES))
    config = timm.data.resolve_model_data_config(model)
    assert (tuple(config["input_size"]), config["crop_pct"]) == ((3, 32, 32), 0.95)
    assert list(config["mean"]) == description(name)["input"]["mean"]


def test_forward_and_backward(place):
    model = timm.create_model(place, num_classes=42).train()
    outputs = model(IMAGES)
    assert outputs.shape == (2, 42)
    outputs.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert not outputs.isnan().any()


def test_default_cfg(place):
    model = timm.create_model(place).eval()
    cfg, state = model.default_cfg, model.state_dict()
    axes = timm.layers.get_spatial_dim(model.output_fmt)
    channel = timm.layers.get_channel_dim(model.output_fmt)
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state
    outputs = model.forward_features(IMAGES)
    tokens = model.output_node.num_prefix_tokens
    wanted = math.prod(cfg["pool_size"]) + tokens
    assert math.prod(outputs.shape[axis] for axis in axes) == wanted
    assert outputs.shape[channel] == model.num_features
    logits = model.forward_head(outputs)
    assert torch.equal(logits, model(IMAGES))
    model.reset_classifier(0)
    pooled = model(IMAGES)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(pooled, model.forward_head(outputs, pre_logits=True))
    model.reset_classifier(0, "")
    assert torch.equal(model(IMAGES), outputs)
    bare = timm.create_model(place, num_classes=0, global_pool="")
    assert bare(IMAGES).shape == outputs.shape


def test_forward_intermediates(place):
    model = timm.create_model(place).eval()
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    output, maps = model.forward_intermediates(IMAGES, output_fmt="NCHW")
    assert len(maps) == len(info.channels())
    for channels, reduction, found in zip(info.channels(), info.reduction(), maps, strict=True):
        assert found.shape == (2, channels, *[math.ceil(32 / reduction)] * 2)
        assert not found.isnan().any()
    assert torch.allclose(output, model.forward_features(IMAGES))


def test_checkpointing_changes_nothing(place):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(place, pretrained=True).eval()
        for module in model.modules():
            module.training = module is model  # checkpointing is for training, dropout is not
        model.set_grad_checkpointing(enable)
        model(IMAGES).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_features_only(place):
    model = timm.create_model(place, pretrained=True, features_only=True).train()
    maps = model(IMAGES)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert len(maps) >= 2
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())
    last = timm.create_model(place, pretrained=True, features_only=True, out_indices=(-1, 0))
    assert last.feature_info.channels() == [m.shape[1] for m in (maps[-1], maps[0])]
    assert [m.shape for m in last(IMAGES)] == [maps[-1].shape, maps[0].shape]


def test_a_plain_vit_has_a_pyramid(folders):
    place = f"local-dir:{folders / 'vit'}"
    model = timm.create_model(place, pretrained=True, features_only=True).eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16]
    maps = model(IMAGES)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    one = timm.create_model(place, pretrained=True, features_only=True, pyramid=False).eval()
    assert torch.equal(one(IMAGES)[0], maps[2])


def test_levels_that_are_not_there_are_refused(folders):
    with pytest.raises(UsageError, match="has 4 feature levels, of strides"):
        timm.create_model(f"local-dir:{folders / 'vit'}", features_only=True, out_indices=(0, 9))


def test_other_channels_as_timm_adapts_them(place):
    own = timm.create_model(place, pretrained=True)
    name = f"{own.default_cfg['first_conv']}.weight"
    weight = own.state_dict()[name]
    for chans, wanted in ((1, weight.sum(1, keepdim=True)), (4, weight[:, [0, 1, 2, 0]] * 0.75)):
        model = timm.create_model(place, pretrained=True, in_chans=chans).eval()
        assert torch.allclose(model.state_dict()[name], wanted)
        assert model(torch.zeros(1, chans, 32, 32)).shape == (1, 3)


def test_another_number_of_classes_keeps_the_rest(place):
    own = timm.create_model(place, pretrained=True).eval()
    other = timm.create_model(place, pretrained=True, num_classes=7).eval()
    assert torch.equal(own.forward_features(IMAGES), other.forward_features(IMAGES))
    assert other(IMAGES).shape == (2, 7)


def test_layer_groups_go_from_the_image_to_the_head(place):
    model = timm.create_model(place)
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(itertools.chain(*groups.values())) == sorted(dict(model.named_parameters()))
        assert {"head.weight", "head.bias"} == set(groups[max(groups)])
        assert f"{model.default_cfg['first_conv']}.weight" in groups[0]
        timm.models.group_modules(model, model.group_matcher(coarse=coarse))
    assert len(groups) == len(model.blocks) + 1
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= names.keys()
    create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.5)


def test_embeddings_are_not_decayed(folders):
    model = timm.create_model(f"local-dir:{folders / 'mixed'}")
    assert model.no_weight_decay() == {"stitches.1.position"}
    vit = timm.create_model(f"local-dir:{folders / 'vit'}")
    assert "blocks.0.pos_embed" in vit.no_weight_decay()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"img_size": 64}, "for images of 32x32"),
        ({"global_pool": "max"}, "'max' is not what this network ends in"),
    ],
)
def test_what_it_cannot_be_is_said(folders, options, says):
    with pytest.raises(UsageError, match=says):
        timm.create_model(f"local-dir:{folders / 'mixed'}", **options)


def test_without_a_folder_it_says_how_to_get_one():
    with pytest.raises(UsageError, match="built from an assembly's folder"):
        timm.create_model("dery_assembly")
    assert dery_cli.timm.dery_assembly.__name__ in timm.list_models("dery*")
