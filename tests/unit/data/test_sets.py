"""Folders, fields of view, fingerprints."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dery_cli.data.samples import fingerprint
from dery_cli.data.sets import ImageDataset, open_checked, open_data
from dery_cli.data.splits import FolderSplit, read_image, stratified_holdout
from dery_cli.errors import DeryError, UsageError
from dery_cli.runtime.terminal import Terminal
from dery_cli.types import InputSpec
from dery_cli.zoo.transforms import EvalTransform, NoBrightnessError, field_of_view, to_mode
from tests.conftest import make_images


def test_one_folder_is_split_by_class(tmp_path):
    data = open_data(str(make_images(tmp_path, ["ant", "bee", "cow"], 10)))
    assert data.classes == ("ant", "bee", "cow")
    assert (len(data.train), len(data.test)) == (24, 6)
    assert [list(data.test.labels).count(label) for label in range(3)] == [2, 2, 2]
    again = open_data(str(tmp_path))
    assert fingerprint(data.train) == fingerprint(again.train)
    assert fingerprint(data.train) != fingerprint(data.test)


def test_train_and_val_folders_are_kept_apart(tmp_path):
    make_images(tmp_path / "train", ["ant", "bee"], 4)
    make_images(tmp_path / "val", ["ant", "bee"], 3)
    data = open_data(str(tmp_path))
    assert (len(data.train), len(data.test)) == (8, 6)
    make_images(tmp_path / "val", ["cow"], 3)
    with pytest.raises(UsageError, match=r"has classes that .* lacks: cow"):
        open_data(str(tmp_path))


def test_a_flat_folder_has_no_labels(tmp_path):
    make_images(tmp_path, ["."], 5)
    data = open_data(str(tmp_path))
    assert data.classes is None
    assert data.train.labels is None
    assert data.test is None
    assert ImageDataset(data.train, lambda image: image.size)[0] == ((46, 40), -1)


def damage(folder):
    """A truncated JPEG, a text file and an empty file, of one class each."""
    (folder / "ant" / "000.jpg").write_bytes(encoded(Image.new("RGB", (60, 60)), "JPEG")[:200])
    (folder / "bee" / "text.png").write_text("not an image")
    (folder / "bee" / "000.ppm").write_bytes(b"P6 4x 4 255 ")  # for which Pillow has a ValueError
    (folder / "cow" / "zzz.gif").write_bytes(b"")
    names = ("ant/000.jpg", "bee/000.ppm", "bee/text.png", "cow/zzz.gif")
    return [str(folder / name) for name in names]


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_broken_image_is_named(tmp_path):
    make_images(tmp_path, ["ant", "bee", "cow"], 3)
    for name in damage(tmp_path):
        data = FolderSplit([Path(name)], None)
        with pytest.raises(DeryError) as caught:
            read_image(data, 0)
        assert caught.value.message.startswith(f"cannot read the image {name}: ")
        assert caught.value.message.count(name) == 1
        assert "--skip-bad" in caught.value.hint
        with pytest.raises(DeryError, match=f"cannot read the image {name}: "):
            ImageDataset(data, lambda image: image)[0]


def test_broken_images_are_as_if_they_were_not_there(tmp_path):
    make_images(tmp_path, ["ant", "bee", "cow"], 10)
    whole = open_data(str(tmp_path))
    names = damage(tmp_path)
    assert fingerprint(open_data(str(tmp_path)).train) != fingerprint(whole.train)
    terminal = Terminal(quiet=True)
    data = open_checked(terminal, str(tmp_path), skip_bad=True)
    for split in ("train", "test"):
        assert getattr(data, split).labels == getattr(whole, split).labels
        assert fingerprint(getattr(data, split)) == fingerprint(getattr(whole, split))
    assert terminal.warnings == [f"left out 4 broken images: {', '.join(names[:3])} ..."]
    assert (data.skip_bad, whole.skip_bad) == (True, False)
    # another process leaves out the same ones without looking
    left_out = iter(data.left_out)
    again = open_data(str(tmp_path), lambda _split: next(left_out))
    assert fingerprint(again.train) == fingerprint(data.train)


def test_broken_images_of_train_and_val(tmp_path):
    for part in ("train", "val"):
        make_images(tmp_path / part, ["ant", "bee", "cow"], 3)
        damage(tmp_path / part)
    data = open_checked(Terminal(quiet=True), str(tmp_path), skip_bad=True)
    for split in (data.train, data.test):
        assert split.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.left_out == ((0, 5, 8, 12), (0, 5, 8, 12))


def test_broken_images_without_classes(tmp_path):
    make_images(tmp_path, ["."], 5)
    (tmp_path / "000.png").write_bytes(b"")
    data = open_checked(Terminal(quiet=True), str(tmp_path), skip_bad=True)
    assert data.left_out == ((0,),)
    assert len(data.train) == 4


def test_nothing_is_said_where_nothing_is_broken(tmp_path):
    make_images(tmp_path, ["ant", "bee"], 5)
    terminal = Terminal(quiet=True)
    data = open_checked(terminal, str(tmp_path), skip_bad=True)
    assert terminal.warnings == []
    assert data.left_out == ((),)
    assert not data.skip_bad
    assert len(data.train) == 8


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("bee/*", "no image of the class 'bee' of .* can be read"),
        ("*/*", "none of the 6 images of"),
    ],
)
def test_a_class_or_all_of_broken_images(tmp_path, broken, message):
    make_images(tmp_path, ["ant", "bee"], 3)
    for path in tmp_path.glob(broken):
        path.write_bytes(b"")
    with pytest.raises(DeryError, match=message) as caught:
        open_checked(Terminal(quiet=True), str(tmp_path), skip_bad=True)
    assert caught.value.hint


class Pictures:
    """A split of somebody else's."""

    def __init__(self, labels, broken=()):
        self.labels, self.broken = labels, broken

    def __len__(self):
        return len(self.labels)

    def image(self, index):
        if index in self.broken:
            if index % 2:
                raise OSError("the disk is on fire")
            whole = encoded(Image.effect_noise((60, 60), 50), "JPEG")
            return Image.open(io.BytesIO(whole[: len(whole) // 2]))
        return Image.new("L", (4, 4), index)


class Somebody:
    """A plugin of theirs; its data have a test split if the argument says so."""

    def __init__(self, classes, broken=()):
        self.names, self.broken = classes, broken

    def classes(self, argument):
        return self.names

    def split(self, argument, name):
        if name == "test" and "test" not in argument:
            return None
        return Pictures([0, 1] * 5, self.broken)


@pytest.fixture
def plugin(monkeypatch):
    """Registers a data plugin as ``my``."""

    def register(plugin):
        monkeypatch.setattr("dery_cli.data.sets.plugin_names", lambda _group: ["my"])
        monkeypatch.setattr("dery_cli.data.sets.find_plugin", lambda *_args, **_words: plugin)

    return register


def test_broken_images_of_a_plugin(plugin):
    plugin(Somebody(("a", "b"), broken=(3, 4)))
    data = open_data("my:test")
    with pytest.raises(DeryError, match="cannot read the image number 3: the disk is on fire"):
        fingerprint(data.train)
    with pytest.raises(DeryError, match="cannot read the image number 4: "):
        read_image(data.train, 4)  # it is opened by the plugin, and decoded later
    terminal = Terminal(quiet=True)
    data = open_checked(terminal, "my:test", skip_bad=True)
    assert data.left_out == ((3, 4), (3, 4))
    assert data.train.labels == [0, 1, 0, 1, 0, 1, 0, 1]
    pixels = [read_image(data.test, index).getpixel((0, 0)) for index in range(8)]
    assert pixels == [0, 1, 2, 5, 6, 7, 8, 9]
    assert terminal.warnings == ["left out 4 broken images: number 3, number 4, number 3 ..."]


def test_a_plugin_without_a_test_split(plugin):
    plugin(Somebody(("a", "b")))
    data = open_data("my")
    assert sorted(data.test.labels) == [0, 1]
    assert len(data.train) == 8


def test_a_plugin_of_one_class(plugin):
    plugin(Somebody(("a",)))
    with pytest.raises(UsageError, match="the data 'my:x' have only one class: a"):
        open_data("my:x")


def test_a_plugins_name_before_a_colon_wins_over_folders(plugin, tmp_path, monkeypatch):
    plugin(Somebody(("a", "b")))
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "my:some" / "place", ["ant", "bee"], 3)
    assert open_data("my:some/place").classes == ("a", "b")
    assert open_data("./my:some/place").classes == ("ant", "bee")
    with pytest.raises(UsageError, match="no such data folder: your:some/place"):
        open_data("your:some/place")


def test_the_field_of_view_is_a_centred_square():
    assert field_of_view((100, 60), 1.0) == (20.0, 0.0, 80.0, 60.0)
    left, top, right, bottom = field_of_view((60, 100), 0.5)
    assert (right - left, bottom - top) == (30.0, 30.0)
    assert (left + right, top + bottom) == (60.0, 100.0)


def test_the_transform_crops_resizes_and_normalises():
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, 10:50] = (255, 0, 51)  # all that the central square can see
    spec = InputSpec(image_size=(8, 8), mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 1.0))
    x = EvalTransform(spec, 1.0)(Image.fromarray(pixels))
    assert x.shape == (3, 8, 8)
    assert x.dtype == torch.float32
    assert torch.allclose(x[:, 4, 4], torch.tensor([1.0, -2.0, 0.0]), atol=1e-6)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "F"]
