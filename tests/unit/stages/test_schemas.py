"""Every kind of record: whatever stands in it, reading gives what the code can use, or an error.

Each record is that of a tiny workspace. Every value in it is replaced by values of other types, and
the hashes are computed anew, as somebody would do it who writes files by hand.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dery_cli.errors import DeryError
from dery_cli.io.records import Artifact, Kind, parse_record
from dery_cli.stages.assemble.costs import LatencyTable
from dery_cli.stages.assemble.store import ASSEMBLY, CANDIDATES, LATENCY, SCORES
from dery_cli.stages.embed.store import EMBEDDING, embed_command, why_left_out
from dery_cli.stages.finetune.store import RUN
from dery_cli.stages.partition.store import PARTITION, stored_partition
from dery_cli.stages.sim.store import SIMILARITY
from dery_cli.types import Anatomy, Donor, InputSpec, Layout, ModelCard, Node
from dery_cli.zoo import schemas
from dery_cli.zoo.networks import loaded
from dery_cli.zoo.registry import Zoo
from dery_cli.zoo.schemas import ZOO
from tests.unit.io.samples import sealed

SHA = hashlib.sha256(b"").hexdigest()
INPUT = InputSpec(image_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
NODES = (
    Node(index=0, name="input", layout=Layout.NCHW, shape=(3, 8, 8), grid=(8, 8)),
    Node(index=1, name="stem", layout=Layout.NCHW, shape=(4, 4, 4), grid=(4, 4), params=9, flops=9),
    Node(index=2, name="pool", layout=Layout.NC, shape=(4,), grid=(1, 1)),
)
DONOR = Donor(
    name="a",
    spec="demo/a",
    weights_sha256=SHA,
    card=ModelCard(input=INPUT, metrics={"top1": 0.5}),
    anatomy=Anatomy(nodes=NODES),
    weights="weights/a.pth",
)
BLOCK = {
    "donor": "a",
    "start": 0,
    "stop": 1,
    "stage": 0,
    "set": None,
    "spec": "demo/a",
    "weights_sha256": SHA,
    "image_size": [8, 8],
    "license": "MIT",
    "task": "digits",
    "source": "here",
}
JOINT = {
    "source": NODES[1].to_json(),
    "target": NODES[1].to_json(),
    "stitch": "linear",
    "r2": 0.5,
    "class_weight": 0.0,
    "prefix_r2": None,
    "position": None,
}
NETWORK = {
    "blocks": [BLOCK, {**BLOCK, "start": 1, "stop": 2, "stage": 1}],
    "joints": [None, JOINT],
    "input": INPUT.to_json(),
    "crop": 0.95,
    "classes": ["x", "y"],
    "end": NODES[1].to_json(),
}
COMMON = {
    "network": NETWORK,
    "params": 10,
    "flops": 10,
    "target": "demo:",
    "target_skip_bad": False,
    "split": {"fraction": 0.2, "seed": 0, "digest": SHA},
    "fitted_on": "fit",
}
SCORED = {
    "network": "a[0:1] + a[1:2]",
    "whole": False,
    "batch_norm": "as it is",
    "blocks": [["a", 0, 1], ["a", 1, 2]],
    "adapters": [False, True],
    "params": 10,
    "flops": 10,
    "program_score": 0.5,
    "latency_ns": None,
    "memory_bytes": None,
    "proxy": 0.5,
    "held_out": None,
    "held_out_loss": None,
    "r2": [None, 0.5],
}
RECORDS: list[Artifact] = [
    Artifact(kind=ZOO, data={"donors": [DONOR.to_json()]}),
    Artifact(
        kind=EMBEDDING,
        parents={"weights": SHA, "anatomy": SHA, "data": SHA},
        options={
            "data": "demo:",
            "samples": 2,
            "grid": 1,
            "grid_samples": 1,
            "batch_size": "auto",
            "dtype": "fp16",
            "crop": 0.95,
            "skip_bad": False,
        },
        seed=0,
        files={"a.safetensors": SHA},
        data={
            "donor": "a",
            "nodes": 3,
            "indices": [1, 0],
            "labels": [0, 1],
            "classes": ["x", "y"],
            "batch_size": 2,
            "bad": {"message": "m", "hint": None, "node": 1},
        },
    ),
    Artifact(
        kind=SIMILARITY,
        parents={"embedding/a": SHA},
        options={"metric": "cka", "minibatch": 4, "biased": False},
        files={"cka.safetensors": SHA},
        data={"index": [["a", 1], ["a", 2]], "directional": False},
    ),
    Artifact(
        kind=PARTITION,
        parents={"similarity": SHA},
        options={"metric": "cka", "blocks": 2},
        seed=0,
        data={
            "donors": [
                {
                    "donor": "a",
                    "cuts": [0, 1, 2],
                    "sets": [0, 1],
                    "similarity": [2.0, 1.0],
                    "forced": False,
                }
            ],
            "anchors": [
                {"set": 0, "donor": "a", "start": 0, "stop": 1},
                {"set": 1, "donor": "a", "start": 1, "stop": 2},
            ],
            "objective": 3.0,
            "upper_bound": 3.0,
            "gap": 0.0,
            "optimal": True,
            "admits_assembly": True,
        },
    ),
    Artifact(
        kind=SCORES,
        parents={"partition": SHA, "target": SHA},
        options={"target_samples": 4},
        seed=0,
        data={"gains": [["a", 0, 1, 0.5]], "joints": [[0, 1, 0.5]]},
    ),
    Artifact(
        kind=LATENCY,
        parents={"weights/a": SHA},
        options={"device": "x"},
        data={
            "units": {"a": [9, 9]},
            "heads": [[4, 1]],
            "stitches": [[0, 1], [1, 2]],
            "error": None,
        },
    ),
    Artifact(
        kind=ASSEMBLY,
        parents={"target": SHA},
        options={"target_samples": 4, "fit_samples": 4, "data": "demo:"},
        seed=0,
        files={"model.safetensors": SHA},
        data={
            **COMMON,
            "name": "a[0:1] + a[1:2]",
            "whole": False,
            "latency_ns": None,
            "memory_bytes": None,
            "input_shape": [3, 8, 8],
            "budget": "30M params",
            "batch_norm": False,
            "head": {"penalty": 0.1, "temperature": 5.0},
            "match": {"before": 0.1, "after": 0.2, "kept": True},
            "proxy": {"name": "probe", "score": 0.5},
            "held_out": None,
            "program": {
                "upper_bound": 0.5,
                "optimal": True,
                "complete": True,
                "solver": "optimal",
                "solver_agrees": True,
                "agreement": "",
                "score": 0.5,
            },
            "builds": {"scored": 2, "tried": 1},
            "learning": {
                "builds": 2,
                "rounds": 1,
                "foreseen": 0,
                "tau": None,
                "tau_interval": [None, None],
                "terms": [["stitches", -1.0]],
            },
            "licenses": {"MIT": ["a"]},
            "comparison": [{"role": "picked", **SCORED, "mean_r2": 0.5, "test_top1": 0.5}],
            "test_top1": 0.5,
        },
    ),
    Artifact(
        kind=RUN,
        parents={"network": SHA, "data": SHA, "teacher": SHA},
        options={"valid_fraction": 0.2, "start": "a"},
        seed=0,
        files={"model.safetensors": SHA},
        data={
            **COMMON,
            "start": "a",
            "best": {"step": 2, "steps": 4, "epochs": 0.5, "batch_size": 8, "valid_loss": 1.0},
            "test_top1_before": 0.1,
            "test_top1": 0.5,
            "test_loss": 1.0,
            "test_images": 100,
            "teacher": {"name": "a", "sha256": SHA, "probe_accuracy": 0.5},
        },
    ),
]
WRONG: list[Any] = [None, "../x", -1, 10**300, 1.5, True, [], [[]], {"a": 1}]


def use(record: Artifact) -> None:
    """What the code makes of a record at once."""
    uses: dict[str, Callable[[], object]] = {
        "zoo": lambda: [Donor.from_json(entry).anatomy.params(0, 1) for entry in donors(record)],
        "embedding": lambda: (embed_command(record.options, record.seed), why_left_out(record)),
        "partition": lambda: [
            stored_partition(record).block(m, k)
            for m, donor in enumerate(record.data["donors"])
            for k in range(len(donor["sets"]))
        ],
        "latency": lambda: LatencyTable.fits(record.data, Zoo([DONOR]), 2),
        "assembly": lambda: loaded_description(record),
        "run": lambda: loaded_description(record),
    }
    uses.get(record.kind.name, lambda: None)()


def donors(record: Artifact) -> Any:
    return record.data["donors"]


def loaded_description(record: Artifact) -> None:
    """Input and classes; to build the blocks takes the plugins."""
    import torch

    assert loaded(torch.nn.Identity(), record).transform.crop > 0  # type: ignore[arg-type]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested data, from the outside in."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def replaced(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    inner: Any = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return body


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind.name)
def test_no_value_anywhere_gives_anything_but_an_error(record):
    body = json.loads(record.to_bytes())
    path = Path(f"{record.kind.name}.json")
    read = parse_record(record.to_bytes(), record.kind, path, "dery again")
    use(read)
    tried = refused = 0
    for place in places({key: body[key] for key in ("parents", "options", "files", "data")}):
        for wrong in WRONG:
            raw = json.dumps(sealed(replaced(body, place, wrong))).encode()
            tried += 1
            try:
                found = parse_record(raw, record.kind, path, "dery again")
            except DeryError as error:
                refused += 1
                told = error
            else:
                use(found)
    assert f"{path} is damaged: " in told.message
    assert told.hint == "rerun: dery again"
    assert refused > tried / 2


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind.name)
def test_what_is_missing_or_not_finite_is_refused(record):
    body = json.loads(record.to_bytes())
    for key in body["data"]:
        for change in (
            lambda data, key=key: data.pop(key),
            lambda data, key=key: data.update({key: math.nan}),
        ):
            changed = copy.deepcopy(body)
            change(changed["data"])
            with contextlib.suppress(ValueError):  # no hash of what is no JSON
                changed = sealed(changed)
            raw = json.dumps(changed).encode()
            needed = key not in ("bad", "batch_size", "teacher")
            if needed or b"NaN" in raw:
                with pytest.raises(DeryError, match="is damaged"):
                    parse_record(raw, record.kind, Path("x.json"), "dery again")


@pytest.mark.parametrize(
    ("kind", "strict"), [(schemas.ASSEMBLY, ASSEMBLY), (schemas.RUN, RUN)], ids=["assembly", "run"]
)
def test_who_loads_a_network_asks_less_than_who_wrote_it(kind: Kind, strict: Kind):
    """Both ask for the same format, and what a later stage adds does not keep it from loading."""
    record = next(record for record in RECORDS if record.kind is strict)
    assert (kind.format, kind.version) == (strict.format, strict.version)
    more = {**record.data, "more": 1}
    raw = json.dumps(sealed({**json.loads(record.to_bytes()), "data": more})).encode()
    assert parse_record(raw, kind, Path("x.json"), "").data == more
    with pytest.raises(DeryError, match="has a field 'more'"):
        parse_record(raw, strict, Path("x.json"), "")


def test_the_candidates_listing():
    listed = {**SCORED, "predicted": None}
    CANDIDATES({"schema": "dery/candidates/3", "proxy": "probe", "candidates": [listed]})
