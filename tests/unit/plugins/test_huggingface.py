"""Hugging Face data sets: small ones made here, read without a network."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dery_cli.data.samples import fingerprint
from dery_cli.data.sets import open_checked, open_data
from dery_cli.data.splits import read_image
from dery_cli.errors import DeryError, UsageError
from dery_cli.runtime.terminal import Terminal
from dery_cli.zoo.plugin import DataPlugin
from dery_huggingface import data
from dery_huggingface.sets import HuggingFaceSplit
from tests.conftest import make_images

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of ``datasets`` of the test's own, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def picture(value):
    """A small PNG of one colour."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(labels, *, first=0, features=None, **columns):
    """Pictures whose colour is their row, counted from ``first``."""
    rows = {
        "image": [
            {"bytes": picture(first + row), "path": f"{row}.png"} for row in range(len(labels))
        ],
        "label": labels,
        **columns,
    }
    known = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    known |= {name: datasets.Value("string") for name in columns} | (features or {})
    return datasets.Dataset.from_dict(rows, features=datasets.Features(known))


def parquet(folder, **splits):
    """A folder of one parquet file a split."""
    for name, part in splits.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def colours(split):
    return [read_image(split, index).getpixel((0, 0))[0] for index in range(len(split))]


def test_it_keeps_the_contract():
    assert isinstance(data, DataPlugin)


def test_a_folder_of_parquet_files(tmp_path):
    folder = parquet(tmp_path / "set", train=table([0, 1, 1]), test=table([1, 0], first=100))
    opened = open_data(f"hf:{folder}")
    assert opened.classes == ("ant", "bee")
    assert opened.train.labels == [0, 1, 1]
    assert opened.test.labels == [1, 0]
    assert colours(opened.train) == [0, 1, 2]
    assert colours(opened.test) == [100, 101]
    assert data.split(str(folder), "other") is None


def test_it_is_opened_once(tmp_path, monkeypatch):
    folder = parquet(tmp_path / "set", train=table([0, 1, 1]), test=table([1, 0], first=100))
    opened = []

    def load(path, *args, **options):
        opened.append(path)
        return load_dataset(path, *args, **options)

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    open_data(f"hf:{folder}")
    assert opened == [str(folder)]
    parquet(folder, train=table([0, 1, 1, 0, 1]))  # another day
    assert len(open_data(f"hf:{folder}").train) == 5
    assert opened == [str(folder)] * 2


def test_content_is_hashed_by_the_encoded_images(tmp_path):
    one = open_data(f"hf:{parquet(tmp_path / 'one', train=table([0, 1] * 5))}")
    same = open_data(f"hf:{parquet(tmp_path / 'same', train=table([0, 1] * 5))}")
    other = open_data(f"hf:{parquet(tmp_path / 'other', train=table([0, 1] * 5, first=1))}")
    assert fingerprint(one.train) == fingerprint(same.train)
    assert fingerprint(one.train) != fingerprint(other.train)


def test_without_a_test_split_a_fifth_of_each_class_is_held_out(tmp_path):
    opened = open_data(f"hf:{parquet(tmp_path / 'set', train=table([0, 1] * 10))}")
    assert (len(opened.train), len(opened.test)) == (16, 4)
    assert sorted(opened.test.labels) == [0, 0, 1, 1]


@pytest.mark.parametrize("both", [True, False])
def test_what_save_to_disk_wrote(tmp_path, both):
    train = table([0, 1, 0]).with_format("torch", columns=["label"])  # a format that was saved too
    folder = str(tmp_path / "set")
    if both:
        datasets.DatasetDict(train=train, validation=table([1], first=50)).save_to_disk(folder)
    else:
        train.save_to_disk(folder)
    train, test = data.split(folder, "train"), data.split(folder, "test")
    assert data.classes(folder) == ["ant", "bee"]
    assert train.labels == [0, 1, 0]
    assert colours(train) == [0, 1, 2]
    assert (test is not None) is both
    assert test is None or colours(test) == [50]


def test_a_folder_of_images(tmp_path):
    make_images(tmp_path / "set" / "train", ["ant", "bee"], 3)
    make_images(tmp_path / "set" / "test", ["ant", "bee"], 1)
    opened, plain = open_data(f"hf:{tmp_path / 'set'}"), open_data(str(tmp_path / "set"))
    assert opened.classes == plain.classes
    assert opened.train.labels == plain.train.labels
    assert fingerprint(opened.train) == fingerprint(plain.train)
    assert fingerprint(opened.test) == fingerprint(plain.test)


