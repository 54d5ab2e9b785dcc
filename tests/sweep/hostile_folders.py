"""Folders of images with loops, pipes, devices, bombs and names that are no text."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from tests.sweep.commands import words
from tests.sweep.harness import Case, Section
from tests.sweep.hostile import ESCAPES, SECONDS, TO_AN_ASSEMBLY, expect, limited, write_images

EMBED = words("embed -n 16 --grid 1 --grid-samples 8 --threads 1 --data")
ONE_DONOR = words("--donor demo__resnext")
EXTRAS = (words(""), ["--json"], ["--skip-bad"], ["--skip-bad", "--json"])
CHAIN = (
    *TO_AN_ASSEMBLY,
    words("finetune --steps 2 --batch-size 4"),
    words("eval --confusion"),
)


def cases(section: Section) -> Iterator[Case]:
    for what, spoil in SPOILED.items():
        for extra in EXTRAS:
            label = f"data folder ({what}): embed {' '.join(extra)}".strip()
            yield Case(label, partial(embed_spoiled, section, label, spoil, extra))
    yield Case("a class called with escapes, to the end", partial(chain_with_escapes, section))


def embed_spoiled(
    section: Section, label: str, spoil: Callable[[Path], object], extra: list[str]
) -> None:
    folder = write_images(section.new_path("data"), 6)
    try:
        spoil(folder)
        with section.workspace(section.reference.after("zoo")) as workspace:
            args = [*EMBED, str(folder), *ONE_DONOR, *extra]
            ended = section.commands.forked(args, workspace, SECONDS, hook=limited())
            label = f"{label} [{ended.seconds:.1f} s]"
            expect(section, label, ended, {0, 1, 2}, escapes="--json" not in extra)
    finally:
        remove_deep(folder)


def remove_deep(folder: Path) -> None:
    """Remove a folder that may be deeper than Python's own way can follow."""
    deepest = folder / "c0" / "d"
    while (deepest / "d").is_dir():  # lift the lower part, so that no path grows too long
        lifted = folder / "lifted"
        (deepest / "d").rename(lifted)
        shutil.rmtree(deepest)
        lifted.rename(deepest)
    shutil.rmtree(folder)


def chain_with_escapes(section: Section) -> None:
    folder = write_images(section.new_path("data"), 12)
    (folder / "c1").rename(folder / f"z{ESCAPES}")
    with section.workspace(section.reference.after("zoo")) as workspace:
        for args in ([*EMBED, str(folder)], *CHAIN):
            ended = section.commands.forked(args, workspace)
            expect(section, f"class folder with escapes: {args[0]}", ended, {0, 1})


def link(name: str, target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).symlink_to(target)


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def each(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        for step in steps:
            step(folder)

    return spoil


def all_linked(number: int) -> Callable[[Path], object]:
    """So many folders, each with links to all others."""

    def spoil(folder: Path) -> None:
        for one in range(number):
            place = folder / f"k{one}"
            place.mkdir()
            shutil.copy(folder / "c0" / "0000.png", place / "0.png")
            for other in range(number):
                if other != one:
                    (place / f"l{other}").symlink_to(f"../k{other}")

    return spoil


def pipe(name: str) -> Callable[[Path], object]:
    return lambda folder: os.mkfifo(folder / name)


def null_device(folder: Path) -> None:
    os.mknod(folder / "c0" / "null.png", 0o666 | stat.S_IFCHR, os.makedev(1, 5))


def bound_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(folder / "c0" / "s.png"))


def new_class(name: str | bytes) -> Callable[[Path], object]:
    """Another class with two images."""

    def spoil(folder: Path) -> None:
        place = folder / os.fsdecode(name)
        place.mkdir()
        for number in range(2):
            shutil.copy(folder / "c0" / f"{number:04}.png", place / f"{number}.png")

    return spoil


def train_and_val_are_one(folder: Path) -> None:
    (folder / "train").mkdir()
    for name in ("c0", "c1"):
        (folder / name).rename(folder / "train" / name)
    (folder / "val").symlink_to("train")


def deep(levels: int) -> Callable[[Path], object]:
    """An image that many folders down; the path may be longer than the system takes."""

    def spoil(folder: Path) -> None:
        image = folder / "c1" / "0000.png"
        here = os.getcwd()
        os.chdir(folder / "c0")
        try:
            for _ in range(levels):
                os.mkdir("d")
                os.chdir("d")
            shutil.copy(image, "x.png")
        finally:
            os.chdir(here)

    return spoil


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def decompression_bomb(folder: Path) -> None:
    """50,000 pixels square, in a small file."""
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(100000))), (b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    (folder / "c0" / "bomb.png").write_bytes(data)


def huge_text(folder: Path) -> None:
    """A good image with a comment that unpacks to 200 MB."""
    good = (folder / "c0" / "0000.png").read_bytes()
    text = chunk(b"zTXt", b"c\0\0" + zlib.compress(b"A" * 200_000_000))
    (folder / "c0" / "text.png").write_bytes(good[:33] + text + good[33:])


SPOILED: Mapping[str, Callable[[Path], object]] = {
    "link to itself": link("c0/loop.png", "loop.png"),
    "link to parent": link("c0/up", ".."),
    "link to root /": link("c0/root", "/"),
    "two links at each other": each(link("c0/x.png", "y.png"), link("c0/y.png", "x.png")),
    "folders linking each other": each(link("c0/b", "../c1"), link("c1/a", "../c0")),
    "7 folders linking each other": all_linked(7),
    "9 folders linking each other": all_linked(9),
    "FIFO.png": pipe("c0/fifo.png"),
    "link to a FIFO": each(pipe("fifo"), link("c0/f.png", "../fifo")),
    "device.png": null_device,
    "link to /dev/zero": link("c0/zero.png", "/dev/zero"),
    "socket.png": bound_socket,
    "dangling link": link("c0/gone.png", "nowhere"),
    "folder called x.png": lambda folder: (folder / "c0" / "x.png").mkdir(),
    "empty image": write("c0/e.png", b""),
    "class called with escapes": new_class(f"z{ESCAPES}"),
    "broken image called with escapes": write(f"c0/z{ESCAPES}.png", b"no"),
    "image called with newline": write("c0/z\nerror: fine.png", b"no"),
    "broken image, name not UTF-8": write(os.fsdecode(b"c0/\xff\xfe.png"), b"no"),
    "class name not UTF-8": new_class(b"\xff"),
    "train is a link to itself": link("train", "train"),
    "val links to train": train_and_val_are_one,
    "60 deep": deep(60),
    "1,100 deep": deep(1100),
    "decompression bomb": decompression_bomb,
    "huge text chunk": huge_text,
}
