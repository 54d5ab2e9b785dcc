"""The export stage: a network written for another runtime, loaded back there, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from dery_cli.data.batches import ImageBatches, batch_spans
from dery_cli.data.classes import check_classes
from dery_cli.data.samples import choose_samples
from dery_cli.data.sets import DataSet, open_checked
from dery_cli.errors import DeryError, UsageError
from dery_cli.io.files import file_sha256
from dery_cli.io.folders import check_place, new_folder
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.export import (
    as_executorch,
    as_onnx,
    as_safetensors,
    as_torch_export,
    metadata,
)
from dery_cli.stages.export.capture import capture, converting, fold_batch_norms
from dery_cli.stages.export.compare import Agreement, Runnable, check_agreement, compare, top1
from dery_cli.stages.export.config import ExportConfig
from dery_cli.zoo.networks import LoadedAssembly, load_assembly
from dery_cli.zoo.plugin import ImageSplit

SCRIPT = "run.py"
BATCH = as_executorch.MOST
"""Images at once; the first is alone, so that more than one batch size is tried."""
_FLOAT = "float.onnx"
_FILES = {
    "safetensors": as_safetensors.FILE,
    "torch-export": as_torch_export.FILE,
    "onnx": as_onnx.FILE,
    "executorch": as_executorch.FILE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
    """Top-1 on the test images before and after quantisation."""

    images: int
    before: float
    after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Args:
        folder: Where.
        model: Name of the network's file.
        size: Bytes of all files of the folder.
        data: Spec of the images that were compared.
        agreement: Of what was loaded back with the original.
        folded: Batch norms; None where that was not asked for.
        int8: None where that was not asked for.
    """

    folder: Path
    model: str
    size: int
    data: str
    agreement: Agreement
    folded: int | None
    int8: Int8 | None


