"""``--format onnx``: ``torch.onnx.export`` on the captured graph; ``onnxruntime`` runs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.onnx
from torch import Tensor
from torch.export import ExportedProgram

from dery_cli.errors import DeryError
from dery_cli.stages.export.capture import BATCH, converting
from dery_cli.stages.export.compare import Runnable

FILE = "model.onnx"
INPUT, OUTPUT = "images", "logits"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_INLINE_BYTES = 1 << 30
"""Weights above this go into a file of their own: one ONNX file holds less than 2 GiB."""
_QUANTISED = ["Conv", "MatMul", "Gemm"]


def check_installed() -> None:
    """Find the libraries before anything is computed.

    Raises:
        DeryError: One is not installed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DeryError(
            f"--format onnx needs {', '.join(missing)}, which is not installed",
            "pip install 'dery-cli[onnx]'",
        )


def write(program: ExportedProgram, folder: Path, file: str = FILE) -> None:
    """Convert the graph and write it.

    Raises:
        DeryError: An operator has no counterpart in ONNX.
        OSError: The disk is full.
    """
    with converting("torch.onnx"):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: BATCH},),
        )
        assert converted is not None
        for node in converted.model.graph.all_nodes():
            node.metadata_props.clear()  # they name folders of this machine
        converted.save(folder / file, external_data=_is_large(program))


def _is_large(program: ExportedProgram) -> bool:
    size: int = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    return size > _INLINE_BYTES


def load(folder: Path, file: str = FILE) -> Runnable:
    """The network as onnxruntime reads it, with as many threads as torch has."""
    with converting("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            folder / file, options, providers=["CPUExecutionProvider"]
        )

    def run(x_NCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x_NCHW.numpy()})[0])

    return run


def describe(folder: Path, properties: Mapping[str, str]) -> None:
    """Put texts into the file's ``metadata_props``; external weights stay as they are."""
    import onnx

    model = onnx.load(folder / FILE, load_external_data=False)
    onnx.helper.set_model_props(model, dict(properties))
    onnx.save(model, folder / FILE)


def quantise(folder: Path, source: str, batches: Iterable[Tensor]) -> None:
    """Write ``FILE`` with weights and activations of eight bits, calibrated on images.

    Static, in QDQ form: one scale a channel for weights of seven bits, so that products of eight do
    not overflow on processors without VNNI (onnxruntime's advice for x86).

    Args:
        folder: Where both files lie.
        source: The file of the float network.
        batches: Normalised training images.

    Raises:
        DeryError: onnxruntime cannot quantise it.
        OSError: The disk is full.
    """
    with converting("onnxruntime"):
        from onnxruntime import quantization

        class Images(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                self._left = iter(batches)

            def get_next(self) -> Any:
                x_NCHW = next(self._left, None)
                return None if x_NCHW is None else {INPUT: x_NCHW.numpy()}

        large = any(folder.glob(f"{source}.data"))
        prepared = folder / f"prepared-{source}"
        quantization.quant_pre_process(
            folder / source, prepared, skip_symbolic_shape=True, save_as_external_data=large
        )
        quantization.quantize_static(
            prepared,
            folder / FILE,
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=_QUANTISED,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=large,
        )
    for path in (*folder.glob(f"{source}*"), *folder.glob(f"{prepared.name}*")):
        path.unlink()
