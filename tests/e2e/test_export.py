"""``dery export``: what it writes is run where dery cannot be imported, and asked the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dery_cli.stages.export import as_safetensors
from dery_cli.zoo.networks import load_assembly
from tests.conftest import run_dery
from tests.e2e.conftest import edit_json, snapshot
from tests.unit.stages.export.networks import write_assembly

WITHOUT_DERY = """
import runpy, sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"dery_cli", "dery_demo", "timm", *sys.argv[2].split(",")}:
            raise ImportError(name)

sys.meta_path.insert(0, Gone())
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NETWORKS = [
    "resnext[0:4] + swin[3:]",
    "vit_cls[0:3] + convnext[4:]",
    "swin[0:3] + vit_cls[3:]",
    "regnet[0:3] + efficientnet[3:]",
    "mobilenetv3[0:4] + regnet[4:]",
    "convnext[0:3] + vit_avg[3:]",
    "efficientnet[0:3] + mobilenetv3[4:]",
]


def run_alone(folder: Path, images: list[Path], *, gone: str = "none") -> list[str]:
    """What ``run.py`` says of images where dery, its plugins and ``gone`` cannot be imported."""
    script = folder / "run.py"
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_DERY, "-", gone, str(script), *map(str, images)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr[-500:]
    return [line.split()[-1] for line in done.stdout.splitlines()]


def some_images(data: Path) -> list[Path]:
    return sorted((data / "test").rglob("*.png"))[::17][:6]


def answers(folder: Path, images: list[Path]) -> list[str]:
    network, transform = load_assembly(folder)
    classes = load_assembly(folder).classes
    assert classes is not None
    with torch.no_grad():
        logits = network(torch.stack([transform(Image.open(path)) for path in images]))
    return [classes[int(index)] for index in logits.argmax(1)]


def tricky(folder: Path, image: Path) -> list[Path]:
    """The image turned by EXIF, with a palette, and with transparency."""
    folder.mkdir()
    picture = Image.open(image).convert("RGB").resize((50, 41))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.png", exif=exif)
    picture.quantize(16).save(folder / "palette.png")
    picture.putalpha(picture.convert("L"))
    picture.save(folder / "clear.png")
    return sorted(folder.iterdir())


def test_onnx_is_run_with_neither_dery_nor_torch(pipeline, tmp_path):
    out = tmp_path / "out"
    words = ["export", "default", "--to", str(out), "--format", "onnx", "--images", "30", "--fuse"]
    outcome = run_dery(*words, "--workspace", str(pipeline.root), "--json")
    assert outcome.code == 0, outcome.stderr
    found = outcome.json["result"]
    assert found["agreement"]["images"] == 30
    assert found["agreement"]["top1"] == 1
    assert 0 < found["agreement"]["difference"] < 1e-3
    assert "top-1 agreement 1.0000, largest relative difference" in outcome.stderr
    images = [*some_images(pipeline.data), *tricky(tmp_path / "t", some_images(pipeline.data)[0])]
    assert run_alone(out, images, gone="torch") == answers(pipeline.root / "runs/default", images)

    import onnx

    model = onnx.load(out / "model.onnx")
    inside = {entry.key: entry.value for entry in model.metadata_props}
    beside = json.loads((out / "metadata.json").read_text())
    for key in ("input", "classes", "licenses", "provenance"):
        assert json.loads(inside[key]) == beside[key]
    assert beside["provenance"]["kind"] == "run"
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [shape[0].dim_param, shape[2].dim_value] == ["batch", beside["input"]["image_size"][0]]
    assert str(Path(__file__).parents[2]).encode() not in (out / "model.onnx").read_bytes()


