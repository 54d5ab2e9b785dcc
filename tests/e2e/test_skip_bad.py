"""Broken images: named by default; with --skip-bad as if they were not there, in all stages."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
from PIL import Image

from tests.conftest import make_images, run_dery
from tests.e2e.conftest import snapshot
from tests.e2e.test_embed_sim import launch

CLASSES = ("ant", "bee", "cow")
BROKEN = 6
STAGES = {
    "embed": "embed --samples 30",
    "sim": "sim",
    "partition": "partition -K 2 --eps 0.5",
    "assemble": "assemble --effort 1",
    "finetune": "finetune --steps 2 --effort 0",
    "eval": "eval",
}


def add_broken(folder):
    """A truncated JPEG, a text file and an empty file in train/ and in val/."""
    for part in ("train", "val"):
        Image.open(folder / part / "ant" / "003.png").save(folder / part / "ant" / "000.jpg")
        whole = (folder / part / "ant" / "000.jpg").read_bytes()
        (folder / part / "ant" / "000.jpg").write_bytes(whole[: len(whole) // 2])
        (folder / part / "bee" / "notes.png").write_text("not an image")
        (folder / part / "cow" / "zzz.webp").write_bytes(b"")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All stages on whole images in ``clean/ws``, and on the same among broken in ``bad/ws``."""
    root = tmp_path_factory.mktemp("skip_bad")
    results = {}
    for name in ("clean", "bad"):
        for part, count in (("train", 12), ("val", 4)):
            make_images(root / name / "pets" / part, CLASSES, count)
        if name == "bad":
            add_broken(root / name / "pets")
        ws = ["--workspace", str(root / name / "ws")]
        added = run_dery("zoo", "add", "demo/mobilenetv3", "demo/resnext", *ws)
        assert added.code == 0, added.stderr
        for stage, line in STAGES.items():
            words = line.split()
            if stage == "embed":
                words += ["--data", str(root / name / "pets")]
                words += ["--skip-bad"] * (name == "bad")
            outcome = run_dery(*words, *ws, "--json")
            assert outcome.code == 0, outcome.stderr
            results[name, stage] = outcome.json
    return root, results


@pytest.fixture
def bad(made, tmp_path):
    """``dery`` in a copy of the workspace of the broken images, on a copy of those."""
    root = made[0]
    shutil.copytree(root / "bad" / "ws", tmp_path / "ws")

    def call(line):
        return run_dery(*shlex.split(line), "--workspace", str(tmp_path / "ws"), "--json")

    return call


def pets(made, name="bad"):
    return made[0] / name / "pets"


def test_the_count_is_told_by_every_stage_that_reads_images(made):
    for stage in STAGES:
        warnings = [w for w in made[1]["bad", stage]["warnings"] if "broken" in w]
        if stage in ("sim", "partition"):
            assert warnings == []
        else:
            folder = pets(made) / "train"
            names = f"{folder}/ant/000.jpg, {folder}/bee/notes.png, {folder}/cow/zzz.webp"
            assert warnings == [f"left out {BROKEN} broken images: {names} ..."]
        assert not any("broken" in w for w in made[1]["clean", stage]["warnings"])


def test_everything_is_as_if_the_files_were_not_there(made):
    root, results = made
    clean, bad = (snapshot(root / name / "ws") for name in ("clean", "bad"))
    tensors = [name for name in clean if name.endswith(".safetensors")]
    assert len(tensors) >= 5
    for name in tensors:
        assert clean[name] == bad[name], name
    for key in ("top1", "images", "confusion"):
        assert results["clean", "eval"]["result"][key] == results["bad", "eval"]["result"][key]
    assert results["bad", "eval"]["result"]["images"] == 12
    record = json.loads(bad["embeddings/demo__resnext.json"])
    assert record["options"]["skip_bad"] is True
    assert json.loads(clean["embeddings/demo__resnext.json"])["options"]["skip_bad"] is False


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("embed --samples 60", "train"),
        ("assemble --effort 1 --name other", "train"),
        ("finetune --steps 2 --effort 0 --name other", "val"),
        ("eval", "val"),
    ],
)
def test_without_the_option_a_broken_file_is_named(bad, made, tmp_path, line, part):
    before = snapshot(tmp_path / "ws")
    outcome = bad(f"{line} --data {pets(made)}")
    assert outcome.code == 1, outcome.stderr
    error = outcome.json["error"]
    names = [f"{pets(made)}/{part}/{name}" for name in ("ant/000.jpg", "bee/notes.png")]
    names.append(f"{pets(made)}/{part}/cow/zzz.webp")
    assert any(f"cannot read the image {name}: " in error["message"] for name in names)
    assert "--skip-bad" in error["hint"]
    after = snapshot(tmp_path / "ws")
    assert {n: d for n, d in after.items() if n in before} == before
    assert not [n for n in after if n.endswith(("assembly.json", "run.json")) and n not in before]


