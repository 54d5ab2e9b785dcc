"""What every node of a zoo knows of a target, and what joints between them would lose.

One pass of each donor over the target's images gives its features at all nodes and the probes on
them; then each node is asked how well it predicts what the probes of all others say. All of it is
kept by target, so that another budget finds it there, and goes on by donor where it was cut off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from dery_cli.core.similarity.features import probe_features
from dery_cli.core.stitching.joint_logits import (
    JointTargets,
    chance,
    joint_losses,
    probe_node,
)
from dery_cli.core.stitching.pseudo_labels import pseudo_labels
from dery_cli.data.batches import ImageStore
from dery_cli.data.target import Target
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace
from dery_cli.io.records import Artifact
from dery_cli.runtime.devices import FP32, Arithmetic
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.assemble.features_store import (
    DonorFeatures,
    Floats,
    PseudoClasses,
    TargetScores,
    TargetStore,
    feature_width,
    features_artifact,
    joints_artifact,
    pseudo_artifact,
    target_name,
)
from dery_cli.types import Donor
from dery_cli.zoo.donors import DonorPool
from dery_cli.zoo.registry import Zoo

PSEUDO_CLASSES = 16
PER_CLUSTER = 8
"""Clusters that stand for classes where the target has no labels, fewer for so many images each."""
CHUNK = 64
"""Target nodes that a source is asked about at once."""


@dataclasses.dataclass(frozen=True)
class _Labels:
    """The classes of a target's images.

    Args:
        label_N: Of each image.
        count: How many classes there are.
        pseudo: The record of pseudo-classes; None where the images have labels.
        donor: Whose clusters they are; None likewise.
    """

    label_N: Tensor
    count: int
    pseudo: Artifact | None
    donor: str | None = None

    @property
    def stand_in(self) -> PseudoClasses | None:
        """The pseudo-classes, if these are."""
        if self.pseudo is None or self.donor is None:
            return None
        return PseudoClasses(
            labels=tuple(self.label_N.tolist()),
            count=self.count,
            donor=self.donor,
            sha256=self.pseudo.sha256,
        )


def score_target(
    terminal: Terminal,
    space: Workspace,
    zoo: Zoo,
    donors: DonorPool,
    target: Target,
    images: ImageStore,
    *,
    digest: str,
    seed: int,
) -> TargetScores:
    """Score all nodes and all joints of a zoo on a target; what is there already is read.

    The caller holds the workspace's lock.

    Args:
        terminal: Gets the progress.
        space: Where the scores are kept.
        zoo: The donors.
        donors: The same, dissected.
        target: Its images.
        images: Has them decoded.
        digest: The images' fingerprint.
        seed: Of whatever is drawn: the images, pseudo-classes.

    Raises:
        DeryError: A donor gives NaN or infinite features, or the same of all images where there are
            no labels; a file cannot be written.
    """
    store = TargetStore(space, target_name(target, digest, seed))
    looker = _Looker(terminal, store, zoo, donors, target, images, digest)
    labels = looker.labels(seed)
    features = looker.features(labels)
    nodes = [(name, node.index) for name in zoo.names() for node in zoo[name].anatomy.nodes]
    wanted = joints_artifact(features, nodes, labels.count, pseudo=labels.pseudo is not None)
    found = store.joints(wanted)
    if found is not None:
        terminal.detail("what joints would lose is known of an earlier run")
    else:
        with terminal.progress("scoring joints", len(nodes) - len(zoo)) as bar:
            arrays = _score_joints(features, nodes, labels, bar.advance)
        found = store.write_joints(wanted, arrays)
    return dataclasses.replace(found, stand_in=labels.stand_in)


def probe_donors(
    terminal: Terminal,
    space: Workspace,
    zoo: Zoo,
    donors: DonorPool,
    target: Target,
    images: ImageStore,
    *,
    digest: str,
    seed: int,
    precision: str = FP32,
) -> dict[str, list[tuple[float, float]]]:
    """What a linear probe at each node of each donor makes of a labelled target.

    Those of single precision are the very ones that ``score_target`` starts from: whichever comes
    second finds them. Other precisions are kept apart. The caller holds the workspace's lock.

    Args:
        terminal: Gets the progress.
        space: Where features and probes are kept.
        zoo: The donors.
        donors: The same, dissected.
        target: Its images, labelled.
        images: Has them decoded.
        digest: The images' fingerprint.
        seed: Of the choice of images.
        precision: Of the forward passes: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        (accuracy, cross-entropy in nats), both cross-validated, of nodes 1, 2, ..., by donor.

    Raises:
        DeryError: A donor gives NaN or infinite features; a file cannot be written.
    """
    name = target_name(target, digest, seed)
    store = TargetStore(space, name if precision == FP32 else f"{name}-{precision}")
    looker = _Looker(terminal, store, zoo, donors, target, images, digest, precision)
    found = looker.features(looker.labels(seed))
    return {donor: features.probes for donor, features in found.items()}


def target_bytes(zoo: Zoo, images: int, num_classes: int | None) -> int:
    """Bytes that features, probes and scores of a target take on disk, headers aside."""
    classes = num_classes or pseudo_classes(images)
    nodes = [node for donor in zoo.donors.values() for node in donor.anatomy.nodes]
    columns = sum(feature_width(node) + classes for node in nodes if node.index)
    return 4 * images * columns + 8 * (3 * len(nodes) ** 2 + 2 * len(nodes))


@dataclasses.dataclass(frozen=True)
class _Looker:
    """Sends a target's images through donors, where what is stored does not spare it."""

    terminal: Terminal
    store: TargetStore
    zoo: Zoo
    donors: DonorPool
    target: Target
    images: ImageStore
    digest: str
    precision: str = FP32

    def labels(self, seed: int) -> _Labels:
        """The target's labels; without any, clusters of the pre-logits of the largest donor.

        Raises:
            DeryError: That donor tells too few images apart.
        """
        target = self.target
        if target.labels is not None and target.num_classes is not None:
            return _Labels(torch.tensor(target.labels), target.num_classes, None)
        donor = max(self.zoo.donors.values(), key=_size)
        count = pseudo_classes(len(target.indices))
        wanted = pseudo_artifact(donor, target, self.digest, count, seed)
        record = self.store.pseudo(wanted)
        if record is None:
            record = self.store.write_pseudo(wanted, self._clusters(donor, count, seed))
        return _Labels(torch.tensor(record.data["labels"]), count, record, donor.name)

    def _clusters(self, donor: Donor, count: int, seed: int) -> list[int]:
        with self.terminal.progress(
            f"clustering the images by {donor.name}", len(self.target.indices)
        ) as bar:
            x_NC = self._pass(donor, bar.advance)[-1]
        try:
            found: list[int] = pseudo_labels(x_NC, count, seed).tolist()
        except ValueError as error:
            raise DeryError(
                f"{donor.name} tells too few of the images apart: {error}",
                "--data with class folders",
            ) from error
        return found

    def features(self, labels: _Labels) -> dict[str, DonorFeatures]:
        """Of every donor, in the order of the zoo: those that are there, the others computed."""
        wanted = {
            name: features_artifact(
                donor, self.target, self.digest, labels.count, labels.pseudo, self.precision
            )
            for name, donor in self.zoo.donors.items()
        }
        found = {name: self.store.features(self.zoo[name], w) for name, w in wanted.items()}
        todo = [name for name, features in found.items() if features is None]
        if not todo:
            self.terminal.detail("the target's features are those of an earlier run")
        else:
            steps = [len(self.target.indices) + len(self.zoo[n].anatomy.nodes) - 1 for n in todo]
            with self.terminal.progress("looking at the target", sum(steps)) as bar:
                for name in todo:
                    found[name] = self._look(wanted[name], self.zoo[name], labels, bar.advance)
        return {name: features for name, features in found.items() if features is not None}

    def _look(
        self, wanted: Artifact, donor: Donor, labels: _Labels, advance: Callable[[int], None]
    ) -> DonorFeatures:
        features = self._pass(donor, advance)
        probes = []
        for x_NC in features:
            probes.append(probe_node(x_NC, labels.label_N, labels.count))
            advance(1)
        return self.store.write_features(donor, wanted, features, probes, self.target.batch_size)

    def _pass(self, donor: Donor, advance: Callable[[int], None]) -> list[Tensor]:
        """Pooled features (N, C) of nodes 1, 2, ..., in one pass.

        Raises:
            DeryError: They are NaN or infinite; donor and node are named.
        """
        dissection = self.donors[donor.name]
        nodes = dissection.anatomy.nodes
        parts: list[list[Tensor]] = [[] for _ in nodes]
        arithmetic = Arithmetic(device=self.target.device, precision=self.precision)
        with torch.inference_mode(), arithmetic.computing():
            for x_NCHW in self.images.view(donor.input, self.target.indices):
                for node, raw in zip(nodes, dissection.features(x_NCHW), strict=True):
                    if node.index:
                        parts[node.index].append(probe_features(raw.float(), node))
                advance(len(x_NCHW))
        features = [torch.cat(some) for some in parts[1:]]
        for node, x_NC in zip(nodes[1:], features, strict=True):
            if not torch.isfinite(x_NC).all():
                raise DeryError(
                    f"{donor.name}: node {node.index} ({node.name}) gives NaN or infinite features "
                    "on the target's images",
                    f"leave it out: dery zoo remove {donor.name}",
                )
        return features


