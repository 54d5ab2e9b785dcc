"""Checkpoints as people have them: wrappers, prefixes, other classifiers, hostile files."""

from __future__ import annotations

import argparse
import json
import os
import struct
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dery_cli.errors import DeryError, UsageError
from dery_cli.zoo.checkpoints import read_checkpoint
from dery_cli.zoo.state_dicts import load_weights

CLASSIFIER = ("head.weight", "head.bias")


def network(classes=5, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    model.add_module("norm", nn.BatchNorm2d(4))
    model.add_module("head", nn.Linear(4, classes))
    return model


def load(model, state, **options):
    return load_weights(model, dict(state), "file.pt", classifier=CLASSIFIER, **options)


def same(model, other, *, but=()):
    mine, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(mine[n], theirs[n]) for n in mine if not n.startswith(but or "\0"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"lr": 0.1}},
        lambda s: {"state_dict": {"model": s}},
        lambda s: {f"module.{n}": v for n, v in s.items()},
        lambda s: {"model": {f"backbone.{n}": v for n, v in s.items()}},
        lambda s: {"state_dict": {f"module._orig_mod.{n}": v for n, v in s.items()}},
        lambda s: {"net": {f"_orig_mod.module.{n}": v for n, v in s.items()}, "best": 0.5},
        lambda s: {"weights": s, "optimizer": {"state": {"a": torch.ones(3)}}},
        lambda s: {"some_name": {"inner": s}, "epoch": 3},
        lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1), "acc": np.float64(0.5)},
        lambda s: {"state_dict": s, "out": Path("/runs/1"), "seen": types.SimpleNamespace(a=1)},
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrap):
    source, target = network(seed=1), network(seed=2)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    assert load(target, read_checkpoint(tmp_path / "w.pth").tensors) == []
    assert same(target, source)


def zeros(state):
    return {n: torch.zeros_like(v) for n, v in state.items()}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"state_dict_ema": s}, "'state_dict_ema' of w.pth is loaded"),
        (lambda s: {"ema": {"module": s, "decay": 0.9}}, "'ema.module' of w.pth is loaded"),
        (
            lambda s: {"model": zeros(s), "model_ema": s},
            "'model_ema' of w.pth is loaded, not model (--weights-key chooses)",
        ),
        (
            lambda s: {"student": zeros(s), "teacher": s},
            "'teacher' of w.pth is loaded, not student (--weights-key chooses)",
        ),
        (
            lambda s: {"student": {f"module.backbone.{n}": v for n, v in s.items()}},
            "'student' of w.pth is loaded",
        ),
    ],
)
def test_what_is_chosen_of_a_checkpoint_is_said(tmp_path, wrap, said):
    source, target = network(seed=1), network(seed=2)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    assert checkpoint.choice == said
    assert load(target, checkpoint.tensors) == []
    assert same(target, source)


@pytest.mark.parametrize(
    ("kept", "others"), [("module.encoder_q.", "module.encoder_k."), ("teacher.", "student.")]
)
def test_of_two_prefixes_the_main_model_s_is_taken_and_said(kept, others):
    source, target = network(seed=1), network(seed=2)
    state = source.state_dict()
    both = {f"{others}{n}": v * 0 for n, v in state.items()}
    both |= {f"{kept}{n}": v for n, v in state.items()}
    notes = load(target, both)
    assert notes[0] == f"the tensors of file.pt whose names begin with '{kept}' are loaded"
    assert notes[1].startswith("9 tensors that the architecture has no place for are left out")
    assert same(target, source)


def test_a_key_chooses_among_state_dicts(tmp_path):
    state = network(seed=1).state_dict()
    torch.save({"a": {"deep": state}, "b": zeros(state)}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"holds several state dicts: a\.deep, b") as caught:
        read_checkpoint(tmp_path / "w.pth")
    assert caught.value.hint == "choose one: --weights-key a.deep"
    for key in ("a.deep", "a"):
        assert torch.equal(
            read_checkpoint(tmp_path / "w.pth", key).tensors["conv.bias"], state["conv.bias"]
        )
    for key in ("c", "a.deep.conv", ""):
        with pytest.raises(UsageError, match="has no tensors under"):
            read_checkpoint(tmp_path / "w.pth", key)


