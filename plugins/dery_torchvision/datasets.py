from __future__ import annotations


class TorchvisionData:
    """Placeholder until the readers below are in."""
