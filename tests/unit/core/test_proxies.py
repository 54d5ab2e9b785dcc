"""Training-free proxies against hand-made cases and against loops after their definitions."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dery_cli.core import proxies
from dery_cli.core.cost.flops import count_flops
from dery_cli.core.proxies import (
    PROXIES,
    ProxyInputs,
    about,
    fisher,
    flops,
    grad_norm,
    jacov,
    naswot,
    params,
    probe,
    snip,
    synflow,
    zico,
)
from dery_cli.core.stitching.probe import probe_accuracy
from dery_cli.core.training_free.passes import fresh_head


def inputs(network: nn.Module, x: torch.Tensor, labels=None, classes=None) -> ProxyInputs:
    return ProxyInputs(
        network=network.eval(),
        batches=lambda: iter(x.split(20)),
        labels=labels,
        num_classes=classes,
    )


def test_params_counts_them():
    assert params(inputs(nn.Linear(5, 3), torch.zeros(1, 5))) == 18


def test_probe_is_the_cross_validated_accuracy_of_the_pre_logits():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    labels = torch.arange(60) % 3
    x = torch.randn(60, 6) + 2 * torch.eye(3, 6)[labels]
    with torch.no_grad():
        expected = probe_accuracy(network(x), labels, 3)
    assert probe(inputs(network, x, labels.tolist(), 3)) == expected
    with pytest.raises(ValueError, match="needs labels"):
        probe(inputs(network, x))


def test_naswot_is_the_log_determinant_of_the_code_kernel():
    torch.manual_seed(0)
    linear = nn.Linear(6, 64)
    network = nn.Sequential(linear, nn.ReLU(inplace=True))
    x = torch.randn(64, 6)
    scores = []
    for batch in x.split(32):
        code = (linear(batch) > 0).double()
        kernel = torch.zeros(32, 32, dtype=torch.float64)
        for i in range(32):
            for j in range(32):
                kernel[i, j] = (code[i] == code[j]).sum()
        scores.append(float(torch.linalg.slogdet(kernel)[1]))
    assert naswot(inputs(network, x)) == pytest.approx(sum(scores) / 2, rel=1e-9)


def test_naswot_leaves_no_hook_and_no_mode_behind():
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.GELU())
    naswot(inputs(network, torch.randn(40, 6)))
    for module in network.modules():
        assert not module._forward_hooks
        assert not module.training
    assert network[1].inplace is True


def test_naswot_prefers_codes_that_differ():
    x = torch.randn(32, 16)
    same = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
    with torch.no_grad():
        same[0].weight.zero_()
        same[0].bias.fill_(1.0)
    different = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
    assert naswot(inputs(different, x)) > naswot(inputs(same, x))


def test_naswot_without_activations_is_minus_infinity():
    assert naswot(inputs(nn.Linear(6, 3), torch.randn(32, 6))) == -math.inf


def test_naswot_sees_functions_and_smooth_activations():
    class Functional(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.linear, self.activation = nn.Linear(6, 64), activation

        def forward(self, x):
            return self.activation(self.linear(x))

    torch.manual_seed(0)
    x = torch.randn(32, 6)
    kinds = (functional.relu, functional.gelu, functional.silu, functional.hardswish)
    scores = []
    for kind in kinds:
        torch.manual_seed(1)
        scores.append(naswot(inputs(Functional(kind), x)))
    assert math.isfinite(scores[0])
    assert scores == [scores[0]] * len(kinds)


IMAGES, SIDE, CLASSES, BATCH = 12, 3, 3, 4


class Small(nn.Module):
    """A convolution, a norm, an activation and a linear map, in double precision."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.ReLU(inplace=True)
        self.linear = nn.Linear(8, 2)

    def forward(self, x):
        return self.after(self.conv(x))

    def after(self, x):
        return self.linear(self.act(self.norm(x)).flatten(1))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(3)
    network = Small()
    network.norm.running_mean.uniform_(-0.3, 0.3)
    network.norm.running_var.uniform_(0.5, 2)
    return network.double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(IMAGES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(4)).double()


LABELS = [0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2]


def few(network, images):
    return ProxyInputs(
        network=network,
        batches=lambda: iter(images.split(5)),
        labels=LABELS,
        num_classes=CLASSES,
        num_batches=IMAGES // BATCH,
        batch_size=BATCH,
    )


