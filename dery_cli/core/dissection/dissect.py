"""Take a model apart: its nodes, and the blocks between them.

A node is a place where exactly one float tensor is alive; everything later depends on it alone
(DeRy, section 3.1: a model as a path of blocks). No list of block names is used. In the order in
which to read them: ``meta`` runs a model without its numbers, ``trace`` records what it does,
``classifier`` says where the last layers begin, ``units`` where to cut, ``layout`` what the tensor
at a cut means; ``twins`` finds what depends on batch size and mode; ``steps`` are the instructions
between two cuts, ``block`` the module made of them.

Legend: N images, C channels, H x W grid, L tokens, n units (nodes 0..n).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dery_cli.core.dissection.block import Block, Finish, Lookup, Stretch
from dery_cli.core.dissection.classifier import classifier_ops, downstream, head_input
from dery_cli.core.dissection.layout import Geometry, Positions, geometry
from dery_cli.core.dissection.meta import meta_copy
from dery_cli.core.dissection.steps import (
    Runner,
    Step,
    build_steps,
    cut_out,
    events,
    open_calls,
    twin_events,
    with_drops,
)
from dery_cli.core.dissection.trace import Call, Op, Trace, record
from dery_cli.core.dissection.twins import (
    FIRST_RUN,
    MORE_RUNS,
    NO_TRAINING,
    TWIN_RUNS,
    Run,
    UnclearError,
)
from dery_cli.core.dissection.units import Cut, choose_cuts, find_cuts
from dery_cli.errors import DeryError
from dery_cli.types import Anatomy, Layout, Node, SharedParams


class DissectError(DeryError):
    """A model cannot be taken apart; the message says why in one line."""

    code = "dissect"


class Dissection:
    """A model taken apart: ``anatomy`` in numbers, ``block`` and ``features`` to run.

    Args:
        anatomy: Nodes with layout, shape and costs.
        classifier: Names of the parameters that belong to the classifier, which no block holds.
        classifier_params: Their number.
        classifier_flops: Multiply-adds of the classifier for one image.
        unused_params: Parameters that neither a block nor the classifier holds (mask tokens,
            auxiliary heads). Units, classifier and these add up to the model's total.
    """

    def __init__(self, model: nn.Module, plan: _Plan) -> None:
        self._model, self._plan = model, plan
        self.anatomy = plan.anatomy
        self.classifier = plan.classifier
        self.classifier_params = plan.classifier_params
        self.classifier_flops = plan.classifier_flops
        self.unused_params = plan.unused_params

    def on_meta(self) -> Dissection:
        """The same without weights, on the ``meta`` device: for what follows from shapes alone."""
        return self.on(meta_copy(self._model).eval().requires_grad_(False))

    def on(self, model: nn.Module) -> Dissection:
        """The same cuts in another model of the very same architecture."""
        return Dissection(model, self._plan)

    def block(self, start: int, stop: int) -> nn.Module:
        """The block between nodes ``start`` and ``stop``.

        Its parameters are the model's own objects under the model's own names; it trains as the
        model does (dropout, stochastic depth and batch norm follow its mode); a deep copy stands
        on its own.

        Args:
            start: Node whose tensor goes in, laid out as ``anatomy.nodes[start]`` says.
            stop: Node whose tensor comes out.

        Raises:
            ValueError: Not 0 <= start < stop <= n.
        """
        n = self.anatomy.num_units
        if not 0 <= start < stop <= n:
            raise ValueError(f"no block between nodes {start} and {stop} of {n + 1}")
        plan = self._plan
        finish = plan.finish[stop]
        steps = cut_out(plan.trace, plan.steps, plan.finish[start].values[0], finish.values)
        return Block(
            self._model,
            steps,
            plan.finish[start].values[0],
            finish,
            copy_input=plan.changed[start],
            units={name: max(unit, start + 1) for name, unit in plan.units.items()},
            reorder=(_into(plan.orders[start]), _out_of(plan.orders[stop])),
        )

    def stretches(self, start: int, stop: int) -> list[Stretch]:
        """What lies between node ``start`` and each later one up to ``stop``, in a row.

        Before the pre-logits vector there is one more place, if the model has it: the last feature
        map, behind the last block and norm and in front of the pooling. Its node has the index of
        the vector's.

        Args:
            start: Node whose tensor goes in.
            stop: Node whose tensor comes out of the last stretch.

        Raises:
            ValueError: Not 0 <= start < stop <= n.
        """
        n = self.anatomy.num_units
        if not 0 <= start < stop <= n:
            raise ValueError(f"no stretch between nodes {start} and {stop} of {n + 1}")
        places = self._plan.places[start : stop + 1]
        last = self._plan.last_map
        if stop == n and last is not None:
            places.insert(-1, last)
        return [self._plan.stretch(a, b) for a, b in itertools.pairwise(places)]

    def features(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The tensors of nodes 0 to n for the batch ``x``, in one pass of the model.

        What no later node needs is freed before the next tensor is made. Gradients and the
        model's mode are the caller's business.

        Args:
            x: (N, C, H, W), normalised.
        """
        plan, last = self._plan, self.anatomy.num_units
        yield x
        env: dict[int, Any] = {plan.finish[0].values[0]: x.clone() if plan.changed[0] else x}
        for node in range(1, last + 1):
            runner = Runner(plan.unit_steps[node - 1], Lookup(self._model))
            runner.run(env, x.shape[0], x.device, self._model.training)
            result: torch.Tensor = plan.finish[node](env)
            order = _out_of(plan.orders[node])
            if order is not None:
                result = result[:, order.to(x.device)]
            elif node < last and plan.changed[node]:
                env[plan.finish[node].values[0]] = result.clone()
            if node == last:
                env.clear()
            yield result
            del result


