"""The embedding artifacts of a zoo: what they were made from, and reading them back."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dery_cli.data.samples import choose_samples, fingerprint
from dery_cli.data.sets import DataSet
from dery_cli.errors import DeryError, StaleError, UsageError
from dery_cli.io.artifacts import Workspace, made_of_the_same, open_artifact, read_record
from dery_cli.io.look import Opened
from dery_cli.io.records import Artifact, Kind, canonical_json
from dery_cli.io.schema import (
    SchemaError,
    any_text,
    boolean,
    both,
    fields,
    integer,
    list_of,
    one_of,
    optional,
    plain,
    plain_name,
)
from dery_cli.runtime.devices import PRECISIONS, Arithmetic
from dery_cli.stages.embed.config import EmbedConfig
from dery_cli.types import Donor
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.schemas import CLASSES, COUNT, CROP

if TYPE_CHECKING:
    from torch import Tensor

    from dery_cli.io.row_stream import LazyRows

EMBED_HINT = "dery embed --data SPEC"


def _one_label_an_image(data: Any) -> None:
    labels = data["labels"]
    if labels is not None and len(labels) != len(data["indices"]):
        raise SchemaError(f"has {len(data['indices'])} images and {len(labels)} labels")
    if labels and data["classes"] and max(labels) >= len(data["classes"]):
        raise SchemaError(f"has {len(data['classes'])} classes and the label {max(labels)}")
    if "bad" not in data and "batch_size" not in data:
        raise SchemaError("has no field 'batch_size'")


EMBEDDING = Kind(
    name="embedding",
    version=1,
    parents=("weights", "anatomy", "data"),
    options=fields(
        {
            "data": any_text,
            "grid": integer(1),
            "grid_samples": integer(1),
            "dtype": one_of(*EmbedConfig.DTYPES),
            "crop": CROP,
            "skip_bad": boolean,
        },
        {"precision": one_of(*PRECISIONS)},
        more=plain,
    ),
    data=both(
        fields(
            {
                "donor": plain_name,
                "nodes": integer(2),
                "indices": list_of(COUNT, least=1),
                "labels": optional(list_of(COUNT)),
                "classes": optional(CLASSES),
            },
            {
                "batch_size": integer(1),
                "dtype": one_of(*EmbedConfig.DTYPES),
                "precision": one_of(*PRECISIONS[1:]),
                "layout": one_of("contiguous", "channels_last"),
                "bad": fields(
                    {"message": any_text, "hint": optional(any_text), "node": optional(COUNT)}
                ),
            },
        ),
        _one_label_an_image,
    ),
)


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
        skip_bad: Whether broken images were left out before the choice.
        batch_size: Images a batch, the smallest of any donor's; 0 before anything is embedded.
    """

    spec: str
    indices: tuple[int, ...]
    digest: str
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None
    crop: float
    skip_bad: bool = False
    batch_size: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "indices": list(self.indices),
            "labels": None if self.labels is None else list(self.labels),
            "classes": None if self.classes is None else list(self.classes),
        }


def choose_calibration(config: EmbedConfig, data: DataSet) -> Calibration:
    """Choose and hash the calibration images, whose number is settled by now.

    Raises:
        UsageError: Fewer than 8 images.
    """
    if len(data.train) < 8:
        raise UsageError(
            f"the data '{config.data}' have {len(data.train)} training images",
            "at least 8 are needed to compare features",
        )
    labels = data.train.labels
    assert config.samples is not None
    indices = choose_samples(range(len(data.train)), labels, config.samples, config.seed)
    return Calibration(
        spec=data.spec,
        indices=indices,
        digest=fingerprint(data.train, indices),
        labels=None if labels is None else tuple(int(labels[i]) for i in indices),
        classes=data.classes,
        crop=config.crop,
        skip_bad=data.skip_bad,
    )


def embedding_artifact(donor: Donor, config: EmbedConfig, calibration: Calibration) -> Artifact:
    """The record of one donor's embedding, before its files are hashed."""
    return Artifact(
        kind=EMBEDDING,
        parents={
            "weights": donor.weights_sha256,
            "anatomy": _anatomy_hash(donor),
            "data": calibration.digest,
        },
        options={
            **config.options(),
            "data": calibration.spec,
            "skip_bad": calibration.skip_bad,
        },
        seed=config.seed,
        data={"donor": donor.name, "nodes": len(donor.anatomy.nodes), **calibration.to_json()},
    )


def finished(record: Artifact, batch_size: int, dtype: str, arithmetic: Arithmetic) -> Artifact:
    """The record of an embedding that was made with this many images a batch, computed so.

    Where a donor's features are of another type than the option says, the record tells it.
    """
    made = {
        "batch_size": batch_size,
        "precision": arithmetic.precision,
        "layout": arithmetic.layout,
    }
    other = {} if dtype == record.options["dtype"] else {"dtype": dtype}
    return dataclasses.replace(record, data={**record.data, **made, **other})


def left_out(record: Artifact, error: DeryError) -> Artifact:
    """The record of a donor whose features cannot be used; it has no files."""
    details = error.details or {}
    bad = {"message": error.message, "hint": error.hint, "node": details.get("node")}
    return dataclasses.replace(record, data={**record.data, "bad": bad})


def why_left_out(record: Artifact) -> DeryError | None:
    """The error for which ``dery embed --skip-bad`` left a donor out, or None."""
    bad = record.data.get("bad")
    if bad is None:
        return None
    return DeryError(bad["message"], bad["hint"], details={"node": bad["node"]})


def known_batch_size(path: Path, wanted: Artifact) -> int | None:
    """The batch size an earlier run came to from the same inputs, its files whole or not."""
    found = made_of_the_same(path, wanted)
    return None if found is None else found.data.get("batch_size")


