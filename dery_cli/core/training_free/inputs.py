"""What a training-free proxy looks at, and what each states of itself.

Legend: N images of a batch, C channels of the pre-logits, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

BATCHES, BATCH_SIZE = 5, 32
"""Few images of the target, as in the paper."""


@dataclasses.dataclass(frozen=True)
class ProxyInputs:
    """What a proxy may look at.

    Args:
        network: Images to pre-logits (N, C), in eval mode.
        batches: Starts a pass over normalised image batches, all of the target's.
        labels: Class index of each image, in order, or None.
        num_classes: Number of classes, or None without labels.
        few: Starts a pass over the few images that all proxies but the probe look at; None takes
            the first of ``batches``.
        few_labels: Their labels, or None.
        num_batches: Of the few images.
        batch_size: Of the few images.
    """

    network: nn.Module
    batches: Callable[[], Iterable[Tensor]]
    labels: Sequence[int] | None
    num_classes: int | None
    few: Callable[[], Iterable[Tensor]] | None = None
    few_labels: Sequence[int] | None = None
    num_batches: int = BATCHES
    batch_size: int = BATCH_SIZE

    def few_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """At most ``num_batches`` full batches of the few images, each with its labels.

        One smaller batch where there is no full one; none where there is one image alone.
        """
        source, labels = self.few, self.few_labels
        if source is None:
            source, labels = self.batches, self.labels
        start = 0
        for x in _rebatched(source(), self.batch_size, self.num_batches):
            stop = start + len(x)
            yield x, None if labels is None else torch.tensor(list(labels[start:stop]))
            start = stop

    def labelled_batches(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """``few_batches`` for a proxy that reads labels.

        Args:
            name: Of the proxy, for the message.

        Raises:
            ValueError: There are no labels.
        """
        if self.num_classes is None:
            raise ValueError(f"the proxy '{name}' needs labels")
        for x, label_N in self.few_batches():
            if label_N is None:
                raise ValueError(f"the proxy '{name}' needs labels")
            yield x, label_N.to(x.device)


def _rebatched(batches: Iterable[Tensor], size: int, count: int) -> Iterator[Tensor]:
    images: list[Tensor] = []
    given = 0
    for batch in batches:
        images.extend(batch)
        while len(images) >= size and given < count:
            yield torch.stack(images[:size])
            images = images[size:]
            given += 1
        if given == count:
            return
    if given == 0 and len(images) > 1:
        yield torch.stack(images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a proxy states of itself.

    Args:
        source: Where it is defined.
        direction: Which scores are taken for better; the scores given are always such that the
            larger is the better.
        cost: Passes over images, in words.
        reads_labels: Whether it needs labels.
    """

    source: str
    direction: str
    cost: str
    reads_labels: bool


ScoreT = TypeVar("ScoreT", bound=Callable[[ProxyInputs], float])


def stated(
    *, source: str, cost: str, reads_labels: bool, direction: str = "larger is better"
) -> Callable[[ScoreT], ScoreT]:
    """Give a proxy its ``about``."""
    about = About(source=source, direction=direction, cost=cost, reads_labels=reads_labels)

    def mark(function: ScoreT) -> ScoreT:
        function.about = about  # type: ignore[attr-defined]
        return function

    return mark


def about(proxy: object) -> About | None:
    """What a proxy states of itself; None where it is another package's and states nothing."""
    found = getattr(proxy, "about", None)
    return found if isinstance(found, About) else None
