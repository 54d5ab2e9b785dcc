"""``dery sim``: similarity of every node of the zoo with every other."""

from __future__ import annotations

from typing import Annotated

import typer

from dery_cli.commands import _completion
from dery_cli.commands._options import (
    DeviceOption,
    Result,
    SeedOption,
    WorkspaceOption,
    command,
    open_workspace,
)
from dery_cli.runtime.terminal import Terminal
from dery_cli.sizes import parse_size
from dery_cli.stages.sim.config import SimConfig


@command
def sim(
    terminal: Terminal,
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            help="Representation similarity: cka, rbf_cka, lr, ridge, or a plugin's.",
            autocompletion=_completion.metrics,
        ),
    ] = "cka",
    minibatch: Annotated[
        int | None,
        typer.Option(
            "--minibatch",
            help="Samples a Gram matrix is built from (cka, rbf_cka); 256, or all if fewer.",
        ),
    ] = None,
    biased: Annotated[
        bool | None,
        typer.Option(
            "--biased/--unbiased",
            help="The plain HSIC estimator, or the unbiased one (cka, rbf_cka).",
            show_default="unbiased",
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth", help="RBF bandwidth over the median distance (rbf_cka); 1 by default."
        ),
    ] = None,
    projection: Annotated[
        int | None,
        typer.Option(
            "--projection", help="Random directions wide predictors are reduced to (lr); off."
        ),
    ] = None,
    penalty: Annotated[
        float | None,
        typer.Option(
            "--penalty", help="Penalty over the mean feature variance (ridge); 0.01 by default."
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option("--folds", help="Parts of the cross-validation (ridge); 5 by default."),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Bytes that may be in use at once, such as 4G.")
    ] = "4G",
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> Result:
    """Compare all nodes of all donors at once, from their embeddings.

    Adding a donor computes only its own pairs. The matrix is similarity/METRIC.safetensors, its
    index the JSON beside it; raw estimates may leave [0, 1], the programs clamp them.

    For example: dery sim --metric cka
    """
    config = SimConfig(
        metric=metric,
        minibatch=minibatch,
        biased=biased,
        bandwidth=bandwidth,
        projection=projection,
        penalty=penalty,
        folds=folds,
        memory=parse_size(memory, "--memory"),
        seed=seed,
        device=device,
    )
    space = open_workspace(workspace)
    from dery_cli.stages.sim.run import compare_zoo

    found = compare_zoo(terminal, space, config)
    pairs = found.pairs
    shown = pairs if len(pairs) <= 8 else [*pairs[:4], *pairs[-4:]]
    if shown:
        terminal.table(
            "most and least similar models (mean over nodes of the best match)",
            ["donor", "donor", "similarity"],
            [[one, other, f"{value:.3f}"] for one, other, value in shown],
        )
    return {
        "metric": found.metric,
        "nodes": found.nodes,
        "donors": found.donors,
        "pairs": [{"donors": [a, b], "similarity": value} for a, b, value in pairs],
        "sha256": found.sha256,
    }
