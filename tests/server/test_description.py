"""Our own OpenAPI description, held against the server by schemathesis: requests within it and beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.server.local import serving

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_no_request_within_or_beside_the_description_breaks_the_server(tmp_path: Path) -> None:
    with serving(2, spec={"name": "quickstart"}, reply="x") as served:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.url}/openapi.json"]
        command += [
            "--checks",
            CHECKS,
            "--max-examples",
            "60",
            "--mode",
            "all",
            "--request-timeout",
            "20",
            "--seed",
            "1",
        ]
        command += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "20", "--no-color"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        served.until_idle()
