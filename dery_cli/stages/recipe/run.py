"""The recipe stage: the steps of a recipe, run or told; who runs a line is given."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dery_cli.data.samples import fingerprint
from dery_cli.data.sets import open_data
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace, is_there
from dery_cli.io.files import file_sha256
from dery_cli.io.records import json_sha256
from dery_cli.runtime.terminal import Terminal, current_terminal, use_terminal
from dery_cli.sizes import show_count
from dery_cli.stages.recipe.config import Recipe
from dery_cli.stages.recipe.steps import Step, inserted
from dery_cli.stages.recipe.store import Memo, snapshot
from dery_cli.zoo.found import target_of
from dery_cli.zoo.manifest import load_manifest
from dery_cli.zoo.registry import default_name, parse_spec, plugin_sha256, read_zoo

DONE, UP_TO_DATE, WOULD_RUN = "done", "up to date", "would run"
COMPUTED = ("eval", "export", "report")
"""Commands that compute anew whenever they are called."""
KEPT = (*COMPUTED, "zoo add")
"""Commands that take their time where nothing changed: their results are kept here."""

RunLine = Callable[[Sequence[str]], Any]
"""Runs ``dery WORDS`` and gives its result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A step that was run, or looked at.

    Args:
        section: Label of the table it comes from.
        line: Of that table.
        makes: What it makes, in words.
        command: As it may be typed.
        state: ``done``, ``up to date`` or ``would run``.
        words: What it would take, in words.
        seconds: It took.
        result: Of the command; what its own ``--dry-run`` gives where nothing was run.
    """

    section: str
    line: int
    makes: str
    command: str
    state: str
    words: str = ""
    seconds: float = 0.0
    result: Any = None


class RecipeRun:
    """The steps of a recipe in a workspace."""

    def __init__(
        self, terminal: Terminal, space: Workspace, recipe: Recipe, run_line: RunLine
    ) -> None:
        self._terminal, self._space, self._recipe = terminal, space, recipe
        self._run_line = run_line
        self._memo = Memo.of(space)

    def run(self, steps: Sequence[Step]) -> list[Done]:
        """Run the steps in order; each stage skips what it finds up to date.

        Raises:
            DeryError: A stage failed; the message says which, and its exit code is kept.
        """
        done: list[Done] = []
        for number, step in enumerate(steps, start=1):
            self._terminal.say()
            told = f"[{number}/{len(steps)}] $ {self._shown(step)}"
            self._terminal.say(told, style="bold cyan")
            try:
                done.append(self._run_one(step))
            except DeryError as error:
                line, label = step.section.place()
                error.message = f"{self._recipe.file}:{line}: {label}: {error.message}"
                so_far = [dataclasses.asdict(one) for one in done]
                where = {"section": label, "line": line, "steps": so_far}
                error.details = {**(error.details or {}), **where}
                raise
        return done

    def _run_one(self, step: Step) -> Done:
        started = time.monotonic()
        kept = step.command in KEPT
        seen = self._seen(step) if kept else {}
        result = None if not kept or seen is None else self._memo.unchanged(step, seen)
        state = UP_TO_DATE
        if result is None:
            before = snapshot(self._space.root)
            force = step.force if self._memo.knows(step) else ()
            result = self._call(inserted(step.words, force), self._terminal.quiet)
            if step.command in COMPUTED or snapshot(self._space.root) != before:
                state = DONE
            if seen is not None:
                self._memo.keep(step, seen, result if kept else {})
        else:
            self._terminal.say("up to date")
        return self._done(step, state, seconds=time.monotonic() - started, result=result)

    def _call(self, words: Sequence[str], quiet: bool) -> Any:
        """The result of a line; its warnings become those of the recipe's terminal."""
        terminal = self._terminal
        flags = {"--json": terminal.json, "--quiet": quiet, "--verbose": terminal.verbose}
        place = ["--workspace", str(self._space.root)]
        given = [*place, *(flag for flag, wanted in flags.items() if wanted)]
        try:
            return self._run_line(inserted(words, given))
        finally:
            terminal.warnings += current_terminal().warnings
            use_terminal(terminal)

    def _seen(self, step: Step) -> dict[str, str] | None:
        """Hashes of what a step reads elsewhere; None where it cannot be read."""
        values = step.section.values
        if step.command == "report":
            return {}
        if step.command == "zoo add":
            return _listed(values)
        spec, what = values.get("data"), values.get("what")
        try:
            if spec is None:
                spec = target_of(self._space.root / str(what)) if what else None
            if spec is None:
                return None
            data = open_data(str(spec))
            return {} if data.test is None else {"test images": fingerprint(data.test)}
        except DeryError:
            return None

    def dry_run(self, steps: Sequence[Step]) -> list[Done]:
        """Say what ``run`` would do, and what it would take; nothing is done."""
        told: list[Done] = []
        fresh = True  # nothing before needs to be run
        for step in steps:
            seen = self._seen(step) if step.command in KEPT else {}
            known = seen is not None and self._memo.unchanged(step, seen) is not None
            one = self._told(step, known=known, fresh=fresh)
            fresh = fresh and one.state == UP_TO_DATE
            told.append(one)
        return told

    def _told(self, step: Step, *, known: bool, fresh: bool) -> Done:
        if step.command == "zoo add":
            words = "" if known else self._donors(step.section.values)
            return self._done(step, UP_TO_DATE if known else WOULD_RUN, words=words)
        if not fresh:
            return self._done(step, WOULD_RUN, words="after what comes before it")
        if step.command == "embed":
            return self._asked(step, known=known)
        if known:
            return self._done(step, UP_TO_DATE)
        if step.command == "assemble":
            return self._asked(step, known=False)
        return self._done(step, WOULD_RUN)

    def _asked(self, step: Step, *, known: bool) -> Done:
        """What the command's own dry run says; it has nothing to explain."""
        words = [word for word in step.words if word != "--explain"]
        try:
            found = self._call(inserted(words, ["--dry-run"]), True)
        except DeryError as error:
            return self._done(step, WOULD_RUN, words=error.message)
        disk = f"about {show_count(found['bytes'])} bytes of disk"
        if step.command == "embed":
            if known and not found["bytes_per_donor"]:
                return self._done(step, UP_TO_DATE, result=found)
            told = f"{found['samples']} images through {len(found['embedded'])} donors, {disk}"
        else:
            told = (
                f"{found['builds']} networks built and {found['finalists']} tried, about "
                f"{show_count(found['multiply_adds'])} multiply-adds, roughly "
                f"{found['seconds'] / 60:.1f} min, {disk}"
            )
        return self._done(step, WOULD_RUN, words=told, result=found)

    def _donors(self, values: Mapping[str, Any]) -> str:
        """What is still to be added to the zoo, and which weights are not at hand."""
        specs = values.get("specs", [])
        name = values.get("as")
        entries: list[tuple[str, str | None, Path | None]] = [
            (spec, name, Path(values["weights"]) if "weights" in values else None)
            for spec in ([specs] if isinstance(specs, str) else specs)
        ]
        if "manifest" in values:
            listed = load_manifest(values["manifest"])
            entries += [(entry.spec, entry.name, entry.weights) for entry in listed]
        zoo = read_zoo(self._space) if is_there(self._space.zoo) else None
        there = set() if zoo is None else set(zoo.names())
        fetched, by_hand, new = [], [], 0
        for spec, given, weights in entries:
            parsed = parse_spec(spec)
            if (given or default_name(parsed)) in there:
                continue
            new += 1
            if weights is not None:
                by_hand += [] if weights.is_file() else [str(weights)]
            elif values.get("pretrained", True) and plugin_sha256(parsed) is None:
                fetched.append(spec)
        words = [f"{new} of {len(entries)} models to add"] if new else []
        if fetched:
            words.append(f"to download, where not in a cache: {', '.join(fetched)}")
        if by_hand:
            words.append(f"missing, to be fetched by hand: {', '.join(by_hand)}")
        return "; ".join(words)

    def _shown(self, step: Step) -> str:
        return shlex.join(["dery", *step.words])

    def _done(self, step: Step, state: str, **more: Any) -> Done:
        line, label = step.section.place()
        shown = self._shown(step)
        return Done(section=label, line=line, makes=step.key, command=shown, state=state, **more)


def _listed(values: Mapping[str, Any]) -> dict[str, str] | None:
    """Hashes of the checkpoints that a zoo's table names, and of what its manifest says."""
    try:
        entries = load_manifest(values["manifest"]) if "manifest" in values else []
        files = [entry.weights for entry in entries if entry.weights is not None]
        files += [Path(values["weights"])] if "weights" in values else []
        found = {str(path): file_sha256(path) for path in files}
    except OSError:
        return None
    return {**found, "manifest": json_sha256([repr(entry) for entry in entries])}


def free_bytes(root: Path) -> int:
    """Free space of the disk that a workspace is, or would be, on."""
    place = root.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
