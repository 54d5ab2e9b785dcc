"""What may make a path good, as terms that add up along it: of its end, its stitches, its units.

Each term is a function of one node, of the two nodes of a stitch, or of one unit, so any weighting
of them is an objective that the exact search can maximise. Which weighting is right differs from
zoo to zoo and from target to target; ``core/assembly/objective.py`` learns it from built networks.

Legend: V nodes of all donors, node 0 of each included; D donors; F terms.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dery_cli.core.assembly.notation import merged
from dery_cli.core.stitching.joint_r2 import MIN_R2
from dery_cli.stages.assemble.features_store import TargetScores
from dery_cli.stages.assemble.free_space import PathScores
from dery_cli.types import BlockRef
from dery_cli.zoo.registry import Zoo

FloatArray = npt.NDArray[np.float64]

HEAD_TERMS = ("probe at the end", "cross-entropy at the end")
STITCH_TERMS = (
    "stitches",
    "divergence at stitches",
    "divergence at stitches, clipped",
    "log of R2 lost at stitches",
    "cross-entropy behind stitches",
    "probe before stitches",
    "probe behind stitches",
    "adapters",
    "depth skipped",
    "depth repeated",
)
UNIT_TERMS = ("units", "units of the last piece")

CLIP = 0.3
"""Nats beyond which a stitch's divergence says no more."""

FORMULA = {
    "probe at the end": 1.0,
    "cross-entropy behind stitches": -0.05,
    "stitches": -0.01,
}
"""The objective before anything is built: the probe where a path ends, less a twentieth of what the
next donor's probe loses behind each stitch (1 is what guessing loses), less a point for each stitch
so that adapters are not free. On 212 paths of the demo zoo within 400k parameters, digits,
Kendall's tau of this sum with the built network's probe was 0.40; with half of the divergence in
nats in place of the cross-entropy it was 0.31."""


