"""What the shell offers after TAB: names of the workspace and of plugins, without torch."""

from __future__ import annotations

import contextlib
import json

import typer

from dery_cli.commands._options import open_workspace
from dery_cli.io.artifacts import Workspace
from dery_cli.zoo.plugin import METRIC_GROUP, PROXY_GROUP, ZOO_GROUP, plugin_names

_QUIETLY = contextlib.suppress(Exception)
"""A workspace that is damaged or gone has no names; the command will say what is wrong."""


def _workspace(context: typer.Context) -> Workspace:
    return open_workspace(context.params.get("workspace"))


def _starting(names: list[str], text: str) -> list[str]:
    return sorted(name for name in names if name.startswith(text))


def donors(context: typer.Context, incomplete: str) -> list[str]:
    """Names of the zoo's donors."""
    names: list[str] = []
    with _QUIETLY:
        record = json.loads(_workspace(context).zoo.read_text(encoding="utf-8"))
        names = [donor["name"] for donor in record["data"]["donors"]]
    return _starting(names, incomplete)


def _folders(context: typer.Context, kind: str, record: str) -> list[str]:
    names: list[str] = []
    with _QUIETLY:
        names += [
            path.parent.name for path in (_workspace(context).root / kind).glob(f"*/{record}")
        ]
    return names


def assemblies(context: typer.Context, incomplete: str) -> list[str]:
    """Names of assemblies."""
    return _starting(_folders(context, "assemblies", "assembly.json"), incomplete)


def runs(context: typer.Context, incomplete: str) -> list[str]:
    """Names of runs."""
    return _starting(_folders(context, "runs", "run.json"), incomplete)


def networks(context: typer.Context, incomplete: str) -> list[str]:
    """``runs/NAME`` and ``assemblies/NAME``."""
    names = [f"runs/{name}" for name in runs(context, "")]
    names += [f"assemblies/{name}" for name in assemblies(context, "")]
    return _starting(names, incomplete)


def metrics(incomplete: str) -> list[str]:
    """Names of similarity metrics."""
    return _starting(plugin_names(METRIC_GROUP), incomplete)


def proxies(incomplete: str) -> list[str]:
    """Names of training-free proxies."""
    return _starting(plugin_names(PROXY_GROUP), incomplete)


def zoo_plugins(incomplete: str) -> list[str]:
    """Names of zoo plugins."""
    return _starting(plugin_names(ZOO_GROUP), incomplete)
