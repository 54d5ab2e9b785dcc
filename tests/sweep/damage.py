"""Damaged files of a workspace: every kind of damage, before every command that reads the file.

A reader may say so, naming the file and a command that helps, or do without the file; it must not
crash, hang, or answer something else. The command that it names must help, and the stage that wrote
the file must write it again to the same bytes.
"""

from __future__ import annotations

import collections
import json
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.sweep.commands import TIMEOUT, Ended
from tests.sweep.harness import Case, Section, rewritten
from tests.sweep.reference import (
    STAGES,
    differences,
    file_sha256,
    files_of,
    is_log,
    sha256,
    shown,
)

Consumer = tuple[str, ...]
"""The words of a command, or one of the two ways below."""
LOAD = "load_assembly"
UNFINISHED = ("finetune without run.json",)

ASSEMBLE = tuple(STAGES["assemble"])
FINETUNE = tuple(STAGES["finetune"])
ASSEMBLE_OTHER = (*ASSEMBLE, "--name", "other")
EVAL = ("eval", "--json")
EVAL_RUN = ("eval", "runs/default", "--json")
EVAL_ASSEMBLY = ("eval", "assemblies/default", "--json")
LOAD_RUN = (LOAD, "runs/default")
LOAD_ASSEMBLY = (LOAD, "assemblies/default")
EMBED, SIM, PARTITION = (tuple(STAGES[stage]) for stage in ("embed", "sim", "partition"))


class Reading(NamedTuple):
    """Who reads files of a name, and which stage writes them.

    Args:
        pattern: Of the name.
        consumers: Who reads them; none where nobody does.
        producer: The stage; None where its rerun does not write the file again.
        unfinished: The stage writes it only as long as the run is not finished.
    """

    pattern: str
    consumers: tuple[Consumer, ...]
    producer: str | None = None
    unfinished: bool = False


READINGS = (
    Reading(r"zoo\.json", (("zoo", "list", "--json"), EMBED, SIM, EVAL, LOAD_RUN), "zoo"),
    Reading(
        r"embeddings/.*(?<!log)\.json|embeddings/.*\.safetensors",
        (SIM, PARTITION, ASSEMBLE),
        "embed",
    ),
    Reading(r"similarity/cka\.(json|safetensors)", (PARTITION, ASSEMBLE), "sim"),
    Reading(r"partition\.json", (ASSEMBLE, EVAL), "partition"),
    Reading(r"scores\.json|targets/.*|builds/.*", (ASSEMBLE_OTHER,)),
    Reading(r"assemblies/default/assembly\.log\.json", (ASSEMBLE,)),
    Reading(r"assemblies/.*", (EVAL_ASSEMBLY, LOAD_ASSEMBLY, FINETUNE), "assemble"),
    Reading(r"runs/default/(run\.json|model\.safetensors)", (EVAL_RUN, EVAL, LOAD_RUN), "finetune"),
    Reading(r"runs/default/run\.log\.json", (FINETUNE,)),
    Reading(
        r"runs/default/(metrics\.jsonl|last-.*|best-.*)",
        ((*FINETUNE, "--resume"), UNFINISHED),
        "finetune",
        unfinished=True,
    ),
    Reading(r".*\.log\.json", ()),
)
ALL = 10**9


class Damage(NamedTuple):
    """One way to damage a file; ``data`` is what it holds then, None where it is deleted."""

    kind: str
    what: str
    data: bytes | None


class Damaged(NamedTuple):
    """A file of the workspace, and what is done to it."""

    name: str
    damage: Damage

    def apply(self, workspace: Path) -> None:
        rewritten(workspace / self.name, self.damage.data)

    def __str__(self) -> str:
        return f"{self.name} {self.damage.what} ({self.damage.kind})"


def cases(section: Section) -> Iterator[Case]:
    consumption = Consumption(section)
    for name, data in files_to_damage(section.reference.after("finetune")):
        reading = next(row for row in READINGS if re.fullmatch(row.pattern, name))
        healed: collections.Counter[str] = collections.Counter()
        # one donor in full is enough
        light = name.startswith("embeddings/") and "resnext" not in name
        for damage in damages(section, name, data, light=light):
            if damage.data == data or not reading.consumers:
                continue
            damaged = Damaged(name, damage)
            for consumer in reading.consumers:
                run = partial(consumption.check, damaged, consumer, reading)
                yield Case(f"{damaged}: {' '.join(consumer)}", run)
            healed[damage.kind] += 1
            if reading.producer and healed[damage.kind] <= most_reruns(reading, damage.kind):
                run = partial(check_rerun, section, damaged, reading)
                yield Case(f"{damaged}: rerun of {reading.producer}", run)


