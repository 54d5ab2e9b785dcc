"""What a plugin's author needs; the words are those of ``dery_cli.zoo.plugin``."""

from dery_cli.zoo.plugin import (
    DATA_GROUP,
    PLUGIN_API_VERSION,
    PROXY_GROUP,
    ZOO_GROUP,
    BrokenPluginError,
    DataPlugin,
    ImageSplit,
    PluginInfo,
    Proxy,
    ZooPlugin,
    describe_plugins,
    find_plugin,
    find_proxy,
    guarded,
    list_models,
    plugin_names,
)

__all__ = [
    "DATA_GROUP",
    "PLUGIN_API_VERSION",
    "PROXY_GROUP",
    "ZOO_GROUP",
    "BrokenPluginError",
    "DataPlugin",
    "ImageSplit",
    "PluginInfo",
    "Proxy",
    "ZooPlugin",
    "describe_plugins",
    "find_plugin",
    "find_proxy",
    "guarded",
    "list_models",
    "plugin_names",
]
