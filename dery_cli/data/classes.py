"""Whether data have labels, and whether they are those of a network's head."""

from __future__ import annotations

from collections.abc import Sequence

from dery_cli.data.sets import DataSet
from dery_cli.errors import UsageError


def training_labels(data: DataSet) -> Sequence[int]:
    """The labels of the training images.

    Raises:
        UsageError: There are none.
    """
    if data.classes is None or data.train.labels is None:
        raise UsageError(f"{data.spec} has no labels to fine-tune on", "give class folders")
    return data.train.labels


def check_classes(data: DataSet, classes: Sequence[str] | None) -> None:
    """Refuse data whose classes are not those of the network's head.

    Raises:
        UsageError: They differ; the message names some.
    """
    if classes is None or data.classes is None or tuple(data.classes) == tuple(classes):
        return
    what = class_difference(data.classes, classes)
    raise UsageError(
        f"{data.spec} has other classes than the network: {what}",
        "assemble for these data: dery assemble --data SPEC",
    )


def class_difference(classes: Sequence[str], others: Sequence[str]) -> str:
    """What tells the first class names from the second, in words."""
    new = [name for name in classes if name not in others]
    missing = [name for name in others if name not in classes]
    return (_some("new", new) + _some("missing", missing)).strip() or "the same in another order"


def _some(what: str, names: Sequence[str]) -> str:
    return f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} " if names else ""
