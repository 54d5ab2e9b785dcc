"""Readers beside a writer: whatever is read is one version, whole, and nobody fails."""

from __future__ import annotations

import collections
import json
import re
import sys
import time
from collections.abc import Collection, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tests.sweep.commands import Ended, Forked
from tests.sweep.harness import Case, Section
from tests.sweep.reference import STAGES, contents, files_of, is_log, resealed, sha256

ASSEMBLY = "assemblies/default"
EVAL = ["eval", ASSEMBLY, "--json"]
LIST = ["zoo", "list", "--json"]
OTHER_WEIGHTS = [*STAGES["assemble"], "--fit-samples", "48"]
"""Another network under the same name."""
ROUNDS = 4
REWRITES = 200
"""Per round."""
REAL_REWRITES = 8
ZOO_REWRITES = 50
TIGHT_REWRITES = 2000

Files = dict[str, bytes]


def cases(section: Section) -> Iterator[Case]:
    versions = Versions(section)
    for number in range(ROUNDS):
        yield Case(f"assembly rewritten, round {number}", versions.load_during_rewrites)
    for number in range(REAL_REWRITES):
        args = OTHER_WEIGHTS if number % 2 == 0 else STAGES["assemble"]
        yield Case(f"assemble run {number}", partial(versions.read_during_assemble, args))
    yield Case("zoo.json rewritten", partial(list_during_rewrites, section))
    for with_file in (False, True):
        yield Case(f"tight loop, file {with_file}", partial(tight_loop, section, with_file))


class Versions:
    """An assembly as it was made, one of the same blocks with other weights, and a third."""

    def __init__(self, section: Section) -> None:
        self._section = section

    @property
    def _source(self) -> Path:
        return self._section.reference.after("assemble")

    @cached_property
    def _two(self) -> tuple[Files, Files]:
        import safetensors.torch

        found = contents(self._source / ASSEMBLY)
        first = {name: data for name, data in found.items() if not is_log(name)}
        tensors = safetensors.torch.load(first["model.safetensors"])
        scaled = {k: v * 1.01 if v.is_floating_point() else v for k, v in tensors.items()}
        second = {**first, "model.safetensors": safetensors.torch.save(scaled)}
        record = json.loads(first["assembly.json"])
        record["files"]["model.safetensors"] = sha256(second["model.safetensors"])
        second["assembly.json"] = json.dumps(resealed(record)).encode()
        return first, second

    @cached_property
    def _good(self) -> set[object]:
        """What a reader may say: of each version, what one says of it at rest."""
        section, good = self._section, set[object]()
        with section.workspace(self._source) as workspace:
            section.commands.forked(OTHER_WEIGHTS, workspace)
            good.add(top1(section.commands.forked(EVAL, workspace)))
        for version in self._two:
            with section.workspace(self._source) as workspace:
                for name, data in version.items():
                    (workspace / ASSEMBLY / name).write_bytes(data)
                loaded = section.commands.load_assembly(workspace / ASSEMBLY)
                good.add(loaded.stdout.strip())
                good.add(top1(section.commands.forked(EVAL, workspace)))
        return good - {None, ""}

    def load_during_rewrites(self) -> None:
        """``load_assembly`` beside the product's own transaction, as ``assemble`` uses it."""
        section, good = self._section, self._good
        with section.workspace(self._source) as workspace:
            rewrite = partial(rewrite_assembly, workspace / ASSEMBLY, self._two)
            writer = section.commands.call(rewrite)
            label = f"{REWRITES} rewrites"
            for _ in until_ended(section, writer, label):
                path = workspace / ASSEMBLY
                loads = [section.commands.load_in_fork(path) for _ in range(2)]
                for ended in [load.finish() for load in loads]:
                    check_read(section, "load_assembly", ended, ended.stdout.strip(), good)
            section.count("rewrites", REWRITES)

    def read_during_assemble(self, args: list[str]) -> None:
        """``eval`` and ``zoo list`` beside a real ``assemble`` that writes another network."""
        section, good = self._section, self._good
        with section.workspace(self._source) as workspace:
            if args == STAGES["assemble"]:  # it must have something to do
                section.commands.forked(OTHER_WEIGHTS, workspace)
            writer = section.commands.fork(args, workspace)
            for _ in until_ended(section, writer, "assemble"):
                ended = section.commands.forked(EVAL, workspace)
                check_read(section, "eval", ended, top1(ended), good)
                ended = section.commands.forked(LIST, workspace)
                check_read(section, "zoo list", ended, "a list", {"a list"})
            section.count("rewrites by assemble")


def rewrite_assembly(folder: Path, versions: tuple[Files, Files]) -> None:
    from dery_cli.io.journal import transaction
    from dery_cli.io.records import Artifact
    from dery_cli.zoo.schemas import ASSEMBLY as KIND

    for number in range(REWRITES):
        version = versions[1 - number % 2]
        record = json.loads(version["assembly.json"])
        with transaction(folder / "assembly.json") as work:
            for name in record["files"]:
                work.path(name).write_bytes(version[name])
            fields = {key: record[key] for key in ("parents", "options", "seed", "data")}
            work.commit(Artifact(kind=KIND, **fields))


