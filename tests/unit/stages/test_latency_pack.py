"""A pack of a tiny zoo, measured by its own script in a process of its own, and read back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from dery_cli.errors import DeryError, StaleError, UsageError
from dery_cli.stages.assemble.costs import latency_elsewhere, stitches_to_time
from dery_cli.stages.latency import as_onnx
from dery_cli.stages.latency.as_onnx import write_parts
from dery_cli.stages.latency.store import WholeTime, donor_sha256, read_times
from dery_cli.types import BlockRef, StitchKind
from dery_cli.zoo.registry import Zoo
from tests.unit.zoo.assemblies import donor

KIND = StitchKind.LINEAR


@pytest.fixture(scope="module")
def zoo():
    return Zoo([donor("resnet")])


@pytest.fixture
def file(zoo, tmp_path):
    """Times of a nanosecond more for each part."""
    anatomy = zoo["resnet"].anatomy
    keys = [f"unit/resnet/{unit}" for unit in range(anatomy.num_units)]
    keys += stitches_to_time(zoo, KIND)
    keys += [f"head/{node.num_chs}" for node in anatomy.nodes if node.index]
    data = {
        "schema": "dery/latency/1",
        "for": {
            "donors": {"resnet": donor_sha256(zoo["resnet"])},
            "stitch": "linear",
            "batch_size": 1,
            "classes": 10,
        },
        "measured_on": {"machine": "toaster"},
        "repeats": 5,
        "warmup": 1,
        "times_ns": {key: 1000 + place for place, key in enumerate(dict.fromkeys(keys))},
        "networks": {"one": {"whole_ns": 1500, "parts": keys[:2]}},
    }
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(data))
    return path


def read(path, zoo, **options):
    return read_times(path, zoo, **{"kind": KIND, "batch_size": 1, "classes": 10, **options})


def changed(path, *keys, value):
    data = json.loads(path.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(data))


def test_a_network_takes_the_sum_of_what_was_measured(file, zoo):
    times = read(file, zoo)
    table = latency_elsewhere(zoo, times, kind=KIND, num_classes=10)
    head = times.head(zoo["resnet"].anatomy.nodes[3].num_chs)
    expected = sum(times.unit("resnet", unit) for unit in range(3)) + head
    assert table.network((BlockRef("resnet", 0, 3),)) == expected
    assert times.wholes() == [WholeTime("one", 1500, 2001)]
    assert times.wholes()[0].error == pytest.approx(2001 / 1500 - 1)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema",), "dery/latency/2", "another dery's format .format 2, this one reads 1"),
        (("schema",), "dery/latency/x", "no file of times"),
        (("for", "donors", "resnet"), "0" * 64, "was made of another resnet"),
        (("for", "donors"), {}, "lacks resnet"),
        (("for", "donors", "swin"), "0" * 64, "has beside these donors swin"),
        (("for", "stitch"), "mlp", "--stitch mlp, not linear"),
        (("for", "batch_size"), 4, "--latency-batch 4, not 1"),
        (("for", "classes"), 3, "heads for 3 classes, the target has 10 classes"),
        (("times_ns", "unit/resnet/0"), -1, "no file of times"),
        (("times_ns", "unit/resnet/0"), "soon", "no file of times"),
    ],
)
def test_what_is_not_of_these_donors_is_refused(file, zoo, keys, value, message):
    changed(file, *keys, value=value)
    with pytest.raises((UsageError, StaleError), match=message):
        read(file, zoo)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_damaged_file_is_refused(file, zoo, text):
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"JSON file|no file of times"):
        read(file, zoo)
    with pytest.raises(UsageError, match="cannot read"):
        read(file.parent / "none.json", zoo)


def test_a_missing_part_is_named(file, zoo):
    data = json.loads(file.read_text())
    del data["times_ns"]["unit/resnet/2"]
    file.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="no time of unit/resnet/2"):
        latency_elsewhere(zoo, read(file, zoo), kind=KIND, num_classes=10)


def test_parts_cut_out_of_one_export_give_what_the_modules_give(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    modules = [
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.Sequential(torch.nn.Linear(5, 2), torch.nn.GELU()),
    ]
    inputs = [torch.randn(1, 3, 8, 8), torch.randn(1, 5)]
    paths = [tmp_path / f"{place}.onnx" for place in range(2)]
    write_parts(list(zip("ab", modules, inputs, paths, strict=True)))
    for module, x, path in zip(modules, inputs, paths, strict=True):
        [y] = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
        assert torch.allclose(torch.from_numpy(y), module(x), atol=1e-5)


def test_the_part_that_cannot_be_exported_is_named(tmp_path):
    pytest.importorskip("onnxscript")

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x @ x.mT)

    parts = [
        ("unit/a/0", torch.nn.Linear(5, 2), torch.randn(1, 5), tmp_path / "0.onnx"),
        ("unit/a/1", Odd(), torch.randn(1, 3, 3), tmp_path / "1.onnx"),
    ]
    with pytest.raises(DeryError, match="cannot take unit/a/1"):
        write_parts(parts)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(as_onnx.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DeryError, match="onnx, onnxscript") as caught:
        as_onnx.check_installed()
    assert caught.value.hint == "pip install 'dery-cli[onnx]'"


def test_the_script_measures_a_pack_on_its_own(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from dery_cli.stages.latency.scripts import measure

    x = torch.randn(1, 5)
    write_parts([("head/5", torch.nn.Linear(5, 2), x, tmp_path / "part.onnx")])
    entry = {"file": "part.onnx", "shape": [1, 5]}
    pack = {
        "for": {"donors": {}},
        "parts": {"head/5": entry},
        "networks": {"one": entry | {"parts": ["head/5"]}},
    }
    (tmp_path / "pack.json").write_text(json.dumps(pack))
    script = tmp_path / "measure.py"
    with open(measure.__file__, encoding="utf-8") as source:
        script.write_text(source.read())
    words = [sys.executable, "-I", str(script), "--repeats", "2", "--warmup", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "latency.json").read_text())
    assert found["times_ns"]["head/5"] > 0
    assert found["networks"]["one"]["parts"] == ["head/5"]
    assert "the sum of its parts" in done.stdout
