"""One thin file a subcommand: options, core, artifacts, summary."""
