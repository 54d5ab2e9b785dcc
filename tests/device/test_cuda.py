"""Every stage on a CUDA device, set against the same stage on the CPU.

    pytest tests/device -m cuda

Tolerances, in single precision with TF32 off: features differ by at most 1e-3 of their norm (sums
in another order, through some dozens of layers), similarities by 1e-3, accuracies by the images
that are near a boundary. In half precision features differ by at most 3 %.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dery_cli.core.numerics import seeded
from tests.conftest import Outcome, run_dery
from tests.e2e.conftest import snapshot, write_images

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

ADD = "zoo add demo/resnext demo/vit_cls demo/convnext"
EMBED = "embed --samples 128 -b 32 --dtype fp32"
STAGES = (
    "sim",
    "sim --metric ridge",
    "partition -K 2 --eps 0.5 --metric cka",
    "assemble --max-params 400k --effort 1 --target-samples 100 --fit-samples 64",
    "finetune --steps 4",
    "eval",
)
CHANCE = 0.1


def run(root: Path, line: str, *more: str) -> Outcome:
    outcome = run_dery(*line.split(), *more, "--workspace", str(root), "--json")
    assert outcome.code == 0, outcome.stderr
    return outcome


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_images(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[str, Path]:
    """All stages on either device."""
    roots = {}
    for device in ("cpu", "cuda"):
        root = roots[device] = tmp_path_factory.mktemp(device) / "ws"
        run(root, ADD)
        run(root, EMBED, "--data", data, "--device", device)
        for line in STAGES:
            where = [] if line.startswith("partition") else ["--device", device]
            run(root, line, *where)
    return roots


def tensors(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / name)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], most: float):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert error <= most, f"{name}: {float(error):.2e}"


@pytest.mark.parametrize("donor", ["resnext", "vit_cls", "convnext"])
def test_features(chains, donor):
    name = f"embeddings/demo__{donor}.safetensors"
    assert_close(tensors(chains["cuda"], name), tensors(chains["cpu"], name), 1e-3)


@pytest.mark.parametrize("metric", ["cka", "ridge"])
def test_similarity(chains, metric):
    found, wanted = (
        tensors(chains[device], f"similarity/{metric}.safetensors")["sim_PP"]
        for device in ("cuda", "cpu")
    )
    assert float((found - wanted).abs().max()) <= 1e-3


def test_similarity_of_the_same_features(chains, tmp_path):
    """The stage alone: what differs between devices is then its own rounding."""
    root = Path(shutil.copytree(chains["cpu"], tmp_path / "ws"))
    shutil.rmtree(root / "similarity")
    run(root, "sim", "--device", "cuda")
    found, wanted = (
        tensors(where, "similarity/cka.safetensors")["sim_PP"] for where in (root, chains["cpu"])
    )
    assert float((found - wanted).abs().max()) <= 1e-5


def test_assemblies_and_runs_are_better_than_chance(chains):
    """Which network is chosen may turn on a near-tie; both have to work, and to fit the budget."""
    accuracy = {}
    for device, root in chains.items():
        record = json.loads((root / "assemblies/default/assembly.json").read_text())
        assert record["data"]["program"] is not None
        found = run(root, "eval", "--device", device).json["result"]
        accuracy[device] = found["top1"]
        assert found["top1"] > 2 * CHANCE
    assert abs(accuracy["cuda"] - accuracy["cpu"]) < 0.25


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(chains, tmp_path, data, precision):
    root = Path(shutil.copytree(chains["cuda"], tmp_path / "ws"))
    line = ("--data", data, "--device", "cuda", "--precision", precision)
    run(root, EMBED, *line)
    first = snapshot(root / "embeddings")
    record = json.loads((root / "embeddings/demo__resnext.json").read_text())
    assert (record["data"]["precision"], record["data"]["layout"]) == (precision, "channels_last")
    for donor in ("resnext", "vit_cls", "convnext"):
        name = f"embeddings/demo__{donor}.safetensors"
        assert_close(tensors(root, name), tensors(chains["cpu"], name), 0.03)
    shutil.rmtree(root / "embeddings")
    run(root, EMBED, *line)
    assert snapshot(root / "embeddings") == first


def test_a_rerun_gives_the_same_bytes(chains, tmp_path, data):
    root = Path(shutil.copytree(chains["cuda"], tmp_path / "ws"))
    shutil.rmtree(root / "embeddings")
    run(root, EMBED, "--data", data, "--device", "cuda")
    assert snapshot(root / "embeddings") == snapshot(chains["cuda"] / "embeddings")


def test_the_generators_of_the_device_are_left_alone():
    before = torch.cuda.get_rng_state()
    with seeded(1):
        torch.rand(2)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_products_are_exact():
    log = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    run_dery("zoo", "plugins")
    from dery_cli.runtime.devices import pick_device

    here = log.to(pick_device("cuda"))
    error = (here @ here).cpu() - log @ log
    assert float(error.abs().max()) < 1e-3  # TF32 is off by about 0.05
