"""Name the class of images: python run.py IMAGE...

Needs Pillow, numpy and the runtime of the format (onnxruntime, torch or executorch). It stands
alone: of dery it needs nothing, but for the format safetensors, which holds weights and no graph.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
META = json.loads((HERE / "metadata.json").read_text(encoding="utf-8"))


def load() -> Callable[[Any], Any]:
    """The network: float32 images (N, C, H, W) to logits (N, classes)."""
    path = str(HERE / META["model"])
    if META["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"images": x})[0]
    import torch

    module: Any
    if META["format"] == "torch-export":
        module = torch.export.load(path).module()
    elif META["format"] == "executorch":
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
        module = lambda x: method.execute([x])[0]  # noqa: E731
    else:
        from dery_cli import load_assembly

        module = load_assembly(HERE).network
    return lambda x: module(torch.from_numpy(x)).detach().numpy()


def preprocess(path: str) -> Any:
    """An image file as the network takes it: float32 (C, H, W)."""
    spec = META["input"]
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":
        sys.exit(f"{path}: save it with 8 bits a channel")
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    image = image.convert("L" if spec["in_chans"] == 1 else "RGB")
    side = spec["crop"] * min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    height, width = spec["image_size"]
    resampling = Image.Resampling[spec["interpolation"].upper()]
    image = image.resize((width, height), resampling, (left, top, left + side, top + side))
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, -1) / np.float32(255)
    return ((pixels - np.float32(spec["mean"])) / np.float32(spec["std"])).transpose(2, 0, 1)


if __name__ == "__main__":
    network = load()
    for name in sys.argv[1:]:
        logits = network(np.ascontiguousarray(preprocess(name)[None]))[0]
        classes = META["classes"]
        print(name, int(logits.argmax()) if classes is None else classes[int(logits.argmax())])
