"""What one asks of a workspace every day: predict, status, doctor."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

from tests.conftest import run_dery
from tests.e2e.conftest import edit_json


def test_predict_answers_with_the_classes_of_the_run(copied, pipeline, tmp_path):
    images = pipeline.data / "test"
    found = copied(
        "predict", "runs/default", str(images), "--top", "2", "--csv", "answers.csv", "--json"
    )
    assert found.code == 0, found.stderr
    told = found.json["result"]["predictions"]
    names = sorted(path.name for path in images.iterdir())
    assert len(told) == sum(1 for _ in images.rglob("*.png"))
    hits = 0
    for one in told:
        assert len(one["classes"]) == 2
        assert set(one["classes"]) <= set(names)
        assert 1 >= one["scores"][0] >= one["scores"][1] >= 0
        hits += one["classes"][0] == one["file"].split("/")[-2]
    top1 = pipeline.results["eval"]["top1"]
    assert hits / len(told) == top1
    rows = list(csv.reader((tmp_path / "answers.csv").read_text().splitlines()))
    assert rows[0] == ["file", "rank", "class", "score"]
    assert len(rows) == 1 + 2 * len(told)


def test_predict_names_what_it_cannot_read(copied, pipeline, tmp_path):
    good = next((pipeline.data / "test").rglob("*.png"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    refused = copied("predict", "assemblies/default", str(bad), str(good), "--json")
    assert refused.code == 1
    assert "bad.png" in refused.json["error"]["message"]
    let = copied("predict", "assemblies/default", str(bad), str(good), "--skip-bad", "--json")
    assert let.code == 0, let.stderr
    assert let.json["result"]["left_out"] == [str(bad)]
    assert [one["file"] for one in let.json["result"]["predictions"]] == [str(good)]
    for words in (["assemblies/default", "nowhere.png"], ["assemblies/none", str(good)]):
        assert copied("predict", *words, "--json").code == 2
    assert copied("predict", "runs/default", str(good), "--top", "0", "--json").code == 2


def test_status_says_what_is_done_and_what_is_stale(copied, tmp_path):
    first = copied("status", "--json").json["result"]
    assert {row["state"] for row in first["stages"]} == {"done"}
    assert first["next"] is None
    stages = [row["stage"] for row in first["stages"]]
    assert stages == ["zoo add", "embed", "sim", "partition", "assemble", "finetune"]
    (tmp_path / "ws" / "similarity" / "cka.json").unlink()
    second = copied("status", "--json").json["result"]
    states = {row["stage"]: row["state"] for row in second["stages"]}
    assert states["sim"] == "missing"
    assert states["partition"] == "stale"
    edit_json(tmp_path / "ws" / "zoo.json", lambda record: record.update(seed=7))
    third = copied("status", "--json")
    assert third.code == 0
    assert third.json["result"]["stages"][0]["state"] == "damaged"
    assert third.json["result"]["next"] is not None


def test_an_empty_workspace_has_everything_before_it(tmp_path):
    found = run_dery("status", "--json", cwd=tmp_path)
    assert found.code == 0
    assert [row["state"] for row in found.json["result"]["stages"]] == ["missing"]
    assert "zoo add" in found.json["result"]["next"]
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_damage_and_mends_what_is_safe(copied, tmp_path):
    root = tmp_path / "ws"
    well = copied("doctor", "--json")
    assert well.code == 0, well.stderr
    said = {one["what"]: one for one in well.json["result"]["findings"]}
    assert said["solver"]["state"] == "fine"
    (root / "similarity" / "cka.safetensors.pending").write_bytes(b"half")
    (root / "assemblies" / "default" / ".tmpAbC123").write_bytes(b"half")
    hurt = copied("doctor", "--json")
    assert hurt.code == 1
    found = hurt.json["error"]["details"]["findings"]
    assert sum(one["what"] == "half-written" for one in found) == 2
    mended = copied("doctor", "--fix", "--json")
    assert mended.code == 0, mended.stderr
    assert not (root / "assemblies" / "default" / ".tmpAbC123").exists()
    weights = root / "assemblies" / "default" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    broken = copied("doctor", "--json")
    assert broken.code == 1
    words = json.dumps(broken.json["error"]["details"]["findings"])
    assert "model.safetensors was altered" in words


def test_status_loads_nothing_heavy(pipeline):
    script = (
        "import sys\n"
        "from dery_cli.cli import run\n"
        f"code = run(['status', '--quiet', '--workspace', {str(pipeline.root)!r}])\n"
        "print(code, sorted({'torch', 'timm', 'mip'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[-2] == "0 []"


def test_compare_puts_records_side_by_side(copied, pipeline):
    found = copied("compare", "assemblies/default", "runs/default", "--json")
    assert found.code == 0, found.stderr
    made, tuned = found.json["result"]["networks"]
    said, run = pipeline.results["assemble"], pipeline.results["finetune"]
    assert (made["name"], tuned["name"]) == ("assemblies/default", "runs/default")
    assert made["network"] == tuned["network"] == said["name"]
    assert (made["params"], made["held_out"]) == (said["params"], said["held_out"])
    assert (made["test_top1"], tuned["test_top1"]) == (said["test_top1"], run["test_top1"])
    assert made["donors"] == sorted({row["donor"] for row in said["network"]["blocks"]})
    assert tuned["held_out"] is None
    plain = copied("compare", "assemblies/default", "runs/default")
    assert max(map(len, plain.stdout.split("held out: ")[0].splitlines())) <= 80
    assert copied("compare", "none", "--json").code == 2
