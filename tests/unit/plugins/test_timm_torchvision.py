from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dery_cli.data.sets import open_data
from dery_cli.data.splits import read_image
from dery_cli.errors import DeryError
from dery_cli.zoo.plugin import DataPlugin, ZooPlugin
from dery_timm import zoo as timm_zoo
from dery_torchvision import data
from dery_torchvision import zoo as vision_zoo
from dery_torchvision.datasets import unpickle


def test_importing_the_plugins_imports_no_framework() -> None:
    code = (
        "import sys, dery_timm, dery_torchvision;"
        "print([m for m in ('torch', 'timm', 'torchvision', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_they_satisfy_the_protocols() -> None:
    assert isinstance(timm_zoo, ZooPlugin)
    assert isinstance(vision_zoo, ZooPlugin)
    assert isinstance(data, DataPlugin)


def test_lists() -> None:
    names = timm_zoo.list_models()
    assert {"resnet18", "resnet18.a1_in1k", "vit_base_patch16_224.augreg_in21k"} <= set(names)
    names = vision_zoo.list_models()
    assert {"resnet50", "resnet50.IMAGENET1K_V2", "vit_b_16"} <= set(names)
    assert not any("fcn" in name or "raft" in name for name in names)


@pytest.mark.parametrize(
    ("model", "license_", "task"),
    [
        ("resnet18.a1_in1k", "Apache-2.0", "ImageNet-1k classification"),
        (
            "convnextv2_tiny.fcmae_ft_in22k_in1k",
            "CC-BY-NC-4.0",
            "masked autoencoding (FCMAE), fine-tuned on ImageNet-22k, then ImageNet-1k "
            "classification",
        ),
        (
            "vit_base_patch16_224.augreg_in21k_ft_in1k",
            "Apache-2.0",
            "ImageNet-21k classification, fine-tuned on ImageNet-1k classification",
        ),
        ("vit_base_patch16_224.dino", "Apache-2.0", "self-supervised (DINO)"),
        ("vit_small_patch16_224.augreg_in21k", "Apache-2.0", "ImageNet-21k classification"),
    ],
)
def test_timm_cards(model: str, license_: str, task: str) -> None:
    card = timm_zoo.card(model)
    assert (card.license, card.task) == (license_, task)
    assert card.source.startswith(f"hf-hub:timm/{model}")


def test_timm_card_input() -> None:
    card = timm_zoo.card("vit_base_patch16_clip_224.openai")
    assert card.input.image_size == (224, 224)
    assert card.input.mean == (0.48145466, 0.4578275, 0.40821073)
    assert timm_zoo.card("test_vit").input.image_size == (160, 160)


def test_torchvision_cards() -> None:
    card = vision_zoo.card("resnet50.IMAGENET1K_V2")
    assert card.input.image_size == (224, 224)
    assert card.input.interpolation == "bilinear"
    assert card.license == "BSD-3-Clause"
    assert card.metrics["top1"] == pytest.approx(0.80858)
    assert card == vision_zoo.card("resnet50")
    swag = vision_zoo.card("vit_b_16.IMAGENET1K_SWAG_E2E_V1")
    assert swag.license == "CC-BY-NC-4.0"
    assert swag.input.image_size == (384, 384)
    assert "SWAG" in swag.task


@pytest.mark.parametrize("zoo", [timm_zoo, vision_zoo])
@pytest.mark.parametrize("model", ["no_such_model", "resnet18.no_such_weights"])
def test_unknown_models(zoo: ZooPlugin, model: str) -> None:
    with pytest.raises(KeyError):
        zoo.card(model)
    with pytest.raises(KeyError):
        zoo.build(model, pretrained=False)


@pytest.mark.parametrize(
    ("zoo", "model"),
    [(timm_zoo, "test_vit"), (vision_zoo, "regnet_y_400mf"), (vision_zoo, "googlenet")],
)
def test_unweighted_builds_work_on_meta(zoo: ZooPlugin, model: str) -> None:
    with torch.device("meta"):
        built = zoo.build(model, pretrained=False)
    assert not built.training
    assert {p.device.type for p in built.parameters()} == {"meta"}


def test_image_sizes() -> None:
    with torch.device("meta"):
        built = timm_zoo.build("vit_tiny_patch16_224", pretrained=False, image_size=(96, 160))
        assert built.patch_embed.grid_size == (6, 10)
        built = vision_zoo.build("vit_b_16", pretrained=False, image_size=(64, 64))
        assert built.image_size == 64
        timm_zoo.build("resnet18", pretrained=False, image_size=(32, 48))
        built = vision_zoo.build("vit_b_16.IMAGENET1K_SWAG_E2E_V1", pretrained=False)
        assert built.image_size == 384


@pytest.mark.parametrize(
    ("zoo", "model", "size", "why"),
    [
        (timm_zoo, "vit_tiny_patch16_224", (225, 225), "multiple of the patch size 16"),
        (timm_zoo, "maxvit_tiny_tf_224", (230, 230), "windows of 7"),
        (timm_zoo, "vgg11", (16, 16), "too small"),
        (vision_zoo, "vit_b_16", (230, 230), "patch size"),
        (vision_zoo, "vit_b_16", (64, 96), "square images only"),
        (vision_zoo, "maxvit_t", (256, 256), "partition size 7"),
    ],
)
def test_sizes_an_architecture_refuses(zoo, model, size, why) -> None:
    with pytest.raises(ValueError, match=rf"{model} does not take|{model} takes") as caught:
        zoo.build(model, pretrained=False, image_size=size)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("zoo", "model"), [(timm_zoo, "resnet18.a1_in1k"), (vision_zoo, "resnet18")]
)
def test_offline(zoo: ZooPlugin, model: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=f"{model} are not in the local cache") as caught:
        zoo.build(model, pretrained=True)
    assert "\n" not in str(caught.value)


