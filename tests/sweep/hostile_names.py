"""Names with escapes, line breaks, markup or no text at all; terminals that cannot say a name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

from tests.sweep.commands import words
from tests.sweep.harness import Case, Section
from tests.sweep.hostile import ESCAPES, SECONDS, TO_AN_ASSEMBLY, expect, write_images
from tests.sweep.reference import STAGES

WORKSPACES = {
    "escapes": f"ws{ESCAPES}",
    "not UTF-8": os.fsdecode(b"ws\xff\xfe"),
    "newline": "ws\nx",
    "very long": "w" * 250,
    "markup": "ws[red]x[/red][/bold]",  # a folder in folders
}
IN_WORKSPACES = (
    words("zoo list"),
    words("eval"),
    words("eval --json"),
    STAGES["assemble"],
    [*STAGES["assemble"], "--json"],
    STAGES["finetune"],
    [*STAGES["finetune"], "--json"],
    words("zoo remove nothing"),
    words("zoo remove nothing --json"),
    words("sim --metric ridge"),
)
ARGUMENTS = {
    "escapes": ESCAPES,
    "not UTF-8": os.fsdecode(b"\xff"),
    "newline": "a\nb",
    "markup": "[red]x[/red]",
}
NAME = "{name}"
"""Stands for the hostile argument."""
TAKES_NAME = (
    words("zoo add demo/{name}"),
    words("zoo add {name}"),
    words("zoo add demo/resnet --as {name}"),
    words("zoo show {name}"),
    words("zoo remove {name}"),
    words("embed --data {name}"),
    words("eval {name}"),
    words("assemble --name {name}"),
    words("assemble --max-params {name}"),
    words("sim --metric {name}"),
    words("finetune --teacher {name}"),
    words("finetune --name {name}"),
    words("{name}"),
    words("embed --{name}"),
)
UNSPEAKABLE = "Käse·日本"
"""A class that few encodings can say."""
ENCODINGS = ("ascii", "latin-1", "utf-8")
SPEAKERS = ("eval", "eval --json", "zoo list", "zoo list --json", "--help")
LOCALES = (
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)
EMBED = words("embed --grid 1 --grid-samples 8 --threads 1 -n")
CHAIN = (*TO_AN_ASSEMBLY, words("eval"))


def cases(section: Section) -> Iterator[Case]:
    for what, name in WORKSPACES.items():
        yield Case(f"workspace called with {what}", partial(use_workspace, section, what, name))
    for what, name in ARGUMENTS.items():
        for taker in TAKES_NAME:
            for more in ([], ["--json"]):
                args = [*(word.replace(NAME, name) for word in taker), *more]
                label = f"an argument with {what}: {' '.join([*taker, *more])}"
                yield Case(label, partial(give_argument, section, label, args))
    spoken = Unspeakable(section)
    for encoding in ENCODINGS:
        for line in SPEAKERS:
            run = partial(spoken.say, {"PYTHONIOENCODING": encoding}, words(line))
            yield Case(f"PYTHONIOENCODING={encoding}: {line}", run)
    for locale in LOCALES:
        yield Case(f"{locale}", partial(spoken.work, locale))


def use_workspace(section: Section, what: str, name: str) -> None:
    workspace = section.work / name
    shutil.copytree(section.reference.after("finetune"), workspace)
    for args in IN_WORKSPACES:
        ended = section.commands.forked(args, workspace, 90)
        as_json = "--json" in args
        line = f"{' '.join(args[:2])}{' --json' if as_json else ''}"
        escapes = what != "escapes" or not as_json
        label = f"workspace called with {what}: {line}"
        expect(section, label, ended, {0, 1, 2, 4}, escapes=escapes)
    shutil.rmtree(workspace)


def give_argument(section: Section, label: str, args: list[str]) -> None:
    with section.workspace(section.reference.after("zoo")) as workspace:
        ended = section.commands.forked(args, workspace, SECONDS)
        expect(section, label, ended, {1, 2, 4}, escapes="--json" not in args)


class Unspeakable:
    """A whole chain on images of a class whose name an encoding may not have."""

    def __init__(self, section: Section) -> None:
        self._section = section

    @cached_property
    def _images(self) -> Path:
        folder = write_images(self._section.new_path("data"), 12)
        (folder / "c1").rename(folder / UNSPEAKABLE)
        return folder

    @cached_property
    def _made(self) -> Path:
        """The workspace after the chain."""
        section, workspace = self._section, self._section.new_path("spoken")
        shutil.copytree(section.reference.after("zoo"), workspace)
        for args in ([*EMBED, "16", "--data", str(self._images)], *CHAIN):
            ended = section.commands.forked(args, workspace)
            assert ended.code == 0, ended.tail()
        return workspace

    def say(self, env: dict[str, str], args: list[str]) -> None:
        """Commands that print the class's name, or might."""
        workspace = None if args == ["--help"] else self._made
        ended = self._section.commands.start(args, workspace, env=env).finish()
        label = f"{env}, a class called {UNSPEAKABLE}: {' '.join(args)}"
        expect(self._section, label, ended, {0, 1})

    def work(self, env: dict[str, str]) -> None:
        """Commands that write it, one after the other."""
        embed = [*EMBED, "12", "--data", str(self._images)]
        finetune = words("finetune --steps 2 --batch-size 4")
        with self._section.workspace(self._made) as workspace:
            for args in (words("eval"), words("eval --json"), finetune, embed):
                ended = self._section.commands.start(args, workspace, env=env).finish()
                label = f"{env}, a class called {UNSPEAKABLE}: {' '.join(args[:2])}"
                expect(self._section, label, ended, {0, 1})
