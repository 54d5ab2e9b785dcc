"""The Typer app, and the one place where an error becomes an exit code."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import typer

import dery_cli
from dery_cli.commands.assemble import assemble
from dery_cli.commands.compare import compare
from dery_cli.commands.demo import demo
from dery_cli.commands.doctor import doctor
from dery_cli.commands.embed import embed
from dery_cli.commands.evaluate import evaluate
from dery_cli.commands.export import export
from dery_cli.commands.finetune import finetune
from dery_cli.commands.init import init
from dery_cli.commands.latency import latency_app
from dery_cli.commands.partition import partition
from dery_cli.commands.predict import predict
from dery_cli.commands.push import push
from dery_cli.commands.report import report
from dery_cli.commands.run import run as run_recipe
from dery_cli.commands.sim import sim
from dery_cli.commands.status import status
from dery_cli.commands.zoo import zoo_app
from dery_cli.errors import DeryError, ExitCode
from dery_cli.runtime.interrupts import Terminated
from dery_cli.runtime.launcher import Dismissed
from dery_cli.runtime.printable import printable
from dery_cli.runtime.startup import begin, unwinding, wants_json
from dery_cli.runtime.streams import Steady, answer_stream
from dery_cli.runtime.terminal import current_terminal

SCHEMA = "dery/1"

app = typer.Typer(
    name="dery",
    help=(
        "Take a zoo of pretrained vision models apart and assemble, under a parameter and FLOP "
        "budget, a new network from the parts.\n\n"
        "In order: zoo add, embed, sim, partition, assemble, finetune, eval, export. "
        "'dery demo' runs them all on a small zoo that comes with dery."
    ),
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(zoo_app, name="zoo")
app.add_typer(latency_app, name="latency")
app.command("embed")(embed)
app.command("sim")(sim)
app.command("partition")(partition)
app.command("assemble")(assemble)
app.command("finetune")(finetune)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("predict")(predict)
app.command("status")(status)
app.command("doctor")(doctor)
app.command("export")(export)
app.command("report")(report)
app.command("push")(push)
app.command("demo")(demo)
app.command("run")(run_recipe)
app.command("init")(init)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dery {dery_cli.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``dery`` and exit with the code its outcome stands for."""
    args = list(sys.argv[1:] if argv is None else argv)
    begin(args)
    sys.exit(_delivered(run(args)))


def _delivered(code: int) -> int:
    """``code``, or that of a failure where the JSON object could not be written."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    answer = answer_stream()
    lost = answer.lost if isinstance(answer, Steady) else None
    if lost is None:
        return code
    terminal = current_terminal()
    terminal.err.print(f"error: could not write to standard output: {lost.strerror}", markup=False)
    return code or (ExitCode.FAILED if terminal.json else ExitCode.OK)


def run(args: Sequence[str]) -> int:
    """Run one command line; print its outcome and return the exit code."""
    name = _command_name(args)
    result: Any = None
    error: dict[str, Any] | None = None
    code: int = ExitCode.OK
    try:
        with unwinding():
            result = typer.main.get_command(app).main(
                args=list(args), prog_name="dery", standalone_mode=False
            )
        if result == ExitCode.INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        if isinstance(result, int):  # --help and --version
            return result
    except DeryError as failure:
        code = failure.exit_code
        error = {"code": failure.code, "message": failure.message, "hint": failure.hint}
        if failure.details is not None:
            error["details"] = failure.details
    except (KeyboardInterrupt, typer.Abort):
        code = ExitCode.INTERRUPTED
        error = {"code": "interrupted", "message": "interrupted", "hint": None}
    except Terminated:
        code = ExitCode.TERMINATED
        error = {"code": "terminated", "message": "terminated by SIGTERM", "hint": None}
    except typer.Exit as stop:
        return stop.exit_code
    except Dismissed as over:  # not the main process: it printed nothing, its exit code says enough
        return ExitCode.FAILED if over.code is None else over.code
    except Exception as failure:
        if not hasattr(failure, "format_message"):  # a bug: its traceback is wanted
            for line in traceback.format_exc().splitlines():
                current_terminal().err.print(printable(line), markup=False)
            code = ExitCode.FAILED
            error = {"code": "bug", "message": f"{type(failure).__name__}: {failure}", "hint": None}
        else:  # what the command-line parser refuses
            code = ExitCode.USAGE
            message = str(failure.format_message()).strip()
            if not message:  # no arguments: the help was printed
                return ExitCode.USAGE
            hint = f"{'dery ' + name if name else 'dery'} --help"
            error = {"code": "usage", "message": message, "hint": hint}
    _print_outcome(name, result, error, as_json=wants_json(args))
    return int(code)


def _print_outcome(name: str, result: Any, error: dict[str, Any] | None, *, as_json: bool) -> None:
    """The error, if there is one, to stderr; the JSON object, if it is wanted, to stdout."""
    terminal = current_terminal()
    if error is not None:
        for key in ("message", "hint"):
            error[key] = None if error[key] is None else printable(error[key])
    if error is not None and error["code"] != "bug":
        terminal.err.print(f"error: {error['message']}", style="bold red", markup=False)
        if error["hint"]:
            terminal.err.print(f"  {error['hint']}", markup=False)
    if as_json:
        outcome = {
            "schema": SCHEMA,
            "command": name,
            "ok": error is None,
            "result": result if error is None else None,
            "error": error,
            "warnings": terminal.warnings,
        }
        text = json.dumps(_finite(outcome)).replace("\x7f", "\\u007f")
        stream = answer_stream()
        stream.write(text + "\n")
        stream.flush()


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _command_name(args: Sequence[str]) -> str:
    words = []
    for arg in args:
        if arg.startswith("-"):
            break
        words.append(arg)
        if words[0] not in {"zoo", "latency"} or len(words) == 2:
            break
    return " ".join(words)