def test_torchvision_weights_are_loaded_without_code(monkeypatch, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    from torchvision.models import ResNet18_Weights

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    file = folder / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save({"fc.weight": Evil()}, file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match="resnet18 are refused: they hold more than tensors"):
        vision_zoo.build("resnet18", pretrained=True)
    assert not (tmp_path / "ran").exists()


def test_torchvision_weights_from_the_cache(monkeypatch, tmp_path: Path) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    source = vision_zoo.build("squeezenet1_1", pretrained=False)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    file = folder / SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(source.state_dict(), file)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    built = vision_zoo.build("squeezenet1_1", pretrained=True)
    state = source.state_dict()
    assert all(torch.equal(state[key], value) for key, value in built.state_dict().items())


def test_position_embeddings_are_resampled(monkeypatch, tmp_path: Path) -> None:
    from torchvision.models import ViT_B_32_Weights

    source = vision_zoo.build("vit_b_32", pretrained=False)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    name = ViT_B_32_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(source.state_dict(), folder / name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    built = vision_zoo.build("vit_b_32", pretrained=True, image_size=(96, 96))
    assert built.encoder.pos_embedding.shape == (1, 10, 768)
    assert torch.equal(built.heads.head.weight, source.heads.head.weight)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", 3), ("t10k", 2)):
        images = np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        labels = gzip.compress(idx(np.arange(count, dtype=np.uint8) + 4))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(labels)
    return tmp_path


def test_idx_files(fashion: Path) -> None:
    spec = f"FashionMNIST?root={fashion}"
    train, test = data.split(spec, "train"), data.split(spec, "test")
    assert (len(train), train.labels) == (3, [4, 5, 6])
    assert (len(test), test.labels) == (2, [4, 5])
    assert np.asarray(train.image(1)).tolist() == [[6, 7, 8], [9, 10, 11]]
    assert data.classes(spec)[9] == "Ankle boot"
    assert data.split(spec, "validation") is None


def test_damaged_and_missing_idx_files(fashion: Path) -> None:
    file = fashion / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"damaged: 17 bytes where \(3, 2, 3\) are announced"):
        data.split(f"FashionMNIST?root={fashion}", "train")
    file.write_bytes(b"hello world")
    with pytest.raises(OSError, match="not an idx file"):
        data.split(f"FashionMNIST?root={fashion}", "train")
    with pytest.raises(OSError, match=r"KMNIST is not in .*torchvision:KMNIST\?download=1"):
        data.split(f"KMNIST?root={fashion}", "train")


def test_idx_files_that_do_not_belong_together(fashion: Path) -> None:
    file = fashion / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    packed = bytearray(file.read_bytes())
    packed[12] ^= 0xFF
    packed[14] ^= 0xFF
    file.write_bytes(packed)
    with pytest.raises(OSError, match=r"train-labels-idx1-ubyte\.gz is damaged: Error"):
        data.split(f"FashionMNIST?root={fashion}", "train")
    file.write_bytes(gzip.compress(idx(np.zeros((3, 2), np.uint8))))
    with pytest.raises(OSError, match=r"are of \(3, 2, 3\) and \(3, 2\)"):
        data.split(f"FashionMNIST?root={fashion}", "train")


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch) -> Path:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: object) -> tuple[str, str]:
        packed = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(packed)
        return name, hashlib.md5(packed).hexdigest()

    images = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072) % 251
    batch = {"data": images.astype(np.uint8), "labels": [3, 1]}
    train = [write("data_batch_1", batch), write("data_batch_2", batch)]
    test = [write("test_batch", batch)]
    name, md5 = write("batches.meta", {"label_names": ["cat", "dog"]})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path


def test_cifar(cifar: Path) -> None:
    spec = f"CIFAR10?root={cifar}"
    train, test = data.split(spec, "train"), data.split(spec, "test")
    assert (train.labels, test.labels) == ([3, 1, 3, 1], [3, 1])
    image = np.asarray(test.image(1))
    assert image.shape == (32, 32, 3)
    # channel planes come first in the file: pixel (0, 1) of the second image
    assert image[0, 1].tolist() == [(3072 + 1 + plane * 1024) % 251 for plane in range(3)]
    assert data.classes(spec) == ["cat", "dog"]


