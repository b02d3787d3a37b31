"""The command line: typer commands over the rooms below, and how a run looks in a terminal. No logic."""
