"""Running the command line: as a process, where signals and timing matter, or in a fork.

A fork of this process, which has torch loaded already, calls the same entry point; that is how many
hundred short commands are affordable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "dery_cli")
TIMEOUT = "timeout"
"""The exit code of what had to be killed for taking too long."""
MODULES = (
    "accelerate",
    "dery_cli.cli",
    "dery_cli.stages.assemble.make",
    "dery_cli.stages.embed.run",
    "dery_cli.stages.finetune.run",
    "dery_cli.stages.partition.run",
    "dery_cli.stages.sim.run",
    "timm",
)
"""What is imported once, before the first fork."""

Words = Sequence[str]


def environment(folder: Path) -> dict[str, str]:
    """All that a command gets to see: one thread, no network, a home of its own, this checkout."""
    programs = f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
    return {
        "PATH": programs,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'plugins'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "LANG": "C.UTF-8",
    }


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a command came to."""

    code: int | str
    stdout: str
    stderr: str
    seconds: float = 0.0

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.text

    @property
    def crashed(self) -> bool:
        """Whether it ended by a bug of its own, told as a traceback or as JSON."""
        return self.traceback or '"bug"' in self.stdout

    @property
    def killed_by(self) -> int | None:
        return -self.code if isinstance(self.code, int) and self.code < 0 else None

    def tail(self, length: int = 700) -> str:
        return (f"exit {self.code}\n" + self.text.strip())[-length:]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files that a command's standard streams go to."""

    out: Path
    err: Path

    def take(self, code: int | str, began: float) -> Ended:
        """Read them, and remove them."""
        seconds = time.monotonic() - began
        return Ended(code, taken(self.out), taken(self.err), seconds)


def taken(path: Path) -> str:
    """The text of a file, which is removed."""
    text = path.read_text(errors="replace") if path.exists() else ""
    path.unlink(missing_ok=True)
    return text


class Started:
    """A process that runs a command line."""

    def __init__(self, process: subprocess.Popen[bytes], outputs: Outputs) -> None:
        self.process = process
        self.began = time.monotonic()
        self._outputs = outputs

    def signal_after(self, seconds: float, number: int) -> bool:
        """Send a signal after so many seconds; False where it had ended before."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(number)
            return True
        return False

    def finish(self, timeout: float = 180) -> Ended:
        code: int | str
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = TIMEOUT
        return self._outputs.take(code, self.began)


class Forked:
    """A fork of this process that runs a command line, or a function."""

    def __init__(self, pid: int, outputs: Outputs) -> None:
        self.pid = pid
        self.began = time.monotonic()
        self._outputs = outputs

    def poll(self) -> Ended | None:
        """What it came to; None as long as it runs."""
        found, status = os.waitpid(self.pid, os.WNOHANG)
        if not found:
            return None
        return self._outputs.take(os.waitstatus_to_exitcode(status), self.began)

    def finish(self, timeout: float = 120) -> Ended:
        while time.monotonic() < self.began + timeout:
            if (ended := self.poll()) is not None:
                return ended
            time.sleep(0.003)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return self._outputs.take(TIMEOUT, self.began)


class Commands:
    """Starts command lines in a folder.

    Args:
        folder: Where they start.
        outputs: Folder for what they print.
    """

    def __init__(self, folder: Path, outputs: Path) -> None:
        self.folder = folder
        self._outputs = outputs
        self._numbers = itertools.count()
        self._loaded = False

    def start(
        self,
        args: Words,
        workspace: Path | str | None,
        *,
        folder: Path | None = None,
        env: Mapping[str, str] | None = None,
        umask: int = -1,
        new_group: bool = False,
        program: Words = PROGRAM,
    ) -> Started:
        """A real command line, as a process; ``program`` comes before its words."""
        outputs = self._new_outputs()
        with outputs.out.open("wb") as out, outputs.err.open("wb") as err:
            process = subprocess.Popen(
                [*program, *with_workspace(args, workspace)],
                cwd=folder or self.folder,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                umask=umask,
                start_new_session=new_group,
                preexec_fn=default_signals,
            )
        return Started(process, outputs)

    def run(self, args: Words, workspace: Path | None) -> Ended:
        return self.start(args, workspace).finish()

    def fork(
        self, args: Words, workspace: Path | None, *, hook: Callable[[], object] | None = None
    ) -> Forked:
        """The same entry point in a fork; ``hook`` is called there first."""
        words = with_workspace(args, workspace)

        def command() -> None:
            from dery_cli.cli import main

            sys.argv = ["dery", *words]
            if hook is not None:
                hook()
            main(words)

        return self.call(command)

    def forked(
        self,
        args: Words,
        workspace: Path | None,
        timeout: float = 120,
        *,
        hook: Callable[[], object] | None = None,
    ) -> Ended:
        return self.fork(args, workspace, hook=hook).finish(timeout)

    def call(self, function: Callable[[], object]) -> Forked:
        """Any function in a fork; what it raises becomes an exit code, as at the end of Python."""
        self._preload()
        outputs = self._new_outputs()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _be_the_child(function, outputs, self.folder)
        return Forked(pid, outputs)

    def load_in_fork(self, path: Path, *, hook: Callable[[], object] | None = None) -> Forked:
        """``load_assembly`` in a fork: the exit code of its error is the one dery would give."""

        def load() -> None:
            if hook is not None:
                hook()
            print_assembly(path)

        return self.call(load)

    def load_assembly(self, path: Path) -> Ended:
        return self.load_in_fork(path).finish()

    def _new_outputs(self) -> Outputs:
        number = next(self._numbers)
        return Outputs(self._outputs / f"out{number}", self._outputs / f"err{number}")

    def _preload(self) -> None:
        if self._loaded:
            return
        import importlib

        import torch

        for name in MODULES:
            importlib.import_module(name)
        torch.set_num_threads(1)
        self._loaded = True


def words(line: str) -> list[str]:
    """A command line's words, none of which holds a space."""
    return line.split()


def with_workspace(args: Words, workspace: Path | str | None) -> list[str]:
    """The words with ``-w``, before a ``--`` where there is one."""
    if workspace is None:
        return [*args]
    end = list(args).index("--") if "--" in args else len(args)
    return [*args[:end], "-w", str(workspace), *args[end:]]


def default_signals() -> None:
    """Signals act, though a background job or a CI runner ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def print_assembly(path: Path) -> None:
    """Load an assembly and print the hashes of its weights and of its record."""
    import dery_cli
    from dery_cli.errors import DeryError
    from dery_cli.zoo.registry import weights_sha256

    try:
        loaded = dery_cli.load_assembly(path)
    except DeryError as error:
        sys.stderr.write(f"error: {error.message}\n  {error.hint}\n")
        sys.exit(int(error.exit_code))
    network, _ = loaded
    print("weights", weights_sha256(network.state_dict()), "record", loaded.record.sha256)


def _be_the_child(function: Callable[[], object], outputs: Outputs, folder: Path) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _redirect(outputs)
        os.chdir(folder)
        try:
            function()
            code = 0
        except SystemExit as ended:
            silent = 0 if ended.code is None else 1
            code = ended.code if isinstance(ended.code, int) else silent
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect(outputs: Outputs) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(outputs.out, flags, 0o644), 1)
    os.dup2(os.open(outputs.err, flags, 0o644), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
