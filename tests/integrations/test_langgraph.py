"""Graphs as real LangGraphs, against a server of scripted engines."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.machinery import BuiltinImporter
from pathlib import Path
from typing import Any

import pytest

from moa_ray.client import Client
from moa_ray.errors import EngineRefused, MoARayError, QuorumNotMet, SpecError
from moa_ray.graph import Graph, from_dict
from moa_ray.integrations.langgraph import moa_graph, source
from moa_ray.server import create_app
from tests.commands import ROOT
from tests.conftest import until
from tests.http import answering
from tests.runtime.panels import SHAPES, panel, runner
from tests.server.local import LocalBackend, Served, serving
from tests.test_docs import snippets

pytest.importorskip("langgraph")

from langgraph.checkpoint.memory import InMemorySaver

QUESTION = "What is 6 times 7?"
ASKED = {"messages": [("user", QUESTION)]}


@contextmanager
def _serving(kind: str) -> Iterator[Served]:
    run, engine = runner(from_dict(SHAPES[kind]))
    backend = LocalBackend(run)
    with answering(create_app(backend)) as url:
        yield Served(url, backend, engine)


def _graph(served: Served) -> Graph:
    return served.backend.runners["panel"].graph


def _moa_graph(served: Served, **settings: Any) -> Any:
    return moa_graph(_graph(served), f"{served.url}/v1", **settings)


def _asked(served: Served) -> Counter[tuple[str, str]]:
    return Counter((call.agent, str(call.messages)) for call in served.engine.calls)


def _by_agent(served: Served) -> dict[str, int]:
    return dict(sorted(Counter(call.agent for call in served.engine.calls).items()))


def _run_file(path: Path, *arguments: str) -> str:
    command = [sys.executable, str(path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- the same as a whole run


@pytest.mark.parametrize("kind", SHAPES)
async def test_a_graph_asks_the_same_and_answers_the_same_as_a_whole_run(kind: str) -> None:
    with _serving(kind) as whole, Client(f"{whole.url}/v1") as client:
        expected, asked = client.run(QUESTION).text, _asked(whole)
    with _serving(kind) as served:
        assert _moa_graph(served).invoke(ASKED)["messages"][-1].text == expected
        assert _asked(served) == asked
    with _serving(kind) as served:
        assert (await _moa_graph(served).ainvoke(ASKED))["messages"][-1].text == expected
        assert _asked(served) == asked


@pytest.mark.parametrize("kind", SHAPES)
def test_an_exported_file_runs_as_it_stands_and_answers_the_same(kind: str, tmp_path: Path) -> None:
    with _serving(kind) as served, Client(f"{served.url}/v1") as client:
        expected = client.run(QUESTION).text
        (tmp_path / "panel.py").write_text(source(_graph(served), f"{served.url}/v1"))
        assert _run_file(tmp_path / "panel.py", QUESTION) == expected + "\n"


def test_agents_that_need_nothing_of_each_other_run_at_once() -> None:
    with serving(3, ttft_s=1.0) as served, ThreadPoolExecutor() as threads:
        running = threads.submit(_moa_graph(served).invoke, ASKED)
        until(lambda: served.engine.active == 3 or running.done())
        assert served.engine.active == 3
        running.result(timeout=60)


def test_a_conversation_goes_on_in_its_thread() -> None:
    with serving(1, replies={"chief": "Forty-two."}) as served:
        graph, thread = _moa_graph(served, checkpointer=InMemorySaver()), _thread()
        graph.invoke(ASKED, thread)
        state = graph.invoke({"messages": [("user", "Sure?")]}, thread)
        asked = [message["content"] for message in served.engine.calls[2].messages]
    assert asked == [QUESTION, "Forty-two.", "Sure?"]
    assert [message.type for message in state["messages"]] == ["human", "ai", "human", "ai"]


# ---------------------------------------------------------------- streaming


async def test_every_agents_text_comes_as_it_is_said() -> None:
    with serving(2, ttft_s=0.02, itl_s=0.05, reply_tokens=8) as served:
        pieces: dict[str, list[str]] = {}
        done: list[str] = []
        async for mode, event in _moa_graph(served).astream(ASKED, stream_mode=["messages", "updates"]):
            if mode == "messages":
                message, about = event
                pieces.setdefault(about["langgraph_node"], []).append(message.content)
            else:
                done += event
    said = {name: "".join(texts).strip() for name, texts in pieces.items()}
    assert said == dict.fromkeys(["1/a1", "1/a2", "answer"], "1 2 3 4 5 6 7 8")
    assert all(len([text for text in texts if text]) > 1 for texts in pieces.values())
    assert sorted(done[:2]) == ["1/a1", "1/a2"] and done[2:] == ["answer"]


# ---------------------------------------------------------------- failures, and going on after them


def _thread() -> dict[str, Any]:
    return {"configurable": {"thread_id": "1"}}


_STRICT = {"policy": {"quorum": 2, "retries": 0}}


@pytest.mark.parametrize("failing", ["a2", "chief"])
def test_a_run_that_failed_goes_on_with_what_is_missing(failing: str) -> None:
    fault = {"kind": "refused", "agent": failing, "times": 1}
    with serving(2, spec=_STRICT, faults=[fault], ttft_s=2.0, slowdown={"a1": 0.0}) as served:
        graph = _moa_graph(served, checkpointer=InMemorySaver())
        with pytest.raises(MoARayError):
            graph.invoke(ASKED, _thread())
        before = _by_agent(served)
        state = graph.invoke(None, _thread())
        assert state["messages"][-1].text.startswith("chief answers")
        assert before["a1"] == before[failing] == 1
        assert _by_agent(served) == {"a1": 1, "a2": 1, "chief": 1} | {failing: 2}


def test_an_agent_that_a_quorum_can_do_without_is_left_out() -> None:
    fault = {"kind": "refused", "agent": "a2"}
    policy = {"policy": {"quorum": 2, "retries": 0}}
    with serving(3, spec=policy, faults=[fault]) as served, Client(f"{served.url}/v1") as client:
        state = _moa_graph(served).invoke(ASKED)
        assert (state["texts"]["1/a2"], state["messages"][-1].text) == (None, client.run(QUESTION).text)
    with serving(3, spec=policy, faults=[fault], agents={"a2": {"required": True}}) as served:
        with pytest.raises((EngineRefused, QuorumNotMet)):
            _moa_graph(served).invoke(ASKED)
        assert "chief" not in _by_agent(served)


def test_the_graphs_retries_are_not_multiplied() -> None:
    fault = {"kind": "unavailable", "agent": "a1"}
    with serving(2, spec={"policy": {"quorum": 1, "retries": 2}}, faults=[fault]) as served:
        _moa_graph(served).invoke(ASKED)
        assert _by_agent(served) == {"a1": 1 + 2, "a2": 1, "chief": 1}


def test_a_server_that_is_away_leaves_nobody_out() -> None:
    with serving(2, spec={"policy": {"retries": 0}}) as served:
        graph = _moa_graph(served, checkpointer=InMemorySaver())
        away = moa_graph(_graph(served), "http://127.0.0.1:9/v1", checkpointer=graph.checkpointer)
        with pytest.raises(MoARayError, match="nobody answers"):
            away.invoke(ASKED, _thread())
        graph.invoke(None, _thread())
        assert _by_agent(served) == {"a1": 1, "a2": 1, "chief": 1}


KILLED = """
import sys
from langgraph.checkpoint.sqlite import SqliteSaver
from moa_ray.graph import load
from moa_ray.integrations.langgraph import moa_graph

