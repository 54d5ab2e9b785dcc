"""Command lines that a command runs in its own process, and what their options are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from dery_cli.commands._options import Checked, checking
from dery_cli.errors import UsageError
from dery_cli.runtime.terminal import current_terminal, use_terminal
from dery_cli.stages.recipe.config import Option


class Lines:
    """``dery`` itself, as a command that is running knows it."""

    def __init__(self, context: typer.Context) -> None:
        self._dery: Any = context.find_root().command

    def run(self, words: Sequence[str]) -> Any:
        """Run ``dery WORDS`` and give its result; Ctrl-C and errors come through."""
        with self._dery.make_context("dery", list(words)) as inner:
            return self._dery.invoke(inner)

    def check(self, words: Sequence[str]) -> None:
        """Have a line's options read and checked by its own command, which then does nothing.

        Raises:
            UsageError: The command or its parser refuses them.
        """
        terminal = current_terminal()
        try:
            with checking():
                self.run(words)
        except Checked:
            return
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            raise UsageError(str(error.format_message()).strip()) from error
        finally:
            use_terminal(terminal)

    def options(self, command: str) -> dict[str, Option]:
        """The options and arguments of a command, by the key that a recipe has for each."""
        found = self._dery
        for word in command.split():
            found = found.commands[word]
        return {option.key: option for option in map(_option, found.params)}


def _option(param: Any) -> Option:
    if param.param_type_name == "argument":
        return Option(key=param.name, on="", count=param.nargs, default=param.default)
    on = max(param.opts, key=len)
    return Option(
        key=on.removeprefix("--"),
        on=on,
        off=next(iter(param.secondary_opts), None),
        flag=param.is_flag,
        count=param.nargs,
        multiple=param.multiple,
        default=param.default,
    )
