"""Recipes: the whole chain as TOML data, each key checked with its path and line.

::

    data = "path/to/images"            # of embed; other stages follow it
    workspace = ".dery"                # optional; as are seed and device, for every stage

    [[zoo]]                            # dery zoo add, once for each such table
    specs = ["timm/resnet18.a1_in1k"]

    [embed]                            # a table, or [[tables]], with a command's name
    samples = 512                      # options as the command line has them, without dashes

    [assemble]
    max-params = "5M,10M"              # an assembly for each, default-5m and default-10m

Paths are relative to the current folder, as on the command line.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dery_cli.errors import UsageError

SECTIONS = {
    "zoo": "zoo add",
    "embed": "embed",
    "sim": "sim",
    "partition": "partition",
    "assemble": "assemble",
    "finetune": "finetune",
    "eval": "eval",
    "export": "export",
    "report": "report",
}
"""Tables of a recipe and the commands they are for, in the order they are run in."""
ONCE = ("embed", "partition")
"""Stages with a single artifact: a second table would undo the first."""
GENERAL: dict[str, type] = {
    "description": str,
    "workspace": str,
    "data": str,
    "seed": int,
    "device": str,
}
NOT_HERE = {
    "json": "it is an option of dery run",
    "quiet": "it is an option of dery run",
    "verbose": "it is an option of dery run",
    "dry-run": "it is an option of dery run",
    "workspace": "all stages share the workspace that stands above the tables",
    "pareto": "it builds nothing that the next stages could use",
    "resume": "a run that was interrupted goes on by itself",
}
"""Options that a recipe has no use for, and why."""

DocumentPath = tuple[str | int, ...]
"""Where something stands in a document: names of tables and keys, and places in arrays."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """An option or argument of a command.

    Args:
        key: Its name in a recipe.
        on: As it is written on the command line; empty for an argument.
        off: What turns a flag off, or None.
        flag: It takes no value.
        count: How many values it takes; -1 for an argument that takes any number.
        multiple: It may be given several times.
        default: Value where it is not given.
    """

    key: str
    on: str
    off: str | None = None
    flag: bool = False
    count: int = 1
    multiple: bool = False
    default: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """One table of a recipe.

    Args:
        name: Of the table, one of ``SECTIONS``.
        label: The name, with its place where there are several: ``zoo[1]``.
        line: Where it begins.
        values: What it says.
        lines: Where it says it.
    """

    name: str
    label: str
    line: int
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    def place(self, key: str | None = None) -> tuple[int, str]:
        """Line and key path of a key, or of the table itself."""
        if key is None or key not in self.values:
            return self.line, self.label
        return self.lines.get(key, self.line), f"{self.label}.{key}"

    @property
    def command(self) -> str:
        return SECTIONS[self.name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe that was read.

    Args:
        file: Its file's name.
        general: What stands above the tables.
        lines: Lines of these.
        sections: The tables, in the order they are run in.
    """

    file: str
    general: Mapping[str, Any]
    lines: Mapping[str, int]
    sections: Sequence[Section]

    def fault(self, place: tuple[int, str], what: str, hint: str | None = None) -> UsageError:
        """The error that says where something is wrong."""
        line, path = place
        joined = what if what.startswith(":") else f" {what}"
        return UsageError(f"{self.file}:{line}: {path}{joined}", hint)


SHIPPED = Path(__file__).parent / "shipped"
"""The recipes that come with dery, and a workflow for CI."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with dery, by bare name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def load_recipe(text: str) -> Recipe:
    """Read a recipe by file or, for those that ship with dery, by bare name.

    Raises:
        UsageError: There is none, or something is wrong in it.
    """
    path = Path(text).expanduser()
    if not path.is_file():
        found = shipped_recipes()
        if text not in found:
            raise UsageError(
                f"no such recipe: {text}",
                f"give a TOML file (dery init writes one), or {', '.join(found)}",
            )
        path = found[text]
    try:
        raw = path.read_text(encoding="utf-8-sig")  # some editors begin with a mark
        document = tomllib.loads(raw)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path.name} is not TOML: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{path.name} is no recipe: it is nested too deeply") from error
    return _checked(path.name, document, key_lines(raw))


def key_lines(text: str) -> dict[DocumentPath, int]:
    """The line of every table and key of a TOML document.

    tomllib tells no lines, so each statement, which begins on a line of its own and ends where what
    was read so far is TOML, is read by itself.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    found: dict[DocumentPath, int] = {}
    tables: collections.Counter[str] = collections.Counter()
    below: DocumentPath = ()
    start = 0
    while start < len(lines):
        statement, stop = _statement(lines, start)
        if lines[start].lstrip().startswith("["):
            below = _header(statement, tables)
            found.setdefault(below, start + 1)
        else:
            for path in _paths(statement, below):
                found.setdefault(path, start + 1)
        start = stop
    return found


def _statement(lines: Sequence[str], start: int) -> tuple[dict[str, Any], int]:
    """The statement that begins on a line, and the line behind it."""
    for stop in range(start + 1, len(lines) + 1):
        try:
            return tomllib.loads("\n".join(lines[start:stop])), stop
        except tomllib.TOMLDecodeError:
            continue
    return {}, start + 1