def test_what_nothing_needs_is_left_out_and_named():
    target = network(seed=2)
    table = torch.zeros(2, 2, dtype=torch.long)
    extra = {"criterion.weight": torch.ones(4), "conv.relative_position_index": table}
    notes = load(target, network(seed=1).state_dict() | extra)
    assert notes == [
        "2 tensors that the architecture has no place for are left out of file.pt: "
        "conv.relative_position_index, criterion.weight"
    ]
    assert same(target, network(seed=1))


@pytest.mark.parametrize("name", ["conv.gamma", "conv.1.weight", "norm.extra.bias"])
def test_more_layers_of_the_model_s_own_are_another_architecture(name):
    with pytest.raises(UsageError, match="1 unexpected"):
        load(network(), network().state_dict() | {name: torch.ones(4)})


def test_an_older_form_is_converted_by_the_plugin():
    def convert(state):
        return {n.replace("old", "conv"): v for n, v in state.items()}

    target, state = network(seed=2), network(seed=1).state_dict()
    older = {n.replace("conv", "old"): v for n, v in state.items()}
    with pytest.raises(UsageError, match="2 missing"):
        load(target, older)
    assert load(target, older, convert=convert) == [
        "file.pt is of an older form and was converted by its plugin"
    ]
    assert same(target, network(seed=1))
    with pytest.raises(UsageError, match="2 missing"):
        load(target, older, convert=lambda state: 1 / 0)


@pytest.mark.parametrize(
    ("mine", "theirs", "side"),
    [
        ((1, 197, 8), (1, 37, 8), 96),
        ((1, 196, 8), (1, 576, 8), 384),
        ((1, 8, 14, 14), (1, 8, 7, 7), 112),
        ((1, 197, 8), (1, 38, 8), None),
        ((1, 197, 8), (1, 37, 4), None),
    ],
)
def test_position_embeddings_of_another_size_name_it(mine, theirs, side):
    model = network()
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(mine)))
    state = model.state_dict() | {"pos_embed": torch.zeros(theirs)}
    with pytest.raises(UsageError) as caught:
        load(model, state, image_size=(224, 224))
    named = f"it is for images of {side} pixels: --image-size {side}"
    assert caught.value.hint == (
        "check the model's name; --allow-partial loads what fits" if side is None else named
    )


def test_eight_bit_floats_are_read():
    source, target = network(seed=1), network(seed=2)
    small = {
        n: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v
        for n, v in source.state_dict().items()
    }
    assert load(target, small) == []
    assert torch.equal(target.conv.weight, small["conv.weight"].float())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><p>", "is a web page"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08", "is packed by gzip"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_files_are_called_what_they_are(tmp_path, content, what, suffix):
    (tmp_path / f"w.{suffix}").write_bytes(content)
    with pytest.raises(UsageError, match=what):
        read_checkpoint(tmp_path / f"w.{suffix}")


