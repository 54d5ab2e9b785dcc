"""The processes of one command: those that a launcher started, or this one alone.

``accelerate launch -m dery_cli ...`` on N devices, ``torchrun --nproc-per-node N -m dery_cli ...``
and MPI start the same command N times. The main process decides, locks, writes and prints; the
others carry out what it orders. What crosses is JSON and raw tensors. Every exchange is one call of
``share`` in all processes, so that the failure of one ends that exchange in all; a process that is
gone shows as a closed connection.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dery_cli.errors import DeryError, ExitCode, UsageError
from dery_cli.runtime.devices import forbid_tf32, pick_device
from dery_cli.runtime.launcher import (
    Dismissed,
    alone_by_mistake,
    launched,
    local_count,
    on_cpus,
)

PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for one that is alive and silent, say for the workspace's lock."""


_WORD = "dery/failure"
"""Where in the launcher's store a process that fails says what of."""


class NoMemoryError(Exception):
    """A batch did not fit, in this process or another."""


class Processes:
    """This process alone.

    Args:
        device: Where this process computes.
        threads: CPU threads it computes with.
    """

    rank = 0
    count = 1

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self.threads = threads

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, message: Any) -> list[Any]:
        """Every process's ``message``, which is JSON, by rank."""
        return [message]

    def check(self, failure: Exception | None) -> None:
        """Fail in all processes if one failed.

        Raises:
            NoMemoryError: In the main process, if a batch did not fit anywhere.
            DeryError: In the main process, whatever another process failed of.
            Dismissed: In the others.
        """
        if failure is not None:
            raise failure

    def order(self, message: dict[str, Any]) -> None:
        """Give the other processes, which are in ``await_order``, something to do."""
        self.share(message)

    def await_order(self) -> dict[str, Any]:
        """The main process's next order.

        Raises:
            Dismissed: The command is over.
        """
        message: dict[str, Any] = self.share(None)[0]
        if "stop" in message:
            raise Dismissed(message["stop"])
        return message

    def collect(
        self,
        rows: Tensor | None,
        nbytes: Sequence[int],  # noqa: ARG002 - for subclasses
    ) -> list[Tensor]:
        """Bring flat byte tensors to the main process.

        Args:
            rows: This process's, or None where it has none.
            nbytes: Their sizes, for the first so many ranks.

        Returns:
            One a rank in the main process, nothing in the others.
        """
        return [] if rows is None else [rows]

    def united(self) -> contextlib.AbstractContextManager[None]:
        """A block in which all run the same code, and it exchanges what it likes, how it likes.

        Whichever process fails in it, none is left waiting, and the main process fails of that.

        Raises:
            DeryError: In the main process, whatever another process failed of.
            Dismissed: In the others.
        """
        return contextlib.nullcontext()

    def close(self, code: int | None) -> None:
        """End the others with the exit code ``code``; None: they are left to find out."""