def _header(statement: Mapping[str, Any], tables: collections.Counter[str]) -> DocumentPath:
    """Path of the table that a header such as ``[zoo]`` or ``[[zoo]]`` opens."""
    name, value = next(iter(statement.items()))
    if not isinstance(value, list):
        return (name, *_header(value, tables)) if value else (name,)
    tables[name] += 1
    return (name, tables[name] - 1)


def _paths(value: object, path: DocumentPath) -> Iterator[DocumentPath]:
    """The keys in a value, at any depth."""
    steps: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, dict):
        steps = value.items()
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        steps = enumerate(value)
    for step, inner in steps:
        yield (*path, step)
        yield from _paths(inner, (*path, step))


def _checked(file: str, document: Mapping[str, Any], lines: Mapping[DocumentPath, int]) -> Recipe:
    """The recipe of a document; options are checked later, by their commands."""

    def line(*path: str | int) -> int:
        while path and path not in lines:
            path = path[:-1]
        return lines.get(path, 1)

    general = {key: value for key, value in document.items() if key in GENERAL}
    recipe = Recipe(
        file=file, general=general, lines={key: line(key) for key in general}, sections=()
    )
    for key, value in document.items():
        if key in GENERAL:
            if type(value) is not GENERAL[key]:
                what = f"is {value!r}; it must be a {'text' if GENERAL[key] is str else 'number'}"
                raise recipe.fault((line(key), key), what)
        elif key not in SECTIONS:
            known = [*SECTIONS, *GENERAL]
            raise recipe.fault(
                (line(key), key), f"is no table or key of a recipe{did_you_mean(key, known)}",
                f"there are the tables {', '.join(SECTIONS)} and the keys {', '.join(GENERAL)}",
            )  # fmt: skip
    sections = []
    for name in [name for name in SECTIONS if name in document]:
        value = document[name]
        tables = value if isinstance(value, list) else [value]
        if not tables or not all(isinstance(table, dict) for table in tables):
            raise recipe.fault((line(name), name), f"is {value!r}; it must be a table")
        if len(tables) > 1 and name in ONCE:
            what = "is a second one; the stage keeps one artifact, so one of them is enough"
            raise recipe.fault((line(name, 1), f"{name}[1]"), what)
        for index, table in enumerate(tables):
            inside = (name, index) if isinstance(value, list) else (name,)
            sections.append(
                Section(
                    name=name,
                    label=f"{name}[{index}]" if len(tables) > 1 else name,
                    line=line(*inside),
                    values=table,
                    lines={key: line(*inside, key) for key in table},
                )
            )
    if not sections:
        raise UsageError(
            f"{file} has no table, so there is nothing to run",
            f"there are {', '.join(SECTIONS)}; dery init writes a recipe to begin with",
        )
    return dataclasses.replace(recipe, sections=sections)


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """A question about a name that is like another, or nothing."""
    close = difflib.get_close_matches(key.replace("_", "-"), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def words_of(recipe: Recipe, section: Section, options: Mapping[str, Option]) -> list[str]:
    """A table as the words of a command line, without the command.

    Raises:
        UsageError: A key is no option of the command, or its value is of the wrong kind.
    """
    words: list[str] = []
    arguments: list[str] = []
    for key, value in section.values.items():
        place = section.place(key)
        if key in NOT_HERE:
            raise recipe.fault(place, f"has no place in a recipe: {NOT_HERE[key]}")
        if key not in options:
            raise recipe.fault(
                place,
                f"is no option of {section.command}{_meant(key, options)}",
                f"dery {section.command} --help lists them",
            )
        option = options[key]
        if option.flag:
            words += _switch(recipe, place, option, value)
            continue
        texts = _texts(recipe, place, option, value)
        if not option.on:
            arguments += texts
        elif option.count > 1:
            words += [option.on, *texts]
        else:
            words += [word for text in texts for word in _given(option.on, text)]
    return [*words, *(["--", *arguments] if arguments else [])]


def _meant(key: str, options: Mapping[str, Option]) -> str:
    switches = {o.off.removeprefix("--"): o.key for o in options.values() if o.off is not None}
    if key in switches:
        return f"; write {switches[key]} = false"
    return did_you_mean(key, [name for name in options if name not in NOT_HERE])


def _given(option: str, text: str) -> list[str]:
    """An option with its value; joined where the value could be taken for another option."""
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def _switch(recipe: Recipe, place: tuple[int, str], option: Option, value: object) -> list[str]:
    if not isinstance(value, bool):
        raise recipe.fault(place, f"is {value!r}; it must be true or false")
    if value:
        return [option.on]
    return [] if option.off is None else [option.off]


def _texts(recipe: Recipe, place: tuple[int, str], option: Option, value: object) -> list[str]:
    """The value or values of an option as they would be typed."""
    several = option.multiple or option.count != 1
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not several:
        raise recipe.fault(place, "takes one value, not a list")
    if option.count > 1 and len(values) != option.count:
        raise recipe.fault(place, f"takes a list of {option.count} values")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise recipe.fault(place, f"is {item!r}; it must be a text or a number")
    return [str(item) for item in values]


def with_general(recipe: Recipe, **given: str | None) -> Recipe:
    """The recipe with what the command line says in place of its own words."""
    told = {key: value for key, value in given.items() if value is not None}
    lines = {**dict.fromkeys(told, 1), **recipe.lines}
    return dataclasses.replace(recipe, general={**recipe.general, **told}, lines=lines)
