"""Records written by hand, with the hashes that dery would give them, and broken JSON."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.sweep.harness import Case, Section
from tests.sweep.hostile import ESCAPES, SECONDS, Victim, expect, limited, victim
from tests.sweep.reference import STAGES, put, resealed, shown

Record = dict[str, Any]
Change = Callable[[Record], object]

ASSEMBLY = "assemblies/default"
LOAD = ["load_assembly"]
UNFINISHED = ["finetune without run.json"]
OTHER = [*STAGES["assemble"], "--name", "other"]
SHOW, REMOVE = ["zoo", "show"], ["zoo", "remove"]
ZOO_COMMANDS = (
    ["zoo", "list"],
    ["zoo", "list", "--json"],
    SHOW,
    *(STAGES[stage] for stage in ("embed", "sim", "partition", "assemble")),
    REMOVE,
)


def cases(section: Section) -> Iterator[Case]:
    for what, bad in DONORS.items():
        for args in ZOO_COMMANDS:
            run = partial(attack_zoo, section, what, bad, args)
            yield Case(f"zoo.json ({what}): {' '.join(args)}", run)
    for what, change in ASSEMBLIES.items():
        for args in (["eval", ASSEMBLY], LOAD, STAGES["finetune"], STAGES["assemble"]):
            touches = what.startswith(("network", "escapes", "classes"))
            if args != STAGES["assemble"] or touches:
                run = partial(
                    attack_record, section, f"{ASSEMBLY}/assembly.json", what, change, args
                )
                yield Case(f"assembly.json ({what}): {args[0]}", run)
    for name, args in OTHER_RECORDS:
        for what, change in EMPTIED.items():
            run = partial(attack_record, section, name, what, change, args)
            yield Case(f"{name} ({what})", run)
    for name, args in PENDING_READERS:
        for what in pending_texts(b""):
            yield Case(
                f"{name}.pending ({what})", partial(attack_pending, section, name, what, args)
            )
    yield Case("a pending record that names a file elsewhere", partial(pending_elsewhere, section))
    for what, make in BROKEN_JSON.items():
        for name, args in JSON_READERS:
            run = partial(attack_json, section, name, what, make, args)
            yield Case(f"{name} ({what}): {' '.join(args)}", run)


class Bait:
    """What a hostile donor may point at: a victim outside of the workspace."""

    def __init__(self, outside: Victim, workspace: Path) -> None:
        self.outside = outside
        self.workspace = workspace

    def from_folder(self, name: str) -> str:
        """The victim's folder, as it is seen from a folder of the workspace."""
        return os.path.relpath(self.outside.folder, self.workspace / name)

    def fifo(self) -> str:
        path = self.outside.folder / "fifo"
        os.mkfifo(path)
        return str(path)


def weights(path: str) -> Record:
    return {"weights": path, "pretrained": False}


def node(**fields: object) -> Callable[[Record, Bait], Record]:
    """A donor whose second node has other fields."""

    def change(donor: Record, _bait: Bait) -> Record:
        anatomy = copy.deepcopy(donor["anatomy"])
        anatomy["nodes"][1].update(fields)
        return {"anatomy": anatomy}

    return change


def huge(donor: Record, _bait: Bait) -> Record:
    return {"input": {**donor["input"], "image_size": [2**40, 2**40]}}


DONORS: Mapping[str, Callable[[Record, Bait], Record]] = {
    "relative name": lambda _, bait: {"name": f"{bait.from_folder('embeddings')}/x"},
    "absolute name": lambda _, bait: {"name": f"{bait.outside.folder}/x"},
    "relative weights": lambda _, bait: weights(f"{bait.from_folder('.')}/keep.txt"),
    "absolute weights": lambda _, bait: weights(f"{bait.outside.folder}/keep.txt"),
    "weights is a device": lambda _, bait: weights("/dev/zero"),
    "weights is a FIFO": lambda _, bait: weights(bait.fifo()),
    "escapes in task": lambda _, bait: {"task": ESCAPES},
    "escapes in name": lambda _, bait: {"name": f"a{ESCAPES}"},
    "huge image_size": huge,
    "negative node": node(shape=[-5, 2**62]),
    "unknown layout": node(layout="ABC"),
    "spec of no plugin": lambda _, bait: {"spec": "nowhere/x"},
    "spec with slashes": lambda _, bait: {"spec": "demo/../../../etc/passwd"},
    "donors is a dict": lambda _, bait: {"donors": {"a": 1}},
    "donor is a number": lambda _, bait: {"donors": [7]},
}
"""What is changed in the first donor; a change called "donors" replaces all of them."""