def until_ended(section: Section, writer: Forked, label: str) -> Iterator[None]:
    """As long as the writer works; it must not fail."""
    while (ended := writer.poll()) is None:
        yield
    if ended.code:
        section.count("writers failed")
        section.fail(f"{label}: the writer failed while others read: exit {ended.code}", ended)


def top1(ended: Ended) -> float | None:
    try:
        return float(json.loads(ended.stdout)["result"]["top1"])
    except (ValueError, KeyError, TypeError):
        return None


def check_read(
    section: Section, what: str, ended: Ended, value: object, good: Collection[object]
) -> None:
    section.count(f"reads: {what}")
    if ended.code == 0 and value in good and not ended.traceback:
        section.count(f"reads: {what}, good")
    elif ended.code == 0 and not ended.traceback:
        section.count(f"reads: {what}, WRONG")
        section.fail(f"{what} during rewrites: exit 0 but {value}", ended)
    else:
        kind = "traceback" if ended.traceback else f"exit {ended.code}"
        section.count(f"reads: {what}, {kind}")
        section.fail(f"{what} during rewrites: {kind}", ended)


def list_during_rewrites(section: Section) -> None:
    """``zoo list`` beside real ``zoo remove`` and ``zoo add``."""
    with section.workspace(section.reference.after("zoo")) as workspace:
        writer = section.commands.call(partial(remove_and_add, workspace))
        for _ in until_ended(section, writer, "zoo add and remove"):
            listings = [section.commands.fork(LIST, workspace) for _ in range(3)]
            for ended in [listing.finish() for listing in listings]:
                try:
                    number = len(json.loads(ended.stdout)["result"]["donors"])
                except (ValueError, KeyError, TypeError):
                    number = None
                check_read(section, "zoo list, zoo.json rewritten", ended, number, {3, 4})
        section.count("rewrites of zoo.json", ZOO_REWRITES)


def remove_and_add(workspace: Path) -> None:
    from dery_cli.cli import run

    for _ in range(ZOO_REWRITES // 2):
        for words in (["remove", "demo__resnext"], ["add", "demo/resnext"]):
            assert run(["zoo", *words, "-q", "-w", str(workspace)]) == 0


def tight_loop(section: Section, with_file: bool) -> None:
    """Two that only read an artifact, against one that only writes it."""
    kind = "record and file" if with_file else "record alone"
    with section.workspace(None) as workspace:
        workspace.mkdir()
        write = partial(write_small, workspace, with_file)
        write(range(1))
        readers = [section.commands.call(partial(read_small, workspace)) for _ in range(2)]
        writer = section.commands.call(partial(write, range(TIGHT_REWRITES))).finish(300)
        (workspace / "stop").touch()
        section.count(f"tight loop, {kind}: writes", TIGHT_REWRITES)
        if writer.code:
            section.count(f"tight loop, {kind}: writer failed")
            section.fail(f"tight loop ({kind}): the writer failed while two others read", writer)
        total: collections.Counter[str] = collections.Counter()
        for reader in readers:
            total.update(readings(reader.finish(360)))
        for what, number in total.items():
            section.count(f"tight loop, {kind}: {what}", number)
            if what != "good":
                told = f"{number} of {sum(total.values())} reads: {what}"
                section.fail(f"tight loop ({kind}): {told}")
        left = [name for name in files_of(workspace) if name not in ("x.json", "x.bin", "stop")]
        if left:
            section.fail(f"tight loop ({kind}): left {left}")


def small_kind() -> Any:
    from dery_cli.io.records import Kind

    return Kind(name="small", version=1)


def write_small(folder: Path, with_file: bool, numbers: range) -> None:
    from dery_cli.io.journal import transaction
    from dery_cli.io.records import Artifact

    for number in numbers:
        with transaction(folder / "x.json") as work:
            if with_file:
                work.path("x.bin").write_bytes(bytes([number % 256]) * 200_000)
            work.commit(Artifact(kind=small_kind(), data={"number": number % 256}))


def read_small(folder: Path) -> None:
    """Open the artifact, which hashes its file, until told to stop; print what came of it."""
    from dery_cli.io.artifacts import open_artifact

    seen: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + 300
    while not (folder / "stop").exists() and time.monotonic() < end:
        try:
            open_artifact(folder / "x.json", small_kind(), missing="gone", hint="rerun")
            seen["good"] += 1
        except Exception as error:
            text = re.sub(r"[0-9a-f]{12,}", "SHA", str(error)).replace(str(folder), "WS")
            seen[f"{type(error).__name__}: {text}"] += 1
    json.dump(seen, sys.stdout)


def readings(ended: Ended) -> dict[str, int]:
    if ended.code == 0 and ended.stdout.strip():
        return dict(json.loads(ended.stdout))
    return {f"reader ended: {ended.tail(300)}": 1}