@pytest.mark.slow
def test_torch_export_is_run_with_torch_alone_and_holds_the_metadata(pipeline, tmp_path):
    out = tmp_path / "out"
    words = ["export", "assemblies/default", "--to", str(out), "--format", "torch-export"]
    outcome = run_dery(*words, "--images", "9", "--workspace", str(pipeline.root))
    assert outcome.code == 0, outcome.stderr
    images = some_images(pipeline.data)
    assert run_alone(out, images) == answers(pipeline.root / "assemblies/default", images)
    extra = {"metadata.json": ""}
    torch.export.load(out / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"])["provenance"]["kind"] == "assembly"


def test_safetensors_are_read_by_load_assembly_to_the_bit(pipeline, tmp_path):
    out = tmp_path / "out"
    words = ["export", "--to", str(out), "--format", "safetensors"]
    outcome = run_dery(*words, "--images", "9", "--workspace", str(pipeline.root), "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["result"]["agreement"]["difference"] == 0
    shutil.move(out, tmp_path / "elsewhere")
    was = load_assembly(pipeline.root / "runs/default").network.state_dict()
    now = load_assembly(tmp_path / "elsewhere").network.state_dict()
    assert was.keys() == now.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
    record = (tmp_path / "elsewhere" / "run.json").read_text()
    assert str(pipeline.data) not in record  # no place of this machine goes along


def test_timm_builds_what_was_exported(pipeline, tmp_path):
    import timm

    import dery_cli.timm

    assert dery_cli.timm.dery_assembly
    out = tmp_path / "out"
    words = ["export", "--to", str(out), "--format", "safetensors", "--images", "2"]
    assert run_dery(*words, "--workspace", str(pipeline.root)).code == 0
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    network, _ = load_assembly(out)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(x), network(x))


def test_an_existing_folder_is_refused_without_force(pipeline, tmp_path):
    out = tmp_path / "out"
    words = ["export", "--to", str(out), "--format", "safetensors", "--images", "2"]
    words += ["--workspace", str(pipeline.root)]
    out.mkdir()
    (out / "metadata.json").write_text('{"schema": "dery/export"}')
    before = snapshot(out)
    again = run_dery(*words)
    assert again.code == 2
    assert "is there already" in again.stderr
    assert snapshot(out) == before
    assert run_dery(*words, "--force").code == 0
    assert "model.safetensors" in snapshot(out)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def alter_weights(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)


def make_newer(folder: Path) -> None:
    edit_json(folder / "run.json", lambda record: record.update(version=99))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_weights, "model.safetensors"),
        (alter_weights, "model.safetensors"),
        (make_newer, "newer dery"),
    ],
)
def test_a_damaged_source_is_an_error_and_nothing_is_written(pipeline, tmp_path, damage, said):
    source = tmp_path / "source"
    shutil.copytree(pipeline.root / "runs/default", source)
    damage(source)
    words = ["export", str(source), "--to", str(tmp_path / "out"), "--format", "safetensors"]
    outcome = run_dery(*words)
    assert outcome.code == 1
    assert said in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_answer_off_by_more_than_the_tolerance_leaves_nothing(pipeline, tmp_path, monkeypatch):
    network = load_assembly(pipeline.root / "runs/default").network
    monkeypatch.setattr(as_safetensors, "load", lambda _folder: lambda x: 1.01 * network(x))
    words = ["export", "--to", str(tmp_path / "out"), "--format", "safetensors", "--images", "3"]
    words += ["--workspace", str(pipeline.root)]
    outcome = run_dery(*words)
    assert outcome.code == 1
    assert "differs from the original by up to 0.01" in outcome.stderr
    assert list(tmp_path.iterdir()) == []
    assert run_dery(*words, "--tolerance", "0.02").code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--format tflite", "--format"),
        ("--format torch-export --int8", "--int8 goes with --format onnx"),
        ("--format safetensors --fuse", "--fuse changes the graph"),
        ("--format onnx --max-drop -1", "--max-drop"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path, words, said):
    outcome = run_dery("export", "--to", str(tmp_path / "out"), *words.split(), cwd=tmp_path)
    assert outcome.code == 2
    assert said in outcome.stderr


def test_a_missing_library_is_named(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["export", "--to", str(tmp_path / "out"), "--workspace", str(pipeline.root)]
    for format_name in ("onnx", "executorch"):
        outcome = run_dery(*words, "--format", format_name)
        assert outcome.code == 1
        assert f"dery-cli[{format_name}]" in outcome.stderr


@pytest.mark.slow
def test_int8_says_top1_before_and_after_and_is_refused_where_it_loses_more(pipeline, tmp_path):
    out = tmp_path / "out"
    words = ["export", "--to", str(out), "--format", "onnx", "--int8", "--images", "60"]
    words += ["--workspace", str(pipeline.root)]
    outcome = run_dery(*words, "--max-drop", "100", "--json")
    assert outcome.code == 0, outcome.stderr
    found = outcome.json["result"]["int8"]
    assert found["images"] == 120
    images = some_images(pipeline.data)
    assert len(run_alone(out, images, gone="torch")) == len(images)
    shutil.rmtree(out)
    again = run_dery(*words, "--max-drop", "0", "--json")
    lost = found["before"] > found["after"]
    assert again.code == (1 if lost else 0)
    assert out.exists() == (not lost)


@pytest.mark.slow
@pytest.mark.parametrize("text", NETWORKS)
def test_every_family_through_a_stitch_in_onnx(tmp_path, text):
    (tmp_path / "a").mkdir()
    write_assembly(tmp_path / "a", text)
    words = ["export", str(tmp_path / "a"), "--to", str(tmp_path / "out"), "--format", "onnx"]
    outcome = run_dery(*words, "--fuse", "--images", "50", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["result"]["agreement"]["top1"] == 1
    assert outcome.json["result"]["agreement"]["difference"] < 1e-4
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 40), (200, 30, 90)).save(image)
    assert run_alone(tmp_path / "out", [image], gone="torch") == answers(tmp_path / "a", [image])


@pytest.mark.slow
def test_executorch_runs_in_its_own_runtime(pipeline, tmp_path):
    pytest.importorskip("executorch")
    out = tmp_path / "out"
    words = ["export", "--to", str(out), "--format", "executorch", "--images", "20", "--json"]
    outcome = run_dery(*words, "--workspace", str(pipeline.root))
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["result"]["agreement"]["top1"] == 1
    images = some_images(pipeline.data)
    assert run_alone(out, images) == answers(pipeline.root / "runs/default", images)
