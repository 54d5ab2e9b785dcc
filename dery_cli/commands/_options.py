"""Options that several commands share: each help text lives here once."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from dery_cli.errors import UsageError
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal, use_terminal

Result = dict[str, Any]

WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        "-w",
        metavar="DIR",
        help="Folder that holds the zoo and every stage's files; $DERY_WORKSPACE, else ./.dery.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps ...; the best that is there by default.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="A folder of class folders, demo, torchvision:CIFAR100?root=DIR, or hf:OWNER/NAME.",
    ),
]
SkipBadOption = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Leave out images that cannot be decoded; by default the first one ends the command.",
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option("--workers", min=0, help="Processes that decode images; 0 decodes in this one."),
]
_JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; the rest goes to stderr.")
]
_QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")
]
_VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print details too.")]

_COMMON = {"json": _JsonOption, "quiet": _QuietOption, "verbose": _VerboseOption}


def command(function: Callable[..., Result]) -> Callable[..., Result]:
    """Give a command the options every command has, and its ``terminal``.

    The decorated function takes ``terminal`` and its own options, and returns the ``result`` of the
    JSON object.
    """
    hints = get_type_hints(function, include_extras=True)
    own = [
        p.replace(annotation=hints[p.name])
        for p in inspect.signature(function).parameters.values()
        if p.name != "terminal"
    ]
    common = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation
        )
        for name, annotation in _COMMON.items()
    ]

    @functools.wraps(function)
    def wrapper(**options: Any) -> Result:
        flags = {name: options.pop(name) for name in _COMMON}
        terminal = Terminal(**flags)
        use_terminal(terminal)
        return function(terminal=terminal, **options)

    del wrapper.__wrapped__  # or the old signature is found
    wrapper.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *common]}
    return wrapper


class Checked(Exception):  # noqa: N818 - no error: a command whose options are right
    """A command's options are right, which was all that was asked."""


_checking = contextvars.ContextVar("checking", default=False)


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Within it a command ends, with ``Checked``, where it would open its workspace."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def open_workspace(path: Path | None) -> Workspace:
    """The workspace of ``--workspace``, ``DERY_WORKSPACE`` or the current folder.

    A command calls this when its options are checked, and before its heavy imports.

    Raises:
        Checked: Within ``checking``.
        UsageError: Its path is no text, which the library that reads tensors needs.
    """
    if _checking.get():
        raise Checked
    if path is None:
        path = Path(os.environ.get("DERY_WORKSPACE") or ".dery")
    try:
        str(path).encode()
        path = path.expanduser()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the workspace has a path that is not UTF-8: {os.fsencode(path)!r}",
            "choose another with --workspace",
        ) from error
    except RuntimeError as error:  # ~name of nobody
        raise UsageError(f"the workspace {path}: {error}", "choose another") from error
    return Workspace(path)
