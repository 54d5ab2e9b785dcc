"""Streamed safetensors files against safetensors' own."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from dery_cli.errors import DeryError
from dery_cli.io.row_stream import (
    SafetensorsStream,
    TensorFile,
    stream_nbytes,
    write_tensors,
)

TENSORS = {
    "1.feat_NC": torch.arange(28, dtype=torch.float32).view(7, 4),
    "0.feat_NC": torch.arange(14, dtype=torch.float16).view(7, 2),
    "10.feat_NGC": torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)),
    "labels": torch.arange(7),
    "bf": torch.arange(7).bfloat16(),
    "b": torch.arange(7) > 3,
    **{
        str(dtype): torch.arange(7, dtype=dtype)
        for dtype in (torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8)
    },
}
SPECS = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


def write(path, tensors=TENSORS, specs=SPECS, metadata=None, step=3):
    with SafetensorsStream(path, specs, metadata) as stream:
        for start in range(0, 7, step):
            for name in reversed(tensors):
                stream.write(name, tensors[name][start : start + step])
    return path


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_same_bytes_as_save_file(tmp_path, metadata, step):
    save_file(TENSORS, tmp_path / "whole", metadata=metadata)
    write(tmp_path / "stream", metadata=metadata, step=step)
    assert (tmp_path / "stream").read_bytes() == (tmp_path / "whole").read_bytes()


def test_opens_with_safetensors_and_size_is_known_before(tmp_path):
    path = write(tmp_path / "stream")
    assert path.stat().st_size == stream_nbytes(SPECS)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, TENSORS[name])
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)


def test_rows_are_cast_to_the_file_s_type(tmp_path):
    path = tmp_path / "stream"
    with SafetensorsStream(path, {"x": (torch.float16, (2, 2))}) as stream:
        stream.write("x", torch.tensor([[1.0, 2.0], [3.0, 1 / 3]]))
    expected = torch.tensor([[1.0, 2.0], [3.0, 1 / 3]]).half()
    assert torch.equal(load_file(path)["x"], expected)


def test_empty_tensor_needs_no_rows(tmp_path):
    path = tmp_path / "stream"
    with SafetensorsStream(path, {"x": (torch.float32, (5, 0, 2))}):
        pass
    assert load_file(path)["x"].shape == (5, 0, 2)


def test_lazy_rows(tmp_path):
    path = write(tmp_path / "stream")
    rows = TensorFile(path).rows("10.feat_NGC")
    assert rows.shape == (7, 3, 5)
    assert len(rows) == 7
    assert torch.equal(rows[2:5], TENSORS["10.feat_NGC"][2:5])
    assert torch.equal(rows[5:], TENSORS["10.feat_NGC"][5:])
    with pytest.raises(ValueError, match="steps of one"):
        rows[::2]


def test_missing_rows_leave_no_file(tmp_path):
    path = tmp_path / "stream"
    stream = SafetensorsStream(path, SPECS)
    stream.write("labels", TENSORS["labels"][:2])
    with pytest.raises(ValueError, match=r"labels \(2 of 7\)"):
        stream.close()
    assert not path.exists()


def test_wrong_rows(tmp_path):
    with (
        pytest.raises(ValueError, match="do not fit labels"),
        SafetensorsStream(tmp_path / "stream", SPECS) as stream,
    ):
        stream.write("labels", torch.arange(8))
    with (
        pytest.raises(ValueError, match=r"do not fit 1\.feat_NC"),
        SafetensorsStream(tmp_path / "stream", SPECS) as stream,
    ):
        stream.write("1.feat_NC", torch.zeros(2, 5))
    assert not (tmp_path / "stream").exists()


def test_an_exception_inside_leaves_no_file(tmp_path):
    path = tmp_path / "stream"
    with pytest.raises(KeyboardInterrupt), SafetensorsStream(path, SPECS):
        raise KeyboardInterrupt
    assert not path.exists()


@pytest.mark.parametrize("place", ["posix_fallocate", "write", "fsync"])
def test_full_disk_is_told_and_leaves_no_file(tmp_path, monkeypatch, place):
    path = tmp_path / "stream"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "write":
        stream = SafetensorsStream(path, SPECS)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DeryError, match="disk is full") as caught:
            stream.write("labels", TENSORS["labels"])
    else:
        monkeypatch.setattr(os, place, full, raising=False)
        with pytest.raises(DeryError, match="disk is full") as caught:
            write(path)
    assert f"{stream_nbytes(SPECS):,} bytes" in caught.value.message
    assert not path.exists()


def test_damaged_file(tmp_path):
    path = write(tmp_path / "stream")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(DeryError, match="cannot be read"):
        TensorFile(path)
    path.write_bytes(whole)
    with pytest.raises(DeryError, match="nothing"):
        TensorFile(path).rows("nothing")
    with pytest.raises(DeryError, match="shown cannot be read"):
        TensorFile(tmp_path / "absent", shown=tmp_path / "shown")


def saved_dtypes() -> list[torch.dtype]:
    """Every type of torch's that safetensors writes and reads."""
    found = []
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        with contextlib.suppress(KeyError, RuntimeError, NotImplementedError):
            load(save({"x": torch.ones(3, 2).to(dtype)}))
            found.append(dtype)
    return found


def test_whole_tensors_are_the_bytes_of_save_file(tmp_path):
    """Of every type that safetensors has, without a shape and empty too."""
    tensors = {
        **{str(dtype): torch.ones(3, 2).to(dtype) for dtype in saved_dtypes()},
        "number": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "whole")
    write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "whole").read_bytes()
    found = TensorFile(tmp_path / "ours")
    assert found.specs() == {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert torch.equal(found.tensors()["turned"], tensors["turned"])
