"""What the licences of a network's donors come to."""

from __future__ import annotations

import pytest

from dery_cli.zoo.licences import hub_licence, licence_conflicts


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["Apache-2.0", "apache-2.0"], "apache-2.0"),
        (["GPL-3.0-only"], "gpl-3.0"),
        (["MIT", "Apache-2.0"], "other"),
        (["my own"], "other"),
    ],
)
def test_the_hub_knows_one_licence_or_other(names, wanted):
    assert hub_licence(names) == wanted


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["MIT", "Apache-2.0", "BSD-3-Clause", "CC-BY-4.0"], []),
        (["CC-BY-NC-4.0"], []),
        (["MIT", "CC-BY-NC-4.0"], ["CC-BY-NC-4.0: no commercial use of the whole network"]),
        (["CC-BY-NC-ND-4.0"], ["CC-BY-NC-ND-4.0 forbids passing on what is derived"]),
        (["MIT", "unknown"], ["the licence 'unknown' is not known; ask whoever made the weights"]),
        (
            ["GPL-3.0", "CC-BY-SA-4.0"],
            ["CC-BY-SA-4.0 and GPL-3.0 each ask that the whole be passed on under itself"],
        ),
    ],
)
def test_conflicts_are_called_out(names, says):
    assert licence_conflicts(names) == says
    assert licence_conflicts(reversed(names)) == says
