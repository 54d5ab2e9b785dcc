"""Heuristic answers to Eq. 2-5: alternation of two exact steps, and exact one-anchor swaps.

Legend as in ``blocks``: C candidate blocks, M donors, K blocks a donor and sets, R
restarts solved side by side, B = M K blocks used by one answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from dery_cli.core.partition.blocks import (
    BlockTable,
    BoolArray,
    FloatArray,
    IntArray,
    anchor_gains,
    forward,
    trace,
)

TOLERANCE = 1e-10
"""Differences of the objective below this are rounding."""

RELATIVE = 1e-9
"""An answer that is better by less than this share of the objective does not count as better."""

PAIRS_AT_ONCE = 4_000_000
"""Similarities held at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """R answers side by side.

    Args:
        blocks_MKR: Block of every donor and stage.
        sets_MKR: The set it is assigned to.
        anchors_KR: Anchor of every set.
        value_R: Objective.
    """

    blocks_MKR: IntArray
    sets_MKR: IntArray
    anchors_KR: IntArray
    value_R: FloatArray

    def take(self, which: IntArray | BoolArray) -> Answers:
        """The answers at ``which``."""
        return Answers(
            blocks_MKR=self.blocks_MKR[..., which],
            sets_MKR=self.sets_MKR[..., which],
            anchors_KR=self.anchors_KR[:, which],
            value_R=self.value_R[which],
        )

    def join(self, other: Answers) -> Answers:
        """These answers and then the others."""
        return Answers(
            blocks_MKR=np.concatenate([self.blocks_MKR, other.blocks_MKR], axis=-1),
            sets_MKR=np.concatenate([self.sets_MKR, other.sets_MKR], axis=-1),
            anchors_KR=np.concatenate([self.anchors_KR, other.anchors_KR], axis=-1),
            value_R=np.concatenate([self.value_R, other.value_R]),
        )

    @property
    def best(self) -> int:
        """Index of the best answer, the first of equals."""
        return int(np.argmax(self.value_R >= self.value_R.max() - TOLERANCE))


