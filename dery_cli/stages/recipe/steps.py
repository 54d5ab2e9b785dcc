"""A recipe as the command lines it stands for: one for each budget, run and output."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dery_cli.errors import DeryError, UsageError
from dery_cli.sizes import LIMITS, budget_name, split_limits
from dery_cli.stages.recipe.config import Option, Recipe, Section, words_of

Options = Mapping[str, Mapping[str, Option]]
"""Of every command, by key."""

_EMBEDDED = ("zoo.json", "embeddings/*.json")
_OUTPUTS = ("to", "figures")
"""Options that name what is written outside the workspace."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command line of a recipe.

    Args:
        section: It comes from.
        words: The command and its options.
        key: What it makes, in words that no other step has.
        records: Of the workspace, what it reads and makes, as patterns.
        outputs: What it writes elsewhere.
        force: How to replace these; empty where the command has no such option.
    """

    section: Section
    words: tuple[str, ...]
    key: str
    records: tuple[str, ...]
    outputs: tuple[Path, ...] = ()
    force: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return self.section.command


def steps_of(recipe: Recipe, options: Options) -> list[Step]:
    """The steps in the order they are run in.

    Raises:
        UsageError: A key is no option, a value of the wrong kind, or two steps make the same.
    """
    steps: list[Step] = []
    assemblies: list[str] = []
    runs: list[str] = []
    for section in recipe.sections:
        chosen = options[section.command]
        words_of(recipe, section, chosen)  # as it was written, for its faults
        for step in _Table(recipe, section, chosen, assemblies, runs).steps():
            twin = next((other for other in steps if other.key == step.key), None)
            if twin is not None:
                named = "to" if step.outputs else "name"
                raise recipe.fault(
                    step.section.place(named),
                    f"would make the {step.key} a second time, after {twin.section.label}",
                    f"give one of them another '{named}'",
                )
            steps.append(step)
    return steps


@dataclasses.dataclass(frozen=True)
class _Table:
    """One table; the names of what it makes are added to ``assemblies`` and ``runs``."""

    recipe: Recipe
    section: Section
    options: Mapping[str, Option]
    assemblies: list[str]
    runs: list[str]

    def steps(self) -> list[Step]:
        name = self.section.name
        if name == "zoo":
            return [self._step(f"donors of {self.section.label}", ("zoo.json",))]
        if name == "embed":
            told = self.recipe.general.get("data")
            data = {"data": told} if told is not None and "data" not in self._values else {}
            return [self._step("embeddings", _EMBEDDED, **data)]
        if name == "sim":
            metric = self._told("metric")
            return [self._step(f"similarity {metric}", (*_EMBEDDED, f"similarity/{metric}.json"))]
        if name == "partition":
            similarity = f"similarity/{self._told('metric')}.json"
            return [self._step("partition", (*_EMBEDDED, similarity, "partition.json"))]
        if name == "assemble":
            return self._assemblies()
        if name == "finetune":
            return self._runs()
        return self._reports() if name == "report" else self._networks()

    @property
    def _values(self) -> Mapping[str, Any]:
        return self.section.values

    def _told(self, key: str) -> str:
        return str(self._values.get(key, self.options[key].default))

    def _step(
        self, key: str, records: Sequence[str], *, several: str | None = None, **more: Any
    ) -> Step:
        values = {**self._values, **more}
        return _step(self.recipe, self.section, self.options, values, key, records, several)

    def _assemblies(self) -> list[Step]:
        """One for each budget."""
        made = []
        for key, limits in _budgets(self.recipe, self.section).items():
            name = budget_name(self._told("name"), key)
            chosen = {option.removeprefix("--"): text for option, text in limits.items()}
            records = (*_EMBEDDED, "partition.json", f"assemblies/{name}/assembly.json")
            made.append(self._step(f"assembly '{name}'", records, **chosen, name=name))
            self.assemblies.append(name)
        return made

    def _runs(self) -> list[Step]:
        """One for each assembly of the recipe, unless the table names one, or a donor."""
        values = self._values
        given = "assembly" in values or "donor" in values
        default = self._told("assembly")
        starts = [default] if given else list(self.assemblies) or [default]
        made = []
        for start in starts:
            name = str(values.get("name", values.get("donor", start)))
            name = f"{name}-{start}" if "name" in values and len(starts) > 1 else name
            source = {} if "donor" in values else {"assembly": start}
            origin = "zoo.json" if "donor" in values else f"assemblies/{start}/assembly.json"
            records = (origin, f"runs/{name}/run.json")
            made.append(self._step(f"run '{name}'", records, **source, name=name))
            self.runs.append(name)
        return made

    def _reports(self) -> list[Step]:
        """One for each assembly of the recipe, unless the table names one."""
        default = self._told("name")
        names = [default] if "name" in self._values else self.assemblies or [default]
        return [
            self._step(
                f"report of '{name}'",
                (*_EMBEDDED, "similarity/*.json", "partition.json", f"*/{name}/*.json"),
                several=name if len(names) > 1 else None,
                name=name,
            )
            for name in names
        ]

    def _networks(self) -> list[Step]:
        """One for each run of the recipe, or else each assembly, unless the table names one."""
        label = self.section.label
        networks = [f"runs/{name}" for name in self.runs]
        networks = networks or [f"assemblies/{name}" for name in self.assemblies]
        if "what" in self._values or not networks:
            what = str(self._values.get("what", ""))
            return [self._step(f"{label} {what}".strip(), (f"{what or '*/default'}/*.json",))]
        return [
            self._step(
                f"{label} of {network}",
                (f"{network}/*.json",),
                several=network.rpartition("/")[2] if len(networks) > 1 else None,
                what=network,
            )
            for network in networks
        ]


def _budgets(recipe: Recipe, section: Section) -> dict[str, dict[str, str]]:
    given = {o: str(v) for o in LIMITS if (v := section.values.get(o[2:])) is not None}
    try:
        return split_limits(given)
    except UsageError as error:
        key = next(option[2:] for option in LIMITS if option in given)
        raise recipe.fault(section.place(key), f": {error.message}", error.hint) from error


def _step(
    recipe: Recipe,
    section: Section,
    options: Mapping[str, Option],
    values: dict[str, Any],
    key: str,
    records: Sequence[str],
    several: str | None,
) -> Step:
    """A step with the values that stand for all stages; with ``several``, outputs of its own."""
    for general in ("seed", "device"):
        if general in recipe.general and general in options:
            values.setdefault(general, recipe.general[general])
    outputs = []
    for name in [name for name in _OUTPUTS if name in options]:
        place = values.get(name, options[name].default)
        if place is None:
            continue
        path = Path(str(place))
        if several is not None:
            is_file = bool(path.suffix)
            path = path.with_stem(f"{path.stem}-{several}") if is_file else path / several
            values[name] = str(path)
        outputs.append(path)
    full = dataclasses.replace(section, values=values)
    force = (options["force"].on,) if "force" in options and "force" not in values else ()
    return Step(
        section=full,
        words=(*section.command.split(), *words_of(recipe, full, options)),
        key=f"{section.command} to {outputs[0]}" if outputs else key,
        records=tuple(records),
        outputs=tuple(outputs),
        force=force,
    )


def inserted(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A line with more options, which go before its arguments."""
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at], *options, *words[at:]]


def check_steps(
    recipe: Recipe, steps: Sequence[Step], check: Callable[[Sequence[str]], None]
) -> None:
    """Have every line checked by its own command, which says what it would say on a terminal.

    Args:
        recipe: The recipe.
        steps: Its steps.
        check: Checks a command line and runs nothing.

    Raises:
        UsageError: An option is refused; the message says where it stands.
    """
    for step in steps:
        try:
            check(inserted(step.words, step.force))
        except DeryError as error:
            raise _placed(recipe, step.section, error) from error


def _placed(recipe: Recipe, section: Section, error: DeryError) -> UsageError:
    """What a command said of its options, with the line of the first that it names."""
    named = [word[2:] for word in re.findall(r"--[a-z][a-z0-9-]*", error.message)]
    for key in named:
        if key in recipe.general and key not in section.lines:
            place = (recipe.lines[key], key)
            return recipe.fault(place, f"of {section.command}: {error.message}", error.hint)
        if key in section.values:
            return recipe.fault(section.place(key), f": {error.message}", error.hint)
    line, label = section.place()
    return recipe.fault((line, label), f": {error.message}", error.hint)
