"""placeholder until the demo zoo is published"""

from dery_cli.commands._options import Result, command
from dery_cli.terminal import Terminal


@command
def demo(terminal: Terminal) -> Result:
    """x."""
    return {}