@pytest.mark.parametrize(
    ("kind", "labels", "classes", "indices"),
    [
        ("string", ["cow", "ant", "cow"], ["ant", "cow"], [1, 0, 1]),
        ("int64", [10, 9, 10], ["9", "10"], [1, 0, 1]),
    ],
)
def test_labels_without_names_are_sorted(tmp_path, kind, labels, classes, indices):
    features = {"label": datasets.Value(kind)}
    train, test = table(labels, features=features), table(labels[1:], features=features)
    spec = str(parquet(tmp_path / "set", train=train, test=test))
    assert data.classes(spec) == classes
    assert data.split(spec, "train").labels == indices
    assert data.split(spec, "test").labels == indices[1:]
    odd = table([labels[0] * 2], features=features)
    spec = str(parquet(tmp_path / "odd", train=train, test=odd))
    with pytest.raises(UsageError, match=f"'test' has classes that 'train' lacks: {labels[0] * 2}"):
        data.split(spec, "test")


def test_class_names_count_not_their_numbers(tmp_path):
    other = table([0, 1], features={"label": datasets.ClassLabel(names=["bee", "ant"])})
    datasets.DatasetDict(train=table([0, 1]), test=other).save_to_disk(tmp_path / "set")
    assert data.split(str(tmp_path / "set"), "test").labels == [1, 0]


def test_columns_that_could_be_either_are_named(tmp_path):
    pictures = [{"bytes": picture(90), "path": None}] * 2
    kinds = {"mask": datasets.Image(), "coarse": datasets.ClassLabel(names=["big", "small"])}
    train = table([0, 1], features=kinds, mask=pictures, coarse=[1, 1])
    spec = f"hf:{parquet(tmp_path / 'set', train=train, test=train)}"
    with pytest.raises(UsageError, match="several image columns: image, mask") as caught:
        open_data(spec)
    assert f"--data '{spec}?image=image'" in caught.value.hint
    with pytest.raises(UsageError, match="several columns of classes: label, coarse") as caught:
        open_data(f"{spec}?image=mask")
    assert f"--data '{spec}?image=mask&label=label'" in caught.value.hint
    opened = open_data(f"{spec}?image=mask&label=coarse")
    assert opened.classes == ("big", "small")
    assert opened.train.labels == [1, 1]
    assert colours(opened.train) == [90, 90]
    with pytest.raises(UsageError, match="has no column 'fine'") as caught:
        open_data(f"{spec}?image=mask&label=fine")
    assert caught.value.hint == "there are image, label, mask, coarse"


def test_parquet_of_another_maker(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet as pq

    rows = {"img": [picture(3), picture(4), b"no image"], "kind": ["x", "y", "y"]}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "set" / "train.parquet")
    spec = f"hf:{tmp_path / 'set'}"
    with pytest.raises(UsageError, match="has no image column") as caught:
        open_data(spec)
    assert "img, kind" in caught.value.hint
    train = data.split(f"{tmp_path / 'set'}?image=img&label=kind", "train")
    assert train.labels == [0, 1, 1]
    assert read_image(train, 1).getpixel((0, 0))[0] == 4
    with pytest.raises(DeryError, match=r"the image 2 of the split 'train' of .*: it is in no"):
        read_image(train, 2)
    with pytest.raises(DeryError, match=r"the image 0 .* \(x\): .*No such file"):
        read_image(data.split(f"{tmp_path / 'set'}?image=kind&label=", "train"), 0)


def test_images_without_labels(tmp_path):
    spec = str(parquet(tmp_path / "set", train=table([0, 1])))
    assert data.classes(f"{spec}?label=") is None
    assert data.split(f"{spec}?label=", "train").labels is None
    bare = table([0, 1]).remove_columns("label")
    assert data.classes(str(parquet(tmp_path / "bare", train=bare))) is None


