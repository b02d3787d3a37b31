"""A graph written out as a file of Prefect flows. Needs no Prefect."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterable
from hashlib import blake2b

from moa_ray.graph import Graph
from moa_ray.integrations.steps import Step, step_by_step

_SAYS_NOTHING = ("replicas", "max_ongoing_requests", "resources", "price")
"""Keys of an engine that change no answer."""


def version(graph: Graph) -> str:
    """What changes with what a graph says: answers are kept for one version of it. Secrets do not count."""
    spec = graph.spec.model_dump(mode="json", exclude={"description", "limits"})
    own = (agent["engine"] for agent in spec["agents"].values())
    for engine in [*spec["engines"].values(), *(each for each in own if isinstance(each, dict))]:
        for key in _SAYS_NOTHING:
            engine.pop(key)
    return blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=8).hexdigest()


def source(graph: Graph, server: str) -> str:
    """The text of a Python file with the flow that `moa_flow` makes, each step on lines of its own.

    Args:
        graph: The graph.
        server: Base URL of the server, `/v1` included.
    """
    steps, lost = step_by_step(graph)
    spec = graph.spec
    function = re.sub(r"\W", "_", spec.name) if spec.name[0].isalpha() else re.sub(r"\W", "_", f"graph_{spec.name}")
    if keyword.iskeyword(function) or function in _TAKEN:
        function += "_"
    return _FILE.format(
        name=spec.name,
        lost="\n".join(f"# - {line}" for line in lost),
        server=json.dumps(server),
        version=version(graph),
        function=function,
        steps="\n".join(line for step in steps for line in _step(step)),
    )


_TAKEN = {"sys", "allow_failure", "flow", "MoAServer", "ask", "publish", "seen", "question", "said", "print"}


def _step(step: Step) -> Iterable[str]:
    call = json.dumps(step.id)
    options = f"retries={step.retries}, timeout_seconds={step.timeout_s:g}"
    shown = f"seen({', '.join(['said', *map(json.dumps, step.inputs)])})" if step.inputs else "{}"
    extra = [f"needed={step.needed}"] if step.needed > 1 else []
    if step.required:
        extra.append(f"required={json.dumps(sorted(step.required))}")
    yield f"    said[{call}] = ask.with_options({options}).submit("
    yield f"        SERVER, GRAPH, {call}, question, {shown}, {', '.join([*extra, 'version=VERSION'])}"
    yield "    )"


_FILE = '''\
"""The graph {name} as a Prefect flow. Written by `moa-ray export --to prefect`, to be changed as you like."""

# Not as the graph has it:
{lost}

import sys

from prefect import flow

from moa_ray.integrations.prefect import MoAServer, ask, publish, seen

# The key: that of MOA_RAY_API_KEY, or MoAServer.load("the name of a block that you saved").
SERVER = MoAServer(url={server})
GRAPH, VERSION = "{name}", "{version}"  # answers are kept for this version: change it when the graph changes


@flow(name=GRAPH)
def {function}(question: str) -> str:
    """Answer a question."""
    said = {{}}
{steps}
    return publish(GRAPH, said)


if __name__ == "__main__":
    print({function}(sys.argv[1]))
'''
