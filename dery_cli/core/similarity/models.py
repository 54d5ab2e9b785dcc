"""Similarity of whole models, from that of their nodes; free of torch.

Legend: P nodes, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]


def model_similarity(sim_PP: FloatArray, model_P: Sequence[int]) -> FloatArray:
    """Similarity of whole models: the mean over nodes of their best match in the other model.

    Taken in both directions and averaged, so that it is symmetric and 1 for a model and itself.

    Args:
        sim_PP: Similarity of nodes.
        model_P: Index of the model each node belongs to, 0..M-1.

    Returns:
        sim_MM [M, M].
    """
    owner_P = np.asarray(model_P)
    groups = [np.flatnonzero(owner_P == m) for m in range(int(owner_P.max()) + 1)]
    best_PM = np.stack([sim_PP[:, group].max(1) for group in groups], 1)
    best_MM = np.stack([best_PM[group].mean(0) for group in groups])
    back_MP = np.stack([sim_PP[group].max(0) for group in groups])
    back_MM = np.stack([back_MP[:, group].mean(1) for group in groups], 1)
    return np.asarray((best_MM + back_MM) / 2)