def attack_zoo(
    section: Section, what: str, bad: Callable[[Record, Bait], Record], args: list[str]
) -> None:
    with section.finished() as workspace, victim(section) as outside:
        record = section.reference.read("zoo.json")
        donor = record["data"]["donors"][0]
        changes = bad(donor, Bait(outside, workspace))
        if "donors" in changes:
            record["data"] = changes
        else:
            donor.update(changes)
        put(workspace / "zoo.json", resealed(record))
        words = [*args, "--", donor["name"]] if args in (SHOW, REMOVE) else args
        ended = section.commands.forked(words, workspace, SECONDS, hook=limited())
        label = f"zoo.json ({what}): {' '.join(args[:2])}"
        expect(section, label, ended, {0, 1, 2, 4})
        if what != "weights is a FIFO":  # its content cannot be compared
            outside.check(section, label, ended)


def block(**fields: object) -> Change:
    return lambda record: record["data"]["network"]["blocks"][0].update(fields)


def net(**fields: object) -> Change:
    return lambda record: record["data"]["network"].update(fields)


def data(**fields: object) -> Change:
    return lambda record: record["data"].update(fields)


def images(**fields: object) -> Change:
    return lambda record: record["data"]["network"]["input"].update(fields)


def file(name: str) -> Change:
    return lambda record: record["files"].update({name: "0" * 64})


def first_joint(record: Record) -> Record:
    found: Record = next(joint for joint in record["data"]["network"]["joints"] if joint)
    return found


ASSEMBLIES: Mapping[str, Change] = {
    "donor ../": block(donor="../../../x"),
    "spec ../": block(spec="demo/../../x"),
    "spec no slash": block(spec="x"),
    "spec unknown plugin": block(spec="nope/x"),
    "spec is a number": block(spec=5),
    "stop beyond": block(stop=99),
    "stop negative": block(stop=-1),
    "start beyond stop": block(start=5, stop=1),
    "start text": block(start="0"),
    "image_size huge": block(image_size=[2**31, 2**31]),
    "image_size zero": block(image_size=[0, 0]),
    "image_size text": block(image_size="ab"),
    "image_size 20000": block(image_size=[20000, 20000]),
    "head_chs 1e12": net(head_chs=10**12),
    "head_chs -1": net(head_chs=-1),
    "classes a million": net(classes=[str(number) for number in range(10**6)]),
    "classes a text": net(classes="ab"),
    "classes numbers": net(classes=[1, 2, 3]),
    "no joints": net(joints=[]),
    "joints text": net(joints="abc"),
    "blocks empty": net(blocks=[], joints=[]),
    "input without mean": lambda record: record["data"]["network"]["input"].pop("mean"),
    "input interpolation": images(interpolation="evil"),
    "input std 0": images(std=[0, 0, 0]),
    "crop 1e9": net(crop=1e9),
    "crop -1": net(crop=-1),
    "crop text": net(crop="x"),
    "network missing": lambda record: record["data"].pop("network"),
    "network a list": data(network=[1]),
    "target /etc": data(target="/etc"),
    "target missing": lambda record: record["data"].pop("target"),
    "target a number": data(target=5),
    "target a device": data(target="/dev/zero"),
    "target torchvision download": data(target="torchvision:CIFAR10?root=dl&download=1"),
    "target hf download": data(target="hf:a/b?download=1"),
    "files with ../": file("../../../../../../etc/hostname"),
    "files absolute": file("/etc/hostname"),
    "files /dev/zero": file("/dev/zero"),
    "files none": lambda record: record["files"].clear(),
    "joint shape huge": lambda record: first_joint(record)["source"].update(shape=[2**40, 2, 2]),
    "joint kind": lambda record: first_joint(record).update(stitch="evil"),
    "escapes in classes": net(classes=[f"{number}{ESCAPES}" for number in range(10)]),
    "escapes in name": data(name=ESCAPES),
}
OTHER_RECORDS = (
    ("partition.json", STAGES["assemble"]),
    ("similarity/cka.json", STAGES["partition"]),
    ("embeddings/demo__resnext.json", STAGES["sim"]),
    ("scores.json", OTHER),
    ("runs/default/run.json", ["eval", "runs/default"]),
)
EMPTIED: Mapping[str, Change] = {
    "data {}": lambda record: record.update(data={}),
    "options {}": lambda record: record.update(options={}),
    "parents {}": lambda record: record.update(parents={}),
    "data values null": lambda record: record.update(data=dict.fromkeys(record["data"])),
    "data values text": lambda record: record.update(data=dict.fromkeys(record["data"], "x")),
}