def test_a_whole_module_is_named_and_not_run(tmp_path):
    for zipped in (True, False):
        torch.save(network(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(DeryError, match=r"holds more than tensors: torch\.nn\.") as caught:
            read_checkpoint(tmp_path / "w.pth")
        assert "\x1b" not in caught.value.message


def test_a_pickle_that_holds_itself(tmp_path):
    state = {}
    state["model"] = state
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds no tensors"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("classes", [3, 7])
def test_another_classifier_is_left_out_and_zero(classes):
    source, target = network(classes, seed=1), network(seed=2)
    notes = load(target, source.state_dict())
    assert notes == ["the classifier of file.pt does not fit and is left out"]
    assert same(target, source, but=("head",))
    assert not target.head.weight.any()
    assert not target.head.bias.any()


def test_a_missing_or_deeper_classifier_is_left_out():
    state = network(seed=1).state_dict()
    backbone = {n: v for n, v in state.items() if not n.startswith("head.")}
    for extra in ({}, {"head.0.weight": torch.ones(9, 4), "head.2.weight": torch.ones(2, 9)}):
        target = network(seed=2)
        assert len(load(target, backbone | extra)) == 1
        assert same(target, network(seed=1), but=("head",))


def test_other_architectures_are_refused_and_change_nothing():
    state = network(seed=1).state_dict()
    state["extra"] = torch.ones(1)
    state["norm.weight"] = torch.ones(9)
    del state["conv.bias"]
    target = network(seed=2)
    with pytest.raises(UsageError) as caught:
        load(target, state)
    assert caught.value.message == (
        "file.pt does not match the architecture: 1 missing (conv.bias); 1 unexpected (extra); "
        "1 of another shape (norm.weight (9,) for (4,))"
    )
    assert caught.value.details == {
        "missing": ["conv.bias"],
        "unexpected": ["extra"],
        "shape": ["norm.weight"],
    }
    assert same(target, network(seed=2))
    notes = load(target, state, allow_partial=True)
    assert notes[0].startswith("file.pt was loaded in part, the rest is random: 1 missing (conv.")
    assert torch.equal(target.conv.weight, state["conv.weight"])
    assert torch.equal(target.conv.bias, network(seed=2).conv.bias)


def test_nothing_that_fits_is_refused_even_in_part():
    with pytest.raises(UsageError, match="has no tensor that fits"):
        load(network(), {"a": torch.ones(2)}, allow_partial=True)
    head = {n: v for n, v in network().state_dict().items() if n.startswith("head.")}
    with pytest.raises(UsageError, match="has no tensor that fits"):
        load(network(), head, allow_partial=True)


def test_tensors_of_another_kind_are_another_shape():
    state = network(seed=1).state_dict()
    state["conv.weight"] = state["conv.weight"].int()
    with pytest.raises(UsageError, match=r"conv\.weight \(4, 3, 3, 3\) int32 for \(4, 3, 3, 3\)"):
        load(network(), state)
    state["conv.weight"] = network().conv.weight.detach().to_sparse()
    with pytest.raises(UsageError, match=r"1 of another shape \(conv\.weight"):
        load(network(), state)


def test_tensors_without_data_or_numbers():
    state = network(seed=1).state_dict()
    state["conv.bias"] = torch.empty(4, device="meta")
    with pytest.raises(DeryError, match=r"the tensor conv\.bias holds no data"):
        load(network(), state)
    state["conv.bias"] = torch.tensor([0.0, 1.0, float("inf"), 2.0])
    with pytest.raises(DeryError, match=r"the tensor conv\.bias holds NaN or infinity"):
        load(network(), state)


def test_half_precision_is_loaded_as_the_model_is():
    source, target = network(seed=1), network(seed=2)
    load(target, source.half().state_dict())
    assert target.conv.weight.dtype == torch.float32
    assert torch.equal(target.conv.weight.half(), source.conv.weight)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    for content in (Evil(), {"state_dict": Evil()}, {"a": torch.ones(2), "b": Evil()}):
        torch.save(content, tmp_path / "evil.pth")
        with pytest.raises(DeryError, match="cannot be read with weights_only=True"):
            read_checkpoint(tmp_path / "evil.pth")
        torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(DeryError, match="cannot be read with weights_only=True"):
            read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]}},
    ],
)
def test_a_huge_declared_tensor_fails_without_memory(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    _fails_small(path)


def test_a_huge_declared_header_fails_without_memory(tmp_path):
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    _fails_small(path)


def _fails_small(path):
    tracemalloc.start()
    try:
        with pytest.raises(DeryError, match="is not a whole safetensors file"):
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_tensor_that_only_claims_to_be_huge(tmp_path):
    """Stride 0: 2**42 elements of one number; its shape is refused before it is looked at."""
    state = network().state_dict() | {"conv.bias": torch.ones(1).expand(1 << 42)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"conv\.bias \(4398046511104,\) for \(4,\)"):
        load(network(), read_checkpoint(tmp_path / "w.pt").tensors)


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(DeryError, match="cannot be read with weights_only=True"):
        read_checkpoint(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="holds no tensors"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(UsageError, match="no such weights file"):
        read_checkpoint(tmp_path)


def test_a_file_is_what_it_holds_whatever_it_is_called(tmp_path):
    state = network(seed=1).state_dict()
    for suffix in ("safetensors", "bin", "pth"):
        save_file(state, tmp_path / f"tensors.{suffix}")
        torch.save(state, tmp_path / f"pickle.{suffix}")
        for kind in ("tensors", "pickle"):
            found = read_checkpoint(tmp_path / f"{kind}.{suffix}").tensors
            assert torch.equal(found["conv.weight"], state["conv.weight"])


@pytest.mark.parametrize("length", range(8, 1200, 8))
def test_safetensors_are_known_whatever_the_length_of_their_header(tmp_path, length):
    """One of 128 bytes begins with the byte that a pickle begins with."""
    path = tmp_path / "x.bin"
    save_file({"a": torch.ones(2)}, path, {"note": "x" * length})
    assert torch.equal(read_checkpoint(path).tensors["a"], torch.ones(2))