def test_a_test_split_without_labels_gives_way_to_the_validation_split(tmp_path):
    hidden, known = table([-1, -1], first=50), table([1, 0], first=70)
    spec = str(parquet(tmp_path / "set", train=table([0, 1]), test=hidden, validation=known))
    assert colours(data.split(spec, "test")) == [70, 71]
    with pytest.raises(UsageError, match="2 of 2 rows of the split 'test' have no label"):
        data.split(f"{spec}?test=test", "test")
    with pytest.raises(UsageError, match="have no label") as caught:
        data.split(f"{spec}?train=test", "train")
    assert "label=" in caught.value.hint


def test_splits_by_name(tmp_path):
    parts = {"big": table([0, 1, 1]), "small": table([1, 0], first=80)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    spec = str(tmp_path / "set")
    with pytest.raises(UsageError, match="has no split 'train'; there are big, small") as caught:
        data.split(spec, "train")
    assert "?train=big" in caught.value.hint
    assert data.split(f"{spec}?test=small", "train").labels == [0, 1, 1]
    assert colours(data.split(f"{spec}?train=big&test=small", "test")) == [80, 81]
    with pytest.raises(UsageError, match="has no split 'bg'"):
        data.split(f"{spec}?train=bg", "train")


def test_one_split_cannot_be_both(tmp_path):
    spec = f"hf:{parquet(tmp_path / 'set', train=table([0, 1] * 5))}?test=train"
    with pytest.raises(UsageError, match="'train' cannot be trained and tested on") as caught:
        open_data(spec)
    assert "a fifth" in caught.value.hint
    parts = datasets.DatasetDict(a=table([0, 1] * 5), test=table([0, 1]))
    parts.save_to_disk(tmp_path / "two")
    assert len(open_data(f"hf:{tmp_path / 'two'}?train=a").test) == 2
    assert len(open_data(f"hf:{tmp_path / 'two'}?train=test").train) == 2  # no test split then


def test_a_test_split_of_other_columns(tmp_path):
    parts = {"train": table([0, 1] * 5), "test": table([0, 1]).remove_columns("label")}
    folder = tmp_path / "set"
    datasets.DatasetDict(parts).save_to_disk(folder)
    assert len(open_data(f"hf:{folder}").test) == 2  # a fifth of the training images
    for asked, lacks in (("?test=test", "label"), ("?test=odd", "image")):
        if lacks == "image":
            shutil.rmtree(folder)
            odd = table([0, 1]).rename_column("image", "photo")
            datasets.DatasetDict(train=parts["train"], odd=odd).save_to_disk(folder)
        with pytest.raises(UsageError, match=f"the split '.*' has no column '{lacks}'") as caught:
            open_data(f"hf:{folder}{asked}")
        assert caught.value.hint.startswith("there are ")


def test_a_single_class_is_refused(tmp_path):
    one = table([0, 0], features={"label": datasets.ClassLabel(names=["ant"])})
    with pytest.raises(UsageError, match="have only one class: ant"):
        open_data(f"hf:{parquet(tmp_path / 'set', train=one)}")


def test_broken_images_are_named_or_left_out(tmp_path):
    whole = table([0, 1] * 6)
    rows = [dict(whole.cast_column("image", datasets.Image(decode=False))[i]) for i in range(12)]
    rows[2]["image"] = {"bytes": picture(2)[:50], "path": "2.png"}
    rows[5]["image"] = {"bytes": b"", "path": "5.png"}
    rows[7]["image"] = None
    broken = datasets.Dataset.from_list(rows, features=whole.features)
    spec = f"hf:{parquet(tmp_path / 'set', train=broken, test=whole)}"
    train = open_data(spec).train
    for index, name in (
        (2, r"2 of the split 'train' of hf:\S+ \(2\.png\)"),
        (5, "5 of"),
        (7, "7 "),
    ):
        with pytest.raises(DeryError, match=f"cannot read the image {name}") as caught:
            read_image(train, index)
        assert "--skip-bad" in caught.value.hint
    with pytest.raises(
        DeryError, match=r"cannot read the image 7 of .*: there is none in this row"
    ):
        fingerprint(train, [7])
    terminal = Terminal(quiet=True)
    opened = open_checked(terminal, spec, skip_bad=True)
    assert colours(opened.train) == [0, 1, 3, 4, 6, 8, 9, 10, 11]
    assert opened.train.labels == [0, 1, 1, 0, 0, 0, 1, 0, 1]
    assert opened.skip_bad
    assert opened.left_out == ((2, 5, 7), ())
    assert terminal.warnings[0].startswith("left out 3 broken images: 2 of the split 'train'")


def test_an_image_elsewhere_is_not_fetched():
    rows = {"image": [{"bytes": None, "path": "https://example.org/0.png"}]}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    split = HuggingFaceSplit(datasets.Dataset.from_dict(rows, features), "image", None, "birds")
    with pytest.raises(DeryError, match=r"image 0 of birds .*is not in the data set"):
        read_image(split, 0)


def test_rows_name_files_of_the_data_set_alone(tmp_path):
    (tmp_path / "elsewhere.png").write_bytes(picture(9))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "in.png").write_bytes(picture(7))
    os.mkfifo(folder / "pipe.png")
    paths = ["in.png", str(folder / "in.png"), "../elsewhere.png"]
    paths += [str(tmp_path / "elsewhere.png"), "/dev/zero", "pipe.png", "none.png"]
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(sys.modules["pyarrow"].table({"file": paths}), folder / "train.parquet")
    split = data.split(f"{folder}?image=file", "train")
    assert [read_image(split, index).getpixel((0, 0))[0] for index in (0, 1)] == [7, 7]
    reasons = ["is not in the data set"] * 3 + ["pipe.png is no file", "No such file"]
    for index, reason in enumerate(reasons, start=2):
        with pytest.raises(DeryError, match=f"cannot read the image {index} of .*{reason}"):
            read_image(split, index)


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [[0], [1], [2]]])
def test_labels_of_other_types(tmp_path, values):
    kind = datasets.Value("float32")
    kind = [datasets.Value("int64")] if isinstance(values[0], list) else kind
    spec = str(parquet(tmp_path / "set", train=table(values, features={"label": kind})))
    assert data.classes(spec) == ["0", "1", "2"]
    assert data.split(spec, "train").labels == [0, 1, 2]


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ([0.5, 1.0], datasets.Value("float32"), "the column 'label' holds 0.5, which is no class"),
        ([float("nan"), 1.0], datasets.Value("float64"), "the column 'label' holds nan"),
        ([[0, 1], [1]], [datasets.Value("int64")], "the column 'label' holds more than one class"),
    ],
)
def test_labels_that_are_no_classes_are_named(tmp_path, values, kind, reason):
    spec = str(parquet(tmp_path / "set", train=table(values, features={"label": kind})))
    with pytest.raises(UsageError, match=reason) as caught:
        data.classes(spec)
    assert f"--data 'hf:{spec}?label='" in caught.value.hint
    assert data.classes(f"{spec}?label=") is None