def batches(images):
    labels = torch.tensor(LABELS)
    return zip(images.split(BATCH), labels.split(BATCH), strict=True)


def loss_of(pre_logits, labels):
    """Mean cross entropy under the fresh head, number by number."""
    weight, bias = fresh_head(pre_logits.shape[1], CLASSES, pre_logits)
    total = 0.0
    for row, label in zip(pre_logits, labels, strict=True):
        logits = [float(weight[k] @ row + bias[k]) for k in range(CLASSES)]
        total += math.log(sum(math.exp(z) for z in logits)) - logits[label]
    return total / len(pre_logits)


def slopes(tensor, value):
    """Derivatives of ``value()`` by every number of a tensor, by central differences."""
    found = np.zeros(tensor.shape)
    step = 1e-5
    with torch.no_grad():
        for place in itertools.product(*map(range, tensor.shape)):
            before = float(tensor[place])
            ends = []
            for moved in (before + step, before - step):
                tensor[place] = moved
                ends.append(value())
            tensor[place] = before
            found[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def weight_slopes(network, images):
    """For each batch, of each of the two weights."""
    found = []
    for x, labels in batches(images):

        def value(x=x, labels=labels):
            return loss_of(network(x), labels)

        weights = (network.conv.weight, network.linear.weight)
        found.append([slopes(weight, value) for weight in weights])
    return found


def test_grad_norm_is_the_sum_of_the_gradients_norms(small, images):
    found = [
        sum(math.sqrt(sum(v * v for v in slope.flat)) for slope in each)
        for each in weight_slopes(small, images)
    ]
    assert grad_norm(few(small, images)) == pytest.approx(np.mean(found), rel=1e-6)


def test_snip_is_the_sum_of_weights_times_gradients(small, images):
    values = [w.detach().numpy() for w in (small.conv.weight, small.linear.weight)]
    found = []
    for each in weight_slopes(small, images):
        pairs = zip(values, each, strict=True)
        found.append(sum(abs(w * g) for v, s in pairs for w, g in zip(v.flat, s.flat, strict=True)))
    assert snip(few(small, images)) == pytest.approx(np.mean(found), rel=1e-6)


def test_zico_is_log_of_mean_over_deviation_across_batches(small, images):
    each = weight_slopes(small, images)
    expected = 0.0
    for layer in range(2):
        total = 0.0
        for numbers in zip(*(batch[layer].flat for batch in each), strict=True):
            deviation = float(np.std(numbers))
            if deviation > 1e-12:  # a unit that is never active has no gradient at all
                total += float(np.mean(np.abs(numbers))) / deviation
        expected += math.log(total)
    assert zico(few(small, images)) == pytest.approx(expected, rel=1e-5)


def test_fisher_is_half_the_mean_square_of_summed_activation_times_gradient(small, images):
    found = []
    for x, labels in batches(images):
        with torch.no_grad():
            conv = small.conv(x)
            linear = small.after(conv.clone())
        by_conv = slopes(conv, lambda c=conv, k=labels: loss_of(small.after(c.clone()), k))
        by_linear = slopes(linear, lambda y=linear, k=labels: loss_of(y, k))
        total = 0.0
        for n in range(len(x)):
            for c in range(2):
                total += (conv[n, c].numpy() * by_conv[n, c]).sum() ** 2
                total += (float(linear[n, c]) * by_linear[n, c]) ** 2
        found.append(total / (2 * len(x)))
    assert fisher(few(small, images)) == pytest.approx(np.mean(found), rel=1e-6)


def test_fisher_of_tokens_sums_over_positions():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x.flatten(2).transpose(1, 2)).mean(1)

    torch.manual_seed(0)
    network = Tokens().double().eval()
    x = torch.randn(4, 3, 2, 2).double()
    labels = [0, 1, 2, 0]
    given = dataclasses.replace(few(network, x), labels=labels, num_batches=1)
    with torch.no_grad():
        tokens = network.linear(x.flatten(2).transpose(1, 2))
    slope = slopes(tokens, lambda: loss_of(tokens.mean(1), labels))
    summed = (tokens.numpy() * slope).sum(1)  # over positions, the channels are last
    assert fisher(given) == pytest.approx((summed**2).sum() / (2 * 4), rel=1e-6)