spec, url, kept = sys.argv[1:]
with SqliteSaver.from_conn_string(kept) as checkpointer:
    graph = moa_graph(load(spec), url, checkpointer=checkpointer)
    thread = {"configurable": {"thread_id": "1"}}
    begun = graph.get_state(thread).next
    print(graph.invoke(None if begun else {"messages": [("user", "why?")]}, thread)["messages"][-1].text)
"""


@pytest.mark.parametrize("hanging", ["a2", "chief"])
def test_a_killed_run_started_again_repeats_no_call_of_an_agent_that_had_finished(hanging: str, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(KILLED)
    kept = tmp_path / "kept.sqlite"
    with serving(2, faults=[{"kind": "hang", "agent": hanging, "times": 1}]) as served:
        (tmp_path / "panel.yaml").write_text(_graph(served).spec.model_dump_json(exclude_unset=True))
        arguments = [str(tmp_path / "panel.yaml"), f"{served.url}/v1", str(kept)]
        command = [sys.executable, str(tmp_path / "run.py"), *arguments]
        with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
            until(lambda: _by_agent(served).get(hanging) == 1 and _texts(kept) >= (1 if hanging == "a2" else 2))
            process.send_signal(signal.SIGKILL)
        served.until_idle()
        assert _run_file(tmp_path / "run.py", *arguments).startswith("chief answers")
        assert _by_agent(served) == {"a1": 1, "a2": 1, "chief": 1} | {hanging: 2}


def _texts(kept: Path) -> int:
    """How many agents' texts are in the file."""
    if not kept.exists():
        return 0
    with closing(sqlite3.connect(f"file:{kept}?mode=ro", uri=True)) as database:
        try:
            return int(database.execute("select count(*) from writes where channel = 'texts'").fetchone()[0])
        except sqlite3.OperationalError:  # it is being set up
            return 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["messages", "texts"])
def test_a_node_with_a_name_of_the_states_is_refused(name: str) -> None:
    agents = {each: {"engine": "script"} for each in ("a", "chief")}
    graph = from_dict({**SHAPES["nodes"], "agents": agents, "nodes": {name: {"agent": "a"}}})
    with pytest.raises(SpecError, match=rf"nodes\.{name}"):
        moa_graph(graph)


def test_without_langgraph_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "langgraph"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [BuiltinImporter])
    with pytest.raises(MoARayError, match=r"(?s)langgraph 1\.2 or newer.*pip install 'moa-ray\[langgraph\]'"):
        moa_graph(panel(1)[0].graph)


async def test_the_snippets_of_the_docs_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with serving(2) as served:
        (tmp_path / "panel.yaml").write_text(_graph(served).spec.model_dump_json(exclude_unset=True))
        found = snippets(ROOT / "docs" / "integrations" / "langgraph.md", "python")
        for text in found:
            text = text.replace("http://127.0.0.1:8000", served.url).replace("panel.yaml", str(tmp_path / "panel.yaml"))
            exec(compile(text, "langgraph.md", "exec"), {})
    assert len(found) == 2 and capsys.readouterr().out.count("chief answers") >= 3