def dissect(
    model: nn.Module,
    example: torch.Tensor,
    *,
    nodes: Sequence[str] | None = None,
    whole: bool = False,
) -> Dissection:
    """Find a model's nodes and the blocks between them. The model is neither run nor changed.

    Args:
        model: Any image model, classifier included, on any device (``meta`` too).
        example: (N, C, H, W), a normalised input; only its shape and type matter.
        nodes: Names of modules whose outputs are the nodes between the first and the last, in
            order, where the automatic choice does not suit.
        whole: Take the model as one single unit, for donors that cannot be cut.

    Returns:
        Node 0 is the image, node n the vector the classifier sees.

    Raises:
        DissectError: The model has no place to cut, or a name in ``nodes`` is no such place.

    Example:
        >>> anatomy = dissect(resnet50, torch.zeros(1, 3, 224, 224)).anatomy
        >>> anatomy.num_units
        16
    """
    shape = (FIRST_RUN.batch, *example.shape[1:])
    try:
        trace = record(model, shape, example.dtype, train=False, count=True)
    except Exception as error:
        kind = type(model).__name__
        reason = str(error).strip().splitlines()
        raise DissectError(
            f"{kind} cannot be traced on an input of shape {tuple(shape)}: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error
    plan = _Plan(model, trace, nodes=nodes, whole=whole)
    return Dissection(model, plan)


@dataclasses.dataclass(frozen=True)
class Place:
    """A node with what is needed to go on from it, or to end at it.

    Args:
        node: What the tensor is.
        finish: Which values it is made of.
        order: Order of its tokens in the donor, None for raster order.
        changed: Whether a later step changes it in place.
    """

    node: Node
    finish: Finish
    order: tuple[int, ...] | None
    changed: bool


class _Plan:
    """Everything found out about a model, before any block is made."""

    def __init__(
        self, model: nn.Module, trace: Trace, *, nodes: Sequence[str] | None, whole: bool
    ) -> None:
        self.trace, self.model = trace, model
        self.method = "fx" if nodes is None else "manifest"
        self.heads = classifier_ops(trace)
        vectors = [head_input(trace, op) for op in self.heads] or [trace.output]
        vectors = list(dict.fromkeys(vectors))
        self._downstream = downstream(trace, self.heads)
        self.stop = max(trace.values[index].born for index in vectors) + 1
        places = Positions(trace)
        self._shapes = {v.index: tuple(v.tensor.shape) for v in trace.values}
        cuts, geometries = [], {}
        self._cuts = find_cuts(trace, self.stop, vectors)
        for cut in self._cuts:
            tensor = trace.values[cut.value].tensor
            known = geometry(tuple(tensor.shape), places.of(cut.value))
            fits = tensor.is_floating_point() and tensor.shape[0] == trace.batch
            if (
                known is not None
                and fits
                and cut.value not in vectors
                and _even(known, shape_of(trace))
            ):
                cuts.append(cut)
                geometries[cut.value] = known
        chosen = self._choose(cuts, nodes, whole)
        self._twins(chosen, vectors)
        self._finish(chosen, vectors, geometries)
        self._costs(chosen)
        self._places(chosen, cuts, geometries)
        self._steps_by_unit()

    def _choose(self, cuts: list[Cut], nodes: Sequence[str] | None, whole: bool) -> list[Cut]:
        if whole:
            return []
        if nodes is not None:
            return [_named_cut(self.trace, cuts, name) for name in nodes]
        chosen = choose_cuts(self.trace, self._cuts, cuts, self.stop)
        if not chosen:
            raise DissectError(
                f"{type(self.model).__name__} has no place between its units where one tensor "
                "carries everything",
                "it can still serve as a whole model",
            )
        return chosen

    def _twins(self, chosen: list[Cut], vectors: list[int]) -> None:
        """Trace other batch sizes and training mode, to see what depends on them."""
        opened = open_calls(self.trace, chosen, [cut.value for cut in chosen] + vectors)
        self.listed = events(self.trace, opened)
        twin = functools.cache(functools.partial(self._twin, opened))
        runs = NO_TRAINING if twin(TWIN_RUNS[-1]) is None else TWIN_RUNS
        reason = "does other things with other batch sizes"
        for tried in (runs, (*runs, *MORE_RUNS)):
            twins = [listed for run in tried if (listed := twin(run)) is not None]
            if len(twins) < len(tried):
                break
            try:
                self.steps = build_steps(self.listed, twins, [FIRST_RUN, *tried])
                return
            except UnclearError as unclear:
                reason = f"depends on the batch size in a way that cannot be followed: {unclear}"
        raise DissectError(f"{type(self.model).__name__} {reason}")

    def _twin(self, opened: set[Call], run: Run) -> list[Op | Call] | None:
        """What corresponds to ``self.listed`` in another run; None where it does other things."""
        image = self.trace.values[self.trace.image].tensor
        shape = (run.batch, *image.shape[1:])
        try:
            other = record(self.model, shape, image.dtype, train=run.training, count=False)
        except Exception:
            return None
        return twin_events(self.trace, opened, other)

    def _finish(
        self, chosen: list[Cut], vectors: list[int], geometries: dict[int, Geometry]
    ) -> None:
        trace = self.trace
        values = trace.values
        self.finish = [Finish((trace.image,))]
        self.finish += [Finish((cut.value,)) for cut in chosen]
        self.finish.append(Finish(tuple(vectors), vector=True))
        self.orders = [None, *(geometries[cut.value].order for cut in chosen), None]
        self.changed = [
            values[f.values[0]].tensor._version != values[f.values[0]].version for f in self.finish
        ]
        image = values[trace.image].tensor
        width = sum(values[v].tensor.shape[1] for v in vectors)
        if any(values[v].tensor.ndim not in (2, 4) for v in vectors):
            raise DissectError(
                f"{type(self.model).__name__} ends in a tensor of shape "
                f"{tuple(values[vectors[0]].tensor.shape)}, not in one vector per image"
            )
        self.geometries = [
            Geometry(Layout.NCHW, (image.shape[2], image.shape[3])),
            *(geometries[cut.value] for cut in chosen),
            Geometry(Layout.NC, (1, 1)),
        ]
        self.shapes = [
            tuple(image.shape[1:]),
            *(self._shapes[cut.value][1:] for cut in chosen),
            (width,),
        ]
        self.names = ["input", *(_name(trace, cut) for cut in chosen), "pre_logits"]

    def _places(self, chosen: list[Cut], cuts: list[Cut], known: dict[int, Geometry]) -> None:
        """The nodes as places that stretches lead between, and the last map beside them."""
        self.places = [
            Place(node, finish, order, changed)
            for node, finish, order, changed in zip(
                self.anatomy.nodes, self.finish, self.orders, self.changed, strict=True
            )
        ]
        self.last_map: Place | None = None
        made = {value for step in self.steps for value in step.makes()}
        before = self.anatomy.nodes[-2]
        for cut in cuts:
            fits = cut.value in made and known[cut.value].grid == before.grid
            if chosen and cut.time > chosen[-1].time and fits and before.layout is not Layout.NC:
                self.last_map = self._last_map(cut, known[cut.value])

    def _last_map(self, cut: Cut, known: Geometry) -> Place:
        value = self.trace.values[cut.value]
        node = Node(
            index=len(self.finish) - 1,
            name=_name(self.trace, cut),
            layout=known.layout,
            shape=self._shapes[cut.value][1:],
            grid=known.grid,
            num_prefix_tokens=known.num_prefix_tokens,
        )
        changed = value.tensor._version != value.version
        return Place(node, Finish((cut.value,)), known.order, changed)

    def stretch(self, start: Place, stop: Place) -> Stretch:
        """What leads from one place to a later one."""
        source, values = start.finish.values[0], stop.finish.values
        return Stretch(
            node=stop.node,
            steps=tuple(with_drops(cut_out(self.trace, self.steps, source, values), values)),
            source=source,
            finish=stop.finish,
            copy_input=start.changed,
            reorder=(_into(start.order), _out_of(stop.order)),
        )

    def _steps_by_unit(self) -> None:
        """Steps of the whole model up to the pre-logits, unit by unit, each run once."""
        steps = cut_out(self.trace, self.steps, self.trace.image, self.finish[-1].values)
        units: list[list[Step]] = []
        done: set[int] = set()
        for finish in self.finish[1:]:
            needed = cut_out(self.trace, self.steps, self.trace.image, finish.values)
            fresh = [s for s in needed if _mark(s) not in done]
            done.update(_mark(s) for s in fresh)
            units.append(fresh)
        assert sum(map(len, units)) == len(steps)
        flat = iter(with_drops([s for unit in units for s in unit], self.finish[-1].values))
        self.unit_steps = [list(itertools.islice(flat, len(unit))) for unit in units]

    def _costs(self, chosen: list[Cut]) -> None:
        trace = self.trace
        total = len(self.finish) - 1
        owned: dict[int, list[int]] = {}  # id of a parameter -> units that hold it
        sizes: dict[int, int] = {}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for unit in range(1, total + 1):
            source, finish = self.finish[unit - 1].values[0], self.finish[unit]
            steps = cut_out(trace, self.steps, source, finish.values)
            block = Block(self.model, steps, source, finish, copy_input=False)
            for param in block.parameters():
                owned.setdefault(id(param), []).append(unit)
                sizes[id(param)] = param.numel()
        self.units = {names[key]: units[0] for key, units in owned.items()}
        params = [0] * (total + 1)
        shared: dict[tuple[int, ...], int] = {}
        for key, units in owned.items():
            params[units[0]] += sizes[key]
            if len(units) > 1:
                shared[tuple(units)] = shared.get(tuple(units), 0) + sizes[key]
        bounds = [0, *(cut.time for cut in chosen), len(trace.ops)]
        flops = [0] * (total + 1)
        for unit in range(1, total + 1):
            ops = trace.ops[bounds[unit - 1] : bounds[unit]]
            flops[unit] = sum(op.flops for op in ops if op.time not in self._downstream) // 2
        self.classifier_flops = sum(trace.ops[t].flops for t in self._downstream) // 2
        read = {i for op in self.heads for i in op.reads if trace.values[i].attr is not None}
        wanted = {str(trace.values[i].attr) for i in read}
        rest = {names[k]: p for k, p in self._rest(owned, names).items()}
        self.classifier = tuple(name for name in rest if name in wanted)
        self.classifier_params = sum(rest[name].numel() for name in self.classifier)
        self.unused_params = sum(p.numel() for p in rest.values()) - self.classifier_params
        self.anatomy = Anatomy(
            nodes=tuple(
                Node(
                    index=i,
                    name=self.names[i],
                    layout=g.layout,
                    shape=self.shapes[i],
                    grid=g.grid,
                    num_prefix_tokens=g.num_prefix_tokens,
                    params=params[i],
                    flops=flops[i],
                )
                for i, g in enumerate(self.geometries)
            ),
            shared=tuple(SharedParams(count=c, units=u) for u, c in sorted(shared.items())),
            method=self.method,
        )

    def _rest(self, owned: dict[int, list[int]], names: dict[int, str]) -> dict[int, nn.Parameter]:
        return {id(p): p for p in self.model.parameters() if id(p) not in owned and id(p) in names}


def shape_of(trace: Trace) -> tuple[int, int]:
    """(height, width) of the image."""
    image = trace.values[trace.image].tensor
    return image.shape[2], image.shape[3]


def _even(known: Geometry, size: tuple[int, int]) -> bool:
    """Whether the stride is about the same both ways, as it is for a map of the whole image."""
    if known.layout is Layout.NC or known.grid == (1, 1):
        return True
    down, across = size[0] / known.grid[0], size[1] / known.grid[1]
    return 0.6 < down / across < 1.7


def _named_cut(trace: Trace, cuts: list[Cut], name: str) -> Cut:
    calls = [call for call in trace.root.walk() if call.path == name]
    if not calls:
        raise DissectError(f"no module {name!r} is called by this model")
    values = {value for call in calls for _, value in call.outputs}
    for cut in cuts:
        if cut.value in values:
            return cut
    raise DissectError(f"the output of {name!r} is not the only tensor alive there")


def _name(trace: Trace, cut: Cut) -> str:
    """The unit that ends at the cut, else the outermost module, else the operation."""
    if cut.name:
        return cut.name
    for call in trace.root.walk():
        if call.path and call.end == cut.time and any(v == cut.value for _, v in call.outputs):
            return call.path
    op = trace.ops[trace.values[cut.value].born]
    return f"{op.owner.path}:{op.name}" if op.owner.path else op.name


def _mark(step: Step) -> int:
    return step.start if step.start >= 0 else -1 - step.outputs[0][1]


def _into(order: tuple[int, ...] | None) -> torch.Tensor | None:
    """Index that brings raster-ordered tokens into the donor's own order."""
    return None if order is None else torch.tensor(order)


def _out_of(order: tuple[int, ...] | None) -> torch.Tensor | None:
    """Index that brings the donor's tokens into raster order."""
    return None if order is None else torch.argsort(torch.tensor(order))
