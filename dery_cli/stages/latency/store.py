"""The files of latencies that another machine measures: what a pack lists, what it gives back.

``pack.json`` names the parts that networks of a zoo are made of, each a file; ``latency.json``,
which the script beside it writes, has the time of each. Both say what they are of.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dery_cli.errors import StaleError, UsageError
from dery_cli.io.records import json_sha256
from dery_cli.io.schema import (
    SchemaError,
    any_text,
    fields,
    integer,
    list_of,
    mapping,
    one_of,
    optional,
    plain,
    plain_name,
    sha256,
)
from dery_cli.types import Donor, Node, StitchKind
from dery_cli.zoo.registry import Zoo

PACK_SCHEMA, LATENCY_SCHEMA, VERSION = "dery/latency-pack/", "dery/latency/", 1
PACK_FORMAT, LATENCY_FORMAT = f"{PACK_SCHEMA}{VERSION}", f"{LATENCY_SCHEMA}{VERSION}"
PACK_FILE, SCRIPT_FILE, LATENCY_FILE = "pack.json", "measure.py", "latency.json"
PACK_HINT = "dery latency pack DIR, and measure.py there"
MOST_BYTES = 1 << 28
"""No file of times is larger."""

_MADE_FOR = fields(
    {
        "donors": mapping(sha256, key=plain_name),
        "stitch": one_of(*StitchKind),
        "batch_size": integer(1),
        "classes": optional(integer(1)),
    }
)
_TIME = integer(1, 1 << 53)
"""Nanoseconds; JSON's readers elsewhere are exact up to here."""
LATENCY = fields(
    {
        "schema": one_of(LATENCY_FORMAT),
        "for": _MADE_FOR,
        "measured_on": mapping(plain),
        "repeats": integer(1),
        "warmup": integer(0),
        "times_ns": mapping(_TIME),
        "networks": mapping(
            fields({"whole_ns": _TIME, "parts": list_of(any_text, least=1)}), key=plain_name
        ),
    }
)


def unit_key(donor: str, unit: int) -> str:
    """Of a donor's unit, from 0."""
    return f"unit/{donor}/{unit}"


def head_key(inputs: int) -> str:
    """Of a head."""
    return f"head/{inputs}"


def stitch_key(source: Node, target: Node) -> str:
    """Of a stitch between nodes of these shapes."""
    return f"stitch/{_shape(source)}/{_shape(target)}"


def _shape(node: Node) -> str:
    numbers = ("x".join(map(str, node.shape)), "x".join(map(str, node.grid)))
    return f"{node.layout}-{'-'.join(numbers)}-{node.num_prefix_tokens}"


def donor_sha256(donor: Donor) -> str:
    """Hash of all that the times of a donor's units follow from."""
    return json_sha256(
        {
            "weights": donor.weights_sha256,
            "input": donor.input.to_json(),
            "anatomy": donor.anatomy.to_json(),
        }
    )


def made_for(zoo: Zoo, *, kind: StitchKind, batch_size: int, classes: int | None) -> dict[str, Any]:
    """What times hold for, as both files say it."""
    return {
        "donors": {name: donor_sha256(donor) for name, donor in zoo.donors.items()},
        "stitch": str(kind),
        "batch_size": batch_size,
        "classes": classes,
    }


@dataclasses.dataclass(frozen=True)
class WholeTime:
    """A network that was measured whole, and the sum of its parts' times; nanoseconds."""

    network: str
    whole: int
    parts: int

    @property
    def error(self) -> float:
        """Of the sum, as a share of the whole."""
        return self.parts / self.whole - 1


class Times:
    """What a machine measured of the parts of a zoo's networks.

    Args:
        path: Of the file.
        data: What stands in it, checked.
    """

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path, self.data = path, data
        self._times: dict[str, int] = data["times_ns"]

    @property
    def sha256(self) -> str:
        """Of the times and what they are of."""
        return json_sha256(dict(self.data))

    def unit(self, donor: str, unit: int) -> int:
        """Nanoseconds of a donor's unit, from 0.

        Raises:
            UsageError: The file has no such entry.
        """
        return self._of(unit_key(donor, unit))

    def head(self, inputs: int) -> int:
        """Nanoseconds of a head; raises as ``unit``."""
        return self._of(head_key(inputs))

    def stitch(self, source: Node, target: Node) -> int | None:
        """Nanoseconds of a stitch; None where it was not measured."""
        return self._times.get(stitch_key(source, target))

    def _of(self, key: str) -> int:
        if key not in self._times:
            raise UsageError(f"{self.path} has no time of {key}", PACK_HINT)
        return self._times[key]

    def require(self, keys: list[str]) -> None:
        """Ask for entries.

        Raises:
            UsageError: Some are missing.
        """
        missing = [key for key in keys if key not in self._times]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UsageError(f"{self.path} has no time of {missing[0]}{others}", PACK_HINT)

    def wholes(self) -> list[WholeTime]:
        """The networks that were measured whole too.

        Raises:
            UsageError: The time of one of their parts is missing.
        """
        return [
            WholeTime(name, found["whole_ns"], sum(map(self._of, found["parts"])))
            for name, found in self.data["networks"].items()
        ]


def read_times(
    path: Path, zoo: Zoo, *, kind: StitchKind, batch_size: int, classes: int | None
) -> Times:
    """The times of a file, which must be of these donors and options.

    Raises:
        UsageError: There is no such file, it is no file of times, or one for other options.
        StaleError: It is of another zoo, or of heads of other classes.
    """
    times = Times(path, _read(path))
    wanted = made_for(zoo, kind=kind, batch_size=batch_size, classes=classes)
    found = times.data["for"]
    for option, key in (("--stitch", "stitch"), ("--latency-batch", "batch_size")):
        if found[key] != wanted[key]:
            raise UsageError(
                f"{path} has times for {option} {found[key]}, not {wanted[key]}",
                f"{option} {found[key]}, or {PACK_HINT}",
            )
    _check_donors(path, found["donors"], wanted["donors"])
    if found["classes"] != classes:
        raise StaleError(
            f"{path} has times of heads for {_classes(found['classes'])}, the target has "
            f"{_classes(classes)}",
            f"{PACK_HINT}: --classes {classes}" if classes else PACK_HINT,
        )
    return times


def _check_donors(path: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for reason, names in (
        ("lacks", sorted(wanted.keys() - found.keys())),
        ("has beside these donors", sorted(found.keys() - wanted.keys())),
        ("was made of another", sorted(n for n in wanted if found.get(n) != wanted[n])),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise StaleError(
                f"{path} holds times of another zoo: it {reason} {names[0]}{more}", PACK_HINT
            )


def _classes(count: int | None) -> str:
    return "no classes" if count is None else f"{count} classes"


def _check_version(path: Path, data: object) -> None:
    schema = data.get("schema") if isinstance(data, dict) else None
    found = re.fullmatch(LATENCY_SCHEMA + r"([0-9]{1,9})", str(schema))
    if found and found[1] != str(VERSION):
        raise UsageError(
            f"{path} is in another dery's format (format {found[1]}, this one reads {VERSION})",
            f"the same dery-cli at both ends; {PACK_HINT}",
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{path} is too large for a file of times", PACK_HINT)
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", PACK_HINT) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON file", PACK_HINT) from error
    _check_version(path, data)
    try:
        LATENCY(data)
    except SchemaError as error:
        raise UsageError(f"{path} is no file of times: {error}", PACK_HINT) from error
    return dict(data)
