"""Hostile weights and manifests: safetensors that lie, pickles with a payload, TOML."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.sweep.commands import Ended
from tests.sweep.harness import Case, Section
from tests.sweep.hostile import ESCAPES, SECONDS, demo_weights, expect, limited, victim
from tests.sweep.reference import STAGES, put, resealed, sha256

ASSEMBLY = "assemblies/default"
HELD = (
    ("similarity/cka.safetensors", "similarity/cka.json", STAGES["partition"]),
    ("similarity/cka.safetensors", "similarity/cka.json", STAGES["sim"]),
    ("embeddings/demo__resnext.safetensors", "embeddings/demo__resnext.json", STAGES["sim"]),
    (f"{ASSEMBLY}/model.safetensors", f"{ASSEMBLY}/assembly.json", ["eval", ASSEMBLY]),
    ("runs/default/model.safetensors", "runs/default/run.json", ["eval"]),
)
"""Files of tensors in a workspace: their records, and who reads them."""
CHECKPOINTS = (("last-000020", "optimizer"), ("last-000020", "model"), ("best-*", "model"))
CHECKPOINT_TENSORS = ("length 2^63-1", "offsets overlap", "empty", "no tensors")
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
PICKLE_READERS = (
    (f"{ASSEMBLY}/model.safetensors", ["eval", ASSEMBLY]),
    ("embeddings/demo__resnext.safetensors", STAGES["sim"]),
    ("similarity/cka.safetensors", STAGES["partition"]),
)


def cases(section: Section) -> Iterator[Case]:
    for what in TENSORS:
        yield Case(f"safetensors as weights ({what})", partial(give_tensors, section, what))
        for name, record, args in HELD:
            run = partial(replace_tensors, section, what, name, record, args)
            yield Case(f"{name} ({what}): {args[0]}", run)
    for what in CHECKPOINT_TENSORS:
        for kind, stem in CHECKPOINTS:
            for extra in (["--resume"], []):
                run = partial(replace_checkpoint, section, what, kind, stem, extra)
                yield Case(f"checkpoint {kind}/{stem} ({what}) {extra}", run)
    payload = Payload(section)
    for what in PICKLES:
        for suffix in SUFFIXES:
            yield Case(f"pickle as weights ({what}, {suffix})", partial(payload.give, what, suffix))
    for name, args in PICKLE_READERS:
        yield Case(f"{name} is a pickle", partial(payload.replace, name, args))
    for what, line in MANIFEST_LINES.items():
        yield Case(f"manifest ({what})", partial(give_manifest_line, section, what, line))
    for what, make in MANIFESTS.items():
        yield Case(f"manifest ({what})", partial(give_manifest, section, what, make))
    for what in ("a folder", "a FIFO", "/dev/zero"):
        yield Case(f"manifest is {what}", partial(give_no_manifest, section, what))


def tensor(
    begin: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors(header: object, body: bytes = bytes(64)) -> bytes:
    """A file of this header, which may be bytes or what JSON can say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


TWICE = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
TENSORS = {
    "length 2^63-1": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "length 2^64-1": b"\xff" * 8,
    "length 90 MB": (90_000_000).to_bytes(8, "little") + b"{}" + b" " * 100,
    "length beyond": (1000).to_bytes(8, "little") + b"{}",
    "offsets beyond": safetensors({"a": tensor(0, 10**15, (25 * 10**13,))}),
    "offsets overlap": safetensors({"a": tensor(0, 16), "b": tensor(8, 24)}),
    "offsets same": safetensors({"a": tensor(0, 16), "b": tensor(0, 16)}),
    "offsets reversed": safetensors({"a": tensor(16, 0)}),
    "offsets negative": safetensors({"a": tensor(-16, 0)}),
    "gap": safetensors({"a": tensor(16, 32)}),
    "shape overflow": safetensors({"a": tensor(0, 16, (2**40, 2**40))}),
    "shape negative": safetensors({"a": tensor(0, 16, (-4,))}),
    "dtype unknown": safetensors({"a": tensor(0, 16, dtype="EVIL")}),
    "offsets 2^64": safetensors({"a": tensor(0, 2**64)}),
    "deep header": safetensors(b"[" * 100000),
    "header list": safetensors([]),
    "header text": safetensors("a"),
    "not json": safetensors(b"{evil"),
    "empty": b"",
    "eight bytes": bytes(8),
    "no tensors": safetensors({}, b""),
    "names with ../": safetensors({"../../x": tensor(0, 16)}, bytes(16)),
    "names with escapes": safetensors({ESCAPES: tensor(0, 16)}, bytes(16)),
    "duplicate": safetensors(b"{" + TWICE + b"," + TWICE + b"}", bytes(16)),
    "metadata not text": safetensors({"__metadata__": {"a": 1}, "a": tensor(0, 16)}, bytes(16)),
}


