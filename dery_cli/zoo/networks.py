"""Assemblies on disk: writing them, and loading them back to the bit.

An assembly's folder holds ``assembly.json`` (blocks, stitches, head, input: all that is needed to
build the network again), ``model.safetensors``, ``candidates.json`` and ``README.md``. A run's
folder holds the same description in ``run.json`` beside its fine-tuned ``model.safetensors``.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dery_cli.core.dissection.dissect import Dissection
from dery_cli.core.numerics import seeded
from dery_cli.core.stitching.fit import StitchFit
from dery_cli.core.stitching.network import AssembledNetwork, after_stem, ending_pool, head_inputs
from dery_cli.core.stitching.stem import Stem
from dery_cli.core.stitching.stitch import Stitch
from dery_cli.errors import DeryError, UsageError
from dery_cli.io.artifacts import open_artifact
from dery_cli.io.look import Opened
from dery_cli.io.records import Artifact, Kind, library_versions
from dery_cli.types import BlockRef, Donor, InputSpec, Node, StemKind, StitchKind
from dery_cli.zoo.found import find_record, made_by
from dery_cli.zoo.registry import Zoo, build_model, dissect_donor, parse_spec, resolve
from dery_cli.zoo.transforms import EvalTransform

MODEL_FILE = "model.safetensors"
HUB = "hf:"
"""Begins the place of a network on the Hugging Face hub."""


def describe_network(
    zoo: Zoo,
    refs: Sequence[BlockRef],
    fits: Sequence[StitchFit | None],
    *,
    classes: Sequence[str] | None,
    crop: float,
    sets: Sequence[int] | None,
    stem: StemKind = StemKind.DONOR,
) -> dict[str, Any]:
    """All that is needed to build a network again, as JSON data.

    Args:
        zoo: The donors.
        refs: Blocks in order.
        fits: How well the stitch in front of each block was fitted, None where there is none.
        classes: Class names of the head, None without a head.
        crop: Field of view of the preprocessing.
        sets: Equivalence set of each block, None for a whole model.
        stem: What the network begins with.
    """
    blocks = []
    for position, ref in enumerate(refs):
        donor = zoo[ref.donor]
        blocks.append(
            {
                "donor": ref.donor,
                "start": ref.start,
                "stop": ref.stop,
                "stage": position,
                "set": None if sets is None else sets[position],
                "spec": donor.spec,
                "weights_sha256": donor.weights_sha256,
                "image_size": list(donor.input.image_size),
                "license": donor.card.license,
                "task": donor.card.task,
                "source": donor.card.source,
            }
        )
    joints: list[dict[str, Any] | None] = []
    for position, fit in enumerate(fits):
        if fit is None:
            joints.append(None)
            continue
        before, after = refs[position - 1], refs[position]
        joints.append(
            {
                "source": zoo[before.donor].anatomy.nodes[before.stop].to_json(),
                "target": zoo[after.donor].anatomy.nodes[after.start].to_json(),
                "stitch": str(fit.kind),
                "r2": fit.r2,
                "class_weight": fit.class_weight,
                "prefix_r2": fit.prefix_r2,
                "position": fit.position,
            }
        )
    fresh = {}
    if stem is not StemKind.DONOR:
        image, first = zoo[refs[0].donor].anatomy.nodes[:2]
        fresh["stem"] = {"source": image.to_json(), "target": first.to_json()}
    return {
        **fresh,
        "blocks": blocks,
        "joints": joints,
        "input": zoo[refs[0].donor].input.to_json(),
        "crop": crop,
        "classes": None if classes is None else list(classes),
        "end": zoo[refs[-1].donor].anatomy.nodes[refs[-1].stop].to_json(),
    }


def build_network(description: Mapping[str, Any], *, seed: int = 0) -> AssembledNetwork:
    """The described network with fresh random weights, in eval mode: the donors' own initialisers.

    Raises:
        DeryError: A donor's plugin is missing, or builds another architecture than it did.
    """
    blocks: list[nn.Module] = []
    stitches: list[Stitch | None] = []
    with seeded(seed):
        for block, joint in zip(description["blocks"], description["joints"], strict=True):
            blocks.append(_fresh_block(block, behind_stem="stem" in description and not blocks))
            stitches.append(
                None
                if joint is None
                else Stitch(
                    Node.from_json(joint["source"]),
                    Node.from_json(joint["target"]),
                    StitchKind(joint["stitch"]),
                )
            )
        end = Node.from_json(description["end"])
        stem = None
        if "stem" in description:
            ends = (description["stem"][key] for key in ("source", "target"))
            stem = Stem(*map(Node.from_json, ends))
        network = AssembledNetwork(blocks, stitches, pool=ending_pool(end), stem=stem)
        classes = description["classes"]
        if classes is not None:
            network.head = nn.Linear(head_inputs(end), len(classes))
    return network.eval()


def _fresh_block(block: Mapping[str, Any], *, behind_stem: bool) -> nn.Module:
    dissection = fresh_donor(block)[1]
    if behind_stem:
        return copy.deepcopy(after_stem(dissection, block["stop"]))
    # a copy of its own: two blocks of one donor may share parameters
    return copy.deepcopy(dissection.block(block["start"], block["stop"]))


def fresh_donor(block: Mapping[str, Any]) -> tuple[nn.Module, Dissection]:
    """The donor of a described block, with random weights, and its dissection.

    Raises:
        DeryError: Its plugin is missing, or builds another architecture than it did.
    """
    try:
        spec = parse_spec(block["spec"])
        plugin, card = resolve(spec)
    except UsageError as error:
        raise DeryError(
            f"the assembly has a block of {block['spec']}: {error.message}",
            "install the plugin it came from",
        ) from error
    size = (block["image_size"][0], block["image_size"][1])
    other = None if size == card.input.image_size else size
    card = dataclasses.replace(card, input=dataclasses.replace(card.input, image_size=size))
    model = build_model(spec, plugin, pretrained=False, image_size=other)
    dissection = dissect_donor(model, card, spec, plugin)
    if block["stop"] > dissection.anatomy.num_units:
        raise DeryError(f"{spec} has no node {block['stop']} any more", "see dery zoo check")
    return model, dissection


@dataclasses.dataclass(frozen=True)
class LoadedAssembly:
    """A network from disk; unpacks as ``network, transform = load_assembly(path)``.

    Args:
        network: ``nn.Module`` in eval mode, on the CPU: images to logits (pre-logits without head).
        transform: PIL image to the normalised tensor the network takes.
        classes: Class names in the order of the logits, or None.
        record: The artifact it was read from.
    """

    network: AssembledNetwork
    transform: EvalTransform
    classes: tuple[str, ...] | None
    record: Artifact

    def __iter__(self) -> Any:
        return iter((self.network, self.transform))


def load_assembly(path: str | Path) -> LoadedAssembly:
    """Load an assembly, or a fine-tuned run, from its folder or from the Hugging Face hub.

    Neither the workspace nor the donors' weights are needed, only the plugins the donors came from.

    Args:
        path: ``.dery/assemblies/NAME``, ``.dery/runs/NAME``, a folder that ``write_timm_folder``
            wrote, or ``hf:OWNER/REPO[@REVISION]``.

    Returns:
        The network with the very parameters and buffers that were saved, and its preprocessing.

    Raises:
        StaleError: There is nothing there, or in an older format.
        DeryError: A file is missing, damaged or altered, a donor's plugin is not installed, or its
            architecture is no longer what it was; the versions that differ are named then.
        UsageError: ``hf:`` is followed by no name of a repository.

    Example:
        >>> network, transform = load_assembly(".dery/assemblies/default")
        >>> logits = network(transform(image)[None])
    """
    if isinstance(path, str) and path.startswith(HUB):
        from dery_cli.zoo.hub import fetch

        return read_network(*find_record(fetch(path.removeprefix(HUB))), hint=f"push {path} anew")
    return read_network(*find_record(Path(path)))


def read_network(record_path: Path, kind: Kind, *, hint: str | None = None) -> LoadedAssembly:
    """The network of an assembly's or a run's record; otherwise as ``load_assembly``.

    Args:
        record_path: Of the record.
        kind: Its kind.
        hint: How to make it anew; by default the command.
    """
    hint = hint or made_by(record_path, kind)
    opened = open_artifact(
        record_path,
        kind,
        missing=f"no {kind.name} in {record_path.parent}",
        hint=hint,
        only=(MODEL_FILE,),
    )
    _check_head(opened)
    try:
        network = build_network(opened.record.data["network"])
        network.load_state_dict(opened.tensors(MODEL_FILE), strict=True)
    except (RuntimeError, ValueError, MemoryError) as error:  # torch's words take many lines
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeryError(
            f"{record_path.parent / MODEL_FILE} does not fit the network: {reason}"
            f"{_names_differ(error)}{_written_by(opened.record)}",
            f"rerun: {hint}",
        ) from error
    return loaded(network, opened.record)


def _names_differ(error: Exception) -> str:
    """The first parameter that is missing or too many, where torch names it."""
    found = re.search(r"(Missing|Unexpected) key\(s\) in state_dict: \"([^\"]+)\"", str(error))
    return "" if found is None else f" ({found[1].lower()}: {found[2]})"


def _written_by(record: Artifact) -> str:
    """Which versions wrote a record, where others are installed."""
    here = library_versions()
    differ = {n: v for n, v in sorted(record.libraries.items()) if here.get(n) != v}
    if not differ:
        return ""
    wrote = ", ".join(f"{name} {version}" for name, version in differ.items())
    have = ", ".join(f"{name} {here.get(name, 'not installed')}" for name in differ)
    return f"; it was written with {wrote}, installed are {have}"


def _check_head(opened: Opened) -> None:
    """Compare the head's size with its weights, before memory is taken for it.

    Raises:
        DeryError: They differ.
    """
    network = opened.record.data["network"]
    if network["classes"] is None:
        return
    wanted = (len(network["classes"]), head_inputs(Node.from_json(network["end"])))
    found = opened.shape(MODEL_FILE, "head.weight")
    if found != wanted:
        raise DeryError(
            f"{opened.path} says that the head's shape is {wanted}, its weights have {found}",
            f"rerun: {opened.hint}",
        )


def loaded(network: AssembledNetwork, record: Artifact) -> LoadedAssembly:
    """A built network with what its record says of input and classes."""
    description = record.data["network"]
    classes = description["classes"]
    return LoadedAssembly(
        network=network.eval(),
        transform=EvalTransform(InputSpec.from_json(description["input"]), description["crop"]),
        classes=None if classes is None else tuple(classes),
        record=record,
    )


def licences(zoo: Zoo, refs: Sequence[BlockRef]) -> dict[str, list[str]]:
    """Donors by licence, for records and cards."""
    found: dict[str, list[str]] = {}
    for ref in refs:
        donor: Donor = zoo[ref.donor]
        names = found.setdefault(donor.card.license, [])
        if donor.name not in names:
            names.append(donor.name)
    return found
