"""A partition as its record: what is read back is what was found."""

from __future__ import annotations

import dataclasses
import json

from dery_cli.core.partition.solve import Partition
from dery_cli.io.artifacts import Artifact
from dery_cli.stages.partition.store import partition_to_json, stored_partition
from dery_cli.types import BlockRef

NAMES = ("a", "b")
FOUND = Partition(
    cuts=((0, 2, 5), (0, 1, 3)),
    sets=((0, 1), (1, 0)),
    anchors=((0, 0, 2), (1, 0, 1)),
    similarity=((2.0, 1.25), (2.0, 0.5)),
    objective=5.75,
    upper_bound=6.0,
    gap=0.25 / 5.75,
    optimal=False,
    forced=(False, True),
    history=(("alternation", 5.75),),
)


def read_back():
    data = json.loads(json.dumps(partition_to_json(NAMES, FOUND)))
    return stored_partition(Artifact(kind="partition", data=data))


def test_all_but_the_course_of_the_search_is_read_back():
    stored = read_back()
    assert stored.names == NAMES
    assert stored.partition == dataclasses.replace(FOUND, history=())
    assert stored.record.data["admits_assembly"] is True


def test_blocks_and_anchors_by_name():
    stored = read_back()
    assert stored.block(0, 1) == BlockRef("a", 2, 5)
    assert stored.anchor(1) == BlockRef("b", 0, 1)
    assert stored.forced == ["b"]
