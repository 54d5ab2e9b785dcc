"""Images that cannot be read, on their way out of loading processes.

A loading process would wrap the error in its traceback; so it travels as an item, and is raised
where the batch is used.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

from torch.utils.data import Dataset, default_collate

from dery_cli.errors import DeryError


def item(dataset: Any, index: int) -> Any:
    """``dataset[index]``, or the error it fails with."""
    try:
        return dataset[index]
    except DeryError as error:
        return error


class Items(Dataset[Any]):
    """``dataset`` with errors for items."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return item(self.dataset, index)


def collate(items: list[Any]) -> Any:
    """The batch, or the first error among its items."""
    for one in items:
        if isinstance(one, DeryError):
            return one
    return default_collate(items)


def raising(batches: Iterable[Any]) -> Generator[Any, None, None]:
    """The batches.

    Raises:
        DeryError: One of them is an error.
    """
    for batch in batches:
        if isinstance(batch, DeryError):
            raise batch
        yield batch
