"""The embedding artifacts of a zoo: what they were made from, and reading them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dery_cli.artifacts import Artifact, Workspace, canonical_json, check_files, read_record
from dery_cli.config import EmbedConfig
from dery_cli.data import DataSet, choose_samples, fingerprint
from dery_cli.errors import StaleError, UsageError
from dery_cli.stream import LazyRows
from dery_cli.types import Donor
from dery_cli.zoo import Zoo

EMBED_HINT = "dery embed --data SPEC"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The calibration images: which they are, in order, and what they are called.

    Args:
        spec: Data spec.
        indices: Chosen images of the training split, in order.
        digest: Hash of their content and labels.
        labels: Class of each, or None.
        classes: Class names, or None.
        crop: Field of view.
        batch_size: Images a batch.
    """

    spec: str
    indices: tuple[int, ...]
    digest: str
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    crop: float
    batch_size: int

    def to_json(self) -> dict[str, Any]:
        return {
            "indices": list(self.indices),
            "labels": None if self.labels is None else list(self.labels),
            "classes": None if self.classes is None else list(self.classes),
        }


def choose_calibration(config: EmbedConfig, data: DataSet) -> Calibration:
    """Choose and hash the calibration images.

    Raises:
        UsageError: Fewer than 8 images.
    """
    if len(data.train) < 8:
        raise UsageError(
            f"the data '{config.data}' have {len(data.train)} training images",
            "at least 8 are needed to compare features",
        )
    indices = choose_samples(len(data.train), config.samples, config.seed)
    labels = data.train.labels
    return Calibration(
        spec=data.spec,
        indices=tuple(indices),
        digest=fingerprint(data.train, indices),
        labels=None if labels is None else tuple(int(labels[i]) for i in indices),
        classes=data.classes,
        crop=config.crop,
        batch_size=config.batch_size,
    )


def embedding_artifact(donor: Donor, config: EmbedConfig, calibration: Calibration) -> Artifact:
    """The record of one donor's embedding, before its files are hashed."""
    anatomy = canonical_json(donor.anatomy.to_json())
    return Artifact(
        kind="embedding",
        parents={
            "weights": donor.weights_sha256,
            "anatomy": _short_hash(anatomy + canonical_json(donor.input.to_json())),
            "data": calibration.digest,
        },
        options={**config.options(), "data": calibration.spec},
        seed=config.seed,
        data={"donor": donor.name, "nodes": len(donor.anatomy.nodes), **calibration.to_json()},
    )


def _short_hash(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The embeddings of all donors of a zoo, from the same images.

    Args:
        zoo: The donors.
        calibration: The images.
        hashes: Content hash of each donor's embedding.
        paths: Tensor file of each donor.
        options: What they were embedded with.
        seed: Of the choice of images.
    """

    zoo: Zoo
    calibration: Calibration
    hashes: dict[str, str]
    paths: dict[str, Path]
    options: dict[str, Any]
    seed: int | None

    def features(self, donor: str, node: int, kind: str = "feat_NC") -> LazyRows:
        """A node's stored tensor (``feat_NC``, ``feat_NGC``, ``prefix_NTC``), read when sliced."""
        return LazyRows(self.paths[donor], f"{node}.{kind}")

    def whole(self, donor: str, node: int, kind: str = "feat_NC") -> Tensor:
        """The same, in memory, as float32."""
        return self.features(donor, node, kind)[:].float()


def embed_command(options: dict[str, Any], seed: int | None) -> str:
    """The command line that made, or would refresh, an embedding."""
    line = f"dery embed --data {options['data']} --samples {options['samples']}"
    return f"{line} --seed {seed}" if seed else line


def read_embeddings(
    workspace: Workspace, zoo: Zoo, donors: Sequence[str] | None = None
) -> Embeddings:
    """Check and open the embeddings of every donor of the zoo.

    Raises:
        StaleError: A donor has none, or one made from other weights, images, grid or seed.
        DeryError: A file is damaged.
    """
    records: dict[str, Artifact] = {}
    for name in donors or zoo.names():
        donor = zoo[name]
        path = workspace.embedding(name)
        record = read_record(path, "embedding", missing=f"{name} has no embedding", hint=EMBED_HINT)
        if record.parents["weights"] != donor.weights_sha256:
            hint = embed_command(dict(record.options), record.seed)
            raise StaleError(f"{name}'s embedding was made from other weights", hint)
        check_files(path, record, hint=embed_command(dict(record.options), record.seed))
        records[name] = record
    first_name, first = next(iter(records.items()))
    for name, record in records.items():
        same = (
            record.parents["data"] == first.parents["data"]
            and canonical_json(dict(record.options)) == canonical_json(dict(first.options))
            and record.seed == first.seed
        )
        if not same:
            raise StaleError(
                f"{name} and {first_name} were embedded from different images, options or seeds",
                embed_command(dict(first.options), first.seed),
            )
    labels, classes = first.data["labels"], first.data["classes"]
    return Embeddings(
        zoo=zoo,
        calibration=Calibration(
            spec=first.options["data"],
            indices=tuple(first.data["indices"]),
            digest=first.parents["data"],
            labels=None if labels is None else tuple(labels),
            classes=None if classes is None else tuple(classes),
            crop=first.options["crop"],
            batch_size=first.options["batch_size"],
        ),
        hashes={name: record.sha256 for name, record in records.items()},
        paths={name: workspace.embedding(name).with_suffix(".safetensors") for name in records},
        options=dict(first.options),
        seed=first.seed,
    )