def test_columns_that_hold_no_images_are_neither_read_nor_advised(tmp_path):
    rows = {"pixels": [np.zeros((8, 8, 3)).tolist()] * 10, "label": [0, 1] * 5}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    spec = f"hf:{tmp_path / 'set'}"
    with pytest.raises(UsageError, match="has no image column") as caught:
        open_data(spec)
    assert caught.value.hint == "its columns are pixels, label"
    for column in ("pixels", "label"):
        with pytest.raises(UsageError, match=f"the column '{column}' holds no images"):
            open_data(f"{spec}?image={column}")


class Birds(datasets.GeneratorBasedBuilder):
    """Prepares ``rows`` as a builder of the hub prepares its files."""

    rows = table([0])

    def _info(self):
        return datasets.DatasetInfo(features=self.rows.features)

    def _split_generators(self, _manager):
        return [datasets.SplitGenerator("train", {})]

    def _generate_examples(self):
        for key in range(len(self.rows)):
            yield key, self.rows[key]


def prepare(cache, rows, config="default"):
    """What ``load_dataset("owner/SomeBirds", config)`` leaves in the cache."""
    builder = type("Birds", (Birds,), {"rows": rows, "__module__": __name__})(
        cache_dir=str(cache),
        dataset_name="SomeBirds",
        repo_id="owner/SomeBirds",
        config_name=config,
        hash="0123abc",
    )
    builder.download_and_prepare()
    assert Path(builder.cache_dir) == cache / "owner___some_birds" / config / "0.0.0" / "0123abc"


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the hub would be asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def test_the_hub_is_not_asked_for_what_is_in_the_cache(cache, no_loading):
    prepare(cache, table([0, 1, 0]))
    opened = open_data("hf:owner/SomeBirds?download=1")
    assert opened.classes == ("ant", "bee")
    assert data.split("owner/SomeBirds", "train").labels == [0, 1, 0]
    assert data.split(f"owner/SomeBirds?root={cache}", "train").labels == [0, 1, 0]
    with pytest.raises(DeryError, match="hf:owner/SomeBirds with config=other is no folder, and"):
        open_data("hf:owner/SomeBirds?config=other")
    with pytest.raises(DeryError, match="is no folder, and not in /nowhere"):
        open_data("hf:owner/SomeBirds?root=/nowhere")


