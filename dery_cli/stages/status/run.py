"""What a workspace has, what of it is out of date, and what comes next; nothing is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from dery_cli.errors import DeryError, StaleError
from dery_cli.io.artifacts import Workspace, is_there, read_record
from dery_cli.sizes import show_count, show_decimals
from dery_cli.stages.assemble.store import ASSEMBLY, FRONTIER_FILE
from dery_cli.stages.embed.store import EMBED_HINT, Embeddings, read_embeddings
from dery_cli.stages.finetune.store import RUN
from dery_cli.stages.partition.store import require_partition
from dery_cli.stages.sim.store import require_similarity
from dery_cli.zoo.found import made_by
from dery_cli.zoo.registry import Zoo, require_zoo

DONE, STALE, MISSING, DAMAGED = "done", "stale", "missing", "damaged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One artifact.

    Args:
        stage: That writes it.
        name: Of several; empty where there is one.
        state: One of ``done``, ``stale``, ``missing``, ``damaged``.
        words: What it is, or what is wrong with it.
        command: That makes it, or makes it anew; None where it is done.
    """

    stage: str
    name: str
    state: str
    words: str
    command: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """A workspace at a glance.

    Args:
        rows: In the order of the stages.
        next: The command to run now; None where all is done.
    """

    rows: list[Row]
    next: str | None


def status(space: Workspace) -> Status:
    """Look at every record of a workspace, and at the parents that it names."""
    rows = list(_rows(space))
    order = {MISSING: 1, STALE: 0, DAMAGED: 0}
    waiting = [row for row in rows if row.state != DONE]
    return Status(
        rows=rows,
        next=min(waiting, key=lambda row: order[row.state]).command if waiting else None,
    )


def _rows(space: Workspace) -> Iterator[Row]:
    zoo, row = _zoo(space)
    yield row
    if zoo is None:
        return
    embeddings, row = _embeddings(space, zoo)
    yield row
    if embeddings is None:
        return
    yield from _similarities(space, embeddings)

    def sets() -> str:
        stored = require_partition(space, embeddings)
        return f"{len(stored.partition.anchors)} sets of the blocks of {len(stored.names)} donors"

    there = is_there(space.partition)
    yield _looked_at("partition", "", sets, there=there, command="dery partition")
    networks = [*_folders(space.root / "assemblies"), *_folders(space.root / "runs")]
    for folder in networks:
        yield _network(folder, embeddings)
    if not networks:
        yield Row(
            stage="assemble",
            name="",
            state=MISSING,
            words="no network was assembled",
            command="dery assemble --max-params SIZE",
        )


def _zoo(space: Workspace) -> tuple[Zoo | None, Row]:
    try:
        zoo = require_zoo(space)
    except DeryError as error:
        state = MISSING if isinstance(error, StaleError) else DAMAGED
        return None, Row(
            stage="zoo add", name="", state=state, words=error.message, command=error.hint
        )
    return zoo, Row(stage="zoo add", name="", state=DONE, words=f"{len(zoo)} donors")


def _embeddings(space: Workspace, zoo: Zoo) -> tuple[Embeddings | None, Row]:
    try:
        found = read_embeddings(space, zoo)
    except DeryError as error:
        there = space.embeddings.is_dir()
        return None, Row(
            stage="embed",
            name="",
            state=_state(error, there=there),
            words=error.message,
            command=error.hint or EMBED_HINT,
        )
    used = found.calibration
    words = f"{len(found.zoo)} donors on {len(used.indices)} images of {used.spec}"
    return found, Row(stage="embed", name="", state=DONE, words=words)


def _similarities(space: Workspace, embeddings: Embeddings) -> Iterator[Row]:
    folder = space.root / "similarity"
    found = sorted(path for path in folder.glob("*.json") if not path.name.endswith(".log.json"))
    for path in found:

        def words(metric: str = path.stem) -> str:
            return f"{len(require_similarity(space, embeddings, metric).index)} nodes compared"

        command = f"dery sim --metric {path.stem}"
        yield _looked_at("sim", path.stem, words, there=True, command=command)
    if not found:
        yield Row(stage="sim", name="", state=MISSING, words="not compared", command="dery sim")


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if path.is_dir())


def _network(folder: Path, embeddings: Embeddings) -> Row:
    """A folder of an assembly or a run."""
    is_run = folder.parent.name == "runs"
    stage, kind = ("finetune", RUN) if is_run else ("assemble", ASSEMBLY)
    path = folder / f"{kind.name}.json"
    command = made_by(path, kind)
    if not is_run and not is_there(path) and (folder / FRONTIER_FILE).is_file():
        return Row(stage=stage, name=folder.name, state=DONE, words=f"a frontier: {FRONTIER_FILE}")

    def words() -> str:
        record = read_record(path, kind, missing=f"{folder} is unfinished", hint=command)
        _check_parents(record.parents, embeddings, command)
        data = record.data
        told = f"{show_count(data['params'])} params"
        top1 = data["test_top1"]
        return told if top1 is None else f"{told}, test top-1 {show_decimals(top1)}"

    return _looked_at(stage, folder.name, words, there=True, command=command)


def _check_parents(parents: Mapping[str, str], embeddings: Embeddings, command: str) -> None:
    """Whether an assembly was made of the embeddings that are there.

    Raises:
        StaleError: It was not.
    """
    now = {f"embedding/{name}": sha for name, sha in embeddings.hashes.items()}
    was = {name: sha for name, sha in parents.items() if name.startswith("embedding/")}
    if was and was != now:
        raise StaleError("it was made of other embeddings", command)


def _looked_at(
    stage: str, name: str, words: Callable[[], str], *, there: bool, command: str
) -> Row:
    try:
        return Row(stage=stage, name=name, state=DONE, words=words())
    except DeryError as error:
        return Row(
            stage=stage,
            name=name,
            state=_state(error, there=there),
            words=error.message,
            command=command,
        )


def _state(error: DeryError, *, there: bool) -> str:
    if not isinstance(error, StaleError):
        return DAMAGED
    return STALE if there else MISSING
