from __future__ import annotations

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn import functional

from dery_cli.core.cost.flops import count_flops, count_params
from dery_cli.core.dissection.dissect import dissect
from dery_cli.core.dissection.meta import meta_copy


def test_params_count_a_shared_tensor_once() -> None:
    layer = nn.Linear(3, 5)
    assert count_params(nn.Sequential(layer, nn.ReLU(), layer)) == 3 * 5 + 5


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 3 * 8 * 9 * 10 * 12),
        (nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8), (8, 16, 16), 8 * 25 * 64),
        (nn.Conv2d(6, 12, 1, groups=3, bias=False), (6, 7, 7), 2 * 12 * 49),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Linear(6, 7), (5, 6), 5 * 6 * 7),
    ],
)
def test_operators_by_hand_and_by_fvcore(module, shape, expected) -> None:
    example = torch.randn(4, *shape)
    assert count_flops(module, example) == expected
    counted = FlopCountAnalysis(module, example[:1]).unsupported_ops_warnings(False).total()
    assert counted == expected


class Product(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.transpose(-1, -2)


def test_matrix_products_by_hand_and_by_fvcore() -> None:
    example = torch.randn(2, 3, 5, 7)
    assert count_flops(Product(), example) == 3 * 5 * 5 * 7
    assert FlopCountAnalysis(Product(), example[:1]).total() == 3 * 5 * 5 * 7


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


def test_fused_attention_counts_both_products() -> None:
    heads, tokens, width = 3, 11, 8
    example = torch.randn(2, heads, tokens, width)
    assert count_flops(Attention(), example) == 2 * heads * tokens * tokens * width


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_whole_models_per_operator_by_fvcore(name: str) -> None:
    model = timm.create_model(name).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # fvcore does not know the fused operator
    example = torch.randn(1, 3, 160, 160)
    counted = FlopCountAnalysis(model, example).unsupported_ops_warnings(False).by_operator()
    expected = sum(counted[kind] for kind in ("conv", "linear", "matmul") if kind in counted)
    assert count_flops(model, example) == expected


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(6, 4, batch_first=True, bidirectional=True)
        self.out = nn.Linear(8, 6)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        rows, _ = self.rows(x.permute(0, 2, 3, 1).reshape(n * h, w, c))
        x = x + self.out(rows).reshape(n, h, w, c).permute(0, 3, 1, 2)
        return self.head(self.norm(x).mean((2, 3)))


def test_shortcuts_on_meta_change_no_number() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Upsample(scale_factor=2, mode="bilinear"))
    model.append(Recurrent())
    example = torch.empty(1, 3, 8, 8)
    found = dissect(model, example, whole=True)
    total = found.anatomy.flops(0, 1) + found.classifier_flops
    assert total == count_flops(model, example)
    # 12 x 12 positions, both directions, four gates over input and state
    lstm = 144 * 2 * 4 * 4 * (6 + 4)
    assert total == 3 * 6 * 9 * 36 + lstm + 144 * 8 * 6 + 6 * 2


def test_meta_copy_keeps_structure_and_sharing() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.table = {"k": [torch.ones(3), self.a.weight]}

    model = Tied()
    twin = meta_copy(model)
    assert all(p.device.type == "meta" for p in twin.parameters())
    assert twin.a.weight is twin.b.weight is twin.table["k"][1]
    assert twin.table["k"][0].device.type == "meta"
    assert model.a.weight.device.type == "cpu"
    assert list(twin.state_dict()) == list(model.state_dict())
