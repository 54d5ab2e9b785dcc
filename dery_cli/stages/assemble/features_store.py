"""What is kept of a target under ``targets/<target>/``, whatever budgets it is asked for later.

``donors/<donor>.json`` names a donor's features of the target's images at its nodes, and the probes
on them; ``classes.json`` holds pseudo-classes where the images have no labels; ``joints.json``
names what a joint between any two nodes would lose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dery_cli.core.stitching.joint_logits import NodeProbe
from dery_cli.data.target import Target
from dery_cli.errors import DeryError
from dery_cli.io.artifacts import Workspace, open_unchanged, unchanged, write_record
from dery_cli.io.journal import transaction
from dery_cli.io.look import Opened
from dery_cli.io.records import Artifact, Kind, json_sha256
from dery_cli.io.row_stream import LazyRows
from dery_cli.io.schema import (
    any_text,
    boolean,
    fields,
    integer,
    list_of,
    number,
    one_of,
    plain_name,
    row,
)
from dery_cli.runtime.devices import FP32, PRECISIONS
from dery_cli.types import Donor, Node
from dery_cli.zoo.schemas import COUNT, CROP

Floats = npt.NDArray[np.float64]

_IMAGES = {"data": any_text, "crop": CROP}
FEATURES = Kind(
    name="target-features",
    version=1,
    parents=("weights", "anatomy", "images"),
    options=fields({**_IMAGES, "classes": integer(2)}, {"precision": one_of(*PRECISIONS[2:])}),
    data=fields(
        {
            "donor": plain_name,
            "images": integer(1),
            "batch_size": integer(1),
            "probes": list_of(row(number(0, 1), number(0)), least=1),
        }
    ),
)
"""Beside features and logits: (accuracy, cross-entropy) of the probes at nodes 1, 2, ..."""
PSEUDO = Kind(
    name="target-classes",
    version=1,
    parents=("weights", "anatomy", "images"),
    options=fields({**_IMAGES, "classes": integer(2)}),
    data=fields({"donor": plain_name, "labels": list_of(COUNT, least=1)}),
)
JOINTS = Kind(
    name="target-joints",
    version=1,
    data=fields(
        {
            "nodes": list_of(row(plain_name, COUNT), least=1),
            "images": integer(1),
            "classes": integer(2),
            "pseudo": boolean,
        }
    ),
)
_JOINTS_FILE = "joints.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PseudoClasses:
    """Clusters of what a donor makes of a target's images: they stand for labels, weakly.

    Args:
        labels: Of each image that is fitted on, in order.
        count: How many there are.
        donor: Whose pre-logits were clustered.
        sha256: Of their record.
    """

    labels: tuple[int, ...]
    count: int
    donor: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class TargetScores:
    """What every node of a zoo knows of a target, and what every joint of two nodes would lose.

    Node 0 of a donor knows nothing (chance). A pair is a source node and a target node; there is
    none from or to a node 0, nor from a node to an earlier one of the same donor: nan.

    Args:
        nodes: (donor, node) of each row, in the order of the zoo, node 0 among them.
        accuracy_V: Cross-validated top-1 of the linear probe at each node.
        cross_entropy_V: Cross-validated, in nats.
        r2_VV: Held-out R2 of the target node's probe logits, regressed on the source's features.
        kl_VV: Mean KL(what the target's probe says of its own features || of the predicted ones).
        joint_cross_entropy_VV: Of the predicted logits, in nats.
        num_images: The target's images.
        pseudo: Whether the classes are pseudo-classes, a weak stand-in for labels.
        sha256: Of the artifact.
        stand_in: The pseudo-classes, where they are.
    """

    nodes: tuple[tuple[str, int], ...]
    accuracy_V: Floats
    cross_entropy_V: Floats
    r2_VV: Floats
    kl_VV: Floats
    joint_cross_entropy_VV: Floats
    num_images: int
    pseudo: bool
    sha256: str
    stand_in: PseudoClasses | None = None

    @functools.cached_property
    def row(self) -> Mapping[tuple[str, int], int]:
        """The row of each (donor, node)."""
        return {node: row for row, node in enumerate(self.nodes)}


@dataclasses.dataclass(frozen=True)
class DonorFeatures:
    """A donor's features and probes of the target's images.

    Args:
        record: Of the artifact.
        rows: ``<node>.feat_NC`` and ``<node>.logits_ND`` of nodes 1, 2, ..., read when sliced.
    """

    record: Artifact
    rows: Mapping[str, LazyRows]

    @property
    def probes(self) -> list[tuple[float, float]]:
        """(accuracy, cross-entropy) of nodes 1, 2, ..."""
        return [(accuracy, loss) for accuracy, loss in self.record.data["probes"]]

    def features(self, node: int) -> Tensor:
        """Pooled features (N, C), in memory."""
        return self.rows[f"{node}.feat_NC"][:]

    def logits(self, node: int) -> Tensor:
        """What the probe says (N, D), in memory."""
        return self.rows[f"{node}.logits_ND"][:]


def target_name(target: Target, digest: str, seed: int) -> str:
    """A plain name for a target's folder: its data spec in short, and which images they are."""
    words = re.findall(r"[a-z0-9]+", target.data.spec.rstrip("/").rpartition("/")[2].lower())
    known = hashlib.sha256(f"{digest} {seed}".encode()).hexdigest()[:12]
    return "-".join(["-".join(words)[:40].strip("-"), known]).strip("-")


def features_artifact(
    donor: Donor,
    target: Target,
    digest: str,
    classes: int,
    pseudo: Artifact | None,
    precision: str = FP32,
) -> Artifact:
    """The record of a donor's features, before they are there.

    Args:
        donor: From the zoo.
        target: Its images.
        digest: Their fingerprint.
        classes: How many there are.
        pseudo: The pseudo-classes that stand for labels.
        precision: Of the forward passes; named where it is not single.
    """
    known = {} if pseudo is None else {"classes": pseudo.sha256}
    other = {} if precision == FP32 else {"precision": precision}
    return Artifact(
        kind=FEATURES,
        parents={**_parents(donor, digest), **known},
        options={**_options(target, classes), **other},
        data={"donor": donor.name, "images": len(target.indices)},
    )


def pseudo_artifact(donor: Donor, target: Target, digest: str, classes: int, seed: int) -> Artifact:
    """The record of so many pseudo-classes by a donor, before they are there."""
    return Artifact(
        kind=PSEUDO,
        parents=_parents(donor, digest),
        options=_options(target, classes),
        seed=seed,
        data={"donor": donor.name},
    )


def joints_artifact(
    features: Mapping[str, DonorFeatures],
    nodes: Sequence[tuple[str, int]],
    classes: int,
    *,
    pseudo: bool,
) -> Artifact:
    """The record of the joints' scores, before they are there."""
    records = {name: found.record for name, found in features.items()}
    return Artifact(
        kind=JOINTS,
        parents={f"features/{name}": record.sha256 for name, record in records.items()},
        data={
            "nodes": [[donor, node] for donor, node in nodes],
            "images": next(iter(records.values())).data["images"],
            "classes": classes,
            "pseudo": pseudo,
        },
    )


def _parents(donor: Donor, digest: str) -> dict[str, str]:
    anatomy = {"anatomy": donor.anatomy.to_json(), "input": donor.input.to_json()}
    return {
        "weights": donor.weights_sha256,
        "anatomy": json_sha256(anatomy),
        "images": digest,
    }


def _options(target: Target, classes: int) -> dict[str, Any]:
    return {"data": target.data.spec, "crop": target.crop, "classes": classes}


class TargetStore:
    """The files of one target; whoever writes holds the workspace's lock.

    What is damaged, or was made from something else, counts as none.

    Args:
        space: The workspace.
        name: Of the target, ``target_name``.
    """

    def __init__(self, space: Workspace, name: str) -> None:
        self.root = space.target(name)

    def features(self, donor: Donor, wanted: Artifact) -> DonorFeatures | None:
        """A donor's features, if they are there and whole."""
        opened = open_unchanged(self._donor(donor), wanted)
        with contextlib.suppress(DeryError):
            return None if opened is None else _donor_features(opened, donor)
        return None

    def write_features(
        self,
        donor: Donor,
        wanted: Artifact,
        features: Sequence[Tensor],
        probes: Sequence[NodeProbe],
        batch_size: int,
    ) -> DonorFeatures:
        """Write features and probes of nodes 1, 2, ...; they are read back when they are used."""
        tensors = {f"{node}.feat_NC": x_NC for node, x_NC in enumerate(features, 1)}
        tensors |= {f"{node}.logits_ND": probe.logits_ND for node, probe in enumerate(probes, 1)}
        told = [[probe.accuracy, probe.cross_entropy] for probe in probes]
        record = dataclasses.replace(
            wanted, data={**wanted.data, "batch_size": batch_size, "probes": told}
        )
        path = self._donor(donor)
        with transaction(path) as work:
            work.write_tensors(path.with_suffix(".safetensors").name, tensors)
            work.commit(record)
        written = self.features(donor, wanted)
        if written is None:
            raise DeryError(f"{path} was altered while it was written", "rerun the command")
        return written

    def pseudo(self, wanted: Artifact) -> Artifact | None:
        """The record of pseudo-classes, if they are there."""
        return unchanged(self.root / "classes.json", wanted)

    def write_pseudo(self, wanted: Artifact, labels: Sequence[int]) -> Artifact:
        record = dataclasses.replace(wanted, data={**wanted.data, "labels": list(labels)})
        return write_record(self.root / "classes.json", record)

    def joints(self, wanted: Artifact) -> TargetScores | None:
        """The joints' scores, if they are there and whole."""
        opened = open_unchanged(self.root / "joints.json", wanted)
        with contextlib.suppress(DeryError):
            return None if opened is None else _target_scores(opened)
        return None

    def write_joints(self, wanted: Artifact, scores: Mapping[str, Floats]) -> TargetScores:
        """Write the arrays of a ``TargetScores`` by their names."""
        with transaction(self.root / "joints.json") as work:
            work.write_tensors(_JOINTS_FILE, {n: torch.from_numpy(a) for n, a in scores.items()})
            record = work.commit(wanted)
        return _as_scores(record, scores)

    def _donor(self, donor: Donor) -> Path:
        return self.root / "donors" / f"{donor.name}.json"


def feature_width(node: Node) -> int:
    """Channels that ``features.probe_features`` gives of a node."""
    return node.num_chs * (1 + node.num_prefix_tokens)


def _donor_features(opened: Opened, donor: Donor) -> DonorFeatures:
    """The tensors that a donor's record promises, and no other.

    Raises:
        DeryError: The file holds something else.
    """
    data, classes = opened.record.data, opened.record.options["classes"]
    nodes = donor.anatomy.nodes[1:]
    if len(data["probes"]) != len(nodes):
        raise DeryError(f"{opened.path} is not of {donor.name}'s nodes")
    shapes: dict[str, tuple[int, ...]] = {}
    for node in nodes:
        shapes[f"{node.index}.feat_NC"] = (data["images"], feature_width(node))
        shapes[f"{node.index}.logits_ND"] = (data["images"], classes)
    file = opened.path.with_suffix(".safetensors").name
    return DonorFeatures(record=opened.record, rows=opened.rows(file, shapes))


def _shapes(nodes: int) -> dict[str, tuple[int, ...]]:
    """The arrays of the scores of so many nodes."""
    pairs = (nodes, nodes)
    return {
        "accuracy_V": (nodes,),
        "cross_entropy_V": (nodes,),
        "r2_VV": pairs,
        "kl_VV": pairs,
        "joint_cross_entropy_VV": pairs,
    }


def _target_scores(opened: Opened) -> TargetScores:
    """The scores that were opened.

    Raises:
        DeryError: They are not of the record's nodes.
    """
    tensors = opened.tensors(_JOINTS_FILE, _shapes(len(opened.record.data["nodes"])))
    return _as_scores(opened.record, {name: t.double().numpy() for name, t in tensors.items()})


def _as_scores(record: Artifact, arrays: Mapping[str, Floats]) -> TargetScores:
    return TargetScores(
        nodes=tuple((donor, node) for donor, node in record.data["nodes"]),
        accuracy_V=arrays["accuracy_V"],
        cross_entropy_V=arrays["cross_entropy_V"],
        r2_VV=arrays["r2_VV"],
        kl_VV=arrays["kl_VV"],
        joint_cross_entropy_VV=arrays["joint_cross_entropy_VV"],
        num_images=record.data["images"],
        pseudo=record.data["pseudo"],
        sha256=record.sha256,
    )
