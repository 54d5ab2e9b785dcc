"""Joints by the logits of their targets' probes, against a loop over pairs, folds and images."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from dery_cli.core.stitching import joint_logits
from dery_cli.core.stitching.joint_logits import JointTargets, chance, joint_losses, probe_node
from dery_cli.core.stitching.probe import fit_classifier
from dery_cli.core.stitching.ridge import RIDGE_PENALTIES
from tests.unit.core.stitching.test_smoother import naive_fit

N, D = 120, 5


def _zoo(n=N, widths=(6, 30, 150), classes=D):
    """Nodes that know ever more of the labels."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.randint(classes, (n,), generator=generator)
    known_NS = torch.randn(classes, 12, generator=generator)[label_N]
    nodes = []
    for number, width in enumerate(widths, 1):
        mix_SC = torch.randn(12, width, generator=generator)
        noise_NC = torch.randn(n, width, generator=generator)
        nodes.append(number * known_NS @ mix_SC + 6 * noise_NC + 2)
    return nodes, label_N


def naive_losses(x_NC, t_ND, label_N):
    """R2, KL and cross-entropy of one joint, float64, fold by fold and image by image."""
    t_ND = t_ND.double()
    everything = torch.ones(len(x_NC), dtype=torch.bool)
    hat = {p: naive_fit(x_NC, torch.eye(len(x_NC)).double(), p, everything) for p in PENALTIES}

    def generalised(penalty):
        residual = t_ND - t_ND.mean(0) - hat[penalty] @ (t_ND - t_ND.mean(0))
        return float(residual.square().sum()) / (1 - float(hat[penalty].trace()) / len(x_NC)) ** 2

    penalty = min(PENALTIES, key=generalised)
    error = spread = kl = loss = 0.0
    for fold in range(4):
        kept_N = torch.arange(len(x_NC)) % 4 != fold
        told_ND = naive_fit(x_NC, t_ND, penalty, kept_N)
        for image in (~kept_N).nonzero().flatten().tolist():
            error += float((told_ND[image] - t_ND[image]).square().sum())
            spread += float((t_ND[image] - t_ND[kept_N].mean(0)).square().sum())
            own_D, other_D = t_ND[image].softmax(0), told_ND[image].softmax(0)
            kl += float((own_D * (own_D / other_D).log()).sum())
            loss -= math.log(float(other_D[label_N[image]]))
    return 1 - error / spread, kl / len(x_NC), loss / len(x_NC)


PENALTIES = RIDGE_PENALTIES


def test_every_pair_is_what_the_plain_loop_gives():
    nodes, label_N = _zoo()
    logits = [probe_node(x_NC, label_N, D).logits_ND for x_NC in nodes]
    chunks = [JointTargets.of(logits[:1], label_N), JointTargets.of(logits[1:], label_N)]
    for x_NC in nodes:
        found = joint_losses(x_NC, chunks)
        for target, t_ND in enumerate(logits):
            r2, kl, loss = naive_losses(x_NC, t_ND, label_N)
            assert float(found.r2_V[target]) == pytest.approx(r2, abs=1e-4)
            assert float(found.kl_V[target]) == pytest.approx(kl, abs=1e-4)
            assert float(found.cross_entropy_V[target]) == pytest.approx(loss, abs=1e-4)


def test_a_node_predicts_its_own_probe_and_a_probe_of_noise_is_not_predicted():
    nodes, label_N = _zoo(widths=(6, 30))
    noise_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
    for x_NC in nodes:
        own_ND = probe_node(x_NC, label_N, D).logits_ND
        found = joint_losses(x_NC, [JointTargets.of([own_ND, noise_ND], label_N)])
        assert float(found.r2_V[0]) > 0.999
        assert float(found.kl_V[0]) < 1e-3
        assert float(found.r2_V[1]) < 0.05
        assert float(found.kl_V[1]) > 0.1


def test_a_wider_view_of_the_same_features_loses_less_than_a_narrower_one():
    """What was left out cannot be predicted; what was mixed can."""
    nodes, label_N = _zoo(widths=(40,))
    mixed_NC = nodes[0] @ torch.randn(40, 40, generator=torch.Generator().manual_seed(6))
    targets = JointTargets.of([probe_node(nodes[0], label_N, D).logits_ND], label_N)
    whole, half = joint_losses(mixed_NC, [targets]), joint_losses(nodes[0][:, :20], [targets])
    assert float(whole.r2_V) > 0.99 > 0.9 > float(half.r2_V)
    assert float(whole.kl_V) < float(half.kl_V)