def test_jacov_is_the_score_of_the_jacobians_correlations(small, images):
    found = []
    for x, _ in batches(images):
        moving = x.clone()
        rows = slopes(moving, lambda m=moving: float(small(m).sum())).reshape(BATCH, -1)
        corr = np.zeros((BATCH, BATCH))
        for i in range(BATCH):
            for j in range(BATCH):
                a, b = rows[i] - rows[i].mean(), rows[j] - rows[j].mean()
                corr[i, j] = (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())
        k = 1e-5
        values = np.linalg.eigvals(corr).real
        found.append(-sum(math.log(v + k) + 1 / (v + k) for v in values))
    assert jacov(few(small, images)) == pytest.approx(np.mean(found), rel=1e-4)


def test_synflow_is_the_log_of_the_flow_through_magnitudes_without_batch_norms(small, images):
    conv, linear = small.conv, small.linear
    w, b = conv.weight.detach().abs().numpy(), conv.bias.detach().abs().numpy()
    v, d = linear.weight.detach().abs().numpy(), linear.bias.detach().abs().numpy()

    def flow(w, v):
        hidden = [b[c] + w[c].sum() for c in range(2) for _ in range(4)]  # ones in, all active
        return sum(d[k] + sum(v[k, i] * hidden[i] for i in range(8)) for k in range(2))

    total = 0.0
    for place in itertools.product(*map(range, w.shape)):
        step = np.zeros_like(w)
        step[place] = 1.0  # linear in it, so this is the derivative
        total += abs(w[place] * (flow(w + step, v) - flow(w, v)))
    for place in itertools.product(*map(range, v.shape)):
        step = np.zeros_like(v)
        step[place] = 1.0
        total += abs(v[place] * (flow(w, v + step) - flow(w, v)))
    assert synflow(few(small, images)) == pytest.approx(math.log(total), rel=1e-9)


def test_flops_are_the_networks(small, images):
    assert flops(few(small, images)) == count_flops(small, images) == 4 * 2 * 4 + 8 * 2


@pytest.mark.parametrize("name", sorted(PROXIES))
def test_a_proxy_changes_nothing_and_gives_the_same_twice(name, small, images):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    proxy = PROXIES[name]
    with torch.inference_mode():  # as it may be called
        first = proxy(few(small, images))
    assert first == proxy(few(small, images))
    assert math.isfinite(first)
    assert all(torch.equal(small.state_dict()[key], value) for key, value in before.items())
    for module in small.modules():
        assert not module.training
        assert not module._forward_hooks
    assert small.act.inplace
    assert all(p.grad is None and p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("name", sorted(PROXIES))
def test_what_a_proxy_states_of_labels_is_so(name, small, images):
    bare = dataclasses.replace(few(small, images), labels=None, num_classes=None)
    stated = about(PROXIES[name])
    assert all((stated.source, stated.cost, stated.direction))
    if stated.reads_labels:
        with pytest.raises(ValueError, match=f"'{name}' needs labels"):
            PROXIES[name](bare)
    else:
        assert math.isfinite(PROXIES[name](bare))


def test_scores_that_are_none_are_nan(small, images):
    one_batch = dataclasses.replace(few(small, images), num_batches=1)
    assert math.isnan(zico(one_batch))
    assert math.isnan(jacov(few(nn.Flatten(), images)))  # its Jacobians are constant
    deep = nn.Sequential(nn.Flatten(), *(nn.Linear(9, 9) for _ in range(400))).double()
    with torch.no_grad():
        for param in deep.parameters():
            param.fill_(1e3)
    assert math.isnan(synflow(few(deep, images)))


def test_the_few_are_full_batches_with_their_labels(small, images):
    given = list(few(small, images).few_batches())
    assert [len(x) for x, _ in given] == [BATCH] * 3
    assert torch.equal(torch.cat([x for x, _ in given]), images)
    assert torch.cat([k for _, k in given]).tolist() == LABELS
    other = images.flip(0)
    chosen = dataclasses.replace(
        few(small, images), few=lambda: iter([other]), few_labels=LABELS[::-1]
    )
    given = list(chosen.few_batches())
    assert torch.equal(torch.cat([x for x, _ in given]), other)
    assert torch.cat([k for _, k in given]).tolist() == LABELS[::-1]


def test_entry_points_are_the_catalogue():
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["dery.proxies"]
    assert named == {name: f"dery_cli.core.proxies:{name}" for name in PROXIES}
    assert all(getattr(proxies, name) is proxy for name, proxy in PROXIES.items())
