"""Embedding and comparing: batches, processes, interruptions, metrics, what is computed again."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.similarity.metric import pairwise_metric
from dery_cli.data.splits import FolderSplit
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime import devices
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble import inputs
from dery_cli.stages.assemble.config import AssembleConfig
from dery_cli.stages.embed import passes, run
from tests.conftest import Outcome, make_images, run_dery
from tests.e2e.conftest import snapshot

REPOSITORY = Path(__file__).parents[2]
RESNEXT, VIT = "demo__resnext", "demo__vit_cls"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small donors with embeddings of 100 images; read only."""
    root = tmp_path_factory.mktemp("made") / "ws"
    for line in ("zoo add demo/resnext demo/vit_cls", "embed --data demo --samples 100 -b 32"):
        outcome = run_dery(*line.split(), "--workspace", str(root))
        assert outcome.code == 0, outcome.stderr
    return root


@pytest.fixture
def ws(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "ws"))


@pytest.fixture
def bare(ws: Path) -> Path:
    """Two donors without embeddings."""
    shutil.rmtree(ws / "embeddings")
    return ws


@pytest.fixture
def dery(tmp_path: Path) -> Callable[..., Outcome]:
    def call(line: str) -> Outcome:
        return run_dery(*line.split(), "--workspace", str(tmp_path / "ws"), "--json", cwd=tmp_path)

    return call


def record(root: Path, name: str) -> dict:
    return json.loads((root / f"{name}.json").read_text())


def litter(root: Path) -> list[str]:
    return [p.name for p in root.rglob("*") if p.name.endswith((".pending", ".part"))]


EMBED = "embed --data demo --samples 100 -b 32"


# the batch size


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    features = Dissection.features

    def limited(self, x):
        if len(x) > most:
            raise torch.OutOfMemoryError(f"out of memory with {len(x)}")
        return features(self, x)

    monkeypatch.setattr(Dissection, "features", limited)


def test_auto_falls_back_on_out_of_memory_and_keeps_to_what_it_found(bare, dery, monkeypatch):
    line = "embed --data demo --samples 100 --donor demo__vit_cls --batch-size"
    with monkeypatch.context() as patch:
        out_of_memory_above(patch, 16)
        outcome = dery(f"{line} auto")
    assert outcome.code == 0, outcome.stderr
    assert "out of memory, again with batches of 16" in outcome.stderr
    made = record(bare, f"embeddings/{VIT}")
    assert made["options"]["batch_size"] == "auto"
    assert made["data"]["batch_size"] == 16
    path = bare / f"embeddings/{VIT}.safetensors"
    found = path.read_bytes()
    # with memory for more, a rerun stays with 16, and so does one that has to repair the file
    assert dery(f"{line} auto").json["result"]["embedded"] == []
    path.write_bytes(found[:-1])
    assert dery(f"{line} auto").json["result"]["embedded"] == [VIT]
    assert record(bare, f"embeddings/{VIT}")["data"]["batch_size"] == 16
    assert path.read_bytes() == found
    # the fixed size of the same number gives the same file
    assert dery(f"{line} 16").json["result"]["embedded"] == [VIT]
    assert path.read_bytes() == found


def test_a_fixed_batch_size_that_does_not_fit(bare, dery, monkeypatch):
    out_of_memory_above(monkeypatch, 16)
    outcome = dery(EMBED)
    assert outcome.code == 1
    error = outcome.json["error"]
    assert error["message"] == "demo__resnext: out of memory on cpu with batches of 32"
    assert error["hint"] == "--batch-size auto, or a number below 32"
    assert snapshot(bare / "embeddings") == {}


@pytest.mark.parametrize(("free", "images"), [(1, 1), (100_000_000, 32), (10**12, 512)])
def test_auto_takes_the_power_of_two_that_half_the_free_memory_holds(monkeypatch, free, images):
    """A layer of 3 -> 64 channels at 100 x 100 holds 120 kB and 2.56 MB; twice that, at most."""

    class Layer:
        def features(self, x):
            yield x
            yield torch.nn.functional.conv2d(x, torch.zeros(64, 3, 1, 1))[:, :, :50]

    donor = SimpleNamespace(input=SimpleNamespace(in_chans=3, image_size=(100, 100)))
    monkeypatch.setattr(passes, "free_memory", lambda device: free)
    # 50e6 / (2 * (2.56 MB + 0.12 MB)) = 9.3
    expected = 8 if images == 32 else images
    assert passes.images_that_fit(Layer(), donor, torch.device("cpu")) == expected