def files_to_damage(workspace: Path) -> Iterator[tuple[str, bytes]]:
    """All but the locks; of the many memos of built networks the first."""
    memo = False
    for name, path in files_of(workspace).items():
        if name.endswith(".lock") or (memo and name.startswith("builds/")):
            continue
        memo |= name.startswith("builds/")
        yield name, path.read_bytes()


def most_reruns(reading: Reading, kind: str) -> int:
    """How many damages of a kind to have repaired; some stages take long."""
    if reading.producer == "assemble":
        return 1
    return 2 if kind in ("flipped", "wrong field type") else ALL


def damages(section: Section, name: str, data: bytes, *, light: bool) -> Iterator[Damage]:
    yield Damage("truncated", "half", data[: len(data) // 2])
    for what, changed in flips(data, section.random_for(name)):
        yield Damage("flipped", what, changed)
    yield Damage("emptied", "empty", b"")
    yield Damage("deleted", "deleted", None)
    if light or not name.endswith((".json", ".jsonl")):
        return
    for text in ("[]", "null", "{}", '"text"'):
        yield Damage("other JSON", text, f"{text}\n".encode())
    record = json.loads(data) if name.endswith(".json") else None
    if isinstance(record, dict) and "version" in record:
        source = "zoo.json" if "partition" in name else "partition.json"
        for kind, what, other in other_records(record, section.reference.read(source)):
            yield Damage(kind, what, json.dumps(other, indent=1).encode())


def flips(data: bytes, generator: random.Random, number: int = 5) -> Iterator[tuple[str, bytes]]:
    """One byte is changed, at several places."""
    for _ in range(number if data else 0):
        place = generator.randrange(len(data))
        change = generator.randrange(1, 256)
        changed = bytes([data[place] ^ change])
        yield f"flip byte {place} ^{change:#x}", data[:place] + changed + data[place + 1 :]


def other_records(
    record: dict[str, object], other: dict[str, object]
) -> Iterator[tuple[str, str, object]]:
    """Records that are JSON, and not what they should be."""
    for version in (99, 0, "two", None, [1], 1.5):
        yield "other version", f"version {json.dumps(version)}", {**record, "version": version}
    yield "other record", f"record of {other['format']}", other
    for field in ("parents", "options", "files", "data"):
        if field in record:
            for wrong in ([1, 2], None):
                what = f"{field} {json.dumps(wrong)}"
                yield "wrong field type", what, {**record, field: wrong}
    yield "wrong field type", "sha256 null", {**record, "sha256": None}
    yield "wrong field type", "NaN in data", {**record, "data": {"x": float("nan")}}


class Consumption:
    """What commands make of damaged files, against what they make of whole ones."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._whole: dict[Consumer, object] = {}
        self._hinted: set[tuple[object, ...]] = set()

    def of_whole(self, consumer: Consumer) -> object:
        """What the consumer comes to in an undamaged workspace."""
        if consumer not in self._whole:
            with self._section.finished() as workspace:
                ended, value = consume(self._section, consumer, workspace)
            assert ended.code == 0, (consumer, ended.tail())
            self._whole[consumer] = value
        return self._whole[consumer]

    def check(self, damaged: Damaged, consumer: Consumer, reading: Reading) -> None:
        section, kind = self._section, damaged.damage.kind
        wanted = self.of_whole(consumer)
        with section.finished() as workspace:
            damaged.apply(workspace)
            ended, value = consume(section, consumer, workspace)
            verdict = judge(ended, damaged.name, same=value == wanted)
            section.count(f"{kind}: {verdict}")
            section.count(verdict)
            section.count("cases")
            bad = ("traceback", "hang", "SILENTLY", "died", "exit")
            if verdict.startswith(bad) or "not named" in verdict or "no command" in verdict:
                what = f"{damaged} -> {shown(consumer)}: {verdict}"
                section.fail(what, ended, value=str(value), reference=str(wanted))
            once = (damaged.name, kind, shown(consumer), ended.stderr.partition(":")[0], ended.code)
            told = ended.code in (1, 4) and not ended.traceback
            if told and consumer != UNFINISHED and once not in self._hinted:
                self._hinted.add(once)
                self._follow_hint(damaged, consumer, reading, workspace, ended)

    def _follow_hint(
        self,
        damaged: Damaged,
        consumer: Consumer,
        reading: Reading,
        workspace: Path,
        ended: Ended,
    ) -> None:
        """Run the command that the message names, if it names a stage; it must help."""
        section = self._section
        stages = re.findall(r"dery (zoo add|embed|sim|partition|assemble|finetune)", ended.stderr)
        if not stages:
            return
        resume = "--resume" in ended.stderr
        stage = stages[-1].removesuffix(" add")
        if stage == reading.producer and not resume:
            section.count("hints at the stage that writes it")  # its rerun is a case of its own
            return
        fix = section.commands.forked([*STAGES[stage], *["--resume"] * resume], workspace)
        again, value = consume(section, consumer, workspace)
        helped = fix.code == 0 and again.code == 0 and value == self.of_whole(consumer)
        if fix.code == 0 and again.code == 4 and stage in ("embed", "sim", "partition"):
            helped = True  # a later stage is stale now, and says so
        section.count(f"hint at {stage} {'works' if helped else 'FAILS'}")
        if not helped:
            codes = f"fix exit {fix.code}, then exit {again.code}"
            what = f"{damaged} -> {shown(consumer)}: hint '{stage}' does not repair ({codes})"
            section.fail(what, fix, first=ended.tail(400))


def consume(section: Section, consumer: Consumer, workspace: Path) -> tuple[Ended, object]:
    """Run a reader, and say what it came to: its answer, or the hashes of what it wrote."""
    if consumer[0] == LOAD:
        ended = section.commands.load_assembly(workspace / consumer[1])
        return ended, ended.stdout.strip()
    if consumer == UNFINISHED:
        (workspace / "runs/default/run.json").unlink(missing_ok=True)
        return section.commands.forked(FINETUNE, workspace), run_hashes(workspace)
    ended = section.commands.forked(consumer, workspace)
    if consumer[0] == "eval":
        try:
            return ended, json.loads(ended.stdout)["result"]["top1"]
        except (ValueError, KeyError, TypeError):
            return ended, None
    if consumer[0] == "zoo":
        return ended, sha256(ended.stdout.encode())
    if consumer[0] == "finetune":
        return ended, run_hashes(workspace)
    if consumer[0] == "embed":
        names = [name for name in files_of(workspace) if name.startswith("embeddings/")]
        return ended, [file_sha256(workspace / name) for name in names if not is_log(name)]
    assembly = "other" if "other" in consumer else "default"
    written = {
        "sim": "similarity/cka.safetensors",
        "partition": "partition.json",
        "assemble": f"assemblies/{assembly}/model.safetensors",
    }
    return ended, file_sha256(workspace / written[consumer[0]])


def run_hashes(workspace: Path) -> list[str | None]:
    run = workspace / "runs/default"
    return [file_sha256(run / name) for name in ("run.json", "model.safetensors")]


def judge(ended: Ended, name: str, *, same: bool) -> str:
    """What a consumer made of a damaged file, in words."""
    if ended.code == TIMEOUT:
        return "hang"
    if ended.crashed:
        return "traceback"
    if ended.code == 0:
        return "as if whole" if same else "SILENTLY DIFFERENT"
    if ended.killed_by:
        return f"died of signal {ended.killed_by}"
    if ended.code not in (1, 4):
        return f"exit {ended.code}"
    named = any(word in ended.text for word in (name, Path(name).name.split(".")[0]))
    error = ended.stderr.partition("error:")[2]
    helps = "dery " in error or "rerun" in ended.stderr or "fine-tune again" in ended.stderr
    missing = ("" if named else ", file not named") + ("" if helps else ", no command")
    return f"error {ended.code}{missing}"


def check_rerun(section: Section, damaged: Damaged, reading: Reading) -> None:
    """The stage that writes the file must write it again, to the same bytes."""
    stage, whole = reading.producer, section.reference.after("finetune")
    assert stage is not None
    with section.finished() as workspace:
        damaged.apply(workspace)
        if reading.unfinished:
            (workspace / "runs/default/run.json").unlink()
        ended = section.commands.forked(STAGES[stage], workspace)
        found = differences(workspace, whole)
        same = all(
            name == damaged.name
            and damaged.damage.data is not None
            and same_but_libraries(workspace / name, whole / name)
            for name in found.changed
        )
        repaired = ended.code == 0 and not ended.traceback
        repaired = repaired and same and not found.missing and not found.extra
        section.count(f"rerun of its stage {'repairs' if repaired else 'FAILS'}")
        if not repaired:
            section.fail(f"{damaged}: rerun of {stage} exit {ended.code}: {found}", ended)


def same_but_libraries(one: Path, other: Path) -> bool:
    """A record's library versions are not covered by its identity."""
    try:
        records = [json.loads(path.read_text()) for path in (one, other)]
        for record in records:
            del record["libraries"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(records[0] == records[1])