def pseudo_classes(images: int) -> int:
    """How many clusters stand for the classes of so many images."""
    return max(2, min(PSEUDO_CLASSES, images // PER_CLUSTER))


def _size(donor: Donor) -> tuple[int, str]:
    return (donor.anatomy.params(0, len(donor.anatomy.nodes) - 1), donor.name)


def _score_joints(
    features: Mapping[str, DonorFeatures],
    nodes: list[tuple[str, int]],
    labels: _Labels,
    advance: Callable[[], None],
) -> dict[str, Floats]:
    """The arrays of a ``TargetScores``: one row a source, all targets at once."""
    rows = [row for row, (_, node) in enumerate(nodes) if node]
    chunks = [
        JointTargets.of(
            [features[nodes[row][0]].logits(nodes[row][1]) for row in rows[first : first + CHUNK]],
            labels.label_N,
        )
        for first in range(0, len(rows), CHUNK)
    ]
    shape = (len(nodes), len(nodes))
    r2_VV, kl_VV, loss_VV = (np.full(shape, np.nan) for _ in range(3))
    for source in rows:
        donor, node = nodes[source]
        found = joint_losses(features[donor].features(node), chunks)
        for into_VV, values_V in (
            (r2_VV, found.r2_V),
            (kl_VV, found.kl_V),
            (loss_VV, found.cross_entropy_V),
        ):
            into_VV[source, rows] = values_V.numpy()
            backward = [row for row in rows if nodes[row][0] == donor and nodes[row][1] < node]
            into_VV[source, backward] = np.nan
        advance()
    probes = [
        features[donor].probes[node - 1] if node else chance(labels.count) for donor, node in nodes
    ]
    return {
        "accuracy_V": np.array([accuracy for accuracy, _ in probes]),
        "cross_entropy_V": np.array([loss for _, loss in probes]),
        "r2_VV": r2_VV,
        "kl_VV": kl_VV,
        "joint_cross_entropy_VV": loss_VV,
    }