def add_weights(section: Section, data: bytes, suffix: str) -> Ended:
    """``zoo add --weights`` with a file of these bytes."""
    path = section.new_path("weights").with_suffix(suffix)
    path.write_bytes(data)
    args = ["zoo", "add", "demo/vit_avg", "--weights", str(path), "--as", "evil"]
    with section.workspace(section.reference.after("zoo")) as workspace:
        ended = section.commands.forked(args, workspace, SECONDS, hook=limited())
    path.unlink()
    return ended


def give_tensors(section: Section, what: str) -> None:
    ended = add_weights(section, TENSORS[what], ".safetensors")
    expect(section, f"--weights safetensors ({what})", ended, {1, 2})


def replace_tensors(
    section: Section, what: str, name: str, record_name: str, args: list[str]
) -> None:
    """As one of the workspace's own files, with the record's hashes recomputed to fit."""
    with section.finished() as workspace:
        reseal_with(workspace / record_name, Path(name).name, TENSORS[what])
        ended = section.commands.forked(args, workspace, SECONDS, hook=limited())
        label = f"{name} with its record resealed ({what}): {args[0]}"
        expect(section, label, ended, {0, 1, 2, 4})


def reseal_with(record_path: Path, name: str, data: bytes) -> None:
    (record_path.parent / name).write_bytes(data)
    record = json.loads(record_path.read_text())
    record["files"][name] = sha256(data)
    put(record_path, resealed(record))


def replace_checkpoint(section: Section, what: str, kind: str, stem: str, extra: list[str]) -> None:
    with section.finished() as workspace:
        run = workspace / "runs/default"
        folder = next(run.glob(kind))
        reseal_with(folder / "checkpoint.json", f"{stem}.safetensors", TENSORS[what])
        (run / "run.json").unlink()
        args = [*STAGES["finetune"], *extra]
        ended = section.commands.forked(args, workspace, 90, hook=limited(12))
        label = f"checkpoint {kind}/{stem} resealed ({what}): finetune {' '.join(extra)}"
        expect(section, label, ended, {0, 1, 2, 4})


class Touch:
    """Unpickled, it runs a command that touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class TouchByEval(Touch):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').system('touch {self.marker}')",)


def saved(value: object, *, modern: bool = True) -> bytes:
    """As torch.save writes it: a zip, or a row of pickles."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=modern)
    return buffer.getvalue()


def zeros(count: int = 2) -> object:
    import torch

    return torch.zeros(count)


def whole_module() -> object:
    import torch

    return torch.nn.Linear(2, 2)


def recursive() -> dict[str, object]:
    found: dict[str, object] = {}
    found["model"] = found
    return found


def zip_that_climbs(marker: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"../../../../{marker.name}", "evil")
        archive.writestr("x/version", "3")
    return buffer.getvalue()


PICKLES: Mapping[str, Callable[[Path], bytes]] = {
    "raw pickle": lambda marker: pickle.dumps(Touch(marker)),
    "state dict with payload, zip": lambda marker: saved(
        {"state_dict": {"a": zeros()}, "x": Touch(marker)}
    ),
    "legacy": lambda marker: saved({"a": zeros(), "x": TouchByEval(marker)}, modern=False),
    "whole module": lambda marker: saved(whole_module()),
    "protocol 0": lambda marker: pickle.dumps(Touch(marker), 0),
    "empty": lambda marker: b"",
    "zip without data.pkl": zip_that_climbs,
    "recursive dict": lambda marker: saved(recursive()),
    "truncated zip": lambda marker: saved({"a": zeros(100)})[:300],
}