class LaunchedProcesses(Processes):
    """One of several, started by ``accelerate launch`` or another torch launcher."""

    def __init__(self, device_name: str | None, threads: int) -> None:
        import torch.distributed as dist
        from accelerate import PartialState

        forbid_tf32()
        state: Any = PartialState(cpu=device_name == "cpu" or launched_on_cpus())
        self._state = state
        self.rank, self.count = int(state.process_index), int(state.num_processes)
        super().__init__(_own_device(state.device, device_name), threads)
        # features travel as CPU tensors, whatever the launcher's own backend can move
        self._group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._broken = False
        self.threads = int(self.share(threads)[0])

    def share(self, message: Any) -> list[Any]:
        import torch.distributed as dist

        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with self._told():
            dist.all_gather(lengths, torch.tensor([len(text)]), group=self._group)
            longest = max(int(length) for length in lengths)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(text)] = text
            dist.all_gather(texts, padded, group=self._group)
        return [
            json.loads(bytes(text[: int(length)].numpy()))
            for text, length in zip(texts, lengths, strict=True)
        ]

    def check(self, failure: Exception | None) -> None:
        states = self.share(None if failure is None else _to_json(failure))
        failed = [state for state in states if state is not None]
        if not failed:
            return
        if not self.main:
            if states[0] is not None and "stop" in states[0]:
                raise Dismissed(states[0]["stop"])
            if failure is not None and not isinstance(failure, DeryError | NoMemoryError):
                traceback.print_exception(failure)
            raise Dismissed
        if failure is not None and not isinstance(failure, NoMemoryError):
            raise failure
        first = next((state for state in failed if "out_of_memory" not in state), None)
        if first is None:
            raise NoMemoryError
        raise DeryError(first["message"], first["hint"], details=first["details"])

    def collect(self, rows: Tensor | None, nbytes: Sequence[int]) -> list[Tensor]:
        import torch.distributed as dist

        with self._told():
            if not self.main:
                if rows is not None:
                    dist.send(rows, dst=0, group=self._group)
                return []
            collected = [] if rows is None else [rows]
            for rank in range(1, len(nbytes)):
                buffer = torch.empty(nbytes[rank], dtype=torch.uint8)
                dist.recv(buffer, src=rank, group=self._group)
                collected.append(buffer)
        return collected

    @contextlib.contextmanager
    def united(self) -> Iterator[None]:
        # The others are in the middle of anything: a process that fails leaves word in the store
        # that the launcher keeps and ends; what the others exchange with it then fails.
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        try:
            yield
        except BaseException as error:
            self._broken = True
            lost = _is_lost(error) or _is_lost(error.__cause__)
            own = isinstance(error, DeryError) and not lost
            if self.main:
                if not own and (word := _word(store)) is not None:
                    message, hint, details = word["message"], word["hint"], word["details"]
                    raise DeryError(message, hint, details=details) from error
                if lost and not isinstance(error, DeryError):
                    raise _lost(error) from error
                raise
            if not isinstance(error, Exception):  # a signal
                raise
            if not lost:
                with contextlib.suppress(RuntimeError):  # the store is gone
                    store.compare_set(_WORD, "", json.dumps(_to_json(error)))
                if not own:
                    traceback.print_exception(error)
            raise Dismissed from error

    def close(self, code: int | None) -> None:
        if code is None or self._broken:
            return
        if self.main:
            with contextlib.suppress(DeryError):
                self.share({"stop": code})
        self._state.destroy_process_group()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A lost connection as an error that says so."""
        try:
            yield
        except RuntimeError as error:
            self._broken = True
            raise _lost(error) from error


def launched_on_cpus() -> bool:
    """Whether a launcher's processes have to compute on CPUs: it says so, or there is nothing else.

    An MPS device cannot be shared.
    """
    if not launched():
        return False
    no_device = not torch.accelerator.is_available() or torch.backends.mps.is_available()
    return on_cpus() or no_device


@contextlib.contextmanager
def open_processes(
    device_name: str | None, threads: int | None, warn: Callable[[str], None]
) -> Iterator[Processes]:
    """A block in which the processes of this command work together.

    In it torch computes with ``threads`` CPU threads, by default as many as this process's share of
    the machine's cores, whatever a launcher set: another count changes the last bits of a result.

    Args:
        device_name: Of ``--device``; with several processes a kind of device.
        threads: CPU threads of each process; the main process's count.
        warn: Told where a launcher seems to have meant several processes and started one.
    """
    if (warning := alone_by_mistake()) is not None:
        warn(warning)
    wanted = threads or own_cores()
    before = torch.get_num_threads()
    if launched():
        processes: Processes = LaunchedProcesses(device_name, wanted)
    else:
        processes = Processes(pick_device(device_name), wanted)
    torch.set_num_threads(processes.threads)
    code = None  # after Ctrl-C and the like: the others may be in the middle of anything
    try:
        yield processes
        code = int(ExitCode.OK)
    except Exception as error:
        code = int(getattr(error, "exit_code", ExitCode.FAILED))
        raise
    finally:
        torch.set_num_threads(before)
        processes.close(code)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def own_cores() -> int:
    """This process's share of them: those of one machine divide its cores."""
    return max(1, usable_cores() // local_count())


def _own_device(device: torch.device, wanted: str | None) -> torch.device:
    if wanted is not None and wanted != torch.device(device).type:
        raise UsageError(
            f"--device {wanted} with several processes, which the launcher put on {device.type}",
            "leave --device out, or launch with --cpu",
        )
    return torch.device(device)


def _word(store: Any) -> dict[str, Any] | None:
    """What another process said that it failed of."""
    with contextlib.suppress(RuntimeError):  # the store is gone
        if store.check([_WORD]):
            word: dict[str, Any] = json.loads(store.get(_WORD))
            return word
    return None


def _is_lost(error: BaseException | None) -> bool:
    """Whether torch says that it cannot reach another process."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _lost(error: BaseException) -> DeryError:
    reason = str(error).strip().splitlines()[0]
    return DeryError(
        f"another process of this run has ended or hangs: {reason}",
        "see its message; rerun the same command, what is finished is kept",
    )


def _to_json(failure: Exception) -> dict[str, Any]:
    if isinstance(failure, NoMemoryError):
        return {"out_of_memory": True}
    if isinstance(failure, DeryError):
        return {"message": failure.message, "hint": failure.hint, "details": failure.details}
    message = f"{type(failure).__name__} in another process: {failure}"
    return {"message": message, "hint": None, "details": None}
