"""One pass of a donor over the calibration images, by as many processes as there are.

The plan is that of a single process: batches of one size, in order. Process r of n computes
batches r, r + n, ...; the main process gets all of them back in order. A batch is computed the same
wherever that happens, so the features do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dery_cli.core.cost.memory import PeakBytes
from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.similarity.features import BatchFeatures, embed_batches, feature_specs
from dery_cli.data.batches import KEEP_BYTES, ImageStore, batch_spans
from dery_cli.data.sets import DataSet, open_data
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.devices import Arithmetic, choose_arithmetic
from dery_cli.runtime.launcher import Dismissed, local_count
from dery_cli.runtime.processes import NoMemoryError, Processes, own_cores
from dery_cli.stages.embed.config import EmbedConfig
from dery_cli.types import Donor, InputSpec, Node
from dery_cli.zoo.registry import load_donor

LARGEST_AUTO = 512
"""Beyond this many images a batch gains nothing."""
_KEPT_SHARE = 4
"""Decoded images take one part in so many of the free memory, and no more than ``KEEP_BYTES``."""

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def embedding_specs(
    nodes: Sequence[Node], config: EmbedConfig, count: int, start: int = 0
) -> Specs:
    """Name, type and shape of every tensor that embedding ``count`` images gives.

    ``start`` images were embedded before these.
    """
    return feature_specs(
        nodes,
        count,
        grid=config.grid,
        grid_samples=max(0, config.grid_samples - start),
        dtype=_DTYPES[config.dtype],
    )


class Embedder:
    """Embeds donor after donor; each image is decoded once for all of them.

    The main process calls ``load``, then ``rows``; the others call ``follow`` once, which does the
    same there.

    Args:
        space: Where local checkpoints are.
        config: Options; the same in all processes.
        processes: Who takes part.
        images: The opened data of ``config``; opened when needed if left out.
        inputs: What each donor to come takes; of use in the main process alone.
    """

    def __init__(
        self,
        space: Workspace,
        config: EmbedConfig,
        processes: Processes,
        images: DataSet | None = None,
        inputs: Sequence[InputSpec] = (),
    ) -> None:
        self._space = space
        self._config = config
        self._processes = processes
        self._images, self._inputs = images, list(inputs)
        self._store: ImageStore | None = None
        self._donor: Donor | None = None
        self._dissection: Dissection | None = None
        self.arithmetic = Arithmetic(device=processes.device)
        self._indices: list[int] = []

    def load(
        self, donor: Donor, indices: Sequence[int], batch_size: int | None, precision: str
    ) -> int:
        """Build a donor in all processes; ``arithmetic`` then tells how it computes.

        Args:
            donor: From the zoo.
            indices: Calibration images, in order.
            batch_size: Images a batch; None: what the memory of every process holds.
            precision: Of the passes, as the option says it.

        Returns:
            The batch size.
        """
        order = {
            "step": "load",
            "donor": donor.to_json(),
            "indices": list(indices),
            "batch_size": batch_size,
            "precision": precision,
            "left_out": () if self._images is None else self._images.left_out,
            "inputs": [spec.to_json() for spec in self._inputs],
        }
        self._processes.order(order)
        return self._load(donor, order)

    def rows(self, batch_size: int, dtype: str) -> Iterator[dict[str, Tensor]]:
        """Rows of every tensor of ``embedding_specs``, batch by batch.

        Args:
            batch_size: Images a batch.
            dtype: Of this donor's features, whatever the others' are.

        Raises:
            NoMemoryError: A batch did not fit.
            DeryError: An image cannot be read, or features are NaN or infinite.
        """
        self._processes.order({"step": "pass", "batch_size": batch_size, "dtype": dtype})
        yield from self._rows(batch_size, dtype)

    def follow(self) -> NoReturn:
        """Do what the main process orders, until the end.

        Raises:
            Dismissed: The command is over.
        """
        while True:
            try:
                order = self._processes.await_order()
                if order["step"] == "load":
                    self._load(Donor.from_json(order["donor"]), order)
                else:
                    for _ in self._rows(order["batch_size"], order["dtype"]):
                        pass
            except Dismissed as dismissed:
                if dismissed.code is not None:
                    raise

    def _load(self, donor: Donor, order: dict[str, Any]) -> int:
        failure: Exception | None = None
        size, processes = order["batch_size"], self._processes
        try:
            if self._images is None:
                left_out = iter(order["left_out"])
                screen = (lambda _split: next(left_out)) if order["left_out"] else None
                self._images = open_data(self._config.data, screen)
            if self._store is None or order["indices"] != self._indices:
                inputs = [InputSpec.from_json(spec) for spec in order["inputs"]]
                self._store = self._decoder(self._images, order["indices"], inputs)
            self._dissection = None  # the last donor's memory is free before this one is built
            dissection = load_donor(donor, self._space, device=processes.device)
            self._donor, self._dissection, self._indices = donor, dissection, order["indices"]
            self.arithmetic = _prepare(dissection, donor, order["precision"], processes.device)
            if size is None:
                size = images_that_fit(dissection, donor, processes.device)
        except Exception as error:
            failure = error
        processes.check(failure)
        return int(min(processes.share(size)))

    def _decoder(
        self, images: DataSet, indices: Sequence[int], inputs: Sequence[InputSpec]
    ) -> ImageStore:
        """Where images come from; a single donor looks at each once, so that none is kept."""
        device, workers = self._processes.device, self._config.workers
        room = min(KEEP_BYTES, free_memory(torch.device("cpu")) // _KEPT_SHARE)
        return ImageStore(
            images.train,
            indices,
            crop=self._config.crop,
            batch_size=LARGEST_AUTO,
            device=device,
            workers=own_cores() if workers is None else workers,
            keep_bytes=room if len(inputs) > 1 else 0,
            inputs=inputs,
        )

    def _rows(self, batch_size: int, dtype: str) -> Iterator[dict[str, Tensor]]:
        assert self._donor is not None
        self._config = dataclasses.replace(self._config, dtype=dtype)
        count, rank = self._processes.count, self._processes.rank
        nodes, config = self._donor.anatomy.nodes, self._config
        spans = batch_spans(len(self._indices), batch_size)
        batches = self._batches(batch_size)
        for first in range(0, len(spans), count):
            turn = spans[first : first + count]
            rows, failure = None, None
            try:
                if rank < len(turn):
                    rows = _rows_of(next(batches))
            except Exception as error:
                failure = NoMemoryError() if _is_out_of_memory(error) else error
            self._processes.check(failure)
            if count == 1:
                assert rows is not None
                yield rows
                continue
            specs = [embedding_specs(nodes, config, stop - start, start) for start, stop in turn]
            packed = self._processes.collect(
                None if rows is None else _pack(rows, specs[rank]), [_nbytes(s) for s in specs]
            )
            for flat, spec in zip(packed, specs, strict=False):
                yield _unpack(flat, spec)

    def _batches(self, batch_size: int) -> Iterator[BatchFeatures]:
        """This process's part of the plan."""
        assert self._donor is not None
        assert self._dissection is not None
        assert self._store is not None
        config, processes = self._config, self._processes
        mine = batch_spans(len(self._indices), batch_size)[processes.rank :: processes.count]
        given = self._store.given_batches(
            self._donor.input, [self._indices[start:stop] for start, stop in mine]
        )
        batches = (self.arithmetic.laid_out(x_NCHW) for x_NCHW in given)
        dtype = _DTYPES[config.dtype]
        if processes.count == 1:
            yield from embed_batches(
                self._dissection,
                batches,
                grid=config.grid,
                grid_samples=config.grid_samples,
                dtype=dtype,
                computing=self.arithmetic.computing,
            )
            return
        for (start, _stop), x_NCHW in zip(mine, batches, strict=True):
            yield from embed_batches(
                self._dissection,
                [x_NCHW],
                grid=config.grid,
                grid_samples=max(0, config.grid_samples - start),
                dtype=dtype,
                computing=self.arithmetic.computing,
            )