class Payload:
    """Pickles that would touch a file, which must not appear."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._marker = section.folder / "MARKER"

    def give(self, what: str, suffix: str) -> None:
        data = PICKLES[what](self._marker)
        ended = add_weights(self._section, data, suffix)
        expect(self._section, f"--weights pickle ({what}, {suffix})", ended, {1, 2})
        self._check(f"{what} {suffix}", ended)

    def replace(self, name: str, args: list[str]) -> None:
        section = self._section
        with section.finished() as workspace:
            (workspace / name).write_bytes(PICKLES["raw pickle"](self._marker))
            ended = section.commands.forked(args, workspace, SECONDS)
            expect(section, f"{name} is a pickle", ended, {1, 4})
            self._check(name, ended)

    def _check(self, what: str, ended: Ended) -> None:
        self._section.count("pickles")
        if self._marker.exists():
            self._marker.unlink()
            self._section.count("PAYLOAD RAN")
            self._section.fail(f"payload ran: {what}", ended)


ESCAPED = "\\u001b[31mRED\\u001b]0;owned\\u0007\\u001b[2J"
"""As TOML writes escapes."""
ELSEWHERE = "{outside}"
"""Stands for a folder outside of the manifest's."""
MANIFEST_LINES = {
    "weights ../": 'weights = "../weights.safetensors"',
    "weights absolute": f'weights = "{ELSEWHERE}/weights.safetensors"',
    "weights through a link": 'weights = "link/weights.safetensors"',
    "weights a FIFO": 'weights = "fifo.safetensors"',
    "name ../": 'name = "../x"',
    "name absolute": 'name = "/x"',
    "name with escape": 'name = "a\\u001b[31m"',
    "task with escapes": f'task = "{ESCAPED}"',
    "license with escapes": 'license = "\\u001b[2J"',
    "source with escapes": 'source = "\\u001b[2J"',
    "name with newline": 'name = "a\\nb"',
    "image_size huge": "image_size = 100000000000",
    "image_size 30000": "image_size = 30000",
    "sha256 wrong": f'sha256 = "{"0" * 64}"',
    "unknown key with escapes": '"\\u001b[31m" = 1',
    "name 10^5 long": f'name = "{"a" * 100000}"',
    "name 300 long": f'name = "{"a" * 300}"',
    "deep": "task = " + "[" * 100000,
}
MANIFESTS: Mapping[str, Callable[[], bytes]] = {
    "binary": lambda: b"\xff\xfe\x00",
    "100 MB comment": lambda: b"#" + b"x" * 100_000_000,
    "empty": lambda: b"",
    "escapes in spec": lambda: b'[[model]]\nspec = "demo/\\u001b[31mx"\n',
    "spec with newline": lambda: b'[[model]]\nspec = "demo/a\\nb"\n',
    "plugin with escapes": lambda: b'[[model]]\nspec = "\\u001b[31m/x"\n',
    "10^5 tables": lambda: b"[[model]]\nspec='demo/x'\n" * 100000,
}


@contextlib.contextmanager
def manifest_folder(section: Section) -> Iterator[Path]:
    """A folder for a manifest, with good weights beside and outside of it, and a FIFO in it."""
    outside = section.new_path("outside")
    folder = outside / "manifests"
    folder.mkdir(parents=True)
    shutil.copy(demo_weights(section), outside / "weights.safetensors")
    (folder / "link").symlink_to(outside)
    os.mkfifo(folder / "fifo.safetensors")
    try:
        yield folder
    finally:
        shutil.rmtree(outside)


def add_manifest(section: Section, path: Path | str, workspace: Path) -> Ended:
    args = ["zoo", "add", "--manifest", str(path)]
    return section.commands.forked(args, workspace, SECONDS, hook=limited())


def give_manifest_line(section: Section, what: str, line: str) -> None:
    """A good model with one bad line; texts that are only shown are taken, and shown safely."""
    before = section.reference.after("zoo")
    with (
        manifest_folder(section) as folder,
        section.workspace(before) as workspace,
        victim(section) as outside,
    ):
        path = folder / "m.toml"
        line = line.replace(ELSEWHERE, str(folder.parent))
        path.write_text(f'[[model]]\nspec = "demo/vit_avg"\n{line}\n')
        ended = add_manifest(section, path, workspace)
        shown = what.startswith(("task", "license", "source"))
        expect(section, f"manifest ({what}): zoo add", ended, {0} if shown else {1, 2})
        if ended.code == 0:
            for args in (["zoo", "list"], ["zoo", "show", "demo__vit_avg"]):
                then = section.commands.forked(args, workspace)
                expect(section, f"manifest ({what}): then {' '.join(args)}", then, {0})
        outside.check(section, f"manifest ({what})", ended)


def give_manifest(section: Section, what: str, make: Callable[[], bytes]) -> None:
    before = section.reference.after("zoo")
    with manifest_folder(section) as folder, section.workspace(before) as workspace:
        path = folder / "m.toml"
        path.write_bytes(make())
        expect(section, f"manifest ({what})", add_manifest(section, path, workspace), {1, 2})


def give_no_manifest(section: Section, what: str) -> None:
    with manifest_folder(section) as folder, section.workspace(None) as workspace:
        places = {"a folder": folder, "a FIFO": folder / "fifo.safetensors"}
        path = places.get(what, Path(what))
        expect(section, f"manifest is {what}", add_manifest(section, path, workspace), {1, 2})
