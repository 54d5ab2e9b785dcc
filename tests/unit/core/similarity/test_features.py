"""Pooling by hand-checked numbers, and streaming over batches against one batch."""

from __future__ import annotations

import pytest
import torch

from dery_cli.core.similarity.features import embed_batches, feature_specs, pool_node
from dery_cli.errors import DeryError
from dery_cli.types import Anatomy, Layout, Node


def node(layout, shape, grid, prefix=0, index=1):
    return Node(
        index=index, name=f"n{index}", layout=layout, shape=shape, grid=grid,
        num_prefix_tokens=prefix,
    )  # fmt: skip


RAMP = torch.arange(32, dtype=torch.float32).view(2, 1, 4, 4)  # one channel, two samples
CELLS = torch.tensor([[2.5, 4.5, 10.5, 12.5], [18.5, 20.5, 26.5, 28.5]])  # 2 x 2 means


def laid_out(layout, prefix):
    """RAMP and its negative as two channels, in ``layout``."""
    x_NCHW = torch.cat([RAMP, -RAMP], 1)
    if layout is Layout.NCHW:
        return x_NCHW, node(layout, (2, 4, 4), (4, 4))
    if layout is Layout.NHWC:
        return x_NCHW.permute(0, 2, 3, 1), node(layout, (4, 4, 2), (4, 4))
    tokens_NLC = x_NCHW.flatten(2).transpose(1, 2)
    front_NTC = torch.full((2, prefix, 2), 1000.0)
    return torch.cat([front_NTC, tokens_NLC], 1), node(
        layout, (16 + prefix, 2), (4, 4), prefix=prefix
    )


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [(Layout.NCHW, 0), (Layout.NHWC, 0), (Layout.NLC, 0), (Layout.NLC, 1), (Layout.NLC, 5)],
)
def test_hand_checked_means_in_every_layout(layout, prefix):
    pooled = pool_node(*laid_out(layout, prefix), 2)
    assert pooled.feat_NC.tolist() == [[7.5, -7.5], [23.5, -23.5]]
    assert torch.equal(pooled.feat_NGC, torch.stack([CELLS, -CELLS], 2))
    assert torch.equal(pooled.prefix_NTC, torch.full((2, prefix, 2), 1000.0))


def test_uneven_grid_is_area_average():
    x = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]]]])
    pooled = pool_node(x, node(Layout.NCHW, (1, 3, 3), (3, 3)), 2)
    assert pooled.feat_NGC[0, :, 0].tolist() == [27 / 4, 54 / 4, 216 / 4, 432 / 4]
    whole = pool_node(x, node(Layout.NCHW, (1, 3, 3), (3, 3)), 7)
    assert whole.feat_NGC.flatten().tolist() == x.flatten().tolist()


def test_oblong_map_keeps_raster_order():
    x = torch.arange(10.0).view(1, 1, 2, 5)
    pooled = pool_node(x, node(Layout.NCHW, (1, 2, 5), (2, 5)), 4)
    assert pooled.feat_NGC.shape == (1, 8, 1)
    assert pooled.feat_NGC.flatten().tolist() == [0.5, 1.5, 2.5, 3.5, 5.5, 6.5, 7.5, 8.5]


def test_vector_stays_as_it_is():
    x = torch.randn(3, 7)
    pooled = pool_node(x, node(Layout.NC, (7,), (1, 1)), 4)
    assert torch.equal(pooled.feat_NC, x)
    assert torch.equal(pooled.feat_NGC, x[:, None])
    assert pooled.prefix_NTC.shape == (3, 0, 7)


def test_grid_samples_limits_grid_and_prefix_only():
    pooled = pool_node(*laid_out(Layout.NLC, 1), 2, grid_samples=1)
    assert pooled.feat_NC.shape == (2, 2)
    assert pooled.feat_NGC.shape == (1, 4, 2)
    assert pooled.prefix_NTC.shape == (1, 1, 2)
    none = pool_node(*laid_out(Layout.NCHW, 0), 2, grid_samples=0)
    assert none.feat_NGC.shape == (0, 4, 2)


def test_half_precision_is_averaged_in_float32():
    x = torch.full((1, 1, 64, 64), 1000.0).bfloat16()
    pooled = pool_node(x, node(Layout.NCHW, (1, 64, 64), (64, 64)), 4)
    assert pooled.feat_NC.dtype == torch.float32
    assert pooled.feat_NC.item() == 1000.0


def test_other_shape_than_registered():
    with pytest.raises(DeryError, match=r"node 1 \(n1\).*\(1, 4, 4\).*\(2, 4, 4\)"):
        pool_node(RAMP, node(Layout.NCHW, (2, 4, 4), (4, 4)), 2)


class Double:
    """Two nodes: the image, and twice its mean over positions; tracks how many are alive."""

    def __init__(self, spoil=None):
        self.anatomy = Anatomy(
            nodes=(
                node(Layout.NCHW, (3, 8, 8), (8, 8), index=0),
                node(Layout.NC, (3,), (1, 1), index=1),
            )
        )
        self.spoil = spoil
        self.grad = []

    def features(self, x):
        self.grad.append(torch.is_grad_enabled())
        yield x
        y = 2 * x.mean((2, 3))
        if self.spoil is not None:
            y[1, 2] = self.spoil
        yield y


def batches(sizes=(4, 4, 2)):
    x = torch.randn(sum(sizes), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, x.split(list(sizes))


def test_batches_add_up_to_one_batch():
    x, parts = batches()
    streamed = list(embed_batches(Double(), parts, grid=2, grid_samples=6))
    whole = next(embed_batches(Double(), [x], grid=2, grid_samples=6))
    assert [batch.start for batch in streamed] == [0, 4, 8]
    specs = feature_specs(Double().anatomy.nodes, 10, grid=2, grid_samples=6)
    for index in range(2):
        for field in ("feat_NC", "feat_NGC"):
            joined = torch.cat([getattr(batch.nodes[index], field) for batch in streamed])
            assert torch.allclose(joined, getattr(whole.nodes[index], field), atol=1e-6)
            assert specs[f"{index}.{field}"] == (torch.float32, tuple(joined.shape))
    assert "0.prefix_NTC" not in specs


def test_specs_of_tokens():
    tokens = node(Layout.NLC, (197, 192), (14, 14), prefix=1, index=5)
    specs = feature_specs([tokens], 2048, dtype=torch.float16)
    assert specs == {
        "5.feat_NC": (torch.float16, (2048, 192)),
        "5.feat_NGC": (torch.float16, (256, 16, 192)),
        "5.prefix_NTC": (torch.float16, (256, 1, 192)),
    }


def test_no_gradients():
    model = Double()
    list(embed_batches(model, batches()[1]))
    assert model.grad == [False, False, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_features_name_the_node(value):
    with pytest.raises(DeryError, match=r"node 1 \(n1\) gives NaN or infinite") as caught:
        list(embed_batches(Double(spoil=value), batches()[1]))
    assert caught.value.details == {"node": 1}


def test_too_large_for_float16_is_refused():
    model = Double(spoil=1e5)
    with pytest.raises(DeryError, match="1e\\+05, too large for float16") as caught:
        list(embed_batches(model, batches()[1], dtype=torch.float16))
    assert "--dtype" in caught.value.hint
    list(embed_batches(model, batches()[1]))