MODES += ["I", "I;16", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_mode_becomes_gray_or_rgb(mode, in_chans):
    image = Image.new(mode, (8, 8))
    spec = InputSpec(
        image_size=(4, 4), mean=(0.0,) * in_chans, std=(1.0,) * in_chans, in_chans=in_chans
    )
    x = EvalTransform(spec)(image)
    assert x.shape == (in_chans, 4, 4)
    assert 0.0 <= float(x.min()) <= float(x.max()) <= 1.0


def stored(path, image, **options):
    """The image after a round through a file."""
    image.save(path, **options)
    return read_image(FolderSplit([path], None), 0)


def test_gray_is_the_same_in_all_channels(tmp_path):
    image = stored(tmp_path / "a.png", Image.new("L", (2, 2), 77))
    assert image.mode == "L"
    assert to_mode(image, 3).getpixel((0, 0)) == (77, 77, 77)
    assert to_mode(image, 1).getpixel((0, 0)) == 77


@pytest.mark.parametrize(
    ("mode", "colour", "options", "seen"),
    [
        ("RGBA", (0, 0, 0, 0), {}, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), {}, (255, 0, 0)),
        ("LA", (0, 127), {}, (128, 128, 128)),
        ("P", 0, {"transparency": 0}, (255, 255, 255)),
        ("P", 0, {"transparency": b"\x7f"}, (128, 128, 128)),
        ("P", 0, {}, (0, 0, 0)),
        ("L", 9, {"transparency": 9}, (255, 255, 255)),
        ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, (255, 255, 255)),
        ("RGB", (1, 2, 3), {"transparency": (1, 2, 4)}, (1, 2, 3)),
    ],
)
def test_transparent_is_white(tmp_path, mode, colour, options, seen):
    image = Image.new(mode, (2, 2), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    assert to_mode(stored(tmp_path / "a.png", image, **options), 3).getpixel((0, 0)) == seen


def test_sixteen_bits_keep_their_brightness(tmp_path):
    pixels = np.array([[0, 32896], [65280, 1000]], np.uint16)
    image = stored(tmp_path / "a.png", Image.fromarray(pixels))
    assert np.asarray(to_mode(image, 1)).tolist() == [[0, 128], [254, 3]]
    image = stored(tmp_path / "a.tif", Image.fromarray(pixels))
    assert np.asarray(to_mode(image, 3))[:, :, 2].tolist() == [[0, 128], [254, 3]]
    image = stored(tmp_path / "b.png", Image.fromarray(pixels), transparency=1000)
    assert np.asarray(to_mode(image, 1)).tolist() == [[0, 128], [254, 255]]


def test_the_colours_of_print(tmp_path):
    image = stored(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
    assert image.mode == "CMYK"
    red, green, blue = to_mode(image, 3).getpixel((8, 8))
    assert red > 250
    assert max(green, blue) < 5


STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, 3),
}
"""How a camera stores an upright picture, by EXIF orientation."""


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_upright_as_exif_says(tmp_path, kind, orientation):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255  # the top left corner
    turned = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = stored(tmp_path / f"a.{kind}", turned.convert("RGB"), exif=exif)
    seen = to_mode(image, 1)
    assert seen.size == (32, 16)
    corners = [seen.getpixel(at) > 127 for at in ((3, 3), (28, 3), (3, 12), (28, 12))]
    assert corners == [True, False, False, False]
    assert to_mode(seen, 1).size == (32, 16)  # once is enough


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_damaged_exif_leaves_the_image_as_it_is(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{kind}"
    Image.new("RGB", (32, 16)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(exif.tobytes().removeprefix(b"Exif\0\0"))
    for byte in range(20):
        changed = bytearray(data)
        changed[start + byte] ^= 0xFF
        path.write_bytes(changed)
        image = read_image(FolderSplit([path], None), 0)
        assert to_mode(image, 3).size in [(32, 16), (16, 32)]


@pytest.mark.parametrize("kind", ["gif", "tif", "webp", "png"])
def test_the_first_of_several_pictures_counts(tmp_path, kind):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    first.save(tmp_path / f"a.{kind}", save_all=True, append_images=[second])
    image = read_image(FolderSplit([tmp_path / f"a.{kind}"], None), 0)
    assert min(to_mode(image, 3).getpixel((0, 0))) > 250


def test_holdout_takes_the_same_share_of_every_class():
    labels = [0] * 10 + [1] * 20 + [2]
    kept, out = stratified_holdout(labels, fraction=0.2, seed=3)
    assert sorted(kept + out) == list(range(31))
    assert [sum(labels[i] == c for i in out) for c in range(3)] == [2, 4, 0]


def test_a_folder_named_like_a_data_set_is_not_guessed_at(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="a data set by that name and a folder here") as caught:
        open_data("demo")
    assert "--data ./demo" in caught.value.hint
    assert open_data("demo:").spec == "demo:"
    with pytest.raises(UsageError, match="no images"):
        open_data("./demo")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "the data spec is empty"),
        ("./pets.zip", "./pets.zip is a file"),
        ("pets.zip", "pets.zip is a file"),
        ("x" * 300, "cannot open the data folder x+: File name too long"),
        ("~nobody-of-that-name/x", "no such data folder: ~nobody-of-that-name/x"),
        ("hf:~nobody-of-that-name/x", "no such folder: '~nobody-of-that-name/x'"),
    ],
)
def test_what_is_no_folder(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets.zip").touch()
    make_images(tmp_path, ["ant", "bee"], 2)
    with pytest.raises(UsageError, match=message) as caught:
        open_data(spec)
    assert caught.value.hint


def test_a_file_that_cannot_be_hashed_is_named(tmp_path):
    with pytest.raises(DeryError, match=r"cannot read the image .*/lost\.png: ") as caught:
        fingerprint(FolderSplit([tmp_path / "lost.png"], None))
    assert "--skip-bad" in caught.value.hint


def test_a_file_name_that_is_no_text_can_be_printed(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    path.touch()
    with pytest.raises(DeryError) as caught:
        read_image(FolderSplit([path], None), 0)
    assert r"caf\xe9.png: " in caught.value.message
    caught.value.message.encode()


class Faulty(Somebody):
    """Fails on its own account, or says things that do not go together."""

    def classes(self, argument):
        if argument == "fails":
            raise IndexError("off by one")
        return None if argument == "unnamed" else super().classes(argument)

    def split(self, argument, name):
        images = super().split(f"{argument},test", name)
        if argument == "outside":
            images.labels[3] = -1
        if argument == "unlabelled" and name == "test":
            images.labels, images.__class__ = None, Unlabelled
        return images


class Unlabelled(Pictures):
    def __len__(self):
        return 10


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("fails", "the plugin 'my' fails at opening 'fails': IndexError: off by one"),
        ("outside", "the training images of 'my:outside' have a label -1; there are 2 classes"),
        ("unnamed", "the training images of 'my:unnamed' have labels but no classes"),
        ("unlabelled", "the test images of 'my:unlabelled' have classes but no labels"),
    ],
)
def test_a_plugin_that_breaks_its_contract(plugin, argument, message):
    plugin(Faulty(("a", "b")))
    with pytest.raises(DeryError, match=message):
        open_data(f"my:{argument}")