def test_cifar100_has_its_fine_labels(tmp_path: Path, monkeypatch) -> None:
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    contents = {
        "train": {
            "data": np.zeros((2, 3072), np.uint8),
            "fine_labels": [1, 0],
            "coarse_labels": [0, 0],
        },
        "meta": {"fine_label_names": ["apple", "bee"], "coarse_label_names": ["thing"]},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    sums = {n: hashlib.md5((folder / n).read_bytes()).hexdigest() for n in contents}
    monkeypatch.setattr(CIFAR100, "train_list", [("train", sums["train"])])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"filename": "meta", "md5": sums["meta"]})
    spec = f"CIFAR100?root={tmp_path}"
    assert data.split(spec, "train").labels == [1, 0]
    assert data.classes(spec) == ["apple", "bee"]


def test_the_root_is_kept_as_an_absolute_path(fashion: Path, monkeypatch) -> None:
    monkeypatch.chdir(fashion)
    opened = open_data("torchvision:FashionMNIST?root=.&download=0")
    assert opened.spec == f"torchvision:FashionMNIST?root={fashion}&download=0"
    assert opened.train.labels == [4, 5, 6]
    assert data.resolve("FashionMNIST") == "FashionMNIST"


def test_cifar_refuses_another_file(cifar: Path) -> None:
    file = cifar / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps({"data": 1}))
    with pytest.raises(OSError, match="is not the published file"):
        data.split(f"CIFAR10?root={cifar}", "test")


class Nasty:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_unpickling_knows_arrays_only(tmp_path: Path) -> None:
    array = np.arange(4)
    for protocol in (0, 2, 4):
        got = unpickle(pickle.dumps({"a": array, b"k": ["x", 1.5]}, protocol=protocol), "f")
        assert got["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(OSError, match=r"f is refused: it asks for pathlib"):
        unpickle(pickle.dumps({"a": Nasty(tmp_path / "ran")}), "f")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError, match="it holds list, not a dict"):
        unpickle(pickle.dumps([1]), "f")
    with pytest.raises(OSError, match="f is refused"):
        unpickle(b"\x80\x02}q", "f")


def test_other_data_sets_are_read_by_torchvision(tmp_path: Path) -> None:
    folder = tmp_path / "food-101"
    for kind in ("pie", "soup"):
        (folder / "images" / kind).mkdir(parents=True)
        Image.new("RGB", (4, 3), "red" if kind == "pie" else "blue").save(
            folder / "images" / kind / "1.jpg"
        )
    (folder / "meta").mkdir()
    for split in ("train", "test"):
        names = '{"pie": ["pie/1"], "soup": ["soup/1"]}'
        (folder / "meta" / f"{split}.json").write_text(names)
    spec = f"Food101?root={tmp_path}"
    split = data.split(spec, "train")
    assert (len(split), split.labels) == (2, [0, 1])
    assert data.classes(spec) == ["pie", "soup"]
    assert split.image(1).size == (4, 3)
    with pytest.raises(OSError, match="DTD is not, or not whole, in"):
        data.split(f"DTD?root={tmp_path}", "train")
    broken = folder / "images" / "soup" / "1.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(DeryError, match=f"cannot read the image {broken}: "):
        read_image(split, 1)


def test_damaged_lists_of_other_data_sets(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for name in ("trainval", "test"):
        (folder / "annotations" / f"{name}.txt").write_text("Birman_2 1 1 1\nSphynx_1 2 1 1\n")
    spec = f"OxfordIIITPet?root={tmp_path}"
    assert data.classes(spec) == ["Birman", "Sphynx"]
    assert data.split(spec, "train").labels == [0, 1]
    (folder / "annotations" / "trainval.txt").write_text("what is this?")
    with pytest.raises(OSError, match=r"the files of OxfordIIITPet in .* cannot be read: "):
        data.split(spec, "train")


def test_unknown_data_sets_and_options(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"it is not one of CIFAR10, .* class folders as a folder"):
        data.split("EuroSAT", "train")
    with pytest.raises(KeyError, match="unknown option 'rot'"):
        data.split(f"CIFAR10?rot={tmp_path}", "train")


def test_nothing_is_fetched_unasked(monkeypatch, tmp_path: Path) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    monkeypatch.setenv("DERY_DATA", str(tmp_path))
    with pytest.raises(OSError, match="CIFAR100 is not in"):
        data.split("CIFAR100", "train")
    with pytest.raises(OSError, match="which HF_HUB_OFFLINE forbids"):
        data.split("CIFAR100?download=1", "train")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for word in ("1", "true", "Yes"):
        with pytest.raises(AssertionError, match="fetched"):
            data.split(f"CIFAR100?download={word}", "train")
    for word in ("0", "False", "NO", "off", "never", ""):
        with pytest.raises(OSError, match="CIFAR100 is not in"):
            data.split(f"CIFAR100?download={word}", "train")