def test_a_batch_size_that_is_neither(dery):
    outcome = dery("embed --data demo --batch-size many")
    assert outcome.code == 2
    assert outcome.json["error"]["message"] == "--batch-size is 'many'"


# several processes


SCRIPT = """
import os, sys
from dery_cli.cli import main
from dery_cli.core.dissection.dissect import Dissection

what, calls, features = sys.argv.pop(1), 0, Dissection.features

def broken(self, x):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 2:
        if what == "die":
            os._exit(7)
        for number, feature in enumerate(features(self, x)):
            yield feature * float("nan") if number == 2 else feature
    else:
        yield from features(self, x)

if what != "work":
    Dissection.features = broken
main()
"""


def launch(tmp_path: Path, what: str, line: str, port: int) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "program.py"
    program.write_text(SCRIPT)
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    words = [*line.split(), "--workspace", str(tmp_path / "ws"), "--json"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(program), what, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_two_processes_write_the_same_bytes_as_one(bare, made, tmp_path):
    """100 images in batches of 32: the last round has one batch of 4 for the second process."""
    done = launch(tmp_path, "work", EMBED, 29651)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["embedded"] == [
        RESNEXT,
        VIT,
    ]  # and one process printed
    assert record(bare, f"embeddings/{VIT}.log")["processes"] == 2
    assert snapshot(bare / "embeddings") == snapshot(made / "embeddings")
    assert not litter(bare)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "port", "message"),
    [("die", 29652, "another process of this run has ended"), ("nan", 29653, "node 2 (")],
)
def test_when_one_process_fails_all_end(bare, tmp_path, what, port, message):
    done = launch(tmp_path, what, EMBED, port)
    assert done.returncode == 1
    assert not litter(bare)
    assert not list((bare / "embeddings").glob("*.safetensors"))
    if done.stdout:  # the launcher may have ended the main process first
        said = json.loads(done.stdout)["error"]["message"]
        assert message in said or (what == "die" and said.startswith("terminated"))
    else:
        assert what == "die"


