"""Bad input: a clear error, the right exit code, nothing changed on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import make_images
from tests.e2e.conftest import edit_json, snapshot


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("zoo add resnet", "'resnet' is not a model spec", "PLUGIN/NAME"),
        ("zoo add tim/resnet18", "no such zoo plugin: tim", "did you mean timm"),
        ("zoo add demo/resnetx", "the plugin 'demo' has no model 'resnetx'", "demo/resnet"),
        ("zoo add timm/resnet_18", "the plugin 'timm' has no model 'resnet_18'", "timm/resnet18"),
        ("zoo add demo/resnet --as No/Good", "bad donor name: 'No/Good'", "lower-case"),
        ("zoo add --manifest nosuch", "no such manifest: nosuch", "demo"),
        ("zoo add demo/resnet --weights nosuch.pt", "no such weights file: nosuch.pt", None),
        ("zoo add", "nothing to add", "dery zoo add SPEC"),
        ("assemble --max-params 30Q", "--max-params: '30Q' is not a size", "30M, 5G, 800k"),
        ("assemble --max-params 0", "--max-params: '0' is not a positive", None),
        ("assemble --max-params -5", "--max-params: '-5' is not a size", None),
        (
            "assemble --max-params 1M --min-params 2M",
            "--min-params 2.00M is above --max-params 1.00M",
            None,
        ),
        ("assemble --proxy magic", "--proxy is 'magic'", "naswot, params, probe, snip"),
        ("assemble --preset fast", "--preset is 'fast'", "paper"),
        ("assemble --stem fresh", "--stem is 'fresh'", "donor, paper"),
        ("assemble --draw random", "draws candidates of the paper's space", "--space paper"),
        (
            "assemble --stem paper --max-latency 8ms",
            "--max-latency does not know the fresh stem",
            "leave out",
        ),
        ("assemble --proxy-batch-size 1", "--proxy-batch-size is 1", None),
        ("assemble --proxy-batches 0", "--proxy-batches is 0", None),
        ("sim --metric cosine", "--metric is 'cosine'", "cka"),
        ("sim --memory much", "--memory: 'much' is not a size", None),
        ("partition -K 0", "-K is 0; it must be at least 1 and at most 8", None),
        ("partition -K 99", "-K is 99; it must be at least 1 and at most 8", None),
        ("partition --size weight", "--size is 'weight'", "nodes, macs, params"),
        ("partition --eps -1", "--eps is -1", None),
        ("embed", "--data is missing", "dery embed --data demo"),
        ("embed --data demo --samples 2", "--samples is 2; it must be at least 4", None),
        ("embed --data demo --dtype int8", "--dtype is 'int8'", "fp16, fp32"),
        ("embed --data demo --crop 2", "--crop is 2.0", None),
        ("finetune --mode half", "mode is 'half'", "frozen, full"),
        ("finetune --batch-norm none", "batch_norm is 'none'", "train, fixed"),
        ("finetune --recipe papr", "no recipe is called 'papr'", "paper"),
        ("finetune --epochs 2 --steps 3", "give either epochs or steps", None),
        ("finetune --valid-fraction 1.5", "--valid-fraction is 1.5", None),
        ("finetune --distill-logits 0.5", "need a teacher", "--teacher best"),
        ("finetune --teacher best --distill-logits 0", "teaches nothing", "above 0"),
        ("finetune --teacher runs/default", "cannot be its own teacher", "--name"),
        ("finetune --donor resnet", "--donor needs --data", "--data SPEC"),
        ("finetune --crop-scale 0.9 0.1", "crop_scale is 0.9 0.1; it must be two rising", None),
        ("finetune --grad-accum 0", "grad_accum is 0; it must be at least 1", None),
        ("finetune --layer-decay 0", "layer_decay is 0.0; it must be above 0", None),
        ("finetune --clip-grad -1", "clip_grad is -1.0; it must be at least 0", None),
        ("assemble --effort nan", "--effort is nan; it must be a number", None),
        ("assemble --joint-weight 1", "--joint-weight is gone", "--effort"),
        ("assemble --finalists 3", "--finalists is gone", "--effort"),
        ("assemble --max-params 1M,2M --max-flops 1G,2G,3G", "the budgets differ in number", None),
        ("assemble --max-params 1M,1M", "the budget 1m is listed twice", None),
        ("assemble --space mine", "--space is 'mine'", "free, paper"),
        ("assemble --space paper --start a", "--start is of the free space", "--space paper"),
        ("assemble --blocks a --end a[1:2]", "--blocks is a whole network", "--end"),
        ("assemble --max-seconds inf", "--max-seconds is inf; it must be a number", None),
        ("assemble --seed -1", "--seed is -1; it must be at least 0", None),
        ("assemble --candidates 9", "--candidates is gone", "--effort"),
        ("partition --eps nan", "--eps is nan; it must be a number", None),
        ("partition --eps 1e300", "--eps is 1e+300; it must be at least 0 and at most", None),
        ("partition --seed -1", "--seed is -1; it must be at least 0", None),
        ("embed --data demo --crop nan", "--crop is nan; it must be a number", None),
        ("embed --data demo --seed -1", "--seed is -1; it must be at least 0", None),
        ("finetune --seed -1", "seed is -1; it must be at least 0", None),
        ("finetune --lr inf", "lr is inf; it must be a number", None),
        ("finetune --steps 99999999999", "steps is 99999999999; it must be", None),
        ("finetune --valid-fraction nan", "--valid-fraction is nan; it must be", None),
        ("eval --split valid", "--split is 'valid'", "test, train"),
        ("eval --workers -1", "Invalid value for '--workers': ", None),
        ("assemble --workers -1", "Invalid value for '--workers': ", None),
        ("frobnicate", "No such command 'frobnicate'", None),
        ("embed --frobnicate", "No such option", None),
    ],
)
def test_usage_errors_exit_2_and_touch_nothing(dery, tmp_path, line, message, hint):
    outcome = dery(*line.split(), "--json")
    assert outcome.code == 2, outcome.stderr
    error = outcome.json["error"]
    assert message in error["message"]
    if hint is not None:
        assert hint in error["hint"]
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / ".dery" / "zoo.json").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("embed --data demo", "the zoo in .dery is empty"),
        ("sim", "the zoo in .dery is empty"),
        ("partition", "the zoo in .dery is empty"),
        ("assemble", "the zoo in .dery is empty"),
        ("finetune", "no assembly in .dery/assemblies/default"),
        ("eval", "no run or assembly 'default'"),
    ],
)
def test_an_empty_workspace_exits_4(dery, line, message):
    outcome = dery(*line.split(), "--json")
    assert outcome.code == 4
    assert message in outcome.json["error"]["message"]
    assert outcome.json["error"]["hint"]


@pytest.fixture
def zoo(dery):
    """A workspace with one donor that is built in a moment."""
    assert dery("zoo", "add", "demo/mobilenetv3").code == 0
    return dery


@pytest.mark.parametrize("stage", ["sim", "partition", "assemble"])
def test_a_stage_before_its_predecessor_exits_4(zoo, stage):
    outcome = zoo(stage, "--json")
    assert outcome.code == 4
    assert "has no embedding" in outcome.json["error"]["message"]
    assert outcome.json["error"]["hint"] == "dery embed --data SPEC"


def test_unknown_data(zoo):
    outcome = zoo("embed", "--data", "dem", "--json")
    assert outcome.code == 2
    assert outcome.json["error"]["message"] == "no such data set or folder: dem"
    assert "demo" in outcome.json["error"]["hint"]
    outcome = zoo("embed", "--data", "no/such/folder", "--json")
    assert outcome.code == 2
    assert "no such data folder" in outcome.json["error"]["message"]
    outcome = zoo("embed", "--data", "hf:no/such", "--json")
    assert outcome.code == 1
    assert "hf:no/such is no folder, and not in " in outcome.json["error"]["message"]
    assert outcome.json["error"]["hint"] == "--data 'hf:no/such?download=1' fetches it"


def test_an_image_folder_without_images(zoo, tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    outcome = zoo("embed", "--data", "./empty", "--json")
    assert outcome.code == 2
    assert "no images in" in outcome.json["error"]["message"]


def test_an_image_folder_of_one_class(zoo, tmp_path):
    make_images(tmp_path / "one", ["cat"], 9)
    outcome = zoo("embed", "--data", "./one", "--json")
    assert outcome.code == 2
    assert "only one class folder with images" in outcome.json["error"]["message"]


def test_a_broken_image_is_named(zoo, tmp_path):
    make_images(tmp_path / "two", ["cat", "dog"], 8)
    broken = tmp_path / "two" / "dog" / "003.png"
    broken.write_bytes(broken.read_bytes()[:200])
    outcome = zoo("embed", "--data", "./two", "--json")
    assert outcome.code == 1
    assert "003.png" in outcome.json["error"]["message"]
    assert not list((tmp_path / ".dery" / "embeddings").glob("*"))


def test_a_truncated_safetensors_file(dery, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    outcome = dery("zoo", "add", "demo/mobilenetv3", "--weights", str(path), "--json")
    assert outcome.code == 1
    assert "is not a whole safetensors file" in outcome.json["error"]["message"]
    assert not (tmp_path / ".dery" / "zoo.json").exists()


def test_weights_of_another_architecture_name_the_keys(dery, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"conv1.0.weight": torch.zeros(3, 3), "zzz": torch.zeros(2)}, path)
    outcome = dery("zoo", "add", "demo/resnet", "--weights", str(path), "--json")
    assert outcome.code == 2
    message = outcome.json["error"]["message"]
    assert "does not match the architecture" in message
    assert "unexpected (zzz)" in message
    assert "conv1.0.weight (3, 3) for" in message
    assert "layer1.0.conv1.weight" in outcome.json["error"]["details"]["missing"]


def test_a_pickle_that_would_run_code_is_not_run(dery, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pth"
    torch.save({"state_dict": Evil()}, path)
    outcome = dery("zoo", "add", "demo/resnet", "--weights", str(path), "--json")
    assert outcome.code == 1
    assert "weights_only=True" in outcome.json["error"]["message"]
    assert not (tmp_path / "ran").exists()


def test_weights_with_nan_are_refused(dery, tmp_path):
    import dery_demo

    state = dery_demo.zoo.build("mobilenetv3", pretrained=False).state_dict()
    name = next(n for n, v in state.items() if v.ndim == 4)
    state[name][0] = float("nan")
    path = tmp_path / "nan.safetensors"
    save_file(state, path)
    outcome = dery("zoo", "add", "demo/mobilenetv3", "--weights", str(path), "--json")
    assert outcome.code == 1
    assert f"the tensor {name} holds NaN or infinity" in outcome.json["error"]["message"]


def test_a_name_that_is_taken(zoo):
    outcome = zoo("zoo", "add", "demo/resnet", "--as", "demo__mobilenetv3", "--json")
    assert outcome.code == 2
    assert "has a donor named 'demo__mobilenetv3' already" in outcome.json["error"]["message"]
    assert zoo("zoo", "list", "--json").json["result"]["donors"][0]["spec"] == "demo/mobilenetv3"


def test_k_larger_than_a_models_units(copied):
    before = copied("zoo", "list", "--json").json
    outcome = copied("partition", "-K", "8", "--eps", "5", "--json")
    units = {d["name"]: len(d["anatomy"]["nodes"]) - 1 for d in before["result"]["donors"]}
    smallest = min(units.values())
    if smallest >= 8:
        pytest.skip("every donor has eight units")
    assert outcome.code == 2
    assert "-K 8 is too large" in outcome.json["error"]["message"]


def test_nothing_fits_exits_3_and_says_by_how_much(copied, tmp_path):
    before = snapshot(tmp_path / "ws")
    outcome = copied("assemble", "--max-params", "100", "--json")
    assert outcome.code == 3
    error = outcome.json["error"]
    assert "params" in error["message"]
    assert error["details"]
    assert snapshot(tmp_path / "ws") == before


def test_a_new_donor_makes_later_stages_stale(copied):
    assert copied("zoo", "add", "demo/resnet").code == 0
    outcome = copied("sim", "--json")
    assert outcome.code == 4
    assert "demo__resnet has no embedding" in outcome.json["error"]["message"]
    assert copied("embed", "--data", "DATA").code == 0
    outcome = copied("partition", "--json")
    assert outcome.code == 4
    assert "demo__resnet" in outcome.json["error"]["message"]
    assert outcome.json["error"]["hint"] == "dery sim --metric cka"


def test_another_embedding_makes_the_matrix_stale(copied):
    assert copied("embed", "--data", "DATA", "--samples", "60").code == 0
    outcome = copied("assemble", "--space", "paper", "--json")
    assert outcome.code == 4
    assert "the similarity is of other embeddings" in outcome.json["error"]["message"]


def test_embeddings_from_different_images_are_refused(copied, pipeline):
    line = ["embed", "--data", "DATA", "--samples", "60", "--donor", "demo__swin"]
    assert copied(*line).code == 0
    outcome = copied("sim", "--json")
    assert outcome.code == 4
    assert "were embedded from different images" in outcome.json["error"]["message"]
    assert outcome.json["error"]["hint"].startswith(f"dery embed --data {pipeline.data}")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("embeddings/demo__swin.safetensors", "sim"),
        ("similarity/cka.safetensors", "partition"),
        ("assemblies/default/model.safetensors", "eval assemblies/default"),
        ("runs/default/model.safetensors", "eval"),
    ],
)
def test_a_damaged_file_is_named_with_its_hash(copied, tmp_path, file, line):
    path = tmp_path / "ws" / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 0xFF
    path.write_bytes(data)
    outcome = copied(*line.split(), "--json")
    assert outcome.code == 1
    message = outcome.json["error"]["message"]
    assert path.name in message
    assert "sha256" in message
    path.write_bytes(data[:-50])
    assert copied(*line.split(), "--json").code == 1
    path.unlink()
    outcome = copied(*line.split(), "--json")
    assert outcome.code == 1
    assert "is missing" in outcome.json["error"]["message"]


def test_an_edited_record_is_noticed(copied, tmp_path):
    path = tmp_path / "ws" / "partition.json"
    edit_json(path, lambda record: record["data"]["donors"][0].update(cuts=[0, 1, 2, 3]))
    outcome = copied("assemble", "--json")
    assert outcome.code == 1
    assert "was altered: its sha256 is" in outcome.json["error"]["message"]


def test_a_record_of_a_newer_dery(copied, tmp_path):
    path = tmp_path / "ws" / "partition.json"
    edit_json(path, lambda record: record.update(version=99))
    outcome = copied("assemble", "--json")
    assert outcome.code == 1
    assert "written by a newer dery (format 99" in outcome.json["error"]["message"]


def test_a_record_that_is_no_json(copied, tmp_path):
    (tmp_path / "ws" / "zoo.json").write_text("{ not json")
    outcome = copied("zoo", "list", "--json")
    assert outcome.code == 1
    assert "is damaged" in outcome.json["error"]["message"]


def test_other_classes_than_the_network(copied, tmp_path):
    make_images(tmp_path / "pets", ["cat", "dog"], 10)
    outcome = copied("eval", "--data", "./pets", "--json")
    assert outcome.code == 2
    assert "has other classes than the network" in outcome.json["error"]["message"]
    outcome = copied("finetune", "--data", "./pets", "--name", "pets", "--json")
    assert outcome.code == 2


def test_images_without_labels_are_not_evaluated(copied, tmp_path):
    make_images(tmp_path / "pets", ["."], 10)
    for split in ("test", "train"):
        outcome = copied("eval", "--data", "./pets", "--split", split, "--json")
        assert outcome.code == 2
        assert outcome.json["error"]["message"] == f"{tmp_path / 'pets'} has no labels"


def test_calibration_images_that_changed(copied, tmp_path):
    folder = make_images(tmp_path / "two", ["cat", "dog"], 20)
    for line in ("embed --data ./two", "sim", "partition -K 3 --eps 0.5"):
        assert copied(*line.split()).code == 0
    (folder / "cat" / "000.png").write_bytes((folder / "cat" / "001.png").read_bytes())
    outcome = copied("assemble", "--json")
    assert outcome.code == 4
    assert "changed since dery embed" in outcome.json["error"]["message"]


def test_an_unknown_device(zoo):
    outcome = zoo("embed", "--data", "demo", "--device", "cuda:7", "--json")
    assert outcome.code == 2
    assert "--device cuda:7 cannot be used" in outcome.json["error"]["message"]