def export_network(terminal: Terminal, folder: Path, config: ExportConfig) -> Exported:
    """Export the network of a folder of a run or an assembly.

    Raises:
        UsageError: There is something in the way, or the data do not suit the network.
        DeryError: The network is damaged, cannot be exported, or answers otherwise once it is.
    """
    place = check_place(
        config.to,
        force=config.force,
        command="dery export",
        file=metadata.METADATA,
        schema=metadata.SCHEMA,
        hint="give another --to",
    )
    if config.format == "onnx":
        as_onnx.check_installed()
    if config.format == "executorch":
        as_executorch.check_installed()
    assembly = load_assembly(folder)
    images = _Images.open(terminal, assembly, config)
    with new_folder(place) as work:
        exporter = _Exporter(terminal, assembly, images, config, work)
        found = exporter.write()
        size = sum(path.stat().st_size for path in work.iterdir())
    return dataclasses.replace(found, folder=place, size=size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Images:
    """The images of the target that a network is compared and calibrated on."""

    data: DataSet
    assembly: LoadedAssembly
    most: int

    @classmethod
    def open(cls, terminal: Terminal, assembly: LoadedAssembly, config: ExportConfig) -> _Images:
        """Open the data asked for, or those the network was made for.

        Raises:
            UsageError: There are none, or ``--int8`` has nothing to judge by.
        """
        target = assembly.record.data
        skip_bad = config.skip_bad or (config.data is None and target["target_skip_bad"])
        data = open_checked(terminal, config.data or target["target"], skip_bad=skip_bad)
        check_classes(data, assembly.classes)
        if config.int8 and (data.test is None or assembly.classes is None or data.classes is None):
            raise UsageError(
                f"--int8 needs labelled test images and a network with a head; {data.spec} and "
                "this network have not both",
                "leave out --int8, or give --data SPEC",
            )
        return cls(data=data, assembly=assembly, most=config.images)

    def held_back(self) -> Iterator[Tensor]:
        """Some of the test images, or of the training images where there are no others."""
        split = self.data.train if self.data.test is None else self.data.test
        return self._some(split)

    def training(self) -> Iterator[Tensor]:
        """Some of the training images."""
        return self._some(self.data.train)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images, with their labels."""
        split = self.data.test
        assert split is not None
        assert split.labels is not None
        label_N = torch.tensor([int(label) for label in split.labels])
        batches = self._batches(split, list(range(len(split))))
        spans = batch_spans(len(split), BATCH)
        for (start, stop), x_NCHW in zip(spans, batches, strict=True):
            yield x_NCHW, label_N[start:stop]

    def _some(self, split: ImageSplit) -> Iterator[Tensor]:
        chosen = list(choose_samples(range(len(split)), split.labels, self.most, seed=0))
        yield from self._batches(split, chosen[:1])
        yield from self._batches(split, chosen[1:])

    def _batches(self, split: ImageSplit, indices: list[int]) -> Iterator[Tensor]:
        view = self.assembly.transform
        yield from ImageBatches(
            split,
            indices,
            view.input,
            crop=view.crop,
            batch_size=BATCH,
            device=torch.device("cpu"),
        )


@dataclasses.dataclass(frozen=True)
class _Exporter:
    """One export, into a folder that is not in its place yet."""

    terminal: Terminal
    assembly: LoadedAssembly
    images: _Images
    config: ExportConfig
    work: Path

    def write(self) -> Exported:
        """Write the network, compare what is read back, then write what goes beside it."""
        config = self.config
        described = metadata.describe(
            self.assembly, format=config.format, model=_FILES[config.format]
        )
        folded: int | None = None
        self.terminal.note(f"converting to {config.format}")
        if config.format == "safetensors":
            as_safetensors.write(self.assembly, self.work, name=config.to.name)
            agreement = self._compared(as_safetensors.load(self.work))
        else:
            program, folded = self._captured()
            described["folded_batch_norms"] = folded
            agreement = self._lowered(program, described)
        int8 = self._quantised() if config.int8 else None
        described["int8"] = None if int8 is None else dataclasses.asdict(int8)
        if config.format == "onnx":
            as_onnx.describe(self.work, metadata.as_properties(described))
        self._beside(described, agreement)
        return Exported(
            folder=self.work,
            model=_FILES[config.format],
            size=0,
            data=self.images.data.spec,
            agreement=agreement,
            folded=folded,
            int8=int8,
        )

    def _captured(self) -> tuple[ExportedProgram, int | None]:
        most = as_executorch.MOST if self.config.format == "executorch" else None
        spec = self.assembly.transform.input
        example_NCHW = torch.zeros(2, spec.in_chans, *spec.image_size)
        program = capture(self.assembly.network, example_NCHW, most)
        if not self.config.fuse:
            return program, None
        return fold_batch_norms(program, example_NCHW, most)

    def _lowered(self, program: ExportedProgram, described: dict[str, Any]) -> Agreement:
        if self.config.format == "torch-export":
            as_torch_export.write(program, self.work, metadata.as_text(described))
            return self._compared(as_torch_export.load(self.work))
        if self.config.format == "executorch":
            as_executorch.write(program, self.work)
            exported, most = as_executorch.load(self.work)
            described["input"]["batch"] = f"1 to {most}"
            return self._compared(exported)
        file = _FLOAT if self.config.int8 else as_onnx.FILE
        as_onnx.write(program, self.work, file)
        return self._compared(as_onnx.load(self.work, file))

    def _compared(self, exported: Runnable) -> Agreement:
        """Hold what was loaded back against the original.

        Raises:
            DeryError: They differ by more than the tolerance.
        """

        def run(x_NCHW: Tensor) -> Tensor:
            with converting(self.config.format):
                return exported(x_NCHW)

        found = compare(
            self.assembly.network,
            run,
            self.images.held_back(),
            classes=self.assembly.classes is not None,
        )
        check_agreement(found, self.config.tolerance)
        return found

    def _quantised(self) -> Int8:
        """Quantise, and count what it costs.

        Raises:
            DeryError: More than ``--max-drop`` points.
        """
        before = top1(as_onnx.load(self.work, _FLOAT), self.images.test())
        self.terminal.note("quantising")
        as_onnx.quantise(self.work, _FLOAT, self.images.training())
        after = top1(as_onnx.load(self.work), self.images.test())
        test = self.images.data.test
        assert test is not None
        found = Int8(images=len(test), before=before, after=after)
        if 100 * (before - after) > self.config.max_drop:
            raise DeryError(
                f"int8 takes top-1 on {found.images} test images from {before:.4f} to {after:.4f}; "
                f"--max-drop allows {self.config.max_drop:g} points",
                "nothing was written; leave out --int8, or allow more with --max-drop",
                details=dataclasses.asdict(found),
            )
        return found

    def _beside(self, described: dict[str, Any], agreement: Agreement) -> None:
        """Write the script, and the metadata last."""
        script = Path(__file__).parent / "scripts" / SCRIPT
        (self.work / SCRIPT).write_bytes(script.read_bytes())
        described["compared"] = dataclasses.asdict(agreement)
        described["files"] = {path.name: file_sha256(path) for path in sorted(self.work.iterdir())}
        text = metadata.as_text(described)
        (self.work / metadata.METADATA).write_text(text, encoding="utf-8")
