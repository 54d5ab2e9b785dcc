"""The graph: any batch size, batch norms folded, and what cannot be converted is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dery_cli.errors import DeryError
from dery_cli.stages.export import as_onnx
from dery_cli.stages.export.capture import capture, fold_batch_norms

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def scrambled(network: nn.Module) -> nn.Module:
    """The network with batch norms that change what they are given."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.eval()


class Branches(nn.Module):
    """One convolution whose batch norm is its only reader, and one with another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.Conv2d(3, 4, 3, padding="same", bias=False)
        self.shared = nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        x = self.norms[0](self.alone(x)).relu()
        y = self.shared(x)
        return (self.norms[1](y) + y).mean((2, 3))


def test_batch_norms_are_folded_where_the_convolution_has_no_other_reader():
    torch.manual_seed(0)
    network = scrambled(Branches())
    program, folded = fold_batch_norms(capture(network, IMAGES), IMAGES)
    norms = [n for n in program.graph.nodes if n.target is torch.ops.aten.batch_norm.default]
    assert (folded, len(norms)) == (1, 1)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-4, atol=1e-4)
    # what was folded is not written besides: two convolutions and one norm are left
    assert sorted(t.numel() for t in program.state_dict.values()) == [4, 4, 4, 4, 4, 4, 16, 108]


def test_a_graph_without_batch_norm_is_left_as_it_is():
    program = capture(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()).eval(), IMAGES)
    again, folded = fold_batch_norms(program, IMAGES)
    assert folded == 0
    assert again is program


def test_a_network_for_one_batch_size_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.flatten(1) * torch.ones(len(x.flatten(1)) * 0 + 2, 1)

    with pytest.raises(DeryError, match=r"torch\.export cannot take the network"):
        capture(Fixed().eval(), IMAGES)


def test_an_operator_that_onnx_has_not_is_named_and_nothing_is_written(tmp_path):
    pytest.importorskip("onnxscript")

    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x.mean(1)).real

    with pytest.raises(DeryError) as caught:
        as_onnx.write(capture(Odd().eval(), IMAGES), tmp_path)
    assert "aten._linalg_eigvals" in caught.value.message or "aten.linalg_eig" in (
        caught.value.message
    )
    assert list(tmp_path.iterdir()) == []
