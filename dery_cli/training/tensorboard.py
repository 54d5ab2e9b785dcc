"""The curves of a run for TensorBoard: ``metrics.jsonl`` once more, as its event files."""

from __future__ import annotations

import shutil
from pathlib import Path

from dery_cli.errors import DeryError
from dery_cli.training.runlog import read_metrics

FOLDER = "tensorboard"
TAGS = {
    "train_loss": "loss/train",
    "valid_loss": "loss/valid",
    "valid_top1": "top1/valid",
    "lr": "lr",
    "epoch": "epoch",
}


class Curves:
    """Event files in ``<run>/tensorboard`` that follow the run's ``metrics.jsonl``.

    They are written anew by the first ``update``, so that a resumed run has each point once.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir = run_dir
        self._make = SummaryWriter
        self._writer: SummaryWriter | None = None
        self._written = 0

    def update(self) -> None:
        """Write the lines of ``metrics.jsonl`` that are new.

        Raises:
            DeryError: They could not be written.
        """
        folder = self._run_dir / FOLDER
        try:
            if self._writer is None:
                shutil.rmtree(folder, ignore_errors=True)
                self._writer = self._make(str(folder))
            lines = read_metrics(self._run_dir)
            for line in lines[self._written :]:
                for key, tag in TAGS.items():
                    if line.get(key) is not None:
                        self._writer.add_scalar(tag, line[key], line["step"])
            self._written = len(lines)
            self._writer.flush()
        except OSError as error:
            raise DeryError(
                f"could not write {folder}: {error}", "free some space, --resume"
            ) from error

    def close(self) -> None:
        """Write what is missing, and close the files."""
        self.update()
        assert self._writer is not None
        self._writer.close()
