"""Seconds from `moa-ray run` on a stopped machine to the first token of the answer: the real quickstart.

Ray, four actors and four copies of SmolLM2 start in that time. Run: `python -m benchmarks.first_token`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

SPEC = "examples/quickstart.yaml"
QUESTION = "Why is the sky blue? Answer in two sentences."


def main() -> None:
    started = time.perf_counter()
    command = [sys.executable, "-m", "moa_ray.cli", "run", SPEC, QUESTION, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready_s = first_s = 0.0
        for line in process.stdout:
            now, event = time.perf_counter() - started, json.loads(line)["event"]
            if event == "run.started":
                ready_s = now
            elif event == "answer.delta" and not first_s:
                first_s = now
        total_s = time.perf_counter() - started
    if process.returncode:
        sys.exit(process.returncode)
    print(f"{SPEC}: engines ready {ready_s:.1f} s, first answer token {first_s:.1f} s, all over {total_s:.1f} s")


if __name__ == "__main__":
    main()
