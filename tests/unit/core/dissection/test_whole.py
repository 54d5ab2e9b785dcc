"""Models that ask for numbers serve whole: the reason is true, and nothing of them is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.cost.memory import activation_peak
from dery_cli.core.dissection.block import units_of
from dery_cli.core.dissection.dissect import DissectError, dissect
from dery_cli.core.dissection.whole import dissect_whole

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Asking(nn.Module):
    def __init__(self, *, heads=1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.register_buffer("gain", torch.tensor(1.5))
        self.scale = nn.Parameter(torch.ones(4))
        self.top = nn.ModuleDict({"drop": nn.Dropout(0.5)})
        for number in range(heads):
            self.top[f"fc{number}"] = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))) * float(self.gain)
        x = x.mean((2, 3)) * self.scale
        if x.mean() > 0.4:
            x = x + 1
        x = self.top["drop"](x)
        return sum(head(x) for name, head in self.top.items() if name != "drop")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Asking().eval()


def test_the_reason_is_true(model):
    for whole in (False, True):
        with pytest.raises(DissectError, match="Asking cannot be traced on an input of shape"):
            dissect(model, EXAMPLE, whole=whole)


@pytest.mark.parametrize("heads", [1, 2])
def test_it_gives_what_the_classifier_sees(heads):
    torch.manual_seed(0)
    model = Asking(heads=heads).eval()
    found = dissect_whole(model, EXAMPLE)
    assert found.anatomy.num_units == 1
    assert found.anatomy.nodes[1].shape == (4,)
    x = torch.randn(6, 3, 16, 16) * 3
    with torch.no_grad():
        seen = found.block(0, 1)(x)
        assert torch.equal(sum(model.top[f"fc{n}"](seen) for n in range(heads)), model(x))
        assert torch.equal(list(found.features(x))[1], seen)


def test_costs_add_up(model):
    found = dissect_whole(model, EXAMPLE)
    assert found.classifier == ("top.fc0.weight", "top.fc0.bias")
    assert found.anatomy.params(0, 1) + found.classifier_params == count_params(model)
    assert found.anatomy.flops(0, 1) + found.classifier_flops == count_flops(model, EXAMPLE)
    assert found.classifier_flops == 20
    assert activation_peak(model, (3, 16, 16), 2) > 2 * 4 * 16 * 16 * 4


def test_its_block_trains_and_stands_on_its_own(model):
    block = dissect_whole(model, EXAMPLE).block(0, 1)
    wanted = {n: v for n, v in model.state_dict().items() if not n.startswith("top.fc")}
    assert block.state_dict().keys() == wanted.keys()
    assert block.get_parameter("scale") is model.scale
    assert units_of(block) == dict.fromkeys(dict(block.named_parameters()), 1)
    alone = copy.deepcopy(block).train()
    alone(torch.randn(8, 3, 16, 16)).sum().backward()
    assert alone.get_parameter("scale").grad is not None
    assert not torch.equal(alone.norm.running_mean, model.norm.running_mean)
    assert model.scale.grad is None
    assert not model.training
    alone.load_state_dict({n: torch.zeros_like(v) for n, v in wanted.items()})
    assert not alone.eval()(torch.ones(2, 3, 16, 16)).any()
    assert bool(model.scale.all())


def test_one_that_does_not_run_is_said_not_to():
    class Broken(Asking):
        def forward(self, x):
            return super().forward(x[:, :2])

    with pytest.raises(DissectError, match="Broken does not run on an input of shape"):
        dissect_whole(Broken(), EXAMPLE)
