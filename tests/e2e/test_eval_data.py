"""What eval and finetune say of test images that were held out of a folder which changed since."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import make_images, run_dery

STAGES = (
    "sim",
    "partition -K 2 --eps 0.5",
    "assemble --effort 1",
    "finetune --steps 2 --valid-fraction 0.2",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All stages on a folder without a test part; a run that chooses on some, one on all."""
    root = tmp_path_factory.mktemp("eval_data")
    make_images(root / "pets", ["ant", "bee"], 12)
    lines = ("zoo add demo/mobilenetv3 demo/resnext", f"embed --data {root / 'pets'}", *STAGES)
    lines += ("finetune --steps 2 --effort 0 --name all",)
    for line in lines:
        outcome = run_dery(*line.split(), "--workspace", str(root / "ws"))
        assert outcome.code == 0, outcome.stderr
    return root


@pytest.mark.parametrize("what", ["runs/default", "runs/all", "assemblies/default"])
def test_images_that_came_later(made, what):
    def warnings(*options):
        return run_dery("eval", what, *options, "-w", str(made / "ws"), "--json").json["warnings"]

    assert warnings() == []
    late = made / "pets" / "ant" / "late.png"
    shutil.copy(made / "pets" / "ant" / "000.png", late)
    try:
        (warning,) = warnings()
        assert "changed since the network was trained: it may have seen some of" in warning
        assert warnings("--split", "train") == []
        if what.startswith("assemblies"):
            line = (
                "finetune",
                "--steps",
                "1",
                "--effort",
                "0",
                "--name",
                "late",
                "-w",
                str(made / "ws"),
                "--json",
            )
            told = "changed since the network was assembled: it may have seen some"
            assert any(told in warning for warning in run_dery(*line).json["warnings"])
            line = (*line, "--scratch")
            assert not any(told in warning for warning in run_dery(*line).json["warnings"])
    finally:
        late.unlink()
