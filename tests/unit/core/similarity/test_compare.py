"""All-at-once metrics against plain float64 loops over pairs, written from the papers' formulas."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from dery_cli.core.similarity.compare import (
    CKA,
    LR,
    RBF_CKA,
    RIDGE,
    Known,
    MetricOptions,
    model_similarity,
    pairwise_metric,
    similarity,
)
from dery_cli.core.similarity.gram import plan_chunks, triangle_tiles
from dery_cli.core.similarity.regression import held_out_errors, orthonormal_basis
from dery_cli.errors import DeryError, UsageError

N = 600


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related(samples=N, widths=(5, 17, 40, 96)):
    """Nodes that share ten directions, with noise of their own."""
    shared = randn(samples, 10, seed=1)
    return [
        shared @ randn(10, c, seed=c) + (0.2 + 0.5 * i) * randn(samples, c, seed=1000 + c)
        for i, c in enumerate(widths)
    ]


def hsic(k, other, biased):
    """Gretton's HSIC_0 and Song's HSIC_1, as printed; times a constant that cancels in CKA."""
    m = len(k)
    one = torch.ones(m, dtype=torch.float64)
    if biased:
        centred = k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()
        return float((centred * other).sum())
    k = k - torch.diag(k.diagonal())
    other = other - torch.diag(other.diagonal())
    return float(
        (k * other).sum()
        + (one @ k @ one) * (one @ other @ one) / ((m - 1) * (m - 2))
        - 2 / (m - 2) * (one @ k @ other @ one)
    )


def linear_kernel(x):
    return x @ x.T


def rbf_kernel(x, bandwidth=1.0):
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = distance[tuple(torch.triu_indices(len(x), len(x), 1))]
    return torch.exp(-(distance**2) / (2 * (bandwidth * pairs.median()) ** 2))


def loop(features, minibatch, *, biased=False, kernel=linear_kernel):
    """CKA of every pair, one at a time, in float64."""
    least = 2 if biased else 4
    spans = [(s, s + minibatch) for s in range(0, len(features[0]), minibatch)]
    grams = []
    for x in features:
        parts = [x[a:b].double() for a, b in spans]
        parts = [(p - p.mean(0)) for p in parts if len(p) >= least]
        # scaled as a whole, so that float64 reaches where the features are huge
        size = max(float(p.norm()) for p in parts)
        grams.append([kernel(p / size) for p in parts])
    sim = torch.zeros(len(features), len(features), dtype=torch.float64)
    own = [sum(hsic(k, k, biased) for k in ks) for ks in grams]
    for i, ki in enumerate(grams):
        for j, kj in enumerate(grams):
            both = sum(hsic(a, b, biased) for a, b in zip(ki, kj, strict=True))
            sim[i, j] = both / math.sqrt(own[i] * own[j])
    return sim


def cka(features, metric=CKA, **options):
    return similarity(features, metric, MetricOptions(**options))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("minibatch", [4, 100, 256, N])
def test_cka_is_the_textbook_loop(minibatch, biased):
    features = related()
    result = cka(features, minibatch=minibatch, biased=biased)
    expected = loop(features, minibatch, biased=biased)
    assert result.sim_PP.dtype == torch.float64
    assert torch.allclose(result.sim_PP, expected, atol=1e-5, rtol=0)
    assert torch.equal(result.sim_PP, result.sim_PP.T)
    assert result.sim_PP.diagonal().tolist() == [1.0] * len(features)


def test_hand_checked_four_samples():
    # off-diagonal Grams, U-centred, are (2, -1, -1 | -1, -1, 2)/3-like patterns: for m = 4 they
    # live in a plane, spanned by the three ways of pairing four samples up
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])  # pairs (01)(23)
    y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])  # pairs (02)(13)
    result = cka([x, y], minibatch=4)
    assert result.sim_PP[0, 1].item() == pytest.approx(-0.5)
    assert result.clamp()[0, 1].item() == 0.0


def test_invariances_give_one():
    x = randn(N, 24)
    rotation, _ = torch.linalg.qr(randn(24, 24, seed=3).double())
    moved = (7.5 * (x.double() @ rotation) + 3.0).float()
    for metric in (CKA, RBF_CKA):
        for biased in (False, True):
            sim_PP = cka([x, moved, x.clone()], metric, biased=biased).sim_PP
            assert sim_PP[0, 1].item() == pytest.approx(1.0, abs=1e-5)
            assert sim_PP[0, 2].item() == 1.0


def adversarial():
    base = related()
    x = base[1]
    outlier = x.clone()
    outlier[7] *= 1e4
    return {
        "plain": base[0],
        "nearly constant": 1.0 + 1e-6 * x.double(),
        "nearly constant, float32": 1.0 + 1e-4 * x,
        "huge": x * 1e25,
        "tiny": x * 1e-25,
        "squares underflow": x * 5e-23,
        "huge float64": base[2].double() * 1e90,
        "offset": base[2] + 1e4,
        "offset differs by channel": base[2] + torch.logspace(-3, 4, 40),
        "low rank": randn(N, 2, seed=8) @ randn(2, 300, seed=9),
        "rank one": base[0][:, :1] @ torch.ones(1, 50),
        "duplicated": torch.cat([x] * 6, 1),
        "mixed scales": base[3] * torch.logspace(-6, 6, 96),
        "outlier": outlier,
        "half": base[2].half(),
        "bfloat16": base[2].bfloat16(),
        "wide noise": randn(N, 4000, seed=10),
        "sparse": base[3] * (randn(N, 96, seed=11) > 2),
        "one channel": base[0][:, :1],
    }


@pytest.mark.parametrize("minibatch", [200, N])
def test_adversarial_features_to_1e_4(minibatch):
    features = list(adversarial().values())
    sim_PP = cka(features, minibatch=minibatch).sim_PP
    assert torch.allclose(sim_PP, loop(features, minibatch), atol=1e-4, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_adversarial_features_rbf(biased):
    far = randn(N, 8, seed=12)
    far[::5] += 1e4  # most distances are of order 1, between samples that lie 1e4 from the mean
    features = [*adversarial().values(), far]
    sim_PP = cka(features, RBF_CKA, minibatch=200, biased=biased).sim_PP
    expected = loop(features, 200, biased=biased, kernel=rbf_kernel)
    assert torch.allclose(sim_PP, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 50.0])
def test_rbf_bandwidth(bandwidth):
    features = related()
    sim_PP = cka(features, RBF_CKA, bandwidth=bandwidth).sim_PP
    expected = loop(features, 256, kernel=lambda x: rbf_kernel(x, bandwidth))
    assert torch.allclose(sim_PP, expected, atol=1e-4, rtol=0)


def test_wide_rbf_kernel_becomes_linear():
    features = related()
    wide = cka(features, RBF_CKA, bandwidth=1e7, minibatch=N).sim_PP
    assert torch.allclose(wide, cka(features, minibatch=N).sim_PP, atol=1e-5)


def test_rbf_where_most_samples_are_equal():
    x = torch.zeros(256, 3)
    x[:40] = randn(40, 3)
    sim_PP = cka([x, randn(256, 3, seed=2)], RBF_CKA).sim_PP
    assert bool(torch.isfinite(sim_PP).all())
    assert sim_PP[0, 0] == 1.0


@pytest.mark.parametrize("metric", [CKA, RBF_CKA, LR, RIDGE])
def test_constant_features_are_zero_and_named(metric):
    dead = torch.full((N, 6), 0.1)
    result = similarity([related()[0], dead, related()[1], dead.double()], metric)
    assert bool(torch.isfinite(result.sim_PP).all())
    assert result.sim_PP[1].abs().max() == 0.0
    assert result.sim_PP[:, 3].abs().max() == 0.0
    assert result.sim_PP[0, 2] > 0.1
    assert result.constant_nodes == (1, 3)
    assert result.warnings == ("constant features at 2 nodes (1, 3): similarity 0 to all",)


def test_constant_in_one_minibatch_only():
    x = related()[0].clone()
    x[256:512] = 2.0
    features = [x, related()[1]]
    assert cka(features).constant_nodes == ()
    full = [(0, 256), (512, N)]
    expected = loop([torch.cat([f[a:b] for a, b in full]) for f in features], 256)
    own = hsic_sum(features[1], [(0, 256), (256, 512), (512, N)]) / hsic_sum(features[1], full)
    assert cka(features).sim_PP[0, 1].item() == pytest.approx(
        expected[0, 1].item() / math.sqrt(own), abs=1e-5
    )


def hsic_sum(x, spans):
    parts = [x[a:b].double() - x[a:b].double().mean(0) for a, b in spans]
    return sum(hsic(p @ p.T, p @ p.T, False) for p in parts)


def test_features_that_u_centring_empties_are_zero():
    # one sample differs, all others agree: K is a_i + a_j off the diagonal
    x = torch.ones(256, 4)
    x[17] = 5.0
    result = cka([x, related()[0][:256]])
    assert result.sim_PP.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert result.constant_nodes == (0,)


@pytest.mark.parametrize("metric", [CKA, RBF_CKA, LR, RIDGE])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_refused(metric, value):
    features = related()
    features[2][300, 1] = value
    with pytest.raises(DeryError, match="node 2 hold NaN or infinity") as caught:
        similarity(features, metric)
    assert caught.value.details == {"node": 2}


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (1, {}, "1 sample cannot be compared"),
        (3, {"minibatch": 4}, "3 samples cannot be compared"),
        (200, {}, "200 samples are fewer than the minibatch of 256"),
    ],
)
def test_too_few_samples(samples, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        cka([randn(samples, 3)], **options)
    assert caught.value.hint
    if samples == 200:
        assert "--minibatch 200" in caught.value.hint


def test_wrong_options_and_features():
    for options in (
        {"minibatch": 3}, {"bandwidth": 0.0}, {"penalty": -1.0}, {"folds": 1}, {"projection": 0}
    ):  # fmt: skip
        with pytest.raises(UsageError):
            MetricOptions(**options)
    with pytest.raises(UsageError, match="no nodes"):
        similarity([])
    with pytest.raises(UsageError, match="features of 300 and of 600 samples"):
        similarity([randn(300, 3), randn(600, 3)])


def test_last_minibatch_is_used_or_left_out():
    features = [f[:515] for f in related()]
    result = cka(features)  # 256 + 256 + 3
    assert result.warnings == ("the last 3 of 515 samples are left out",)
    assert torch.equal(result.sim_PP, cka([f[:512] for f in features]).sim_PP)
    features = [f[:516] for f in related()]
    assert cka(features).warnings == ()
    assert torch.allclose(cka(features).sim_PP, loop(features, 256), atol=1e-5)


@pytest.mark.parametrize("metric", [CKA, RBF_CKA, LR, RIDGE])
def test_blocked_is_unblocked(metric):
    features = related(300, widths=(5, 17, 40)) * 4
    whole = similarity(features, metric, MetricOptions(minibatch=300))
    memory = {"cka": 1.0e6, "rbf_cka": 4.0e6, "lr": 1.7e6, "ridge": 4.2e6}[metric.name]
    calls = []
    small = similarity(
        features,
        metric,
        MetricOptions(minibatch=300, memory=int(memory)),
        progress=lambda done, total: calls.append(done),
    )
    assert len(calls) > 4 * len(features)  # several chunks
    assert torch.allclose(whole.sim_PP, small.sim_PP, atol=2e-6)


@pytest.mark.parametrize("size", [1, 4, 31, 64, 65, 200, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 2.0])
def test_chunks_cover_the_triangle_once(size, share):
    max_area = max(size, int(share * size * size))
    count = np.zeros((size, size), int)
    for chunk in plan_chunks(size, max_area):
        assert 0 < chunk.area <= max_area
        for top, bottom, left, right in chunk.tiles:
            count[top:bottom, left:right] += 1
            if top == left:
                assert (bottom, top) == (right, left)
            else:
                count[left:right, top:bottom] += 1
    assert (count == 1).all()
    assert all(tile[1] - tile[0] > 0 for tile in triangle_tiles(size, 16))


def test_memory_bound_too_small_says_what_would_do():
    features = [randn(64, 2)] * 100
    with pytest.raises(UsageError, match="100 nodes do not fit a memory bound of 0 MB") as caught:
        cka(features, minibatch=64, memory=50_000)
    needed = int(caught.value.hint.split()[2].rstrip("M"))
    assert cka(features, minibatch=64, memory=needed * 1_000_000).sim_PP.shape == (100, 100)


def test_large_zoo_falls_back_to_float32_numerators():
    features = [f[:64] for f in related()] * 50
    tight = cka(features, minibatch=64, memory=1_000_000)
    loose = cka(features, minibatch=64)
    assert (tight.sim_PP.dtype, loose.sim_PP.dtype) == (torch.float32, torch.float64)
    assert torch.allclose(tight.sim_PP.double(), loose.sim_PP, atol=1e-5)


@pytest.mark.parametrize("metric", [CKA, RBF_CKA, LR, RIDGE, "own"])
def test_adding_donors_is_the_full_matrix(metric):
    if metric == "own":
        metric = pairwise_metric("own", lambda x, y: float(x.std() / y.std()), directional=True)
    features = [*related(), *[f * f for f in related()]]
    whole = similarity(features, metric)
    kept = [5, 0, 3, 6]
    old = similarity([features[p] for p in kept], metric)
    positions = [kept.index(p) if p in kept else None for p in range(len(features))]
    read = CountingRows.wrap(features)
    grown = similarity(read, metric, known=Known(similarity=old, positions=positions))
    assert torch.allclose(grown.sim_PP, whole.sim_PP, atol=2e-6)
    assert torch.allclose(grown.numer_PP, whole.numer_PP, rtol=1e-4, atol=1e-6)
    assert torch.allclose(grown.unit_P, whole.unit_P)
    assert torch.equal(grown.sim_PP[0, 3], old.sim_PP[1, 2])


class CountingRows:
    """Features that count how often they are read."""

    def __init__(self, rows):
        self.rows, self.shape, self.reads = rows, rows.shape, 0

    def __getitem__(self, rows):
        self.reads += 1
        return self.rows[rows]

    @classmethod
    def wrap(cls, features):
        return [cls(f) for f in features]


@pytest.mark.parametrize("metric", [CKA, LR])
def test_removing_donors_computes_nothing(metric):
    features = related()
    old = similarity(features, metric)
    read = CountingRows.wrap([features[3], features[1]])
    left = similarity(read, metric, known=Known(similarity=old, positions=[3, 1]))
    assert [rows.reads for rows in read] == [0, 0]
    assert torch.equal(left.sim_PP, old.sim_PP[[3, 1]][:, [3, 1]])


def test_adding_computes_only_new_pairs():
    features = related()
    told = []
    cka_old = similarity(features[:3], progress=lambda *told: None)
    similarity(
        features,
        known=Known(similarity=cka_old, positions=[0, 1, 2, None]),
        progress=lambda done, total: told.append((done, total)),
    )
    full = []
    similarity(features, progress=lambda done, total: full.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert full[-1][0] == full[-1][1]
    area = full[-1][1] / (sum(f.shape[1] for f in features) + 10)
    assert full[-1][1] - told[-1][1] == pytest.approx(6 * area)  # three nodes have six pairs


def least_squares_r2(x, y):
    x, y = (z.double().numpy() - z.double().numpy().mean(0) for z in (x, y))
    solution, *_ = np.linalg.lstsq(x, y, rcond=None)
    return 1 - ((y - x @ solution) ** 2).sum() / (y**2).sum()


def test_lr_is_least_squares():
    x = related()[1]
    features = [*related(), torch.cat([x, x], 1), torch.cat([x, torch.zeros(N, 3)], 1), x + 100]
    sim_PP = similarity(features, LR).sim_PP
    expected = [[least_squares_r2(x, y) for y in features] for x in features]
    assert torch.allclose(sim_PP, torch.tensor(expected, dtype=torch.float64), atol=2e-5)
    assert sim_PP.diagonal().tolist() == [1.0] * len(features)
    assert (sim_PP - sim_PP.T).abs().max() > 0.05  # row: predictor, column: predicted
    assert sim_PP[0, 3] < sim_PP[3, 0]


def test_basis_of_dependent_columns():
    x = randn(50, 4).double()
    x = torch.cat([x, x[:, :2] + x[:, 2:]], 1)
    q = orthonormal_basis(x - x.mean(0))
    assert q.shape == (50, 4)
    assert torch.allclose(q.T @ q, torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_lr_refuses_few_samples_unless_projected():
    features = [randn(N, 20), randn(N, 151, seed=1)]
    with pytest.raises(UsageError, match=r"node 1 .* 151 channels and 600 samples") as caught:
        similarity(features, LR)
    assert "--projection 150" in caught.value.hint
    sim_PP = similarity(features, LR, MetricOptions(projection=150)).sim_PP
    # 150 random directions explain 150/599 of unrelated channels, and most of the 151 they are from
    assert sim_PP[1, 0].item() == pytest.approx(150 / 599, abs=0.05)
    assert 0.9 < sim_PP[1, 1].item() < 1.0
    assert sim_PP[0, 0].item() == 1.0
    with pytest.raises(UsageError, match="151 channels"):
        similarity(features, LR, MetricOptions(projection=200))


def ridge_loop(x, y, folds, penalty):
    """Cross-validated R^2 by fitting, predicting and scoring each fold."""
    x, y = x.double().numpy(), y.double().numpy()
    wrong = total = 0.0
    for fold in range(folds):
        held = np.arange(len(x)) % folds == fold
        mean_x, mean_y = x[~held].mean(0), y[~held].mean(0)
        centred = x[~held] - mean_x
        gram = centred.T @ centred
        gram += penalty * np.trace(gram) / len(gram) * np.eye(len(gram))
        weights = np.linalg.solve(gram, centred.T @ (y[~held] - mean_y))
        predicted = (x[held] - mean_x) @ weights + mean_y
        wrong += ((y[held] - predicted) ** 2).sum()
        total += ((y[held] - mean_y) ** 2).sum()
    return 1 - wrong / total


@pytest.mark.parametrize(("folds", "penalty"), [(5, 1e-2), (2, 1.0), (7, 1e-4)])
def test_ridge_is_an_explicit_cross_validation(folds, penalty):
    features = [f[:101] for f in [*related(), randn(N, 130, seed=4)]]
    sim_PP = similarity(features, RIDGE, MetricOptions(folds=folds, penalty=penalty)).sim_PP
    expected = [[ridge_loop(x, y, folds, penalty) for y in features] for x in features]
    assert torch.allclose(sim_PP, torch.tensor(expected), atol=1e-4)
    assert sim_PP[4, 0] < 0.05  # unrelated features predict nothing held out


def test_ridge_too_few_samples():
    with pytest.raises(UsageError, match="9 samples are too few for 5 folds"):
        similarity([randn(9, 2)], RIDGE)


def test_held_out_errors_of_a_constant_predict_the_mean():
    errors = held_out_errors(torch.zeros(6, 2, dtype=torch.float64), 3, 0.1)
    assert torch.allclose(errors @ torch.ones(6, dtype=torch.float64), torch.zeros(6).double())
    assert errors[0, 1].item() == pytest.approx(-1 / 4)
    assert errors[0, 3].item() == 0.0


def test_own_metric_enters_by_the_same_door():
    dot = pairwise_metric("dot", lambda x, y: float((x * y).sum()), directional=False)
    features = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]
    result = similarity(features, dot)
    assert result.sim_PP.tolist() == [[5.0, 11.0], [11.0, 25.0]]
    assert result.clamp().tolist() == [[1.0, 1.0], [1.0, 1.0]]
    broken = pairwise_metric("nan", lambda x, y: float("nan"), directional=False)
    result = similarity(features, broken)
    assert result.sim_PP.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert result.warnings == ("nan gave NaN for 4 pairs; they count as 0",)


def test_models_by_best_match():
    sim_PP = torch.tensor([[1.0, 0.2, 0.8], [0.2, 1.0, 0.4], [0.8, 0.4, 1.0]])
    sim_MM = model_similarity(sim_PP, [0, 0, 1])
    assert torch.allclose(sim_MM, torch.tensor([[1.0, 0.7], [0.7, 1.0]]))


def test_products_are_full_float32_whatever_the_caller_has_set():
    seen = []

    class Watching(CountingRows):
        def __getitem__(self, rows):
            seen.append(torch.get_float32_matmul_precision())
            return super().__getitem__(rows)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        similarity(Watching.wrap(related()))
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_lazy_rows_from_a_file(tmp_path):
    from dery_cli.io.row_stream import SafetensorsStream, TensorFile

    features = related()
    specs = {str(p): (f.dtype, tuple(f.shape)) for p, f in enumerate(features)}
    path = os.path.join(tmp_path, "zoo.safetensors")
    with SafetensorsStream(path, specs) as stream:
        for p, f in enumerate(features):
            stream.write(str(p), f)
    lazy = [TensorFile(path).rows(str(p)) for p in range(len(features))]
    assert torch.equal(similarity(lazy).sim_PP, similarity(features).sim_PP)
