"""What is known of a target: the numbers, and the files that another budget finds."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from dery_cli.core.similarity.features import probe_features
from dery_cli.core.stitching.joint_logits import JointTargets, joint_losses, probe_node
from dery_cli.data.batches import ImageStore
from dery_cli.data.samples import Split, choose_target, fingerprint
from dery_cli.data.sets import open_data
from dery_cli.data.target import Target
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble.features import pseudo_classes, score_target, target_bytes
from dery_cli.stages.assemble.features_store import target_name
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo, require_zoo
from tests.conftest import run_dery

IMAGES = 60
FIRST, SECOND = "demo__mobilenetv3", "demo__resnext"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    line = ("zoo", "add", "demo/mobilenetv3", "demo/resnext")
    assert run_dery(*line, cwd=folder).code == 0
    return folder / ".dery"


class Unlabelled:
    labels = None

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def image(self, index):
        return self.split.image(index)


def make_target(*, labels=True, seed=0, crop=0.95):
    data = open_data("demo:")
    if not labels:
        data = dataclasses.replace(data, train=Unlabelled(data.train), classes=None)
    split = Split.of(data.train, seed)
    indices = choose_target(data.train, split, samples=IMAGES, fit=20).indices
    return Target(
        data=data,
        indices=indices,
        fit_indices=indices[:20],
        crop=crop,
        batch_size=32,
        device=torch.device("cpu"),
        workers=0,
    )


class Counted:
    """Donors that are dissected when they are asked for; some must not be."""

    def __init__(self, zoo, space, refused=()):
        self.pool = DonorPool(zoo, space, torch.device("cpu"))
        self.asked, self.refused = [], refused

    def __getitem__(self, name):
        if name in self.refused:
            raise KeyboardInterrupt
        self.asked.append(name)
        return self.pool[name]


def score(root, target, *, refused=(), zoo=None):
    """The scores, and the donors that had to look at the images."""
    space = Workspace(root)
    donors = Counted(require_zoo(space), space, refused)
    zoo = zoo or require_zoo(space)
    images = ImageStore(
        target.data.train,
        target.indices,
        crop=target.crop,
        batch_size=target.batch_size,
        device=target.device,
    )
    digest = fingerprint(target.data.train, target.indices)
    with space.lock(lambda _: None):
        found = score_target(
            Terminal(quiet=True), space, zoo, donors, target, images, digest=digest, seed=0
        )
    return found, donors.asked


def files(root):
    """The bytes of all that is kept of targets."""
    place = root / "targets"
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A workspace in which the target was scored in one go."""
    copy = tmp_path_factory.mktemp("whole") / ".dery"
    shutil.copytree(root, copy)
    return copy, *score(copy, make_target())


@pytest.fixture
def fresh(root, tmp_path):
    shutil.copytree(root, tmp_path / ".dery")
    return tmp_path / ".dery"


@pytest.fixture
def done(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / ".dery")
    return tmp_path / ".dery"


def test_nodes_and_joints_are_those_of_features_taken_by_hand(whole):
    root, found, asked = whole
    target, space = make_target(), Workspace(root)
    zoo = require_zoo(space)
    assert asked == [FIRST, SECOND]
    assert found.nodes == tuple(
        (n, node.index) for n in zoo.names() for node in zoo[n].anatomy.nodes
    )
    assert (found.num_images, found.pseudo) == (IMAGES, False)
    pool, label_N = DonorPool(zoo, space, target.device), torch.tensor(target.labels)
    images = ImageStore(
        target.data.train, target.indices, crop=0.95, batch_size=IMAGES, device=target.device
    )
    feats, probes = {}, {}
    for name in zoo.names():
        [x_NCHW] = images.view(zoo[name].input, target.indices)
        with torch.no_grad():
            for node, raw in zip(zoo[name].anatomy.nodes, pool[name].features(x_NCHW), strict=True):
                feats[name, node.index] = probe_features(raw, node)
                probes[name, node.index] = probe_node(feats[name, node.index], label_N, 10)
    for node, row in found.row.items():
        if node[1] == 0:
            assert found.accuracy_V[row] == 0.1
            assert found.cross_entropy_V[row] == pytest.approx(np.log(10))
        else:
            assert found.accuracy_V[row] == pytest.approx(probes[node].accuracy, abs=1.5 / IMAGES)
            assert found.cross_entropy_V[row] == pytest.approx(probes[node].cross_entropy, rel=0.02)
    for u, v in (((FIRST, 2), (SECOND, 5)), ((SECOND, 3), (FIRST, 1)), ((FIRST, 2), (FIRST, 4))):
        wanted = joint_losses(feats[u], [JointTargets.of([probes[v].logits_ND], label_N)])
        place = found.row[u], found.row[v]
        assert found.r2_VV[place] == pytest.approx(float(wanted.r2_V), abs=2e-3)
        assert found.kl_VV[place] == pytest.approx(float(wanted.kl_V), rel=2e-2)
        assert found.joint_cross_entropy_VV[place] == pytest.approx(
            float(wanted.cross_entropy_V), rel=2e-2
        )


def test_every_stitch_of_the_grammar_has_a_score_and_no_other_pair(whole):
    found = whole[1]
    for (donor, u), row in found.row.items():
        for (other, v), column in found.row.items():
            allowed = u > 0 and v > 0 and (donor != other or u <= v)
            for pairs in (found.r2_VV, found.kl_VV, found.joint_cross_entropy_VV):
                assert np.isfinite(pairs[row, column]) == allowed


def test_another_run_reads_what_is_there(done, whole):
    before = files(done)
    found, asked = score(done, make_target())
    assert asked == []
    assert files(done) == before
    assert found.sha256 == whole[1].sha256
    for name in ("accuracy_V", "cross_entropy_V", "r2_VV", "kl_VV", "joint_cross_entropy_VV"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole[1], name))


