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
        words_of(recipe, section, options[section.command])  # as it was written, for its faults
        for step in _steps(recipe, section, options[section.command], assemblies, runs):
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


def _steps(
    recipe: Recipe,
    section: Section,
    options: Mapping[str, Option],
    assemblies: list[str],
    runs: list[str],
) -> list[Step]:
    """Those of one table; names of what it makes are added to ``assemblies`` and ``runs``."""
    values = dict(section.values)

    def told(key: str) -> str:
        return str(values.get(key, options[key].default))

    def step(key: str, records: Sequence[str], *, several: str | None = None, **more: Any) -> Step:
        return _step(recipe, section, options, {**values, **more}, key, records, several)

    if section.name == "zoo":
        return [step(section.label, ("zoo.json",))]
    if section.name == "embed":
        data = {"data": recipe.general["data"]} if "data" in recipe.general else {}
        return [step("embeddings", _EMBEDDED, **{**data, **values})]
    if section.name == "sim":
        metric = told("metric")
        return [step(f"similarity {metric}", (*_EMBEDDED, f"similarity/{metric}.json"))]
    if section.name == "partition":
        read = (*_EMBEDDED, f"similarity/{told('metric')}.json")
        return [step("partition", (*read, "partition.json"))]
    if section.name == "assemble":
        made = []
        for key, limits in _budgets(recipe, section).items():
            name = budget_name(told("name"), key)
            chosen = {option.removeprefix("--"): text for option, text in limits.items()}
            reads = (*_EMBEDDED, "partition.json", f"assemblies/{name}/assembly.json")
            made.append(step(f"assembly '{name}'", reads, **chosen, name=name))
            assemblies.append(name)
        return made
    if section.name == "finetune":
        given = "assembly" in values or "donor" in values
        starts = [told("assembly")] if given else assemblies or [told("assembly")]
        made = []
        for start in starts:
            name = str(values.get("name", values.get("donor", start)))
            name = f"{name}-{start}" if "name" in values and len(starts) > 1 else name
            source = {} if "donor" in values else {"assembly": start}
            origin = "zoo.json" if "donor" in values else f"assemblies/{start}/assembly.json"
            records = (origin, f"runs/{name}/run.json")
            made.append(step(f"run '{name}'", records, **source, name=name))
            runs.append(name)
        return made
    if section.name == "report":
        names = [told("name")] if "name" in values else assemblies or [told("name")]
        return [
            step(
                f"report of '{name}'",
                (*_EMBEDDED, "similarity/*.json", "partition.json", "*/" + name + "/*.json"),
                several=name if len(names) > 1 else None,
                name=name,
            )
            for name in names
        ]
    networks = [f"runs/{name}" for name in runs] or [f"assemblies/{name}" for name in assemblies]
    if "what" in values or not networks:
        what = str(values.get("what", ""))
        return [step(f"{section.label} {what}".strip(), (f"{what or '*/default'}/*.json",))]
    return [
        step(
            f"{section.label} of {network}",
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
            check([*step.words, *step.force])
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
