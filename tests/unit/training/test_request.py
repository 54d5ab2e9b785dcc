"""What is asked of a run, checked before anything heavy is imported."""

from __future__ import annotations

import importlib.util

import pytest

from dery_cli.errors import UsageError
from dery_cli.training.request import FinetuneRequest, check_distillation


def test_a_run_is_called_as_said_or_as_what_it_starts_from():
    assert FinetuneRequest().run_name == "default"
    assert FinetuneRequest(assembly="small").run_name == "small"
    assert FinetuneRequest(donor="resnet", data="demo").run_name == "resnet"
    assert FinetuneRequest(donor="resnet", data="demo", name="mine").run_name == "mine"


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"valid_fraction": 1.0}, "--valid-fraction is 1.0; it must be at least 0 and below 1"),
        ({"valid_fraction": -0.1}, "--valid-fraction is -0.1"),
        ({"donor": "a", "data": "demo", "scratch": True}, "exclude each other"),
        ({"donor": "a"}, "--donor needs --data"),
        ({"name": "No/Good"}, "bad run name: 'No/Good'"),
        ({"name": "x", "teacher": "runs/x"}, "the run 'x' cannot be its own teacher"),
        ({"teacher": "runs/default"}, "the run 'default' cannot be its own teacher"),
    ],
)
def test_what_does_not_go_together_is_refused(asked, text):
    with pytest.raises(UsageError) as error:
        FinetuneRequest(**asked)
    assert text in error.value.message


def test_an_assembly_may_teach_the_run_of_its_name():
    assert FinetuneRequest(teacher="assemblies/default").teacher == "assemblies/default"


def test_curves_without_their_package_name_the_command_that_installs_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    assert not FinetuneRequest().tensorboard
    with pytest.raises(UsageError) as error:
        FinetuneRequest(tensorboard=True)
    assert error.value.message == "--tensorboard needs the package tensorboard"
    assert error.value.hint == "pip install 'dery-cli[tensorboard]'"


def test_distillation_and_a_teacher_need_each_other():
    check_distillation(None, 0.5, 0.0, given=False)
    check_distillation("best", 0.0, 1.0, given=True)
    with pytest.raises(UsageError, match="--distill-temperature need a teacher"):
        check_distillation(None, 0.5, 0.0, given=True)
    with pytest.raises(UsageError, match="teaches nothing"):
        check_distillation("best", 0.0, 0.0, given=True)
