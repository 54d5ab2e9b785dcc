"""Words of others in a card are words: neither Markdown nor HTML."""

from __future__ import annotations

from dery_cli.stages.assemble.model_card import model_card


def test_a_card_escapes_what_donors_and_data_say():
    block = {"stage": 0, "donor": "a", "start": 0, "stop": 3}
    block |= {"task": "x | y\n<b>z</b>", "license": "[MIT](http://x)\x1b[31m"}
    data = {
        "network": {
            "input": {"image_size": [8, 8]},
            "crop": 1,
            "blocks": [block],
            "joints": [None],
        },
        "params": 1,
        "flops": 1,
        "budget": {},
        "target": "/data/<img src=x>|",
        "test_top1": 0.5,
        "held_out": 0.5,
    }
    card = model_card("n", data)
    assert "\x1b" not in card
    assert "<" not in card
    (row,) = [line for line in card.splitlines() if line.startswith("| 1 ")]
    assert row.replace("\\|", "").count("|") == 7
    assert "\\[MIT\\]" in row
