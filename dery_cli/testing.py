"""Checks for a plugin's own tests; see ``dery_cli.zoo.check``."""

from dery_cli.zoo.check import Report, check_model, check_plugin
from dery_cli.zoo.contract import Check

__all__ = ["Check", "Report", "check_model", "check_plugin"]
