"""Many models put to the test of the plugins' contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dery_cli.errors import UsageError
from dery_cli.runtime.terminal import Terminal
from dery_cli.stages.zoo.config import CheckConfig
from dery_cli.zoo.plugin import ZOO_GROUP, ZooPlugin, find_plugin, list_models
from dery_cli.zoo.registry import Spec, parse_spec, resolve

if TYPE_CHECKING:
    from dery_cli.zoo.check import Report


def check_models(terminal: Terminal, config: CheckConfig) -> dict[str, Report]:
    """What was found out about each model, by its spec.

    Raises:
        UsageError: No such plugin or model, or nothing to check.
        BrokenPluginError: A plugin cannot be loaded or gives no names.
    """
    wanted = [parse_spec(text) for text in config.specs]
    for spec in wanted:
        resolve(spec)
    plugins = {name: find_plugin(ZOO_GROUP, name, ZooPlugin) for name in {s.plugin for s in wanted}}
    if config.all_of is not None:
        plugin = find_plugin(ZOO_GROUP, config.all_of, ZooPlugin, what="zoo plugin")
        plugins[config.all_of] = plugin
        wanted += [Spec(config.all_of, name) for name in list_models(config.all_of, plugin)]
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        raise UsageError("nothing to check", "dery zoo check SPEC..., or dery zoo check --all demo")

    from dery_cli.zoo.check import check_model  # torch, when the names are known to be right

    reports = {}
    with terminal.progress("checking models", len(wanted)) as progress:
        for spec in wanted:
            reports[str(spec)] = check_model(plugins[spec.plugin], spec.model, config.image_size)
            progress.advance()
    return reports
