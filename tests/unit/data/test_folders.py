"""Image folders as people have them: parts by other names, links, stubs, unreadable places."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from dery_cli.data.folders import PassedOver, read_folder
from dery_cli.data.sets import open_data
from dery_cli.data.splits import read_image
from dery_cli.errors import DeryError, UsageError
from tests.conftest import make_images

CLASSES = ("ant", "bee")


def parts(root, **counts):
    """A folder of parts with so many images a class."""
    for name, count in counts.items():
        make_images(root / name, CLASSES, count)
    return root


def sizes(root):
    classes, train, test = read_folder(root)
    return classes, len(train), None if test is None else len(test)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val", "TEST"])
@pytest.mark.parametrize("train", ["train", "Train"])
def test_what_the_held_out_part_may_be_called(tmp_path, train, name):
    assert sizes(parts(tmp_path, **{train: 5, name: 2})) == (CLASSES, 10, 4)


def test_test_comes_before_val(tmp_path):
    assert sizes(parts(tmp_path, train=5, val=2, test=3)) == (CLASSES, 10, 6)


@pytest.mark.parametrize("only", ["", ".DS_Store", "a/b/readme.txt", "000.png"])
def test_a_test_part_without_class_folders_gives_way(tmp_path, only):
    """It is empty, or its labels are kept back."""
    parts(tmp_path, train=5)
    (tmp_path / "test" / only).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "test").mkdir(exist_ok=True)
    if only:
        shutil.copy(tmp_path / "train" / "ant" / "000.png", tmp_path / "test" / only)
    assert sizes(tmp_path) == (CLASSES, 10, None)
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.test)) == (8, 2)
    parts(tmp_path, val=2)
    assert sizes(tmp_path) == (CLASSES, 10, 4)


def test_an_empty_class_folder_beside_the_held_out_ones(tmp_path):
    parts(tmp_path, train=5, val=2)
    (tmp_path / "val" / "cow").mkdir()
    shutil.rmtree(tmp_path / "val" / "ant")
    classes, _, test = read_folder(tmp_path)
    assert (classes, test.labels) == (CLASSES, [1, 1])


@pytest.mark.parametrize("names", [("training", "testing"), ("test", "val"), ("Valid", "test")])
def test_parts_are_not_taken_for_classes(tmp_path, names):
    parts(tmp_path, **dict.fromkeys(names, 3))
    with pytest.raises(UsageError, match="are called like parts, not like classes: ") as caught:
        read_folder(tmp_path)
    assert ", ".join(sorted(names)) in caught.value.message
    assert caught.value.hint == "call them train and val (or test), or give one of them"


def test_a_class_called_train_is_not_guessed_at(tmp_path):
    make_images(tmp_path, ["bus", "car", "train"], 3)
    with pytest.raises(UsageError, match=r"is .*/train a class.* beside it there are bus, car"):
        read_folder(tmp_path)
    make_images(tmp_path / "all" / "train", ["bus", "car", "train"], 3)
    assert sizes(tmp_path / "all") == (("bus", "car", "train"), 9, None)


def test_other_folders_beside_unlabelled_images(tmp_path):
    make_images(tmp_path, ["train", "val"], 3)
    (tmp_path / "notes").mkdir()
    assert sizes(tmp_path) == (None, 3, None)


def test_hidden_files_are_no_images(tmp_path):
    make_images(tmp_path, CLASSES, 5)
    before = [path.name for path in read_folder(tmp_path)[1].files]
    for place in ("ant/.ipynb_checkpoints/000.png", "__MACOSX/ant/._000.png", "bee/._000.png"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    classes, train, _ = read_folder(tmp_path)
    assert (classes, [path.name for path in train.files]) == (CLASSES, before)


def test_links_are_followed(tmp_path):
    real = make_images(tmp_path / "real", ["ant", "bee", "cow"], 3)
    linked = tmp_path / "linked"
    (linked / "cow").mkdir(parents=True)
    for place in ("ant", "bee"):
        (linked / place).symlink_to(real / place)
    (linked / "cow" / "more").symlink_to(real / "cow")
    (linked / "cow" / "000.png").symlink_to(real / "ant" / "000.png")
    (linked / "zzz").symlink_to("nowhere")
    assert sizes(linked) == (("ant", "bee", "cow"), 10, None)


def test_links_that_go_in_circles(tmp_path):
    make_images(tmp_path / "set", CLASSES, 3)
    (tmp_path / "set" / "ant" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "ant" / "farther").symlink_to("../..")
    (tmp_path / "set" / "ant" / "here").symlink_to(".")
    (tmp_path / "set" / "bee" / "itself").symlink_to("itself")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "a").symlink_to(tmp_path / "two")
    (tmp_path / "two" / "b").symlink_to(tmp_path / "one")
    (tmp_path / "set" / "bee" / "one").symlink_to(tmp_path / "one")
    assert sizes(tmp_path / "set") == (CLASSES, 6, None)


def test_an_image_that_is_a_link_to_nowhere_is_missed(tmp_path):
    make_images(tmp_path, CLASSES, 3)
    (tmp_path / "ant" / "aaa.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    train = read_folder(tmp_path)[1]
    assert len(train) == 7
    with pytest.raises(DeryError, match=r"cannot read the image .*/aaa\.png: .*No such file"):
        read_image(train, 3)


def test_the_order_is_that_of_the_names(tmp_path):
    make_images(tmp_path, ["b", "a b", "a", "B", "é", "10", "9"], 2)
    for place in ("a/0/001.png", "a/000.d/0.png", "a/000 b/0.PNG", "a/z/y/x.JpEg"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "b" / "000.png", path)
    classes, train, _ = read_folder(tmp_path)
    assert classes == ("10", "9", "B", "a", "a b", "b", "é")
    assert train.files == sorted(train.files)
    assert train.labels == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    make_images(tmp_path, CLASSES, 3)
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DeryError, match=r"cannot list the folder .*/bee: Permission denied"):
        read_folder(tmp_path)


def test_a_class_name_that_is_no_text(tmp_path):
    make_images(tmp_path, CLASSES, 3)
    os.rename(tmp_path / "bee", os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(UsageError, match=r"has a name that is not UTF-8: b'caf\\xe9'"):
        read_folder(tmp_path)


def passed_over(root):
    passed = PassedOver()
    read_folder(root, passed)
    return [note.replace(f"{root}/", "") for note in passed.notes()]


def test_classes_that_link_one_another_keep_their_own_images(tmp_path):
    """Followed without memory, nine of them have about a million ways through one another."""
    names = [f"c{number}" for number in range(9)]
    make_images(tmp_path, names, 1)
    for name in names:
        for other in names:
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    classes, train, _ = read_folder(tmp_path)
    assert (classes, train.labels) == (tuple(names), list(range(9)))


def test_folders_in_a_class_that_link_one_another_are_read_once(tmp_path):
    make_images(tmp_path, CLASSES, 1)
    inner = [f"i{number}" for number in range(9)]
    make_images(tmp_path / "ant", inner, 1)
    for name in inner:
        for other in inner:
            (tmp_path / "ant" / name / f"to-{other}").symlink_to(tmp_path / "ant" / other)
    assert sizes(tmp_path) == (CLASSES, 11, None)


def test_a_class_that_is_a_link_to_another_is_none(tmp_path):
    make_images(tmp_path, [*CLASSES, "zed"], 2)
    (tmp_path / "wasp").symlink_to("bee")
    assert sizes(tmp_path) == ((*CLASSES, "zed"), 6, None)
    assert passed_over(tmp_path) == ["passed over, for they link to another class: wasp"]


def test_folders_nest_only_so_deep(tmp_path):
    make_images(tmp_path, CLASSES, 1)
    deep = tmp_path / "bee" / "/".join("d" * 70)
    deep.mkdir(parents=True)
    with pytest.raises(UsageError, match="folders nest more than 64 deep"):
        read_folder(tmp_path)


def test_what_is_passed_over_is_told(tmp_path):
    make_images(tmp_path, CLASSES, 2)
    assert passed_over(tmp_path) == []
    (tmp_path / "cow").mkdir()
    for name in ("cow/a.heic", "cow/b.heic", "ant/notes.txt", "LICENSE"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    (tmp_path / "bee" / "zero.png").symlink_to("/dev/zero")
    assert passed_over(tmp_path) == [
        "passed over, for they are no files: ant/pipe.png, bee/zero.png",
        "no classes, for they have no images: cow",
        "passed over 4 files that are no images: 2 .heic, 1 .txt, 1 no suffix",
    ]
    assert open_data(str(tmp_path)).notes[1].endswith("/cow")


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "jp2", "pbm", "tga"])
def test_what_pillow_reads_is_read(tmp_path, suffix):
    make_images(tmp_path, CLASSES, 1)
    image = read_image(read_folder(tmp_path)[1], 0)
    if suffix == "pbm":
        image = image.convert("1")
    image.save(tmp_path / "ant" / f"x.{suffix}")
    train = read_folder(tmp_path)[1]
    assert len(train) == 3
    assert read_image(train, 1).size == image.size


def test_class_names_are_the_same_in_every_locale(tmp_path):
    make_images(tmp_path, ["Käse", "日本", "z"], 1)
    script = (
        "import sys; from pathlib import Path; from dery_cli.data.folders import read_folder; "
        "print(ascii(read_folder(Path(sys.argv[1]))[0]))"
    )
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ascii(("Käse", "z", "日本"))
