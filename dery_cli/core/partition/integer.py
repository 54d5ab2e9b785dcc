"""Eq. 2-5 as an integer program in python-mip, over a pool of anchors seen.

CBC is exact only to its tolerance, so it proposes anchors; what they are worth is computed by the
exact path programs. See ``bound`` for x, y, z and the subproblem.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dery_cli.core.partition.blocks import IntArray
from dery_cli.core.partition.bound import Subproblem, gains
from dery_cli.core.partition.search import Incumbent

POOL = 16
"""Anchors of the pool, those with the largest reduced gain; the incumbent's come first."""

OFFERS = 4
"""Anchors of the pool a block may be assigned to, the most similar ones."""

MAX_BLOCKS = 2_000
"""Candidate blocks up to which the program is worth its time."""

MAX_NODES = 20
"""Branches of CBC: a count, so that a rerun stops at the same place."""


def improve(
    sub: Subproblem,
    incumbent: Incumbent,
    seen: IntArray,
    seconds_left: Callable[[], float] = lambda: math.inf,
) -> bool:
    """Solve the program over the anchors in ``seen`` that the bound has not ruled out.

    Args:
        sub: The tightened root: blocks and anchors that can still beat the incumbent.
        incumbent: Receives the anchors found.
        seen: Indices of blocks in the whole table, of any shape.
        seconds_left: The time limit.

    Returns:
        Whether the incumbent rose.
    """
    table = sub.table
    if len(table) > MAX_BLOCKS:
        return False
    pool = _pool(sub, incumbent, seen)
    if len(pool) <= table.num_blocks:
        return False

    # a large library, and its types are wrong: imported only where there is something to solve
    mip: Any = importlib.import_module("mip")

    model = mip.Model(sense=mip.MAXIMIZE, solver_name=mip.CBC)
    model.verbose = 0
    model.threads = 1
    model.seed = 1
    y = [model.add_var(var_type=mip.BINARY) for _ in pool]
    x = [model.add_var(var_type=mip.BINARY) for _ in range(len(table))]
    sim_CA = table.columns(pool)
    offers: list[dict[int, Any]] = []
    for b in range(len(table)):
        near = np.argsort(-sim_CA[b], kind="stable")[:OFFERS].tolist()
        own = np.nonzero(pool == b)[0].tolist()
        offers.append({a: model.add_var(lb=0.0, ub=1.0) for a in dict.fromkeys(own + near)})
    model.objective = mip.xsum(
        float(sim_CA[b, a]) * z for b, row in enumerate(offers) for a, z in row.items()
    )
    model += mip.xsum(y) == table.num_blocks
    for b, row in enumerate(offers):
        model += mip.xsum(row.values()) == x[b]
    for a, anchor in enumerate(pool):
        model += offers[anchor][a] == y[a]
    for m, n in enumerate(table.units):
        for unit in range(n):  # exactly one block, at most one of each set
            over = np.nonzero(
                (table.donor_C == m) & (table.start_C <= unit) & (table.stop_C > unit)
            )[0].tolist()
            model += mip.xsum(x[b] for b in over) == 1
            for a in range(len(pool)):
                inside = [offers[b][a] for b in over if a in offers[b]]
                if inside:
                    model += mip.xsum(inside) <= y[a]
        mine = np.nonzero(table.donor_C == m)[0].tolist()
        model += mip.xsum(x[b] for b in mine) == table.num_blocks
    current = set(incumbent.answer.anchors_KR[:, 0].tolist())
    blocks = set(incumbent.answer.blocks_MKR.ravel().tolist())
    model.start = [(y[a], float(sub.ids_C[b] in current)) for a, b in enumerate(pool)]
    model.start += [(x[b], float(i in blocks)) for b, i in enumerate(sub.ids_C.tolist())]
    model.optimize(max_nodes=MAX_NODES, max_seconds=seconds_left())
    found = [
        tuple(int(sub.ids_C[pool[a]]) for a in range(len(pool)) if values[a] > 0.5)
        for values in [[v.xi(i) for v in y] for i in range(model.num_solutions)]
    ]
    return incumbent.offer([f for f in found if len(f) == table.num_blocks])


def _pool(sub: Subproblem, incumbent: Incumbent, seen: IntArray) -> IntArray:
    """The anchors of the program, as indices of the subproblem's table, ascending."""
    wanted = set(seen.ravel().tolist()) | set(itertools.chain(*incumbent.solved))
    pool = sub.open_A[np.isin(sub.ids_C[sub.open_A], sorted(wanted))]
    rank = gains(sub.table, pool, sub.lambda_C)
    rank[np.isin(sub.ids_C[pool], incumbent.answer.anchors_KR[:, 0])] = np.inf
    chosen: IntArray = np.sort(pool[np.argsort(-rank, kind="stable")[:POOL]])
    return chosen