def test_a_launcher_that_starts_one_process_only_is_pointed_out(made, monkeypatch):
    """As ``accelerate launch --cpu --num_processes 2`` does without MPI."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    outcome = run_dery(*EMBED.split(), "--workspace", str(made), "--json")
    assert outcome.code == 0
    assert "torchrun --nproc-per-node N -m dery_cli" in outcome.json["warnings"][0]


# interruptions


@pytest.mark.slow
def test_a_killed_run_continues_with_the_donor_it_was_in(bare, made, dery, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from dery_cli.cli import main\n"
        "from dery_cli.io.row_stream import SafetensorsStream\n"
        "write = SafetensorsStream.write\n"
        "def killing(self, name, rows):\n"
        "    if 'vit_cls' in str(self.path) and name == '4.feat_NC' and self._rows[name]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(self, name, rows)\n"
        "SafetensorsStream.write = killing\n"
        "main()\n"
    )
    words = [*EMBED.split(), "--workspace", str(bare)]
    done = subprocess.run([sys.executable, "-c", script, *words], check=False, cwd=REPOSITORY)
    assert done.returncode == -9
    assert litter(bare) == [f"{VIT}.safetensors.pending"]
    outcome = dery(EMBED)
    assert outcome.code == 0
    assert outcome.json["result"]["embedded"] == [VIT]
    assert outcome.json["result"]["unchanged"] == [RESNEXT]
    assert snapshot(bare / "embeddings") == snapshot(made / "embeddings")
    assert not litter(bare)


def test_one_more_donor_embeds_one_donor(ws, dery):
    assert dery("zoo add demo/convnext").code == 0
    assert dery(EMBED).json["result"]["embedded"] == ["demo__convnext"]


@contextlib.contextmanager
def largest_file(nbytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_embedding(ws, dery):
    before = snapshot(ws)
    with largest_file(100_000):
        outcome = dery("embed --data demo --samples 200 --donor demo__vit_cls")
    assert outcome.code == 1
    error = outcome.json["error"]
    assert "the disk is full" in error["message"]
    dry = dery("embed --data demo --samples 200 --donor demo__vit_cls --dry-run")
    assert error["details"]["bytes_needed"] == dry.json["result"]["bytes"]
    assert f"{dry.json['result']['bytes']:,} bytes" in error["message"]
    assert snapshot(ws) == before
    assert not litter(ws)


def test_too_little_disk_is_seen_before_anything_is_written(bare, dery, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    outcome = dery(EMBED)
    assert outcome.code == 1
    assert "the disk has 1.00k" in outcome.json["error"]["message"]
    assert not (bare / "embeddings").exists()


def test_the_second_of_two_runs_waits_and_finds_the_work_done(bare, made, dery):
    held = threading.Event()

    def other() -> None:
        with FileLock(bare / ".lock"):
            held.set()
            time.sleep(1.5)
            shutil.copytree(made / "embeddings", bare / "embeddings")

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    outcome = dery(EMBED)
    thread.join()
    assert outcome.code == 0
    assert f"another dery works in {bare}; waiting for it to finish" in outcome.stderr
    assert "all 2 embeddings are up to date" in outcome.stderr
    assert outcome.json["result"]["embedded"] == []


def test_a_dry_run_prints_the_very_bytes(bare, made, dery):
    outcome = dery(f"{EMBED} --dry-run")
    sizes = {
        name: (made / f"embeddings/{name}.safetensors").stat().st_size for name in (RESNEXT, VIT)
    }
    assert outcome.json["result"]["bytes_per_donor"] == sizes
    assert outcome.json["result"]["bytes"] == sum(sizes.values())
    assert f"{RESNEXT}: " in outcome.stderr
    assert "bytes in all, in " in outcome.stderr
    assert not (bare / "embeddings").exists()


# nothing to do


PLAIN = """
import sys
from dery_cli.cli import run
code = run(sys.argv[1:])
heavy = sorted({"torch", "timm", "torchvision", "accelerate"} & set(sys.modules))
sys.exit(f"exit code {code}, imported {heavy}" if code or heavy else 0)
"""


def test_a_stage_with_nothing_to_do_imports_no_torch_and_says_the_same(ws, dery, tmp_path):
    for line in (EMBED, "sim", "partition -K 2"):
        first = dery(line)
        assert first.code == 0, first.stderr
        words = [*line.split(), "--workspace", str(ws), "--json"]
        again = subprocess.run(
            [sys.executable, "-c", PLAIN, *words],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert again.returncode == 0, again.stderr
        assert "up to date" in again.stderr
        assert json.loads(again.stdout)["result"] == first.json["result"]


# bad input


@pytest.fixture
def nan_in_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Dissection.features

    def broken(self, x):
        token_model = any(node.num_prefix_tokens for node in self.anatomy.nodes)
        for number, feature in enumerate(features(self, x)):
            yield feature * float("inf") if token_model and number == 3 else feature

    monkeypatch.setattr(Dissection, "features", broken)


def test_nan_is_refused_and_the_node_named(bare, dery, nan_in_vit):
    outcome = dery(EMBED)
    assert outcome.code == 1
    error = outcome.json["error"]
    assert error["message"].startswith("demo__vit_cls: node 3 (blocks.2) gives NaN or infinite")
    assert error["details"]["node"] == 3
    assert set(snapshot(bare / "embeddings")) == {f"{RESNEXT}.json", f"{RESNEXT}.safetensors"}


def test_skip_bad_leaves_a_donor_out_here_and_later(bare, dery, nan_in_vit, monkeypatch):
    outcome = dery(f"{EMBED} --skip-bad")
    assert outcome.code == 0
    assert outcome.json["result"]["skipped"] == [VIT]
    assert outcome.json["result"]["embedded"] == [RESNEXT]
    assert outcome.json["warnings"][0].startswith("demo__vit_cls is left out: node 3")
    monkeypatch.undo()
    # the verdict is kept: nothing is computed again, and without the option it is still refused
    again = dery(f"{EMBED} --skip-bad")
    assert again.json["result"]["skipped"] == [VIT]
    assert again.json["result"]["embedded"] == []
    refused = dery(EMBED)
    assert refused.code == 1
    assert "node 3 (blocks.2)" in refused.json["error"]["message"]
    compared = dery("sim")
    assert compared.code == 0
    assert compared.json["warnings"][0].startswith("demo__vit_cls is left out: node 3")
    assert compared.json["result"]["donors"] == 1
    assert {d for d, _ in record(bare, "similarity/cka")["data"]["index"]} == {RESNEXT}


def test_a_donor_that_turns_bad_loses_its_embedding(ws, dery, nan_in_vit):
    assert dery("embed --data demo --samples 90 --skip-bad").code == 0
    assert not (ws / f"embeddings/{VIT}.safetensors").exists()
    assert record(ws, f"embeddings/{VIT}")["data"]["bad"]["node"] == 3


def test_features_too_large_for_half_precision_keep_that_donor_alone_in_single(
    bare, dery, monkeypatch
):
    features = Dissection.features

    def large(self, x):
        token_model = any(node.num_prefix_tokens for node in self.anatomy.nodes)
        for number, feature in enumerate(features(self, x)):
            yield feature * 1e6 if token_model and number == 3 else feature

    monkeypatch.setattr(Dissection, "features", large)
    outcome = dery(EMBED)
    assert outcome.code == 0, outcome.stderr
    (warning,) = outcome.json["warnings"]
    assert warning.startswith("demo__vit_cls: node 3 (blocks.2) gives features up to ")
    assert warning.endswith("too large for float16; its features are kept in fp32")
    assert record(bare, f"embeddings/{VIT}")["data"]["dtype"] == "fp32"
    assert "dtype" not in record(bare, f"embeddings/{RESNEXT}")["data"]
    again = dery(EMBED)
    assert (again.json["result"]["embedded"], again.json["warnings"]) == ([], [])
    assert dery("sim").code == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_recorded_close_and_the_same_on_a_rerun(bare, made, dery, precision):
    line = f"embed --data demo --samples 40 -b 32 --dtype fp32 --donor {RESNEXT} --precision"
    path = bare / f"embeddings/{RESNEXT}.safetensors"
    assert dery(f"{line} fp32").code == 0
    exact = load_file(path)
    assert dery(f"{line} {precision}").code == 0
    found, first = record(bare, f"embeddings/{RESNEXT}"), snapshot(bare / "embeddings")
    assert found["options"]["precision"] == found["data"]["precision"] == precision
    half = load_file(path)
    assert torch.equal(half["0.feat_NC"], exact["0.feat_NC"])
    for name, tensor in exact.items():
        error = (half[name] - tensor).norm() / tensor.norm()
        assert error < 0.02, name
    last = max(int(name.split(".")[0]) for name in exact)
    assert not torch.equal(half[f"{last}.feat_NC"], exact[f"{last}.feat_NC"])
    path.unlink()
    assert dery(f"{line} {precision}").json["result"]["embedded"] == [RESNEXT]
    assert snapshot(bare / "embeddings") == first


def test_auto_is_single_precision(made):
    data = record(made, f"embeddings/{RESNEXT}")["data"]
    assert (data["precision"], data["layout"]) == ("fp32", data["layout"])
    log = record(made, f"embeddings/{RESNEXT}.log")
    assert (log["precision"], log["tf32"]) == ("fp32", False)


def test_a_donor_that_half_precision_cannot_compute_is_computed_in_single(bare, dery, monkeypatch):
    features = Dissection.features

    def overflowing(self, x):
        token_model = any(node.num_prefix_tokens for node in self.anatomy.nodes)
        for number, feature in enumerate(features(self, x)):
            half = torch.is_autocast_enabled("cpu") and token_model and number == 3
            yield feature * float("inf") if half else feature

    monkeypatch.setattr(Dissection, "features", overflowing)
    outcome = dery(f"{EMBED} --precision fp16")
    assert outcome.code == 0, outcome.stderr
    (warning,) = outcome.json["warnings"]
    assert warning.startswith("demo__vit_cls: node 3 (blocks.2) gives NaN or infinite features")
    assert warning.endswith("its features are computed in fp32")
    assert record(bare, f"embeddings/{VIT}")["data"]["precision"] == "fp32"
    assert record(bare, f"embeddings/{RESNEXT}")["data"]["precision"] == "fp16"


def test_a_model_that_looks_at_strides_is_computed_contiguous(bare, made, dery, monkeypatch):
    features = Dissection.features

    def flat(self, x):
        for feature in features(self, x):
            if feature.ndim == 4:
                feature.view(len(feature), -1)
            yield feature

    monkeypatch.setattr(Dissection, "features", flat)
    monkeypatch.setattr(devices, "channels_last_gains", lambda *_: True)
    assert dery(EMBED).code == 0
    assert record(bare, f"embeddings/{RESNEXT}")["data"]["layout"] == "contiguous"


def test_images_are_decoded_once_whatever_the_number_of_workers(bare, made, dery, monkeypatch):
    decoded = []
    image = FolderSplit.image

    def counted(self, index):
        decoded.append(index)
        return image(self, index)

    monkeypatch.setattr(FolderSplit, "image", counted)
    folder = make_images(bare / "pictures", ["cat", "dog"], 10)
    found = []
    for workers in (0, 3):
        decoded.clear()
        assert dery(f"embed --data {folder} --workers {workers}").code == 0
        assert len(decoded) == len(set(decoded)) == 16
        found.append(snapshot(bare / "embeddings"))
        shutil.rmtree(bare / "embeddings")
    assert found[0] == found[1]


def test_a_zoo_of_bad_donors_cannot_be_compared(bare, dery, nan_in_vit):
    assert dery(f"{EMBED} --skip-bad").code == 0
    assert dery("zoo remove demo__resnext").code == 0
    outcome = dery("sim")
    assert outcome.code == 4
    assert "no donor has usable features; demo__vit_cls: node 3" in outcome.json["error"]["message"]


@pytest.mark.parametrize("option", ["--grid 2", "--seed 3", "--dtype fp32", "--samples 90"])
def test_embeddings_that_differ_are_refused_with_the_command_that_fixes_it(ws, dery, option):
    assert dery(f"embed --data demo --samples 100 -b 32 {option} --donor {RESNEXT}").code == 0
    outcome = dery("sim")
    assert outcome.code == 4
    hint = outcome.json["error"]["hint"]
    assert (
        "were embedded from different images, options or seeds"
        in (outcome.json["error"]["message"])
    )
    assert option in hint
    assert hint.startswith("dery embed ")
    assert dery(hint.removeprefix("dery ")).code == 0
    assert dery("sim").code == 0


def test_one_image_is_too_few(bare, dery, tmp_path):
    make_images(tmp_path / "flat", ["."], 1)
    outcome = dery("embed --data ./flat")
    assert outcome.code == 2
    assert "have 1 training images" in outcome.json["error"]["message"]
    assert outcome.json["error"]["hint"] == "at least 8 are needed to compare features"


def test_fewer_samples_than_a_minibatch(bare, dery):
    assert dery("embed --data demo --samples 20").code == 0
    assert dery("sim").code == 0
    assert record(bare, "similarity/cka")["options"]["minibatch"] == 20
    outcome = dery("sim --minibatch 64")
    assert outcome.code == 2
    assert "20 samples are fewer than the minibatch of 64" in outcome.json["error"]["message"]


def test_a_broken_image_is_one_line_from_a_loading_process_too(bare, dery, tmp_path):
    folder = make_images(tmp_path / "two", ["cat", "dog"], 6)
    broken = folder / "dog" / "003.png"
    broken.write_bytes(broken.read_bytes()[:200])
    outcome = dery("embed --data ./two --workers 1")
    assert outcome.code == 1
    assert f"cannot read the image {broken}" in outcome.json["error"]["message"]
    assert "\n" not in outcome.json["error"]["message"]


# metrics


@pytest.mark.parametrize(
    ("line", "options", "seed", "directional"),
    [
        ("cka", {"minibatch": 100, "biased": False}, None, False),
        ("cka --minibatch 50 --biased", {"minibatch": 50, "biased": True}, None, False),
        (
            "rbf_cka --bandwidth 0.5",
            {"minibatch": 100, "biased": False, "bandwidth": 0.5},
            None,
            False,
        ),
        ("lr --projection 16 --seed 3", {"projection": 16}, 3, True),
        ("ridge --penalty 0.1 --folds 4", {"penalty": 0.1, "folds": 4}, None, True),
    ],
)
def test_every_metric_records_the_options_it_uses(ws, dery, line, options, seed, directional):
    outcome = dery(f"sim --metric {line}")
    assert outcome.code == 0, outcome.stderr
    name = line.split()[0]
    made = record(ws, f"similarity/{name}")
    assert made["options"] == {"metric": name, **options}
    assert made["seed"] == seed
    assert made["data"]["directional"] is directional
    sim_PP = load_file(ws / f"similarity/{name}.safetensors")["sim_PP"]
    assert bool(torch.isfinite(sim_PP).all())
    assert torch.equal(sim_PP, sim_PP.T) != directional
    assert "up to date" in dery(f"sim --metric {line}").stderr


def test_each_option_matters(ws, dery):
    """Another value, another matrix: none is dropped on its way to the metric."""

    def matrix(line: str) -> torch.Tensor:
        assert dery(f"sim --metric {line}").code == 0
        return load_file(ws / f"similarity/{line.split()[0]}.safetensors")["sim_PP"]

    for one, other in (
        ("cka", "cka --minibatch 50"),
        ("cka", "cka --biased"),
        ("rbf_cka", "rbf_cka --bandwidth 0.5"),
        ("lr --projection 16", "lr --projection 8"),
        ("lr --projection 16", "lr --projection 16 --seed 1"),
        ("ridge", "ridge --penalty 1"),
        ("ridge", "ridge --folds 2"),
    ):
        assert not torch.equal(matrix(one), matrix(other)), other


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("cka --penalty 1", "--penalty is no option of the metric cka", "it belongs to ridge"),
        ("lr --biased", "--biased is no option of the metric lr", "cka and rbf_cka"),
        ("ridge --folds 1", "1 folds are too few", "--folds 5"),
        ("cosine", "--metric is 'cosine'", "cka, lr, rbf_cka, ridge"),
    ],
)
def test_options_of_another_metric_are_refused(ws, dery, line, message, hint):
    outcome = dery(f"sim --metric {line}")
    assert outcome.code == 2
    assert message in outcome.json["error"]["message"]
    assert hint in outcome.json["error"]["hint"]


CALLS: list[tuple[int, int]] = []


def _counted(x_NC: torch.Tensor, y_NC: torch.Tensor) -> float:
    CALLS.append((x_NC.shape[1], y_NC.shape[1]))
    return float((x_NC.mean() * y_NC.mean()).tanh().abs())


COUNTED = pairwise_metric("counted", _counted, directional=False)
FAILING = pairwise_metric("failing", lambda x, y: 1 / 0, directional=False)
NO_METRIC = object()


@pytest.fixture
def own_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.entry_points

    def more(**select):
        own = [
            EntryPoint(name, f"tests.e2e.test_embed_sim:{variable}", "dery.metrics")
            for name, variable in (
                ("counted", "COUNTED"),
                ("failing", "FAILING"),
                ("bad", "NO_METRIC"),
            )
        ]
        return [*found(**select), *(own if select.get("group") == "dery.metrics" else [])]

    monkeypatch.setattr(importlib.metadata, "entry_points", more)


def test_an_own_metric_and_only_new_pairs_are_computed(ws, dery, own_metrics):
    from tests.e2e import test_embed_sim

    calls = test_embed_sim.CALLS  # the entry point's module, whatever pytest calls this one

    def nodes() -> int:
        return len(record(ws, "similarity/counted")["data"]["index"])

    calls.clear()
    assert dery("sim --metric counted").code == 0
    two = nodes()
    assert len(calls) == two * (two + 1) // 2
    before = load_file(ws / "similarity/counted.safetensors")["sim_PP"]
    options = record(ws, "similarity/counted")["options"]
    assert set(options) >= {"metric", "minibatch", "penalty"}

    assert dery("zoo add demo/convnext").code == 0
    assert dery(EMBED).code == 0
    calls.clear()
    assert dery("sim --metric counted").code == 0
    three = nodes()
    assert len(calls) == three * (three + 1) // 2 - two * (two + 1) // 2
    index = record(ws, "similarity/counted")["data"]["index"]
    old = [row for row, (donor, _) in enumerate(index) if donor != "demo__convnext"]
    after = load_file(ws / "similarity/counted.safetensors")["sim_PP"]
    assert torch.equal(after[old][:, old], before)

    assert dery("zoo remove demo__convnext").code == 0
    calls.clear()
    assert dery("sim --metric counted").code == 0
    assert calls == []
    assert torch.equal(load_file(ws / "similarity/counted.safetensors")["sim_PP"], before)


@pytest.mark.parametrize(
    ("name", "message"),
    [("failing", "plugin 'failing' fails at a similarity: ZeroDivisionError"), ("bad", "lacks")],
)
def test_a_broken_metric_is_named(ws, dery, own_metrics, name, message):
    outcome = dery(f"sim --metric {name}")
    assert outcome.code == 1
    assert message in outcome.json["error"]["message"]
    assert not (ws / f"similarity/{name}.json").exists()


@pytest.mark.parametrize("metric", ["cka", "ridge"])
def test_a_matrix_that_grew_is_the_matrix_made_at_once(ws, dery, metric):
    assert dery(f"sim --metric {metric}").code == 0
    assert dery("zoo add demo/convnext").code == 0
    assert dery(EMBED).code == 0
    assert dery(f"sim --metric {metric}").code == 0
    path = ws / f"similarity/{metric}.safetensors"
    assert record(ws, f"similarity/{metric}.log")["reused"]
    grown = load_file(path)["sim_PP"]
    shutil.rmtree(ws / "similarity")
    assert dery(f"sim --metric {metric}").code == 0
    torch.testing.assert_close(grown, load_file(path)["sim_PP"], rtol=0, atol=1e-5)


def test_sim_prints_the_most_and_least_similar_models(ws, dery):
    assert dery("zoo add demo/resnet").code == 0
    assert dery(EMBED).code == 0
    outcome = dery("sim")
    pairs = outcome.json["result"]["pairs"]
    assert [pair["similarity"] for pair in pairs] == sorted(
        (pair["similarity"] for pair in pairs), reverse=True
    )
    assert len(pairs) == 3
    assert "most and least similar models" in outcome.stderr
    # by hand: the mean over the nodes of one of their best match in the other, both ways
    sim_PP = load_file(ws / "similarity/cka.safetensors")["sim_PP"].clamp(0, 1)
    index = record(ws, "similarity/cka")["data"]["index"]
    one, other = pairs[0]["donors"]
    rows = [i for i, (donor, _) in enumerate(index) if donor == one]
    columns = [i for i, (donor, _) in enumerate(index) if donor == other]
    block = sim_PP[rows][:, columns]
    expected = (block.amax(1).mean() + block.amax(0).mean()) / 2
    assert pairs[0]["similarity"] == pytest.approx(float(expected))


def test_a_cpu_takes_fewer_large_images_unless_some_are_embedded(copied, monkeypatch, tmp_path):
    """The demo's images of 32 pixels count as large here."""
    monkeypatch.setattr(run, "LARGE", 32)
    monkeypatch.setattr(run, "FEW_SAMPLES", 24)
    there = copied("embed", "--data", "DATA", "--batch-size", "100", "--json")
    assert there.json["result"]["samples"] == 100
    assert there.json["result"]["embedded"] == []
    shutil.rmtree(tmp_path / "ws" / "embeddings")
    few = copied("embed", "--data", "DATA", "--batch-size", "100", "--json")
    assert few.json["result"]["samples"] == 24
    assert "24 images, since a CPU takes long for 32 pixels" in few.stderr
    again = copied("embed", "--data", "DATA", "--batch-size", "100", "--json")
    assert again.json["result"]["embedded"] == []
    told = copied("embed", "--data", "DATA", "--batch-size", "100", "-n", "30", "--json")
    assert told.json["result"]["samples"] == 30
    monkeypatch.setattr(run, "LARGE", 33)
    small = copied("embed", "--data", "DATA", "--batch-size", "100", "--dry-run", "--json")
    assert small.json["result"]["samples"] == 100


@pytest.mark.parametrize(("embedded", "taken"), [(4, 512), (700, 700), (9000, 2048)])
def test_the_target_has_as_many_images_as_were_embedded(pipeline, monkeypatch, embedded, taken):
    def read(*words):
        found = stored(*words)
        return dataclasses.replace(found, options={**found.options, "samples": embedded})

    stored = inputs.read_embeddings
    monkeypatch.setattr(inputs, "read_embeddings", read)
    found = inputs.read_inputs(Terminal(), Workspace(pipeline.root), AssembleConfig())
    assert found.record.options["target_samples"] == found.config.target_samples == taken
    asked = AssembleConfig(target_samples=40)
    found = inputs.read_inputs(Terminal(), Workspace(pipeline.root), asked)
    assert found.record.options["target_samples"] == 40
