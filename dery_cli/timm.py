"""Assemblies as timm models: importing this registers the architecture ``dery_assembly``.

``import dery_cli`` does it too where timm was imported before. Then
``timm.create_model("local-dir:FOLDER")`` and ``timm.create_model("hf-hub:OWNER/REPO")`` build what
``dery push`` and ``write_timm_folder`` write.
"""

from __future__ import annotations

from typing import Any

from timm.models import is_model, register_model
from torch import nn

from dery_cli.zoo.timm_folder import write_timm_folder
from dery_cli.zoo.timm_model import ARCHITECTURE, NamedMaps, create_assembly

__all__ = ["NamedMaps", "dery_assembly", "write_timm_folder"]


def dery_assembly(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """An assembly, or its feature maps with ``features_only=True``; see ``create_assembly``."""
    return create_assembly(pretrained=pretrained, **kwargs)


if not is_model(ARCHITECTURE):
    register_model(dery_assembly)