def values(table: BlockTable, anchors_KR: IntArray) -> FloatArray:
    """The objective of the best partitions under each set of anchors, -inf where none exists."""
    num_sets, num_restarts = anchors_KR.shape
    result = np.empty(num_restarts)
    step = max(1, PAIRS_AT_ONCE // (len(table) * num_sets))
    ends = table.last_M
    for at in range(0, num_restarts, step):
        gain_CR, _ = anchor_gains(table, anchors_KR[:, at : at + step])
        result[at : at + step] = forward(table, gain_CR)[-1, ends].sum(axis=0)
    return result


def partition_step(table: BlockTable, anchors_KR: IntArray) -> Answers:
    """The best partition and assignment of every donor under fixed anchors (exact)."""
    gain_CR, set_CR = anchor_gains(table, anchors_KR)
    best = forward(table, gain_CR)
    blocks_MKR = trace(table, gain_CR, best)
    restarts = np.arange(gain_CR.shape[1])
    return Answers(
        blocks_MKR=blocks_MKR,
        sets_MKR=set_CR[blocks_MKR, restarts],
        anchors_KR=anchors_KR,
        value_R=best[-1, table.last_M].sum(axis=0),
    )


def anchor_step(table: BlockTable, answers: Answers) -> IntArray:
    """The best anchor of every set for fixed partitions and assignments (exact), as (K, R)."""
    num_restarts = len(answers.value_R)
    anchors_KR = np.empty((table.num_blocks, num_restarts), np.int64)
    blocks_BR = answers.blocks_MKR.reshape(-1, num_restarts)
    sets_BR = answers.sets_MKR.reshape(-1, num_restarts)
    step = max(1, PAIRS_AT_ONCE // len(blocks_BR) ** 2)
    for at in range(0, num_restarts, step):
        blocks, sets = blocks_BR[:, at : at + step], sets_BR[:, at : at + step]
        pairs_BBR = table.similarity(blocks[:, None], blocks[None, :])
        pairs_BBR[sets[:, None] != sets[None, :]] = 0.0
        score_BR = pairs_BBR.sum(axis=0)
        for k in range(table.num_blocks):
            member = np.where(sets == k, score_BR, -np.inf)
            chosen = np.argmax(member >= member.max(axis=0) - TOLERANCE, axis=0)
            anchors_KR[k, at : at + step] = blocks[chosen, np.arange(blocks.shape[1])]
    return anchors_KR


def alternate(table: BlockTable, anchors_KR: IntArray) -> tuple[Answers, list[FloatArray]]:
    """Alternate the two exact steps until no answer rises; the objective never falls.

    Returns:
        The answers, and their objectives after every round.
    """
    answers = partition_step(table, anchors_KR)
    history = [answers.value_R.copy()]
    active = np.arange(anchors_KR.shape[1])
    while len(active):
        risen = partition_step(table, anchor_step(table, answers.take(active)))
        better = risen.value_R > answers.value_R[active] + TOLERANCE
        active = active[better]
        risen = risen.take(better)
        answers.blocks_MKR[..., active] = risen.blocks_MKR
        answers.sets_MKR[..., active] = risen.sets_MKR
        answers.anchors_KR[:, active] = risen.anchors_KR
        answers.value_R[active] = risen.value_R
        history.append(answers.value_R.copy())
    return answers, history


def seeds(table: BlockTable, num_restarts: int, rng: np.random.Generator) -> IntArray:
    """Anchors to start from, as (K, R): odd restarts k-means++-like, even ones uniform.

    Each restart draws a random partition and picks K of its blocks, so that its anchors can be
    used together.
    """
    gain_CR = rng.random((len(table), num_restarts))
    blocks_MKR = trace(table, gain_CR, forward(table, gain_CR))
    blocks_BR = blocks_MKR.reshape(-1, num_restarts)
    restarts = np.arange(num_restarts)
    spread = restarts % 2 == 1
    taken_BR = np.zeros(blocks_BR.shape, bool)
    nearest_BR = np.zeros(blocks_BR.shape)
    anchors_KR = np.empty((table.num_blocks, num_restarts), np.int64)
    for k in range(table.num_blocks):
        weight_BR = np.where(spread & (k > 0), 2.0 + TOLERANCE - nearest_BR, 1.0)
        weight_BR[taken_BR] = 0.0
        reach_BR = np.cumsum(weight_BR, axis=0)
        draw = rng.random(num_restarts) * reach_BR[-1]
        chosen = np.argmax(reach_BR > draw, axis=0)
        anchors_KR[k] = blocks_BR[chosen, restarts]
        taken_BR[chosen, restarts] = True
        nearest_BR = np.maximum(nearest_BR, table.similarity(blocks_BR, anchors_KR[k]))
    return anchors_KR


def swap(
    table: BlockTable,
    answer: Answers,
    pool: IntArray,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Answers:
    """Replace one anchor by one of ``pool`` while that helps, each try solved exactly.

    Args:
        table: Candidate blocks.
        answer: One answer (R = 1).
        pool: Blocks to try as anchors.
        out_of_time: Asked between rounds.
    """
    while not out_of_time():
        tries = np.repeat(answer.anchors_KR, table.num_blocks * len(pool), axis=1)
        for k in range(table.num_blocks):
            tries[k, k * len(pool) : (k + 1) * len(pool)] = pool
        value = values(table, tries)
        value[np.isin(tries, answer.anchors_KR).sum(axis=0) == table.num_blocks] = -np.inf
        top = int(np.argmax(value >= value.max() - TOLERANCE))
        if value[top] <= answer.value_R[0] + TOLERANCE:
            break
        answer, _ = alternate(table, tries[:, top : top + 1].copy())
    return answer


@dataclasses.dataclass
class Incumbent:
    """The best answer so far, and the anchor sets that were solved on the way.

    Args:
        table: The whole table; anchor sets are given by its indices.
        answer: One answer (R = 1).
    """

    table: BlockTable
    answer: Answers
    solved: set[tuple[int, ...]] = dataclasses.field(default_factory=set)

    @property
    def value(self) -> float:
        """Its objective."""
        return float(self.answer.value_R[0])

    @property
    def floor(self) -> float:
        """Bounds up to here prove that nothing better is left."""
        return self.value + RELATIVE * max(1.0, self.value)

    def offer(self, anchors: list[tuple[int, ...]]) -> bool:
        """Solve the sets that are new; True where the incumbent rose."""
        fresh = [
            a for a in dict.fromkeys(tuple(sorted(a)) for a in anchors) if a not in self.solved
        ]
        if not fresh:
            return False
        self.solved.update(fresh)
        tries = np.array(fresh, np.int64).T
        value = values(self.table, tries)
        top = int(np.argmax(value))
        if value[top] <= self.value + TOLERANCE:
            return False
        return self.accept(alternate(self.table, tries[:, top : top + 1])[0])

    def accept(self, answer: Answers) -> bool:
        """Take an answer (R = 1) that is better; True where it was."""
        self.solved.add(tuple(sorted(answer.anchors_KR[:, 0].tolist())))
        if answer.value_R[0] <= self.value + TOLERANCE:
            return False
        self.answer = answer
        return True
