"""Where a model's classifier begins: the layers that turn a vector into class scores."""

from __future__ import annotations

from dery_cli.core.dissection.trace import Op, Trace


def classifier_ops(trace: Trace) -> list[Op]:
    """The last linear layers (or 1x1 convolutions) that make the output: the classifier.

    Going back from the output, only operations without weights are passed. There is no classifier
    where a norm or another weighted operation is met first, or more than four linear layers.
    """
    made = {value: op for op in trace.ops for _, value in op.outputs}
    made.update({new: op for op in trace.ops for _, new in op.aliases})
    heads: dict[int, Op] = {}
    todo, seen = [trace.output], set()
    while todo:
        op = made.get(todo.pop())
        if op is None or op.time in seen:
            continue
        seen.add(op.time)
        data = [i for i in op.reads if trace.values[i].data]
        kept = [i for i in op.reads if not trace.values[i].data]
        if kept and op.flops and len(data) == 1:
            heads[op.time] = op
        elif any(trace.values[i].attr is not None for i in kept):
            return []
        else:
            todo += data
    found = [heads[time] for time in sorted(heads)]
    if len(found) > 1:  # where several meet, those of vectors are classifiers, others may not be
        found = [op for op in found if not _spread(trace, op)]
    return found if len(found) <= 4 else []


def _spread(trace: Trace, op: Op) -> bool:
    shape = trace.values[head_input(trace, op)].tensor.shape
    return len(shape) != 2 and tuple(shape[2:]) != (1, 1)


def head_input(trace: Trace, op: Op) -> int:
    """The value that a classifier's layer is applied to."""
    return next(i for i in op.reads if trace.values[i].data)


def downstream(trace: Trace, heads: list[Op]) -> set[int]:
    """Times of the heads and of everything computed from them."""
    times = {op.time for op in heads}
    tainted = {value for op in heads for _, value in op.outputs}
    for op in trace.ops:
        if any(i in tainted for i in op.reads):
            times.add(op.time)
            tainted.update(value for _, value in op.outputs)
    return times
