"""Where to cut: the places where one tensor carries everything, and the units between them.

A *cut* is a boundary between two ops across which exactly one image-dependent tensor is alive. A
*unit* is what nobody would want to cut open: a residual block, an MBConv, a transformer block.
Units are found by structure alone. Between two cuts lies a segment; a segment with weights in
which paths join (an add, a gate, attention) is a *knot*. A module whose own forward ties a knot is
a unit. A module that merely calls others in a row, cuts between them, is a container.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import nn

from dery_cli.core.dissection.trace import Call, Trace


@dataclasses.dataclass(frozen=True)
class Cut:
    """Between ops ``time - 1`` and ``time`` only ``value`` is alive.

    ``name`` is the module whose output it is, where that is a unit.
    """

    time: int
    value: int
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Unit:
    """Ops [start, end) that belong together, and the call that makes them, if it is just one."""

    start: int
    end: int
    call: Call | None = None


def find_cuts(trace: Trace, stop: int, wanted: Sequence[int]) -> list[Cut]:
    """All cuts before time ``stop``, at which the values ``wanted`` are needed; one per value.

    Of several boundaries over which one value is alone, the one inside the fewest calls counts.
    """
    last = dict.fromkeys(wanted, stop)
    for op in trace.ops[:stop]:
        for index in op.reads:
            if trace.values[index].data:
                last[index] = max(last.get(index, -1), op.time)
    ending: dict[int, list[int]] = {}
    for index, time in last.items():
        ending.setdefault(time, []).append(index)
    depth = _depths(trace)
    alive = {trace.image}
    best: dict[int, Cut] = {}
    for op in trace.ops[:stop]:
        made = [value for _, value in op.outputs] + [new for _, new in op.aliases]
        alive.update(v for v in made if trace.values[v].data and last.get(v, -1) > op.time)
        alive.difference_update(ending.get(op.time, ()))
        if len(alive) == 1:
            (value,) = alive
            cut = Cut(op.time + 1, value)
            if value not in best or depth[cut.time] < depth[best[value].time]:
                best[value] = cut
    best.pop(trace.image, None)
    return sorted(best.values(), key=lambda cut: cut.time)


def _depths(trace: Trace) -> list[int]:
    """For each boundary, how many calls it lies strictly inside of."""
    change = [0] * (len(trace.ops) + 2)
    for call in trace.root.walk():
        if call.end - call.start > 1:
            change[call.start + 1] += 1
            change[call.end] -= 1
    depth, total = [], 0
    for step in change:
        total += step
        depth.append(total)
    return depth


def choose_cuts(trace: Trace, cuts: Sequence[Cut], usable: Sequence[Cut], stop: int) -> list[Cut]:
    """The cuts that end a unit: one after each unit but the last, where there is one.

    Args:
        trace: What the model does.
        cuts: All cuts; they say what is separate from what.
        usable: Those whose tensor has a layout that joins know; only these are chosen.
        stop: Time at which the classifier begins.
    """
    finder = _Finder(trace, cuts, stop)
    chosen = _between(finder, finder.units(), usable)
    return chosen or _between(finder, finder.segments(), usable)


def _between(finder: _Finder, units: Sequence[Unit], usable: Sequence[Cut]) -> list[Cut]:
    """One of the ``usable`` cuts after each of ``units`` but the last, where there is one."""
    chosen: list[Cut] = []
    times = [cut.time for cut in usable]
    for unit, following in pairwise(units):
        low, high = unit.end, following.start
        inside = usable[bisect.bisect_left(times, low) : bisect.bisect_right(times, high)]
        if not inside:  # the next unit may open with ops that still leave one tensor (a concat)
            first = finder.first_weight(following)
            inside = usable[bisect.bisect_left(times, high) : bisect.bisect_right(times, first)]
        if not inside:
            continue
        # a lone layer keeps its norm, activation and pool; a downsampling goes with what follows
        lone = unit.call is None and unit.end - unit.start == 1
        cut = inside[-1] if lone and following.call is None else inside[0]
        if not chosen or cut.time > chosen[-1].time:
            chosen.append(dataclasses.replace(cut, name=_ends(unit, cut)))
    return chosen


def _ends(unit: Unit, cut: Cut) -> str:
    call = unit.call
    return call.path if call and any(value == cut.value for _, value in call.outputs) else ""


class _Finder:
    def __init__(self, trace: Trace, cuts: Sequence[Cut], stop: int) -> None:
        self.trace, self.stop = trace, stop
        self.times = [0, *(cut.time for cut in cuts), stop]
        values = trace.values
        ops = trace.ops[:stop]
        self.weights = [
            op.time for op in ops if op.flops and any(not values[i].data for i in op.reads)
        ]
        joins = [op for op in ops if len({i for i in op.reads if values[i].data}) > 1]
        self.joins = [op.time for op in joins]
        self.owner = {op.time: op.owner for op in joins}
        knotted = {self.segment(time) for time in self.joins}
        self.knots = sorted(knotted & {self.segment(time) for time in self.weights})

    def segment(self, time: int) -> int:
        """Number of the segment that op ``time`` lies in."""
        return bisect.bisect_right(self.times, time) - 1

    def first_weight(self, unit: Unit) -> int:
        at = bisect.bisect_left(self.weights, unit.start)
        return self.weights[at] if at < len(self.weights) else unit.start

    def units(self) -> list[Unit]:
        if not self.knots:
            return self._plain()
        units = self._within(self.trace.root)
        units = self._promote(self._alike(units))
        units = self._widen(self._alike(units))
        return sorted(units, key=lambda unit: unit.start)

    def segments(self) -> list[Unit]:
        """Every knot as a unit of its own, for models whose modules cannot be kept whole."""
        return [Unit(self.times[knot], self.times[knot + 1]) for knot in self.knots]

    def _knots_in(self, call: Call) -> dict[int, list[int]]:
        """Joins made inside ``call``, by knot."""
        low = bisect.bisect_left(self.joins, call.start)
        high = bisect.bisect_left(self.joins, call.end)
        found: dict[int, list[int]] = {}
        for time in self.joins[low:high]:
            segment = self.segment(time)
            if segment in self.knots:
                found.setdefault(segment, []).append(time)
        return found

    def _within(self, call: Call) -> list[Unit]:
        knots = self._knots_in(call)
        if not knots:
            return []
        whole = [Unit(call.start, min(call.end, self.stop), call)]
        own = {k for k, joins in knots.items() if any(self.owner[t] is call for t in joins)}
        holders: dict[int, list[Call]] = {
            k: [c for c in call.calls() if any(c.start <= t < c.end for t in joins)]
            for k, joins in knots.items()
        }
        if len(knots) == 1:
            (holding,) = holders.values()
            return self._within(holding[0]) if not own and len(holding) == 1 else whole
        if own and len(knots) - len(own) < max(2, len(own) + 1) and call is not self.trace.root:
            return whole
        units: list[Unit] = []
        done: set[int] = set()
        for knot, holding in holders.items():
            if knot in own or len(holding) != 1:
                units.append(Unit(self.times[knot], self.times[knot + 1]))
            elif id(holding[0]) not in done:
                done.add(id(holding[0]))
                units.extend(self._within(holding[0]))
        return units

    def _alike(self, units: list[Unit]) -> list[Unit]:
        """Take what has the class, or the place in a list, of a unit for a unit as well."""
        calls = [unit.call for unit in units if unit.call is not None]
        classes = {type(call.module) for call in calls if not _generic(call.module)}
        patterns = {_pattern(call.path) for call in calls}

        held = Counter(a for c in calls for a in c.ancestors())

        def like(call: Call) -> bool:
            if self._weighs(call) < 2 or held[call] > 1 or call is self.trace.root:
                return False
            return type(call.module) in classes or _pattern(call.path) in patterns

        def collect(call: Call) -> Iterator[Call]:
            if call in calls or like(call):
                yield call
            else:
                for child in call.calls():
                    yield from collect(child)

        found = [call for call in collect(self.trace.root) if call.start < self.stop]
        return _outermost([unit for unit in units if unit.call is None], found, self.stop)

    def _promote(self, units: list[Unit]) -> list[Unit]:
        """Widen units to the list elements they fill (``blocks.3`` = conv block, SE, MLP block).

        An element of a list is one block where none of the list's elements holds a list of units,
        that is, two units in a row with the same place in one.
        """
        callers = {a for unit in units if unit.call for a in unit.call.ancestors()}
        places = {_pattern(call.path) for call in callers if _indexed(call.path)}
        raw = [unit for unit in units if unit.call is None]
        for place in sorted(places, key=lambda path: (-path.count("."), path)):
            held: dict[Call, list[str]] = {}
            inner = [unit.call for unit in sorted(units, key=lambda unit: unit.start) if unit.call]
            for call in inner:
                for around in call.ancestors():
                    if _pattern(around.path) == place and around is not call:
                        held.setdefault(around, []).append(_pattern(call.path))
            in_list = any(a == b for each in held.values() for a, b in pairwise(each))
            if len(held) > 1 and not in_list:
                calls = [unit.call for unit in units if unit.call is not None]
                units = _outermost(raw, [*calls, *held], self.stop)
        return units

    def _widen(self, units: list[Unit]) -> list[Unit]:
        """Widen a unit to its caller while it is the only unit there (an SE to its MBConv)."""
        calls = [unit.call for unit in units if unit.call is not None]
        held = Counter(a for call in calls for a in call.ancestors())
        raw = [unit for unit in units if unit.call is None]
        wide = []
        for call in calls:
            around = [a for a in call.ancestors() if a.path and held[a] == 1]
            free = [a for a in around if not any(a.start < u.end and u.start < a.end for u in raw)]
            wide.append(free[-1] if free else call)
        return _outermost(raw, wide, self.stop)

    def _weighs(self, call: Call) -> int:
        return bisect.bisect_left(self.weights, call.end) - bisect.bisect_left(
            self.weights, call.start
        )

    def _plain(self) -> list[Unit]:
        """A model without knots: repeated composite layers, else convolutions and linears."""
        counts: dict[str, int] = {}
        for call in self.trace.root.walk():
            if self._weighs(call) > 1 and _indexed(call.path):
                counts[_pattern(call.path)] = counts.get(_pattern(call.path), 0) + 1
        units: list[Unit] = []
        for time in self.weights:
            owner = self.trace.ops[time].owner
            around = [c for c in owner.ancestors() if counts.get(_pattern(c.path), 0) > 1]
            inner = next((c for c in around if self._weighs(c) > 1), None)
            unit = Unit(time, time + 1) if inner is None else Unit(inner.start, inner.end, inner)
            if unit not in units:
                units.append(unit)
        return units


def _outermost(raw: list[Unit], calls: list[Call], stop: int) -> list[Unit]:
    chosen = set(calls)
    kept = [
        c for c in dict.fromkeys(calls) if not any(a in chosen for a in c.ancestors() if a is not c)
    ]
    units = [Unit(call.start, min(call.end, stop), call) for call in kept]
    free = [u for u in raw if not any(u.start < w.end and w.start < u.end for w in units)]
    return units + free


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _indexed(path: str) -> bool:
    return bool(re.search(r"\d[^.]*$", path))


def _generic(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")