def test_logits_of_many_classes_are_measured_on_their_principal_components(monkeypatch):
    """Where nothing lies outside these, the projection changes nothing."""
    nodes, label_N = _zoo(classes=12, widths=(30,))
    low_ND = nodes[0][:, :3] @ torch.randn(3, 12, generator=torch.Generator().manual_seed(7)) / 20
    whole = joint_losses(nodes[0], [JointTargets.of([low_ND], label_N)])
    monkeypatch.setattr(joint_logits, "MAX_DIMS", 4)
    targets = JointTargets.of([low_ND], label_N)
    assert targets.code_NVK.shape == (N, 1, 4)
    projected = joint_losses(nodes[0], [targets])
    assert float(projected.r2_V) == pytest.approx(float(whole.r2_V), abs=1e-3)
    assert float(projected.kl_V) == pytest.approx(float(whole.kl_V), abs=1e-3)
    assert float(projected.cross_entropy_V) == pytest.approx(float(whole.cross_entropy_V), abs=1e-3)


def test_distributions_may_be_compared_on_some_of_the_images(monkeypatch):
    nodes, label_N = _zoo(n=600, widths=(10, 20))
    logits = [probe_node(x_NC, label_N, D).logits_ND for x_NC in nodes]
    whole = joint_losses(nodes[0], [JointTargets.of(logits, label_N)])
    monkeypatch.setattr(joint_logits, "KL_ENTRIES", 300 * D)
    targets = JointTargets.of(logits, label_N)
    assert targets.own_VSD.shape == (2, 300, D)
    some = joint_losses(nodes[0], [targets])
    assert torch.equal(some.r2_V, whole.r2_V)
    assert torch.allclose(some.kl_V, whole.kl_V, rtol=0.2)
    assert not torch.equal(some.kl_V, whole.kl_V)


def test_the_probe_of_a_node_is_the_closed_form_classifier():
    nodes, label_N = _zoo()
    for x_NC in nodes:
        probe, wanted = probe_node(x_NC, label_N, D), fit_classifier(x_NC, label_N, D)
        assert probe.accuracy == pytest.approx(wanted.accuracy, abs=0.05)
        logits_ND = x_NC.double() @ wanted.weight_CD + wanted.bias_D
        both = torch.stack([probe.logits_ND.flatten().double(), logits_ND.flatten()])
        assert float(torch.corrcoef(both)[0, 1]) > 0.9
    assert [probe_node(x, label_N, D).accuracy for x in nodes] == sorted(
        probe_node(x, label_N, D).accuracy for x in nodes
    )


def test_a_probe_is_asked_about_images_that_it_was_not_fitted_on():
    """Labels drawn anew: whatever fits them, held out it is chance, and its entropy tells so."""
    nodes, label_N = _zoo()
    drawn_N = label_N[torch.randperm(N, generator=torch.Generator().manual_seed(8))]
    accuracy, loss = chance(D)
    for x_NC in nodes:
        probe = probe_node(x_NC, drawn_N, D)
        assert probe.accuracy < accuracy + 3 * (accuracy * (1 - accuracy) / N) ** 0.5
        assert probe.cross_entropy > 0.95 * loss
    assert chance(4) == (0.25, pytest.approx(math.log(4)))


def test_the_cross_entropy_is_that_of_held_out_logits_at_the_best_temperature():
    nodes, label_N = _zoo(widths=(30,))
    x_NC, probe = nodes[0], probe_node(nodes[0], label_N, D)
    fold_N = joint_logits.stratified_folds(label_N, 5)
    y_ND = one_hot(label_N, D).double()
    losses = []
    for penalty in RIDGE_PENALTIES:
        told_ND = torch.empty_like(y_ND)
        for fold in range(5):
            told_ND[fold_N == fold] = naive_fit(x_NC, y_ND, penalty, fold_N != fold)[fold_N == fold]
        grid = torch.linspace(1, 30, 400)
        losses.append(min(float(cross_entropy(t * told_ND, label_N)) for t in grid))
    assert probe.cross_entropy == pytest.approx(min(losses), abs=0.02)
