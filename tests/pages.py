"""What users read: README and the pages that it leads to, with their commands and snippets."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGINS = (ROOT / "plugins" / "README.md").read_text()
BENCHES = (ROOT / "tests" / "bench" / "README.md").read_text()
README = (ROOT / "README.md").read_text()
PAGES = "\n".join((PLUGINS, BENCHES, README))
