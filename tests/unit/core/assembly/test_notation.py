"""Networks as text: what is printed can be read, and what is wrong is named."""

from __future__ import annotations

import random

import pytest

from dery_cli.core.assembly.notation import (
    format_network,
    merged,
    needs_stitch,
    parse_network,
    parse_piece,
)
from dery_cli.errors import UsageError
from dery_cli.types import Anatomy, BlockRef, Layout, Node


def anatomy(units):
    nodes = [
        Node(index=i, name=f"n{i}", layout=Layout.NC, shape=(4,), grid=(1, 1))
        for i in range(units + 1)
    ]
    return Anatomy(nodes=tuple(nodes))


ZOO = {"resnext": anatomy(9), "vit_cls": anatomy(6), "a-1.b": anatomy(3), "tiny": anatomy(1)}


def random_network(rng):
    donor = rng.choice(list(ZOO))
    refs = [BlockRef(donor, 0, rng.randint(1, ZOO[donor].num_units))]
    for _ in range(rng.randint(0, 4)):
        donor = rng.choice([name for name in ZOO if ZOO[name].num_units > 1])
        before = refs[-1]
        least = before.stop if before.donor == donor else 1
        if least >= ZOO[donor].num_units:
            continue
        start = rng.randint(least, ZOO[donor].num_units - 1)
        follows = before.donor == donor and before.stop == start
        stop = rng.randint(start + 1, ZOO[donor].num_units)
        refs.append(BlockRef(donor, start, stop, adapter=follows))
    return tuple(refs)


def test_whatever_is_printed_can_be_read():
    rng = random.Random(0)
    texts = set()
    for _ in range(500):
        network = random_network(rng)
        text = format_network(network)
        assert parse_network(text, ZOO) == network
        texts.add(text)
    assert any("~" in text for text in texts)
    assert any("+" in text for text in texts)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("resnext", "resnext[0:9]"),
        ("resnext[:4]+vit_cls[3:]", "resnext[0:4] + vit_cls[3:6]"),
        ("resnext[0:4] + resnext[4:9]", "resnext[0:9]"),
        ("resnext[0:4] ~ resnext[4:9]", "resnext[0:4] ~ resnext[4:9]"),
        ("resnext[0:4] ~ vit_cls[1:2]", "resnext[0:4] + vit_cls[1:2]"),
        ("  resnext[0:2]+resnext[7:9] ", "resnext[0:2] + resnext[7:9]"),
        ("resnext[0:2]+vit_cls[1:3]+resnext[1:9]", "resnext[0:2] + vit_cls[1:3] + resnext[1:9]"),
    ],
)
def test_shorter_ways_to_write_it(text, same):
    assert format_network(parse_network(text, ZOO)) == same


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("resnet", "there is no donor resnet", "did you mean resnext?"),
        ("qqq[0:1]", "there is no donor qqq", "dery zoo list"),
        ("resnext[0:12]", "resnext has nodes 0 to 9", "dery zoo show resnext"),
        ("resnext[3:3]", "has no unit", "nodes 0 to 9"),
        ("resnext[5:3]", "begins at node 5 and ends at node 3", "nodes 0 to 9"),
        ("resnext[1:3]", "a network begins at a donor's node 0", "'resnext[0:3]'"),
        ("resnext[0:3] + vit_cls", "begins at the image", "vit_cls[1:6]"),
        ("resnext[0:3] + tiny", "begins at the image", "leave it out"),
        ("resnext[0:5] + resnext[3:9]", "goes back to node 3 of resnext", "node 5 or later"),
        ("resnext[0:5] +", "ends without a piece", "donor[first node:last node]"),
        ("+ resnext", "begins without a piece", "donor[first node:last node]"),
        ("resnext + ~ vit_cls[1:2]", "goes on without a piece", "donor[first node:last node]"),
        ("", "begins without a piece", "donor[first node:last node]"),
        ("resnext[a:b]", "is no piece of a donor", "donor[first node:last node]"),
        ("resnext[0:-1]", "is no piece of a donor", "donor[first node:last node]"),
        ("../x[0:1]", "is no piece of a donor", "donor[first node:last node]"),
    ],
)
def test_a_wrong_one_names_the_piece_and_what_there_is(text, message, hint):
    with pytest.raises(UsageError) as caught:
        parse_network(text, ZOO)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_piece():
    assert parse_piece("resnext[2:4]", ZOO) == BlockRef("resnext", 2, 4)
    assert parse_piece(" a-1.b ", ZOO) == BlockRef("a-1.b", 0, 3)
    with pytest.raises(UsageError, match=r"vit_cls has nodes 0 to 6"):
        parse_piece("vit_cls[2:7]", ZOO)


def test_blocks_that_meet_without_a_stitch_are_one():
    first, second = BlockRef("resnext", 0, 3), BlockRef("resnext", 3, 9)
    adapter = BlockRef("resnext", 3, 9, adapter=True)
    assert merged([first, second]) == (BlockRef("resnext", 0, 9),)
    assert merged([first, adapter]) == (first, adapter)
    assert not needs_stitch(first, second)
    assert needs_stitch(first, adapter)
    three = [BlockRef("vit_cls", 0, 1), BlockRef("resnext", 2, 3), second]
    assert merged(three) == (three[0], BlockRef("resnext", 2, 9))
    after_adapter = [first, BlockRef("resnext", 3, 5, adapter=True), BlockRef("resnext", 5, 9)]
    assert merged(after_adapter) == (first, adapter)