def _prepare(
    dissection: Dissection, donor: Donor, precision: str, device: torch.device
) -> Arithmetic:
    """Lay a donor's weights out, channels-last where that gains and the donor can be computed so.

    A model that looks at its tensors' strides (``view`` of a map as a vector) cannot.
    """
    model = dissection.block(0, dissection.anatomy.num_units)
    arithmetic = choose_arithmetic(precision, device, model)
    arithmetic.prepared(model)
    if arithmetic.channels_last:
        x_NCHW = torch.zeros(1, donor.input.in_chans, *donor.input.image_size, device=device)
        try:
            with torch.inference_mode(), arithmetic.computing():
                for _ in dissection.features(arithmetic.laid_out(x_NCHW)):
                    pass
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise
            arithmetic = dataclasses.replace(arithmetic, channels_last=False)
            arithmetic.prepared(model)
    return arithmetic


def _rows_of(batch: BatchFeatures) -> dict[str, Tensor]:
    rows = {}
    for index, pooled in enumerate(batch.nodes):
        rows[f"{index}.feat_NC"] = pooled.feat_NC
        rows[f"{index}.feat_NGC"] = pooled.feat_NGC
        if pooled.prefix_NTC.shape[1]:
            rows[f"{index}.prefix_NTC"] = pooled.prefix_NTC
    return rows


def _nbytes(specs: Specs) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def _pack(rows: dict[str, Tensor], specs: Specs) -> Tensor:
    return torch.cat([rows[name].contiguous().flatten().view(torch.uint8) for name in specs])


def _unpack(flat: Tensor, specs: Specs) -> dict[str, Tensor]:
    parts = torch.split(flat, [_nbytes({name: spec}) for name, spec in specs.items()])
    return {
        name: part.clone().view(dtype).reshape(shape)
        for part, (name, (dtype, shape)) in zip(parts, specs.items(), strict=True)
    }


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error).lower() for w in _OUT_OF_MEMORY)


def images_that_fit(dissection: Dissection, donor: Donor, device: torch.device) -> int:
    """The largest power of two of images, up to ``LARGEST_AUTO``, that half the free memory holds.

    A pass over one image tells how many bytes of tensors are alive at once; the scratch memory of
    the kernels is taken to be as much again.
    """
    x_NCHW = torch.zeros(1, donor.input.in_chans, *donor.input.image_size, device=device)
    with torch.inference_mode(), PeakBytes() as peak:
        for _ in dissection.features(x_NCHW):
            pass
    budget = free_memory(device) // 2
    images = max(1, budget // (2 * (peak.peak + x_NCHW.nbytes)))
    return int(min(LARGEST_AUTO, 1 << (images.bit_length() - 1)))


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
    for limit, used in (
        ("memory.max", "memory.current"),  # the container's, cgroup 2 and 1
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file
            folder = Path("/sys/fs/cgroup")
            free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()))
    return max(0, free) // local_count()