class PathTerms:
    """The terms of a zoo's paths, from what the target's images say of its nodes and joints.

    Args:
        zoo: The donors.
        scores: Of the target; a stitch that cannot be has NaN.
    """

    def __init__(self, zoo: Zoo, scores: TargetScores) -> None:
        donors = zoo.names()
        units_D = np.array([zoo[name].anatomy.num_units for name in donors])
        firsts_D = np.concatenate([[0], np.cumsum(units_D + 1)[:-1]])
        self._first: Mapping[str, int] = dict(zip(donors, firsts_D.tolist(), strict=True))
        self._donor_V = np.repeat(np.arange(len(donors)), units_D + 1)
        self._index_V = np.arange(len(self._donor_V)) - firsts_D[self._donor_V]
        self._depth_V = self._index_V / units_D[self._donor_V]
        self._scores = scores
        self.names = (
            *HEAD_TERMS,
            *(f"ends in {name}" for name in donors),
            *STITCH_TERMS,
            *UNIT_TERMS,
            *(f"begins in {name}" for name in donors),
        )
        self._stitches = len(HEAD_TERMS) + len(donors)
        self._units = self._stitches + len(STITCH_TERMS)
        self._begins = self._units + len(UNIT_TERMS)

    @property
    def formula_F(self) -> FloatArray:
        """The weights before anything is built, ``FORMULA``."""
        return np.array([FORMULA.get(name, 0.0) for name in self.names])

    def of(self, refs: Sequence[BlockRef]) -> FloatArray:
        """The terms of a network, (F,): sums over its parts."""
        refs = merged(refs)
        total_F = np.zeros(len(self.names))
        last = refs[-1]
        end = self._first[last.donor] + last.stop
        total_F[: len(HEAD_TERMS)] = self._heads[end]
        total_F[len(HEAD_TERMS) + self._donor_V[end]] = 1.0
        total_F[self._units] = sum(ref.stop - ref.start for ref in refs)
        total_F[self._units + 1] = last.stop - last.start
        total_F[self._begins + self._donor_V[self._first[refs[0].donor]]] = 1.0
        for before, ref in itertools.pairwise(refs):
            source = self._first[before.donor] + before.stop
            target = self._first[ref.donor] + ref.start
            for term, values in enumerate(self._stitch_terms):
                total_F[self._stitches + term] += values[source, target]
        return total_F

    def weighted(self, weight_F: FloatArray) -> PathScores:
        """What the parts of a path are worth under these weights of the terms."""
        stitch_VV = np.zeros(self._scores.kl_VV.shape)
        weights = weight_F[self._stitches : self._units].tolist()
        for weight, values_VV in zip(weights, self._stitch_terms, strict=True):
            if weight:
                stitch_VV += weight * values_VV
        unit, last = weight_F[self._units : self._begins].tolist()
        begin_V, end_V = weight_F[self._begins :][self._donor_V], weight_F[len(HEAD_TERMS) :]
        return PathScores(
            head_V=self._heads @ weight_F[: len(HEAD_TERMS)] + end_V[self._donor_V],
            stitch_VV=stitch_VV,
            # only a path's first piece has a donor's first unit
            unit_V=np.where(self._index_V > 0, unit, 0.0)
            + np.where(self._index_V == 1, begin_V, 0.0),
            last_unit_V=np.where(self._index_V > 0, last, 0.0),
        )

    def shares(self, refs: Sequence[BlockRef], weight_F: FloatArray) -> list[tuple[str, float]]:
        """What each part of a network adds to its weighted sum, in the order of the parts.

        Args:
            refs: The network.
            weight_F: Of the terms.

        Returns:
            Pieces, the stitches between them, and the head, each in words and with its share.
        """
        worth, pieces = self.weighted(weight_F), merged(refs)
        unit_V = worth.unit_V
        found: list[tuple[str, float]] = []
        for place, ref in enumerate(pieces):
            first = self._first[ref.donor]
            if place:
                before = pieces[place - 1]
                source, target = self._first[before.donor] + before.stop, first + ref.start
                joint = f"stitch from {before.donor}'s node {before.stop} "
                joint += f"to {ref.donor}'s node {ref.start}"
                if ref.adapter:
                    joint = f"adapter at {ref.donor}'s node {ref.start}"
                found.append((joint, float(worth.stitch_VV[source, target])))
            if place == len(pieces) - 1:
                unit_V = unit_V + worth.last_unit_V
            units = slice(first + ref.start + 1, first + ref.stop + 1)
            found.append((str(ref), float(unit_V[units].sum())))
        last = pieces[-1]
        end = float(worth.head_V[self._first[last.donor] + last.stop])
        return [*found, (f"head on {last.donor}'s node {last.stop}", end)]

    @functools.cached_property
    def _heads(self) -> FloatArray:
        return np.stack([self._scores.accuracy_V, self._lost(self._scores.cross_entropy_V)], 1)

    def _lost(self, cross_entropy: FloatArray) -> FloatArray:
        """Cross-entropies in units of what guessing at node 0 loses."""
        chance = float(self._scores.cross_entropy_V[0]) or 1.0
        lost: FloatArray = np.nan_to_num(cross_entropy, nan=0.0) / chance
        return lost

    @functools.cached_property
    def _stitch_terms(self) -> list[FloatArray]:
        """Of each of ``STITCH_TERMS`` (V, V), or what is broadcast to it."""
        scores, shape = self._scores, self._scores.kl_VV.shape
        kl_VV = np.nan_to_num(scores.kl_VV, nan=0.0)
        r2_VV = np.nan_to_num(scores.r2_VV, nan=0.0)
        further_VV = self._depth_V[None] - self._depth_V[:, None]
        return [
            np.broadcast_to(1.0, shape),
            kl_VV,
            kl_VV.clip(max=CLIP),
            -np.log(np.maximum(r2_VV, MIN_R2)),
            self._lost(scores.joint_cross_entropy_VV),
            np.broadcast_to(scores.accuracy_V[:, None], shape),
            np.broadcast_to(scores.accuracy_V[None], shape),
            np.eye(len(self._donor_V)),
            further_VV.clip(min=0.0),
            (-further_VV).clip(min=0.0),
        ]
