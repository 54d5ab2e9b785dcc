"""Registering donors: names, several weights of one architecture, hashes, whole-only models."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

import dery_demo
from dery_cli.core.dissection.dissect import DissectError, dissect
from dery_cli.io.artifacts import Workspace
from dery_cli.zoo import registry as zoo_module
from dery_cli.zoo.registry import Spec, load_donor, read_zoo
from tests.conftest import run_dery
from tests.unit.io.samples import edit


def weights(path, *, seed=1, classes=None):
    torch.manual_seed(seed)
    model = dery_demo.zoo.build("mobilenetv3", pretrained=False)
    state = model.state_dict()
    if classes is not None:
        last = [n for n, _ in model.named_parameters()][-2]
        state[last] = torch.randn(classes, state[last].shape[1])
        bias = last.replace("weight", "bias")
        state[bias] = torch.randn(classes)
    save_file(state, path)
    return path


def test_one_architecture_with_several_weights(tmp_path):
    for seed in (1, 2):
        path = weights(tmp_path / f"{seed}.safetensors", seed=seed)
        line = ["zoo", "add", "demo/mobilenetv3", "--weights", str(path), "--as", f"w{seed}"]
        assert run_dery(*line, "--json", cwd=tmp_path).code == 0
    zoo = read_zoo(Workspace(tmp_path / ".dery"))
    assert zoo.names() == ["w1", "w2"]
    assert zoo["w1"].weights_sha256 != zoo["w2"].weights_sha256
    (tmp_path / "1.safetensors").unlink()  # a copy is kept
    dissection = load_donor(zoo["w1"], Workspace(tmp_path / ".dery"))
    assert dissection.anatomy == zoo["w1"].anatomy


def test_another_number_of_classes_is_accepted_and_loads_again(tmp_path):
    path = weights(tmp_path / "w.safetensors", classes=3)
    outcome = run_dery(
        "zoo", "add", "demo/mobilenetv3", "--weights", str(path), "--json", cwd=tmp_path
    )
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["warnings"] == [
        "demo__mobilenetv3: the classifier of w.safetensors does not fit and is left out"
    ]
    space = Workspace(tmp_path / ".dery")
    load_donor(read_zoo(space)["demo__mobilenetv3"], space)


def test_two_donors_of_one_name(tmp_path):
    (tmp_path / "m.toml").write_text(
        '[[model]]\nspec = "demo/mobilenetv3"\nname = "x"\n[[model]]\nspec = "demo/resnet"\n'
    )
    line = ["zoo", "add", "demo/swin", "--as", "x", "-m", "m.toml", "--json"]
    outcome = run_dery(*line, cwd=tmp_path)
    assert outcome.code == 2
    message = outcome.json["error"]["message"]
    assert message == "two of the models would be named 'x': demo/swin and demo/mobilenetv3"
    assert not (tmp_path / ".dery" / "zoo.json").exists()


def test_a_taken_name_is_found_before_anything_is_built(tmp_path, monkeypatch):
    assert run_dery("zoo", "add", "demo/mobilenetv3", cwd=tmp_path).code == 0
    before = (tmp_path / ".dery" / "zoo.json").read_bytes()
    monkeypatch.setattr(zoo_module, "build_model", lambda *_, **__: pytest.fail("it was built"))
    (tmp_path / "m.toml").write_text(
        '[[model]]\nspec = "demo/resnet"\n'
        '[[model]]\nspec = "demo/swin"\nname = "demo__mobilenetv3"\n'
    )
    outcome = run_dery("zoo", "add", "-m", "m.toml", "--json", cwd=tmp_path)
    assert outcome.code == 2
    assert "has a donor named 'demo__mobilenetv3' already" in outcome.json["error"]["message"]
    assert (tmp_path / ".dery" / "zoo.json").read_bytes() == before


def test_the_manifest_overrides_licence_and_task(tmp_path):
    (tmp_path / "m.toml").write_text(
        '[[model]]\nspec = "demo/mobilenetv3"\nlicense = "CC0-1.0"\ntask = "hats"\nsource = "me"\n'
    )
    assert run_dery("zoo", "add", "-m", "m.toml", cwd=tmp_path).code == 0
    card = read_zoo(Workspace(tmp_path / ".dery"))["demo__mobilenetv3"].card
    assert (card.license, card.task, card.source) == ("CC0-1.0", "hats", "me")


def hashed(tmp_path, sha256, *, line=""):
    (tmp_path / "m.toml").write_text(
        f'[[model]]\nspec = "demo/mobilenetv3"\nsha256 = "{sha256}"\n{line}'
    )
    return run_dery("zoo", "add", "-m", "m.toml", "--json", cwd=tmp_path)


def test_the_hash_of_a_weights_file(tmp_path):
    path = weights(tmp_path / "w.safetensors")
    line = 'weights = "w.safetensors"\n'
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    outcome = hashed(tmp_path, "0" * 64, line=line)
    assert outcome.code == 1
    expected = f"w.safetensors: sha256 is {right[:12]}, the manifest says 000000000000"
    assert outcome.json["error"]["message"] == expected
    assert not (tmp_path / ".dery" / "zoo.json").exists()
    assert hashed(tmp_path, right, line=line).code == 0


def test_the_hash_of_a_plugins_own_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(type(dery_demo.zoo), "weights_sha256", lambda *_: "1" * 64, raising=False)
    outcome = hashed(tmp_path, "0" * 64)
    assert outcome.code == 1
    message = outcome.json["error"]["message"]
    assert message.startswith("the weights of demo/mobilenetv3: sha256 is 111111111111, the mani")
    assert hashed(tmp_path, "1" * 64).json["warnings"] == []
    monkeypatch.setattr(type(dery_demo.zoo), "weights_sha256", lambda *_: None)
    outcome = hashed(tmp_path, "0" * 64)
    assert outcome.code == 0
    assert outcome.json["warnings"] == [
        "the sha256 of the weights of demo/mobilenetv3 is not checked: its plugin does not tell it"
    ]


@pytest.fixture
def uncut(monkeypatch):
    """A dissection that finds no place to cut."""
    import dery_cli.core.dissection.dissect as module

    def refuse(model, example, *, nodes=None, whole=False):
        if not whole:
            raise DissectError("Knot has no place between its units where one tensor carries all")
        return dissect(model, example, whole=True)

    monkeypatch.setattr(module, "dissect", refuse)


def test_a_model_that_cannot_be_cut_is_a_whole_donor(tmp_path, uncut):
    outcome = run_dery("zoo", "add", "demo/mobilenetv3", "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["warnings"] == [
        "demo/mobilenetv3 serves as a whole model only: Knot has no place between its units where "
        "one tensor carries all"
    ]
    space = Workspace(tmp_path / ".dery")
    donor = read_zoo(space)["demo__mobilenetv3"]
    assert donor.anatomy.num_units == 1
    block = load_donor(donor, space).block(0, 1)
    model = dery_demo.zoo.build("mobilenetv3", pretrained=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.get_classifier()(block.eval()(x)), model(x), atol=1e-5)


def test_the_offline_switch_reaches_the_hub(tmp_path):
    outcome = run_dery("zoo", "add", "timm/resnet18.a1_in1k", "--offline", "--json", cwd=tmp_path)
    if outcome.code == 0:
        pytest.skip("the weights are in the local cache")
    assert outcome.code == 1
    message = outcome.json["error"]["message"]
    assert message.startswith("cannot get the weights of timm/resnet18.a1_in1k: ")
    assert "not in the local cache and HF_HUB_OFFLINE is set" in message
    assert "--weights FILE" in outcome.json["error"]["hint"]
    assert json.loads(outcome.stdout)["result"] is None


def test_specs_are_shown_as_they_are_written():
    assert str(Spec("timm", "resnet18.a1_in1k")) == "timm/resnet18.a1_in1k"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "../victim.pth"),
        ("weights", "weights/../../victim.pth"),
        ("weights", "ABSOLUTE"),
        ("name", "../victim"),
        ("name", "ABSOLUTE"),
        ("name", 7),
    ],
)
def test_a_crafted_zoo_never_reaches_out_of_its_workspace(tmp_path, field, value):
    assert run_dery("zoo", "add", "demo/mobilenetv3", cwd=tmp_path).code == 0
    victims = [tmp_path / "victim.pth", tmp_path / "victim.json", tmp_path / "victim.safetensors"]
    for victim in victims:
        victim.write_text("mine")
    space = Workspace(tmp_path / ".dery")
    value = str(victims[0].with_suffix("")) if value == "ABSOLUTE" else value
    edit(space.zoo, lambda body: body["data"]["donors"][0].update({field: value}), seal=True)
    for line in (["list"], ["remove", str(value)]):
        outcome = run_dery("zoo", *line, cwd=tmp_path)
        assert outcome.code == 1, outcome
        assert "zoo.json is damaged" in outcome.stderr
        assert "Traceback" not in outcome.stderr
    assert all(victim.read_text() == "mine" for victim in victims)


def test_a_zoo_that_cannot_be_read_is_begun_anew_by_the_command_that_is_named(tmp_path):
    add = ("zoo", "add", "demo/mobilenetv3")
    assert run_dery(*add, cwd=tmp_path).code == 0
    path = tmp_path / ".dery" / "zoo.json"
    before = path.read_bytes()
    for damage in (b"{", b"[" * 100_000, b"\xff", before.replace(b'"version": 1', b'"version": 9')):
        path.write_bytes(damage)
        outcome = run_dery("zoo", "list", "--json", cwd=tmp_path)
        assert outcome.code == 1
        assert str(path.name) in outcome.json["error"]["message"]
        assert "dery zoo add SPEC" in outcome.json["error"]["hint"]
        outcome = run_dery(*add, "--json", cwd=tmp_path)
        assert outcome.code == 0
        assert "the zoo is begun anew" in outcome.json["warnings"][0]
        assert path.read_bytes() == before


def test_a_zoo_that_was_committed_but_not_renamed_is_there(tmp_path):
    assert run_dery("zoo", "add", "demo/mobilenetv3", cwd=tmp_path).code == 0
    path = tmp_path / ".dery" / "zoo.json"
    path.rename(path.with_name("zoo.json.pending"))
    outcome = run_dery("zoo", "list", "--json", cwd=tmp_path)
    assert [donor["name"] for donor in outcome.json["result"]["donors"]] == ["demo__mobilenetv3"]
    assert not path.exists()
    assert run_dery("zoo", "add", "demo/mobilenetv3", cwd=tmp_path).code == 0
    assert path.exists()
    assert not path.with_name("zoo.json.pending").exists()