def test_configurations_in_the_cache(cache, no_loading):
    prepare(cache, table([0, 1]), "one")
    prepare(cache, table([1, 1, 0]), "two")
    with pytest.raises(UsageError, match="has several configurations: one, two") as caught:
        open_data("hf:owner/SomeBirds")
    assert caught.value.hint == "--data 'hf:owner/SomeBirds?config=one'"
    assert data.split("owner/SomeBirds?config=two", "train").labels == [1, 1, 0]


def test_nothing_is_fetched_unless_the_spec_says_so(cache, no_loading):
    with pytest.raises(DeryError) as caught:
        open_data("hf:owner/birds")
    assert caught.value.message == f"hf:owner/birds is no folder, and not in {cache}"
    assert caught.value.hint == "--data 'hf:owner/birds?download=1' fetches it"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_forbids_even_that(no_loading, monkeypatch, variable):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DeryError, match=f"and {variable} forbids fetching it"):
        open_data("hf:owner/birds?download=1")


def test_fetching_runs_no_code_of_the_data_set(monkeypatch):
    asked = {}

    def load(path, config, **options):
        asked.update(options, path=path, config=config)
        return datasets.DatasetDict(train=table([0, 1, 1]))

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert data.split("owner/birds?download=1&config=c&root=~/r", "train").labels == [0, 1, 1]
    assert asked == {
        "path": "owner/birds",
        "config": "c",
        "cache_dir": str(Path.home() / "r"),
        "trust_remote_code": False,
    }


def test_a_script_in_a_folder_is_not_run(tmp_path):
    folder = parquet(tmp_path / "birds", train=table([0, 1]))
    (folder / "birds.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DeryError, match="cannot open hf:"):
        open_data(f"hf:{folder}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_a_folder_that_cannot_be_read(tmp_path, content):
    (tmp_path / "set").mkdir()
    if content is not None:
        (tmp_path / "set" / "train.parquet").write_bytes(content)
    with pytest.raises(DeryError, match=f"cannot open hf:{tmp_path / 'set'}: ") as caught:
        open_data(f"hf:{tmp_path / 'set'}")
    assert "parquet" in caught.value.hint
    assert "\n" not in caught.value.message


def test_the_extra_that_is_missing(tmp_path, monkeypatch):
    folder = parquet(tmp_path / "set", train=table([0, 1]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DeryError, match="needs the package 'datasets'") as caught:
        open_data(f"hf:{folder}")
    assert caught.value.hint == "pip install 'dery-cli[huggingface]'"


def test_another_thing_called_datasets_is_not_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))  # as a folder of data is
    with pytest.raises(DeryError, match="needs the package 'datasets'"):
        open_data(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:", "no such folder: ''"),
        ("hf:birds", "no such folder: 'birds'"),
        ("hf:./no/such", "no such folder: './no/such'"),
        ("hf:a/b/c", "no such folder: 'a/b/c'"),
        ("hf:a/b?splt=x", r"hf:a/b\?splt=x: unknown option 'splt'"),
    ],
)
def test_a_wrong_spec(spec, message):
    with pytest.raises(UsageError, match=message):
        open_data(spec)


def test_folders_are_kept_as_absolute_paths(tmp_path, monkeypatch):
    parquet(tmp_path / "a set", train=table([0, 1] * 5))
    monkeypatch.chdir(tmp_path)
    opened = open_data("hf:./a set?root=my cache&label=label")
    assert f"?root={tmp_path}/my+cache&" in opened.spec
    assert str(tmp_path / "a set") in opened.spec
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = open_data(opened.spec)
    assert again.spec == opened.spec
    assert (tmp_path / "my cache").is_dir()
    assert fingerprint(again.train) == fingerprint(opened.train)