@pytest.mark.parametrize(
    "line",
    [
        "assemble --effort 1 --name other",
        "finetune --steps 2 --effort 0 --name other",
        "eval",
    ],
)
def test_the_option_is_for_other_data_too(bad, made, line):
    outcome = bad(f"{line} --data {pets(made)} --skip-bad")
    assert outcome.code == 0, outcome.stderr
    assert f"left out {BROKEN} broken images" in outcome.json["warnings"][0]


def test_a_later_stage_may_ask_for_it_first(bad, made, tmp_path):
    """The folder was whole when its images were embedded."""
    shutil.copytree(pets(made, "clean"), tmp_path / "pets")
    for line in (f"embed --samples 30 --data {tmp_path / 'pets'}", *list(STAGES.values())[1:3]):
        assert bad(line).code == 0
    add_broken(tmp_path / "pets")
    assert bad("assemble --effort 1").code == 4  # other images are chosen from it now
    outcome = bad("assemble --effort 1 --skip-bad")
    assert outcome.code == 0, outcome.stderr
    assert f"left out {BROKEN} broken images" in outcome.json["warnings"][0]
    assert bad("eval assemblies/default").json["result"]["images"] == 12  # and it is remembered


def test_with_the_option_whole_images_need_nothing_new(bad, made):
    whole = f"--data {pets(made, 'clean')} --samples 30"
    assert bad(f"embed {whole}").code == 0
    outcome = bad(f"embed {whole} --skip-bad")
    assert outcome.code == 0
    assert outcome.json["result"]["embedded"] == []
    assert outcome.json["warnings"] == []


def test_it_is_remembered_what_was_left_out(bad, made):
    outcome = bad(f"embed --samples 30 --data {pets(made)} --skip-bad")
    assert outcome.json["result"]["embedded"] == []
    assert bad("assemble --effort 1").code == 0


def test_the_command_that_refreshes_has_the_option(bad, made, tmp_path):
    shutil.copytree(pets(made), tmp_path / "pets")
    for line in (f"embed --samples 30 --data {tmp_path / 'pets'} --skip-bad", "sim"):
        assert bad(line).code == 0
    assert bad("partition -K 2 --eps 0.5").code == 0
    for path in (tmp_path / "pets" / "train" / "ant").glob("*.png"):
        shutil.copy(tmp_path / "pets" / "train" / "bee" / "000.png", path)
    outcome = bad("assemble --effort 1")
    assert outcome.code == 4
    hint = outcome.json["error"]["hint"]
    assert hint == f"dery embed --data {tmp_path / 'pets'} --samples 30 --skip-bad"
    assert bad(hint.removeprefix("dery ")).code == 0


def test_a_class_of_broken_images_only(bad, made, tmp_path):
    shutil.copytree(pets(made), tmp_path / "pets")
    for path in (tmp_path / "pets" / "train" / "bee").iterdir():
        path.write_bytes(b"")
    outcome = bad(f"embed --data {tmp_path / 'pets'} --skip-bad")
    assert outcome.code == 1
    assert "no image of the class 'bee'" in outcome.json["error"]["message"]


@pytest.mark.slow
def test_two_processes_leave_out_the_same(made, tmp_path):
    shutil.copytree(made[0] / "bad" / "ws", tmp_path / "ws")
    shutil.rmtree(tmp_path / "ws" / "embeddings")
    line = f"embed --samples 30 -b 8 --data {pets(made)} --skip-bad"
    done = launch(tmp_path, "work", line, 29661)
    assert done.returncode == 0, done.stderr
    two = (tmp_path / "ws" / "embeddings" / "demo__resnext.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "ws" / "embeddings")
    alone = run_dery(*shlex.split(line), "--workspace", str(tmp_path / "ws"))
    assert alone.code == 0
    assert two == (tmp_path / "ws" / "embeddings" / "demo__resnext.safetensors").read_bytes()
