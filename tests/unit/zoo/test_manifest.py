"""Manifests: key path and line in every error, and the ones that ship."""

from __future__ import annotations

import pytest
import torch

from dery_cli.errors import UsageError
from dery_cli.zoo import manifest
from dery_cli.zoo.manifest import load_manifest, read_manifest, shipped_manifests
from dery_cli.zoo.registry import parse_spec, resolve
from tests.conftest import run_dery

PERMISSIVE = {"Apache-2.0", "MIT", "BSD-3-Clause"}
HEAD = '[zoo]\ntitle = "mine"\n\n'
FIRST = '[[model]]\nspec = "demo/resnet"\n\n'


def write(tmp_path, text):
    path = tmp_path / "zoo.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, model: at least one [[model]] is needed"),
        ("model = 3", "line 1, model: at least one [[model]] is needed"),
        ("model = [3]", "line 1, model: at least one [[model]] is needed"),
        (HEAD + FIRST + "[other]\n", "line 7, other: unknown table"),
        ("zoo = 3\n" + FIRST, "line 1, zoo: expected a table, got 3"),
        ('[zoo]\ntitel = "x"\n' + FIRST, "line 2, zoo.titel: unknown key"),
        (HEAD + FIRST + '[[model]]\nname = "x"\n', "line 7, model[1]: 'spec' is missing"),
        (
            HEAD + FIRST + '[[model]]\nspec = "demo/swin"\nspek = "x"\n',
            "line 9, model[1].spek: unknown key; there are spec, name, weights",
        ),
        (
            FIRST + '[[ model ]]\nspec = "demo/swin"\n\n# side\nimage_size = "224"\n',
            "line 8, model[1].image_size: expected int, got '224'",
        ),
        (
            '[[model]]\nspec = "a/b"\nimage_size = true\n' + FIRST,
            "line 3, model[0].image_size: expected int, got True",
        ),
        (
            '[[model]]\nspec = "a/b"\nimage_size = 0\n',
            "line 3, model[0].image_size: expected a side of 1 to 4096 pixels, got 0",
        ),
        ('[[model]]\nspec = "a/b"\nsha256 = "12ab"\n', "line 3, model[0].sha256: expected 64"),
        (
            FIRST + '[[model]]\nspec = "a/b"\nweights = "../w.pt"\n',
            "line 6, model[1].weights: '../w.pt' leaves the manifest's folder",
        ),
        (
            '[[model]]\nspec = "a/b"\n"weights" = "/etc/passwd"\n',
            "line 3, model[0].weights: '/etc/passwd' leaves the manifest's folder",
        ),
        (
            '[[model]]\nspec = "a/b"\nweights = "x/../../w.pt"\n',
            "line 3, model[0].weights: 'x/../../w.pt' leaves",
        ),
        (FIRST + FIRST, "line 5, model[1].spec: model[0] is 'demo/resnet' already"),
        (
            '[[model]]\nspec = "a/b"\nname = "x"\n[[model]]\nspec = "a/c"\nname = "x"\n',
            "line 6, model[1].name: model[0] is 'x' already",
        ),
        ("[[model\n", "is not TOML: "),
    ],
)
def test_errors_name_key_path_and_line(tmp_path, text, message):
    with pytest.raises(UsageError) as caught:
        read_manifest(write(tmp_path, text))
    assert message in caught.value.message
    assert caught.value.message.startswith("zoo.toml")


def test_a_link_may_not_leave_the_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "w.pt").write_bytes(b"")
    (inside / "w.pt").symlink_to(tmp_path / "w.pt")
    with pytest.raises(UsageError, match="leaves the manifest's folder"):
        read_manifest(write(inside, '[[model]]\nspec = "a/b"\nweights = "w.pt"\n'))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "zoo.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"zoo\.toml is not TOML"):
        read_manifest(path)


def test_every_key_arrives(tmp_path):
    entry = read_manifest(
        write(
            tmp_path,
            '[[model]]\nspec = "a/b"\nname = "n"\nweights = "w/x.pt"\nallow_partial = true\n'
            f'sha256 = "{"0" * 64}"\nimage_size = 64\nlicense = "MIT"\ntask = "t"\n'
            'source = "s"\nnote = "by hand"\nparams = 3\ntop1 = 1\n',
        )
    )[0]
    assert entry == manifest.ManifestEntry(
        spec="a/b",
        name="n",
        weights=(tmp_path / "w" / "x.pt").resolve(),
        allow_partial=True,
        sha256="0" * 64,
        image_size=64,
        license="MIT",
        task="t",
        source="s",
        note="by hand",
    )


@pytest.mark.parametrize("name", sorted(shipped_manifests()))
def test_shipped_manifests_resolve_without_network(name):
    for entry in load_manifest(name):
        _, card = resolve(parse_spec(entry.spec))
        assert entry.license, entry.spec
        assert entry.license != "unknown" or "no licence is stated" in entry.note
        assert entry.task, entry.spec
        assert entry.source, entry.spec
        if entry.weights is None and entry.license != "unknown" and card.license != "unknown":
            assert entry.license == card.license, entry.spec
        assert entry.weights is None or "fetch" in entry.note


def test_the_papers_zoo_has_its_size():
    entries = load_manifest("paper")
    assert len(entries) == 28
    assert len({entry.spec.partition(".")[0] for entry in entries}) == 21
    assert sum(entry.weights is not None for entry in entries) == 5


def test_the_small_zoo_is_small_and_permissive():
    import timm

    entries = load_manifest("timm-small")
    for entry in entries:
        with torch.device("meta"):
            model = timm.create_model(entry.spec.removeprefix("timm/"))
        assert sum(p.numel() for p in model.parameters()) < 30e6, entry.spec
        assert entry.license in PERMISSIVE


def test_weights_that_must_be_fetched_by_hand(tmp_path):
    """The note says from where; a shipped manifest looks below the current folder."""
    entry = next(e for e in load_manifest("paper") if e.name == "resnet50.mocov2")
    (tmp_path / "own.toml").write_text(
        f'[[model]]\nspec = "demo/mobilenetv3"\nname = "byhand"\nweights = "weights/x.pth"\n'
        f'note = "{entry.note}"\n[[model]]\nspec = "demo/mobilenetv3"\n'
    )
    outcome = run_dery("zoo", "add", "-m", "own.toml", "--no-pretrained", "--json", cwd=tmp_path)
    assert outcome.code == 2
    error = outcome.json["error"]
    assert error["message"] == "1 of 2 models were not added: byhand"
    assert error["details"]["added"] == ["demo__mobilenetv3"]
    assert "no such weights file" in outcome.json["warnings"][0]
    assert "fetch it from https://dl.fbaipublicfiles.com/moco" in outcome.json["warnings"][0]
    assert run_dery("zoo", "list", "--json", cwd=tmp_path).json["result"]["donors"]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "m.toml"
    path.write_bytes(b'\xef\xbb\xbf[[model]]\nspec = "a/b"\nweights_key = "ema"\n')
    (entry,) = read_manifest(path)
    assert (entry.spec, entry.weights_key) == ("a/b", "ema")


def test_a_manifest_that_nests_without_end(tmp_path):
    (tmp_path / "m.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(UsageError, match=r"m\.toml is no"):
        read_manifest(tmp_path / "m.toml")
