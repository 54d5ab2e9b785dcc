"""What built networks came to, kept from one run to the next: it saves time and changes nothing.

One small record a figure, below ``builds/<target>/``. A figure is looked up by all that it follows
from (the network, its donors' weights, the target's images, the options of building), so that other
budgets find it too, and a killed run goes on with what it had.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from dery_cli.core.stitching.fit import StitchFit
from dery_cli.core.stitching.probe import Judgement
from dery_cli.data.samples import fingerprint
from dery_cli.io.artifacts import made_of_the_same, write_record
from dery_cli.io.records import Artifact, Kind, canonical_json, json_sha256
from dery_cli.io.schema import boolean, fields, list_of, number, optional
from dery_cli.stages.assemble.candidates import Candidate, Scored
from dery_cli.stages.assemble.costs import latency_options
from dery_cli.stages.assemble.setting import Setting
from dery_cli.training.tuned_trial import TunedTrial, trial_config
from dery_cli.types import StemKind, StitchKind
from dery_cli.zoo.plugin import PROXY_GROUP, is_built_in
from dery_cli.zoo.schemas import SCORE

_FIT = fields(
    {
        "r2": SCORE,
        "class_weight": number(),
        "prefix_r2": SCORE,
        "position": optional(boolean),
    }
)
BUILD = Kind(
    name="build",
    version=2,
    parents=("target",),
    data=fields(
        {"value": SCORE},
        {
            "fits": list_of(optional(_FIT)),
            "penalty": number(),
            "temperature": number(),
            "cross_entropy": number(),
        },
    ),
)


class Memo:
    """Figures of built networks.

    Args:
        folder: Of the target's.
        setting: What networks are built of.
        target: Hash of the target's images.
    """

    def __init__(self, folder: Path, setting: Setting, target: str) -> None:
        self._folder, self._setting, self._target = folder, setting, target

    def scored(self, candidate: Candidate, proxy: str) -> Scored | None:
        """A candidate as a proxy scored it once; None where it has to be built."""
        if not is_built_in(PROXY_GROUP, proxy):  # nobody tells when another's code changes
            return None
        found = self._find(self._wanted(candidate, self._asked(proxy)))
        if found is None or found["value"] is None:
            return None
        kind = StitchKind(self._setting.config.stitch)
        fits = tuple(None if f is None else StitchFit(kind, **f) for f in found["fits"])
        return Scored(candidate=candidate, proxy=found["value"], fits=fits)

    def keep_scored(self, scored: Scored, proxy: str) -> None:
        """Remember what ``scored`` gives back; scores that are not finite are asked for again."""
        if not is_built_in(PROXY_GROUP, proxy) or abs(scored.proxy) == float("inf"):
            return
        fits = [
            None
            if fit is None
            else {
                "r2": fit.r2,
                "class_weight": fit.class_weight,
                "prefix_r2": fit.prefix_r2,
                "position": fit.position,
            }
            for fit in scored.fits
        ]
        self._keep(
            self._wanted(scored.candidate, self._asked(proxy)),
            {"value": scored.proxy, "fits": fits},
        )

    def _asked(self, proxy: str) -> str:
        """The proxy, and for all but the probe the few images that it looks at."""
        config = self._setting.config
        few = f", {config.proxy_batches} x {config.proxy_batch_size} images"
        stand_in = self._setting.builder.stand_in
        classes = "" if stand_in is None else f", pseudo-classes {stand_in.sha256}"
        return f"proxy {proxy}{'' if proxy == 'probe' else few}{classes}"

    def trial(self, candidate: Candidate) -> Judgement | None:
        """What trying it came to; None where it has to be tried."""
        found = self._find(self._wanted(candidate, "trial"))
        if found is None or found["value"] is None:
            return None
        return Judgement(
            accuracy=found["value"],
            penalty=found["penalty"],
            temperature=found["temperature"],
            cross_entropy=found["cross_entropy"],
        )

    def keep_trial(self, candidate: Candidate, trial: Judgement) -> None:
        """Remember what trying a network came to."""
        self._keep(
            self._wanted(candidate, "trial"),
            {
                "value": trial.accuracy,
                "penalty": trial.penalty,
                "temperature": trial.temperature,
                "cross_entropy": trial.cross_entropy,
            },
        )

    def tuned(self, entry: Scored) -> TunedTrial | None:
        """What fine-tuning it for a few updates came to; None where it has to be done."""
        found = self._find(self._wanted(entry.candidate, self._tuned))
        if found is None or found["value"] is None:
            return None
        return TunedTrial(accuracy=found["value"], cross_entropy=found.get("cross_entropy"))

    def keep_tuned(self, candidate: Candidate, trial: TunedTrial) -> None:
        """Remember what a fine-tuned trial came to."""
        data = {"value": trial.accuracy}
        if trial.cross_entropy is not None:
            data["cross_entropy"] = trial.cross_entropy
        self._keep(self._wanted(candidate, self._tuned), data)

    @functools.cached_property
    def _tuned(self) -> str:
        """A short fine-tuning, by its settings; how many load images changes no number."""
        return f"tuned, {canonical_json(dataclasses.asdict(trial_config(0)))}"

    def whole_latency(self, candidate: Candidate) -> int:
        """Nanoseconds of a network as a whole: those of an earlier run, or measured and kept.

        A time is never the same twice, and the pick hangs on it.
        """
        config, target = self._setting.config, self._setting.target
        how = latency_options(
            target.device, self._setting.stitch, config.latency_batch, target.num_classes
        )
        wanted = self._wanted(candidate, f"latency, {canonical_json(how)}")
        found = self._find(wanted)
        if found is None:
            found = {"value": float(self._setting.whole_latency(candidate.refs))}
            self._keep(wanted, found)
        return int(found["value"])

    def test_top1(self, candidate: Candidate) -> float | None:
        """The accuracy on the test images; None where it has to be found."""
        found = self._find(self._wanted(candidate, self._tested))
        return None if found is None else found["value"]

    def keep_test_top1(self, candidate: Candidate, value: float) -> None:
        """Remember an accuracy on the test images."""
        self._keep(self._wanted(candidate, self._tested), {"value": value})

    @functools.cached_property
    def _tested(self) -> str:
        """What is asked of test images: a figure of these very ones."""
        test = self._setting.target.data.test
        assert test is not None
        return f"test top-1, {self._setting.config.purpose}, {fingerprint(test)}"

    def _wanted(self, candidate: Candidate, what: str) -> Artifact:
        config, zoo = self._setting.config, self._setting.zoo
        donors = sorted({ref.donor for ref in candidate.refs})
        return Artifact(
            kind=BUILD,
            parents={
                "target": self._target,
                **{f"weights/{name}": zoo[name].weights_sha256 for name in donors},
            },
            options={
                "what": what,
                "network": str(candidate),
                "blocks": [[r.donor, r.start, r.stop, r.adapter] for r in candidate.refs],
                "batch_norm": candidate.reestimated,
                "inputs": {name: zoo[name].input.to_json() for name in donors},
                "stitch": config.stitch,
                "match": config.match,
                **({} if config.stem == StemKind.DONOR else {"stem": config.stem}),
                "fit_samples": config.fit_samples,
                "target_samples": config.target_samples,
                "crop": self._setting.target.crop,
                "batch_size": self._setting.target.batch_size,
            },
            seed=config.seed,
        )

    def _path(self, wanted: Artifact) -> Path:
        key = json_sha256(
            {
                "parents": dict(wanted.parents),
                "options": dict(wanted.options),
                "seed": wanted.seed,
            }
        )
        return self._folder / f"{key[:24]}.json"

    def _find(self, wanted: Artifact) -> dict[str, Any] | None:
        found = made_of_the_same(self._path(wanted), wanted)
        return None if found is None else dict(found.data)

    def _keep(self, wanted: Artifact, data: dict[str, Any]) -> None:
        write_record(
            self._path(wanted),
            Artifact(
                kind=BUILD,
                parents=wanted.parents,
                options=wanted.options,
                seed=wanted.seed,
                data=data,
            ),
        )
