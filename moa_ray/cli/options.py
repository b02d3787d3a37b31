"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Address = Annotated[
    str | None,
    typer.Option(
        help="A running Ray cluster, host:port or auto; a local one is started where there is none.",
        envvar="RAY_ADDRESS",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, nothing else.")]
