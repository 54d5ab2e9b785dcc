"""The plugins' door: whatever a plugin does wrong, it is named, and everything else goes on."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint

import pytest

from dery_cli.errors import DeryError, UsageError
from dery_cli.zoo import plugin as door
from dery_cli.zoo.plugin import BrokenPluginError, ZooPlugin, describe_plugins, find_plugin
from tests.conftest import run_dery

MODULE = """
from dery_cli.types import InputSpec, ModelCard

class Good:
    def list_models(self): return ["one", "two"]
    def card(self, model):
        if model not in ("one", "two"): raise KeyError(model)
        return ModelCard(input=InputSpec(image_size=(32, 32)))
    def build(self, model, *, pretrained, image_size=None):
        import dery_demo
        return dery_demo.zoo.build("mobilenetv3", pretrained=pretrained, image_size=image_size)

class BadList(Good):
    def list_models(self): raise RuntimeError("no list")
class WordList(Good):
    def list_models(self): return "one"
class BadCard(Good):
    def card(self, model): return {}["size"]
class NoCard(Good):
    def card(self, model): return {"size": 3}
class BadBuild(Good):
    def build(self, model, *, pretrained, image_size=None): return 1 / 0
class NoBuild(Good):
    def build(self, model, *, pretrained, image_size=None): return "network"
class Offline(Good):
    def build(self, model, *, pretrained, image_size=None): raise OSError("no route")
class Newer(Good):
    api_version = 99

class Empty: pass
good, bad_list, word_list, bad_card, no_card = Good(), BadList(), WordList(), BadCard(), NoCard()
bad_build, no_build, offline, newer, empty = BadBuild(), NoBuild(), Offline(), Newer(), Empty()
"""


@pytest.fixture
def register(monkeypatch, tmp_path):
    """Entry points of the group ``dery.zoo``: names and the objects of a module made here."""
    (tmp_path / "door_module.py").write_text(MODULE)
    (tmp_path / "door_raises.py").write_text("raise ImportError('half installed')\n")
    (tmp_path / "door_exits.py").write_text("raise SystemExit('bye')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "door_module", raising=False)

    def install(*points):
        made = [
            EntryPoint(name, value if ":" in value else f"door_module:{value}", door.ZOO_GROUP)
            for name, value in points
        ]
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda group: made if group == door.ZOO_GROUP else [],
        )

    return install


BROKEN = {
    "door_raises:zoo": "fails to load: ImportError: half installed (door_raises.py:1)",
    "door_exits:zoo": "fails to load: SystemExit: bye",
    "door_module:nothing": "fails to load: AttributeError",
    "door_nowhere:zoo": "fails to load: ModuleNotFoundError: No module named 'door_nowhere'",
    "door_module:empty": "lacks build, card, list_models",
    "door_module:Good": "is a class; register an instance of it",
    "door_module:newer": "is written for version 99 of dery's plugin interface, this is version 1",
}


@pytest.mark.parametrize(("value", "reason"), BROKEN.items(), ids=list(BROKEN))
def test_a_plugin_that_cannot_be_used_is_named_and_left_out(register, value, reason):
    register(("good", "good"), ("broken", value))
    infos = {info.name: info for info in describe_plugins()}
    assert infos["good"].error is None
    assert infos["good"].models == 2
    assert reason in infos["broken"].error
    assert f"plugin 'broken' ({value})" in infos["broken"].error
    assert find_plugin(door.ZOO_GROUP, "good", ZooPlugin).list_models() == ["one", "two"]
    with pytest.raises(BrokenPluginError) as caught:
        find_plugin(door.ZOO_GROUP, "broken", ZooPlugin)
    assert reason in caught.value.message
    assert caught.value.exit_code == 1
    assert caught.value.hint.startswith("update")


def test_two_plugins_of_one_name(register):
    register(("birds", "good"), ("birds", "newer"), ("other", "good"))
    infos = describe_plugins()
    assert [info.error is None for info in infos] == [False, False, True]
    with pytest.raises(DeryError) as caught:
        find_plugin(door.ZOO_GROUP, "birds", ZooPlugin)
    assert "two plugins of the group dery.zoo are named 'birds'" in caught.value.message
    assert caught.value.hint == "uninstall one of them"
    assert find_plugin(door.ZOO_GROUP, "other", ZooPlugin)


def test_one_plugin_seen_twice_is_one(register):
    register(("birds", "good"), ("birds", "good"))
    assert [info.error for info in describe_plugins()] == [None]


def test_an_unknown_plugin_lists_the_close_ones(register):
    register(("birds", "good"))
    with pytest.raises(UsageError) as caught:
        find_plugin(door.ZOO_GROUP, "bird", ZooPlugin)
    assert caught.value.hint == "did you mean birds?"


def test_metrics_and_proxies_are_in_the_list():
    found = {(info.group, info.name) for info in describe_plugins() if info.error is None}
    assert {("dery.metrics", "cka"), ("dery.proxies", "probe"), ("dery.data", "demo")} <= found


def test_a_broken_plugin_warns_in_the_list(register):
    register(("good", "good"), ("broken", "door_raises:zoo"), ("lists", "bad_list"))
    outcome = run_dery("zoo", "plugins", "--json")
    assert outcome.code == 0
    assert len(outcome.json["warnings"]) == 2
    states = {p["name"]: (p["models"], p["error"]) for p in outcome.json["result"]["plugins"]}
    assert states["good"] == (2, None)
    assert "the plugin 'lists' fails at list_models(): RuntimeError: no list" in states["lists"][1]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("bad_card", "the plugin 'broken' fails at card('one'): KeyError: 'size' (door_module"),
        ("no_card", "fails at card('one'): TypeError: expected a ModelCard, got dict"),
        ("bad_build", "fails at build('one'): ZeroDivisionError: division by zero (door_module"),
        ("no_build", "fails at build('one'): TypeError: expected an nn.Module, got str"),
        ("offline", "cannot get the weights of broken/one: no route"),
        ("door_raises:zoo", "fails to load: ImportError: half installed"),
    ],
)
def test_adding_goes_on_without_the_broken_one(register, tmp_path, value, reason):
    register(("good", "good"), ("broken", value))
    alone = run_dery("zoo", "add", "broken/one", "--json", cwd=tmp_path)
    assert alone.code == 1
    assert reason in alone.json["error"]["message"]
    assert "Traceback" not in alone.stderr
    assert not (tmp_path / ".dery" / "zoo.json").exists()
    both = run_dery("zoo", "add", "broken/one", "good/one", "--json", cwd=tmp_path)
    assert both.code == 1
    assert both.json["error"]["message"] == "1 of 2 models were not added: broken__one"
    assert both.json["error"]["details"]["added"] == ["good__one"]
    assert reason in both.json["warnings"][0]
    donors = run_dery("zoo", "list", "--json", cwd=tmp_path).json["result"]["donors"]
    assert [donor["name"] for donor in donors] == ["good__one"]


@pytest.mark.parametrize("value", ["bad_list", "word_list"])
def test_a_broken_list_is_a_clear_error(register, tmp_path, value):
    register(("broken", value))
    for line in ("zoo plugins --models broken", "zoo add broken/unknown", "zoo check --all broken"):
        outcome = run_dery(*line.split(), "--json", cwd=tmp_path)
        assert outcome.code == 1
        assert "the plugin 'broken' fails at list_models()" in outcome.json["error"]["message"]
    assert run_dery("zoo", "add", "broken/one", cwd=tmp_path).code == 0
