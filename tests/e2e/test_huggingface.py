"""A Hugging Face data set through the stages, named by a relative path."""

from __future__ import annotations

import pytest

from dery_cli.zoo.networks import load_assembly
from tests.conftest import make_images, run_dery

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Parquet files with one truncated image, in ``somewhere/pets``."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = make_images(tmp_path / "images", ["ant", "bee"], 12)
    encoded = [path.read_bytes() for path in sorted(images.rglob("*.png"))]
    encoded[20] = encoded[20][:100]
    features = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["Ant", "Bee"])}
    rows = {
        "photo": [{"bytes": data, "path": None} for data in encoded],
        "kind": [0] * 12 + [1] * 12,
    }
    place = tmp_path / "somewhere" / "pets"
    place.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(place / "a.parquet")
    return place


@pytest.mark.slow
def test_all_stages(folder, tmp_path):
    def dery(line, cwd=tmp_path):
        return run_dery(*line.split(), "--workspace", str(tmp_path / "ws"), "--json", cwd=cwd)

    assert dery("zoo add demo/mobilenetv3 demo/resnext").code == 0
    failed = dery("embed --data hf:./pets", cwd=folder.parent)
    assert failed.code == 1
    assert "cannot read the image 20 of the split 'train' of hf:" in failed.json["error"]["message"]
    assert dery("embed --data hf:./pets --skip-bad", cwd=folder.parent).code == 0
    for line in (
        "sim",
        "partition -K 2 --eps 0.5",
        "assemble --effort 1",
        "finetune --steps 2 --effort 0",
    ):
        outcome = dery(line)
        assert outcome.code == 0, outcome.stderr
    scored = dery("eval").json
    assert scored["result"]["data"] == f"hf:{folder}"
    assert scored["result"]["images"] == 4  # a fifth of twelve and of eleven
    assert "left out 1 broken image: 20 of the split" in scored["warnings"][0]
    assert load_assembly(tmp_path / "ws" / "runs" / "default").classes == ("Ant", "Bee")
