"""The embedded demo zoo (ten small pretrained donors) and demo data of ``dery``.

``zoo`` and ``data`` enter by the same entry points as anyone's plugin. Importing this package
imports neither torch nor timm.
"""

from __future__ import annotations

from dery_demo.images import DemoData
from dery_demo.zoo import DemoZoo

zoo = DemoZoo()
data = DemoData()

__all__ = ["data", "zoo"]
