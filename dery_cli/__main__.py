"""``python -m dery_cli``: the same as ``dery``."""

from dery_cli.cli import main

main()
