"""Checkpoints as people have them: wrappers, prefixes, other classifiers, hostile files."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dery_cli.errors import DeryError, UsageError
from dery_cli.zoo.state_dicts import load_weights, read_state_dict

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
        lambda s: {"state_dict": {f"module.encoder_q.{n}": v for n, v in s.items()}},
        lambda s: {"teacher": {f"module.backbone.{n}": v for n, v in s.items()}},
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrap):
    source, target = network(seed=1), network(seed=2)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    assert load(target, read_state_dict(tmp_path / "w.pth")) == []
    assert same(target, source)


def test_a_pickle_that_holds_itself(tmp_path):
    state = {}
    state["model"] = state
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds no tensors"):
        read_state_dict(tmp_path / "w.pt")


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
            read_state_dict(tmp_path / "evil.pth")
        torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(DeryError, match="cannot be read with weights_only=True"):
            read_state_dict(tmp_path / "evil.pth")
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
            read_state_dict(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_tensor_that_only_claims_to_be_huge(tmp_path):
    """Stride 0: 2**42 elements of one number; its shape is refused before it is looked at."""
    state = network().state_dict() | {"conv.bias": torch.ones(1).expand(1 << 42)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"conv\.bias \(4398046511104,\) for \(4,\)"):
        load(network(), read_state_dict(tmp_path / "w.pt"))


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(DeryError, match="cannot be read with weights_only=True"):
        read_state_dict(tmp_path / "text.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="holds no tensors"):
        read_state_dict(tmp_path / "list.pt")
    torch.save(network().state_dict(), tmp_path / "wrong.safetensors")
    with pytest.raises(DeryError, match="is not a whole safetensors file"):
        read_state_dict(tmp_path / "wrong.safetensors")
    with pytest.raises(UsageError, match="no such weights file"):
        read_state_dict(tmp_path)
    save_file(network().state_dict(), tmp_path / "right.safetensors")
    assert set(read_state_dict(tmp_path / "right.safetensors")) == set(network().state_dict())