def attack_record(section: Section, name: str, what: str, change: Change, args: list[str]) -> None:
    with section.finished() as workspace:
        record = section.reference.read(name)
        change(record)
        put(workspace / name, resealed(record))
        if args == LOAD:
            load = section.commands.load_in_fork(workspace / ASSEMBLY, hook=limited())
            ended = load.finish(SECONDS)
        else:
            ended = section.commands.forked(args, workspace, SECONDS, hook=limited())
        expect(section, f"{name}, hashes recomputed ({what}): {args[0]}", ended, {0, 1, 2, 4})


PENDING_READERS = (
    ("zoo.json", ["zoo", "list"]),
    (f"{ASSEMBLY}/assembly.json", ["eval", ASSEMBLY]),
    ("partition.json", STAGES["assemble"]),
)


def pending_texts(whole: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "half": whole[:100],
        "[]": b"[]",
        "null": b"null",
        "{}": b"{}",
        "files null": b'{"files": null}',
        "files a number": b'{"files": 3}',
        "binary": b"\x80\xff",
        "deep": b"[" * 100000,
    }


def attack_pending(section: Section, name: str, what: str, args: list[str]) -> None:
    """A left-over of a write that no dery began."""
    with section.finished() as workspace:
        path = workspace / name
        path.with_name(f"{path.name}.pending").write_bytes(pending_texts(path.read_bytes())[what])
        ended = section.commands.forked(args, workspace, SECONDS)
        expect(section, f"{name}.pending ({what}): {shown(args)}", ended, {0, 1, 4})


def pending_elsewhere(section: Section) -> None:
    """A read must rename nothing outside of the folder."""
    with section.finished() as workspace, victim(section) as outside:
        kept = outside.folder / "keep.txt"
        kept.with_name("keep.txt.pending").write_text("evil")
        outside.watch()
        record = section.reference.read(f"{ASSEMBLY}/assembly.json")
        record["files"][os.path.relpath(kept, workspace / ASSEMBLY)] = "0" * 64
        put(workspace / ASSEMBLY / "assembly.json.pending", resealed(record))
        ended = section.commands.load_assembly(workspace / ASSEMBLY)
        label = "assembly.json.pending that names ../victim/keep.txt, then load_assembly (a read)"
        outside.check(section, label, ended)


BROKEN_JSON: Mapping[str, Callable[[], bytes]] = {
    "10^5 deep list": lambda: b"[" * 100000 + b"]" * 100000,
    "10^5 deep dict": lambda: b'{"a":' * 100000 + b"1" + b"}" * 100000,
    "100 MB string": lambda: (
        b'{"format": "dery/zoo", "version": 1, "x": "' + b"A" * 100_000_000 + b'"}'
    ),
    "number of 5,000 digits": lambda: b'{"format": "dery/zoo", "version": 1' + b"0" * 5000 + b"}",
}
JSON_READERS = (
    ("zoo.json", ["zoo", "list"]),
    ("zoo.json", STAGES["zoo"]),
    ("zoo.json", ["zoo", "list", "--json"]),
    ("embeddings/demo__resnext.json", STAGES["sim"]),
    ("embeddings/demo__resnext.json", STAGES["embed"]),
    ("similarity/cka.json", STAGES["partition"]),
    ("similarity/cka.json", STAGES["sim"]),
    ("partition.json", STAGES["assemble"]),
    ("partition.json", STAGES["partition"]),
    ("scores.json", OTHER),
    (f"{ASSEMBLY}/assembly.json", ["eval", ASSEMBLY]),
    (f"{ASSEMBLY}/assembly.json", STAGES["assemble"]),
    (f"{ASSEMBLY}/assembly.log.json", STAGES["assemble"]),
    ("runs/default/run.json", ["eval"]),
    ("runs/default/run.json", STAGES["finetune"]),
    ("runs/default/metrics.jsonl", UNFINISHED),
    ("runs/default/last-000020/checkpoint.json", UNFINISHED),
    ("runs/default/best-*/checkpoint.json", UNFINISHED),
)


def attack_json(
    section: Section, name: str, what: str, make: Callable[[], bytes], args: list[str]
) -> None:
    with section.finished() as workspace:
        next(workspace.glob(name)).write_bytes(make())
        words = args
        if args == UNFINISHED:
            (workspace / "runs/default/run.json").unlink()
            words = STAGES["finetune"]
        ended = section.commands.forked(words, workspace, 90, hook=limited(12))
        label = f"{name} ({what}): {' '.join(words[:2])} [{ended.seconds:.1f} s]"
        expect(section, label, ended, {0, 1, 4})