def _anatomy_hash(donor: Donor) -> str:
    """Hash of a donor's nodes and of what it takes as input."""
    known = canonical_json(donor.anatomy.to_json()) + canonical_json(donor.input.to_json())
    return hashlib.sha256(known.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The embeddings of all usable donors of a zoo, from the same images.

    Args:
        zoo: The donors; those that ``dery embed --skip-bad`` left out are not among them.
        left_out: Why each other donor of the workspace's zoo was left out.
        calibration: The images.
        hashes: Content hash of each donor's embedding.
        rows: Tensors of each donor, which are read when they are sliced; a donor's file is opened
            when it is first asked for.
        options: What they were embedded with.
        seed: Of the choice of images.
    """

    zoo: Zoo
    left_out: dict[str, str]
    calibration: Calibration
    hashes: dict[str, str]
    rows: Mapping[str, Mapping[str, LazyRows]]
    options: dict[str, Any]
    seed: int | None

    @property
    def warnings(self) -> list[str]:
        """One line for each donor that is left out."""
        return [f"{name} is left out: {reason}" for name, reason in self.left_out.items()]

    def features(self, donor: str, node: int, kind: str = "feat_NC") -> LazyRows:
        """A node's stored tensor (``feat_NC``, ``feat_NGC``, ``prefix_NTC``), read when sliced."""
        return self.rows[donor][f"{node}.{kind}"]

    def whole(self, donor: str, node: int, kind: str = "feat_NC") -> Tensor:
        """The same, in memory, as float32."""
        return self.features(donor, node, kind)[:].float()


def embed_command(options: Mapping[str, Any], seed: int | None) -> str:
    """The command line that made, or would refresh, an embedding."""
    defaults = EmbedConfig(data="").options()
    words = ["dery embed --data", shlex.quote(options["data"])]
    for name, default in defaults.items():
        value = options.get(name, default)
        if name == "samples" or (name != "data" and value != default):
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join([*words, f"--seed {seed}"] if seed else words)


def read_embeddings(
    workspace: Workspace, zoo: Zoo, donors: Sequence[str] | None = None
) -> Embeddings:
    """Check and open the embeddings of every donor of the zoo.

    Donors that were left out of the embedding are left out here too.

    Raises:
        StaleError: A donor has none, or one made from other weights, images, grid or seed; or all
            were left out.
        DeryError: A file is damaged.
    """
    opened = {name: _open_embedding(workspace, zoo[name]) for name in donors or zoo.names()}
    records = {name: embedding.record for name, embedding in opened.items()}
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
                embed_command(first.options, first.seed),
            )
    bad = {name: str(why) for name, record in records.items() if (why := why_left_out(record))}
    usable = {name: record for name, record in records.items() if name not in bad}
    if not usable:
        name, reason = next(iter(bad.items()))
        raise StaleError(
            f"no donor has usable features; {name}: {reason}", "dery zoo add SPEC, then dery embed"
        )
    labels, classes = first.data["labels"], first.data["classes"]
    return Embeddings(
        zoo=Zoo(zoo[name] for name in usable),
        left_out=bad,
        calibration=Calibration(
            spec=first.options["data"],
            indices=tuple(first.data["indices"]),
            digest=first.parents["data"],
            labels=None if labels is None else tuple(labels),
            classes=None if classes is None else tuple(classes),
            crop=first.options["crop"],
            skip_bad=first.options.get("skip_bad", False),
            batch_size=min(record.data["batch_size"] for record in usable.values()),
        ),
        hashes={name: record.sha256 for name, record in usable.items()},
        rows=_Rows({name: (opened[name], zoo[name]) for name in usable}),
        options=dict(first.options),
        seed=first.seed,
    )


def _open_embedding(workspace: Workspace, donor: Donor) -> Opened:
    """A donor's embedding, made from the donor as it is now.

    Raises:
        StaleError: There is none, or it was made from something else.
        DeryError: A file is damaged.
    """
    path, missing = workspace.embedding(donor.name), f"{donor.name} has no embedding"
    record = read_record(path, EMBEDDING, missing=missing, hint=EMBED_HINT)
    hint = embed_command(record.options, record.seed)
    opened = open_artifact(path, EMBEDDING, missing=missing, hint=hint, late=True)
    parents = opened.record.parents
    if parents["weights"] != donor.weights_sha256:
        raise StaleError(f"{donor.name}'s embedding was made from other weights", hint)
    if parents["anatomy"] != _anatomy_hash(donor):
        raise StaleError(f"{donor.name}'s embedding was made at other nodes or another size", hint)
    return opened


class _Rows(Mapping[str, Mapping[str, "LazyRows"]]):
    """The tensors of each donor's embedding: those that its record promises, and no other."""

    def __init__(self, opened: Mapping[str, tuple[Opened, Donor]]) -> None:
        self._opened = opened
        self._rows: dict[str, dict[str, LazyRows]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)

    def __getitem__(self, name: str) -> dict[str, LazyRows]:
        """A donor's.

        Raises:
            DeryError: The file holds something else, or is not the same any more.
        """
        if name not in self._rows:
            self._rows[name] = _rows(*self._opened[name])
        return self._rows[name]


def _rows(opened: Opened, donor: Donor) -> dict[str, LazyRows]:
    from dery_cli.core.similarity.features import feature_specs

    options, count = opened.record.options, len(opened.record.data["indices"])
    specs = feature_specs(
        donor.anatomy.nodes,
        count,
        grid=options["grid"],
        grid_samples=options["grid_samples"],
    )
    shapes = {name: shape for name, (_, shape) in specs.items()}
    return opened.rows(f"{donor.name}.safetensors", shapes)