@pytest.mark.parametrize(
    ("values", "kind", "seen"),
    [
        ([0, 0.5, 1], "float32", [0, 128, 255]),
        ([0, 100, 255], "float32", [0, 100, 255]),
        ([0, 100, 255], "int32", [0, 100, 255]),
        ([0, 16, 4095], "uint16", [0, 0, 255]),
        ([0, 2048, 4080], "uint16", [0, 127, 254]),
        ([0, 257, 65535], "uint16", [0, 1, 255]),
        ([0, 257, 65535], "int32", [0, 1, 255]),
        ([0, 1 << 30, (1 << 31) - 1], "int32", [0, 127, 255]),
    ],
)
def test_more_than_eight_bits_are_scaled_by_their_range(values, kind, seen):
    image = Image.fromarray(np.array([values], dtype=kind))
    assert np.asarray(to_mode(image, 1)).tolist() == [seen]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([-1, 0.5], "float32"),
        ([0, 300], "float32"),
        ([0, float("nan")], "float32"),
        ([-5], "int32"),
    ],
)
def test_values_without_a_white_are_refused_and_the_file_named(tmp_path, values, kind):
    folder = make_images(tmp_path, ["all"], 3) / "all"
    image = Image.fromarray(np.array([values], dtype=kind))
    with pytest.raises(NoBrightnessError, match="of which none is known to be white"):
        to_mode(image, 1)
    image.save(folder / "001.tif")
    data = open_data(str(folder))
    view = EvalTransform(InputSpec(image_size=(8, 8)))
    whole = ImageDataset(data.train, view)
    broken = [i for i in range(len(data.train)) if data.train.name(i).endswith("001.tif")]
    with pytest.raises(DeryError, match=rf"cannot use the image .*/001\.tif: mode {image.mode} "):
        whole[broken[0]]
    terminal = Terminal(quiet=True)
    assert len(open_checked(terminal, str(folder), skip_bad=True).train) == len(data.train) - 1
    assert "left out 1 broken image: " in terminal.warnings[0]