def test_a_killed_run_goes_on_by_donor_to_the_same_bytes(fresh, whole):
    with pytest.raises(KeyboardInterrupt):
        score(fresh, make_target(), refused=(SECOND,))
    [folder] = (fresh / "targets").iterdir()
    assert [p.name for p in folder.rglob("*.json")] == [f"{FIRST}.json"]
    _, asked = score(fresh, make_target(), refused=(FIRST,))
    assert asked == [SECOND]
    assert files(fresh) == files(whole[0])


@pytest.mark.parametrize("name", [f"donors/{FIRST}.safetensors", f"donors/{FIRST}.json"])
def test_damaged_features_are_computed_anew(done, whole, name):
    [folder] = (done / "targets").iterdir()
    path = folder / name
    path.write_bytes(path.read_bytes()[:-30])
    _, asked = score(done, make_target())
    assert asked == [FIRST]
    assert files(done) == files(whole[0])


def test_damaged_scores_are_computed_anew_from_the_features(done, whole):
    [folder] = (done / "targets").iterdir()
    (folder / "joints.safetensors").unlink()
    _, asked = score(done, make_target())
    assert asked == []
    assert files(done) == files(whole[0])


def test_a_donor_with_other_weights_is_looked_at_again(done, whole):
    zoo = require_zoo(Workspace(done))
    other = dataclasses.replace(zoo[SECOND], weights_sha256="0" * 64)
    found, asked = score(done, make_target(), zoo=Zoo([zoo[FIRST], other]))
    assert asked == [SECOND]
    assert found.sha256 != whole[1].sha256


def test_another_field_of_view_replaces_and_other_images_lie_apart(done):
    _, asked = score(done, make_target(crop=0.5))
    assert asked == [FIRST, SECOND]
    assert len(list((done / "targets").iterdir())) == 1
    _, asked = score(done, make_target(seed=1))
    assert asked == [FIRST, SECOND]
    assert len(list((done / "targets").iterdir())) == 2


def test_fewer_donors_share_the_features_of_those_that_stay(done):
    zoo = require_zoo(Workspace(done))
    found, asked = score(done, make_target(), zoo=Zoo([zoo[SECOND]]))
    assert asked == []
    assert {name for name, _ in found.nodes} == {SECOND}


def test_without_labels_clusters_of_the_largest_donor_stand_for_classes(fresh):
    target = make_target(labels=False)
    found, asked = score(fresh, target)
    assert asked == [SECOND, FIRST, SECOND]
    assert found.pseudo
    count = pseudo_classes(IMAGES)
    assert found.accuracy_V[found.row[FIRST, 0]] == 1 / count
    # the clusters are of resnext's last node, so its later nodes know them best
    knows = {node: found.accuracy_V[row] for node, row in found.row.items()}
    assert max(knows, key=knows.get) in [(SECOND, node) for node in range(5, 10)]
    assert knows[SECOND, 9] > 4 / count
    before = files(fresh)
    again, asked = score(fresh, target)
    assert asked == []
    assert (again.sha256, files(fresh)) == (found.sha256, before)
    [folder] = (fresh / "targets").iterdir()
    (folder / "classes.json").unlink()
    _, asked = score(fresh, target)
    assert asked == [SECOND]
    assert files(fresh) == before


def test_features_that_are_no_numbers_name_donor_and_node(fresh, monkeypatch):
    def broken(x, node):
        feat_NC = probe_features(x, node)
        return feat_NC * torch.nan if node.index == 3 else feat_NC

    monkeypatch.setattr("dery_cli.stages.assemble.features.probe_features", broken)
    with pytest.raises(DeryError, match=f"{FIRST}: node 3 .* gives NaN or infinite") as caught:
        score(fresh, make_target())
    assert caught.value.hint == f"leave it out: dery zoo remove {FIRST}"
    assert [p for p in files(fresh) if not p.endswith(".log.json")] == []


def test_images_that_a_donor_does_not_tell_apart_make_no_classes(fresh, monkeypatch):
    monkeypatch.setattr(
        "dery_cli.stages.assemble.features.probe_features",
        lambda x, node: 0 * probe_features(x, node),
    )
    with pytest.raises(DeryError, match=f"{SECOND} tells too few of the images apart"):
        score(fresh, make_target(labels=False))


def test_the_folder_has_the_name_of_the_data_and_of_the_images(whole):
    target = make_target()
    assert target_name(target, "0" * 64, 0).startswith("demo-")
    assert target_name(target, "0" * 64, 0) == target_name(target, "0" * 64, 0)
    assert target_name(target, "0" * 64, 1) != target_name(target, "0" * 64, 0)
    assert target_name(target, "1" * 64, 0) != target_name(target, "0" * 64, 0)
    for spec, slug in (
        ("/data/My Photos/", "my-photos-"),
        ("torchvision:CIFAR100", "torchvision-cifar100-"),
        ("/data/ß", ""),
    ):
        data = dataclasses.replace(target.data, spec=spec)
        name = target_name(dataclasses.replace(target, data=data), "0" * 64, 0)
        assert name.startswith(slug)
        Workspace(whole[0]).target(name)  # it refuses what is no plain name


def test_the_bytes_that_are_foretold_are_those_that_are_written(whole):
    zoo = require_zoo(Workspace(whole[0]))
    written = sum(len(b) for name, b in files(whole[0]).items() if name.endswith(".safetensors"))
    assert target_bytes(zoo, IMAGES, 10) <= written < 1.05 * target_bytes(zoo, IMAGES, 10)
