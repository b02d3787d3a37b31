"""The whole path, for real: HTTP, Serve's proxy, gateway, router, engines."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import psutil
import pytest
import ray
import yaml
from pydantic import SecretStr
from ray import serve

from moa_ray.cluster import Session, operate
from moa_ray.cluster.deploy import deploy
from moa_ray.cluster.session import Listen, details_of
from moa_ray.errors import ClusterError, RequestError, ResourcesShort, SpecError
from moa_ray.gates.learned import outcomes
from moa_ray.gates.learned.file import GateFile
from moa_ray.graph import Graph, from_dict
from moa_ray.server import ServerSettings
from moa_ray.server.deployed import api_keys, application, config, http
from tests.conftest import HTTP_PORT, until
from tests.gates.learned.embedder import WIDTH, embedding

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

WHY: Any = [{"role": "user", "content": "why?"}]


def panel(*, agents: dict[str, Any] | None = None, chief: dict[str, Any] | None = None, **one: Any) -> Graph:
    """Two proposers on the engine `one`, an aggregator on the engine `two`."""
    return from_dict(
        {
            "version": 1,
            "name": "panel",
            "engines": {
                "one": {"kind": "scripted", "model": "m", **one},
                "two": {"kind": "scripted", "model": "m", **(chief or {})},
            },
            "agents": {name: {"engine": "one", **(agents or {})} for name in ("a1", "a2")}
            | {"chief": {"engine": "two"}},
            "layers": [["a1", "a2"]],
            "aggregator": "chief",
        }
    )


@contextmanager
def up(*graphs: Graph, settings: ServerSettings | None = None) -> Iterator[str]:
    """`graphs` served at a path of their own; yields the base URL."""
    app = f"app-{time.monotonic_ns()}"
    deploy(graphs, app, http=http(settings or ServerSettings()), route_prefix=f"/{app}", may_grow=True)
    try:
        yield f"http://127.0.0.1:{HTTP_PORT}/{app}"
    finally:
        serve.delete(app)


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def replicas(app: str) -> dict[str, set[str]]:
    """Ids of the running actors of each deployment."""
    return {
        name: {r["actor_id"] for r in deployment["replicas"] if r["state"] == "RUNNING"}
        for name, deployment in details_of(app)["deployments"].items()
    }


class Load:
    """Callers that ask without a pause, and what became of it."""

    def __init__(self, url: str, callers: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self._callers = callers
        self.texts: list[str] = []
        self.failures: list[Exception] = []

    def __enter__(self) -> Load:
        self._tasks = [self._pool.submit(self._ask) for _ in range(self._callers)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def _ask(self) -> None:
        with client(self._url) as caller:
            while not self._stop.is_set():
                try:
                    answer = caller.chat.completions.create(model="panel", messages=WHY)
                    self.texts.append(answer.choices[0].message.content or "")
                except openai.OpenAIError as error:
                    self.failures.append(error)

    def goes_on(self, answers: int = 10) -> None:
        """Wait until so many more answers have come."""
        wanted = len(self.texts) + answers
        until(lambda: len(self.texts) >= wanted or bool(self.failures))


@pytest.fixture(scope="module")
def shared(ray_cluster: None) -> Iterator[str]:
    """The graphs `panel` and `other` in one application, which no test changes; its base URL."""
    graph = panel(reply="{agent} says {prompt}", chief={"reply": "the end"})
    other = from_dict({**panel().spec.model_dump(exclude_unset=True), "name": "other"})
    with up(graph, other) as url:
        yield url


def test_a_graph_is_called_as_an_openai_model_and_so_is_each_agent(shared: str) -> None:
    answer = client(shared).chat.completions.create(model="panel", messages=WHY)
    assert answer.choices[0].message.content == "the end"
    stream = client(shared).chat.completions.create(model="panel/a1", messages=WHY, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a1 says why?"
    with pytest.raises(openai.NotFoundError, match="did you mean 'panel'"):
        client(shared).chat.completions.create(model="pannel", messages=WHY)
    response = httpx2.get(f"{shared}/ready")
    assert response.status_code == 200 and len(response.headers.get_list("x-request-id")) == 1


def test_several_graphs_are_several_models(shared: str) -> None:
    names = [f"{graph}{agent}" for graph in ("panel", "other") for agent in ("", "/a1", "/a2", "/chief")]
    assert [model.id for model in client(shared).models.list()] == names
    assert client(shared).chat.completions.create(model="other", messages=WHY).model == "other"


def test_what_is_not_there_cannot_be_operated(shared: str) -> None:
    with pytest.raises(RequestError, match=r"(?s)has no engine 'on'.*did you mean 'one'"):
        operate.scale(shared.rpartition("/")[2], {"on": 2})
    with pytest.raises(RequestError, match="there is no application 'nothing'"):
        operate.delete("nothing")


def test_below_a_route_prefix_a_key_is_needed_too() -> None:
    with up(panel(), settings=ServerSettings(api_keys=(SecretStr("sk-one"),))) as url:
        with pytest.raises(openai.AuthenticationError):
            client(url).chat.completions.create(model="panel", messages=WHY)
        keyed = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-one", max_retries=0)
        assert keyed.chat.completions.create(model="panel", messages=WHY).choices


def test_a_client_that_leaves_stops_every_engine() -> None:
    with up(panel(itl_s=0.01, reply_tokens=100_000, chief={"itl_s": 0.01, "reply_tokens": 100_000})) as url:
        app = url.rpartition("/")[2]

        def ongoing() -> int:
            return sum(engine.load.ongoing for engine in operate.status(app)[0].engines)

        for stream in (True, False):
            body = json.dumps({"model": "panel", "messages": WHY, "stream": stream})
            caller = HTTPConnection("127.0.0.1", HTTP_PORT)
            caller.request("POST", f"/{app}/v1/chat/completions", body, {"Content-Type": "application/json"})
            until(lambda: ongoing() == 2)
            caller.close()
            until(lambda: ongoing() == 0)


def test_a_reader_that_does_not_read_holds_no_place() -> None:
    words = 20_000
    with up(panel(chief={"reply_tokens": words})) as url, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(("127.0.0.1", HTTP_PORT))
        body = json.dumps({"model": "panel", "messages": WHY, "stream": True})
        path = f"{url.rpartition('/')[2]}/v1/chat/completions"
        head = f"POST /{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        slow.sendall(f"{head}content-type: application/json\r\n\r\n{body}".encode())
        until(lambda: 'moa_ray_requests_total{model="panel",status="200"} 1.0' in httpx2.get(f"{url}/metrics").text)
        assert "moa_ray_requests_running 0.0" in httpx2.get(f"{url}/metrics").text
        received = b"".join(iter(lambda: slow.recv(65536), b""))
    assert f"{words} ".encode() in received and b"data: [DONE]" in received


def test_scaling_one_engine_moves_nothing_else_and_loses_no_request() -> None:
    with up(panel(ttft_s=0.05, concurrency=1, chief={"reply": "the end"})) as url, Load(url, 4) as load:
        app = url.rpartition("/")[2]
        load.goes_on()
        before = replicas(app)
        operate.scale(app, {"one": 3})
        load.goes_on()
        after = replicas(app)
        assert len(after["engine.panel.one"]) == 3 and before["engine.panel.one"] < after["engine.panel.one"]
        operate.scale(app, {"panel/one": 1})
        load.goes_on()
        until(lambda: len(replicas(app)["engine.panel.one"]) == 1)
        for deployment in ("engine.panel.two", "router.panel", "gateway"):
            assert replicas(app)[deployment] == before[deployment]
    assert load.failures == [] and set(load.texts) == {"the end"}


def test_a_changed_prompt_reaches_the_agents_without_any_actor_being_restarted() -> None:
    with up(panel(), settings=ServerSettings()) as url:
        app = url.rpartition("/")[2]
        before = replicas(app)
        changed = panel(agents={"system": "Speak up.", "max_tokens": 3})
        deploy([changed], app, http=http(ServerSettings()), route_prefix=f"/{app}", may_grow=True)
        assert replicas(app) == before
        answer = client(url).chat.completions.create(model="panel/a1", messages=WHY)
        assert answer.usage and answer.usage.prompt_tokens == 5  # <system> Speak up. <user> why?
        proposals = client(url).chat.completions.create(model="panel", messages=WHY)
        assert proposals.model_extra and {
            r["completion_tokens"] for r in proposals.model_extra["moa"]["agents"][:2]
        } == {3}


def test_a_changed_engine_is_rolled_out_without_losing_a_request() -> None:
    def version(reply: str) -> Graph:
        return panel(ttft_s=0.05, replicas=2, chief={"reply": reply, "ttft_s": 0.05, "replicas": 2})

    with up(version("old")) as url, Load(url, 4) as load:
        app = url.rpartition("/")[2]
        load.goes_on()
        before = replicas(app)
        deploy([version("new")], app, http=http(ServerSettings()), route_prefix=f"/{app}", may_grow=True)
        load.texts.clear()
        load.goes_on()
        assert set(load.texts) == {"new"}
        assert replicas(app)["engine.panel.one"] == before["engine.panel.one"]
        assert replicas(app)["engine.panel.two"].isdisjoint(before["engine.panel.two"])
    assert load.failures == []


def test_a_router_that_is_killed_loses_no_request() -> None:
    with up(panel(ttft_s=0.3, chief={"reply": "the end", "ttft_s": 0.3})) as url, Load(url, 4) as load:
        app = url.rpartition("/")[2]
        load.goes_on(4)
        (router,) = [
            process
            for process in psutil.Process().children(recursive=True)
            if process.cmdline()[:1] == [f"ray::ServeReplica:{app}:router.panel"]
        ]
        router.kill()
        load.goes_on(8)
    assert load.failures == [] and set(load.texts) == {"the end"}


def test_the_status_tells_replicas_gpus_and_load() -> None:
    with up(panel(replicas=2, resources={"num_gpus": 1}, ttft_s=0.02)) as url:
        app = url.rpartition("/")[2]
        for _ in range(3):
            client(url).chat.completions.create(model="panel", messages=WHY)
        (found,) = operate.status(app)
        one, two = found.engines
        assert (found.state, found.route_prefix, one.engine, two.engine) == ("RUNNING", f"/{app}", "one", "two")
        assert (one.wanted, one.alive, one.gpus, one.queued) == (2, 2, 2, 0)
        assert (len(one.load.seconds), len(two.load.seconds)) == (6, 3)
        assert (one.load.percentile(50) or 0) >= 0.02 and one.hint == 1
        assert app in [each.app for each in operate.status()]


def test_the_status_says_how_many_replicas_the_load_asks_for() -> None:
    busy = panel(replicas={"min": 1, "max": 4, "target_ongoing_requests": 0.01}, ttft_s=0.5)
    with up(busy) as url:
        for _ in range(3):
            client(url).chat.completions.create(model="panel", messages=WHY)
        (found,) = operate.status(url.rpartition("/")[2])
        one, two = found.engines
        assert one.load.mean_ongoing >= 6 * 0.5 / 60 and one.hint == math.ceil(one.load.mean_ongoing / 0.01) > 4
        assert two.hint == 1


def test_what_is_said_of_an_answer_is_kept_whichever_gateway_gave_it(tmp_path: Path) -> None:
    kept = tmp_path / "feedback.jsonl"
    with up(panel(), settings=ServerSettings(gateways=2, feedback=kept)) as url:
        for _ in range(6):
            answer = client(url).chat.completions.create(model="panel", messages=WHY)
            said = httpx2.post(f"{url}/v1/feedback", json={"id": answer.id, "thumb": "up"})
            assert said.status_code == 200, said.text
        assert httpx2.post(f"{url}/v1/feedback", json={"id": "nobody", "thumb": "up"}).status_code == 400
    assert len(outcomes.load(kept, ("a1", "a2"), with_panel=True).questions) == 6


def gated(graph: Graph, **gate: Any) -> Graph:
    """`graph` with a gate."""
    return from_dict({**graph.spec.model_dump(mode="json"), "gate": gate})


def test_a_changed_gate_reaches_the_router_without_a_restart_and_the_status_tells_its_load() -> None:
    rules = [{"when": {"matches": "why"}, "agents": ["a2"]}]
    with up(gated(panel(), kind="rules", rules=rules)) as url:
        app = url.rpartition("/")[2]
        before = replicas(app)
        answer = client(url).chat.completions.create(model="panel", messages=WHY)
        assert [row["call"] for row in (answer.model_extra or {})["moa"]["agents"]] == ["1/a2", "answer"]
        (found,) = operate.status(app)
        (gate,) = found.gates
        assert (gate.graph, gate.kind, gate.load.requests) == ("panel", "rules", 1)
        assert gate.load.load == {"a1": 0, "a2": 1} and gate.load.max_over_mean_load == 2
        rules[0]["agents"] = ["a1"]
        graph = gated(panel(), kind="rules", rules=rules)
        deploy([graph], app, http=http(ServerSettings()), route_prefix=f"/{app}", may_grow=True)

        def asked() -> list[str]:
            changed = client(url).chat.completions.create(model="panel", messages=WHY)
            return [row["call"] for row in (changed.model_extra or {})["moa"]["agents"]]

        until(lambda: asked() == ["1/a1", "answer"])
        assert replicas(app) == before


def test_a_gate_with_a_model_has_an_actor_of_its_own_and_without_it_everybody_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moa_ray.gates.simple.Random.has_model", True)
    with up(gated(panel(), kind="random", k=1, timeout_s=5)) as url:
        app = url.rpartition("/")[2]

        def asked() -> int:
            answer = client(url).chat.completions.create(model="panel", messages=WHY)
            return len((answer.model_extra or {})["moa"]["agents"])

        assert len(replicas(app)["gate.panel"]) == 1 and asked() == 2
        (name,) = (r["actor_name"] for r in details_of(app)["deployments"]["gate.panel"]["replicas"])
        ray.kill(ray.get_actor(name, namespace="serve"))
        assert asked() in (2, 3)  # all of them, or those whom the gate that takes its place picks
        until(lambda: asked() == 2, within_s=120)  # Serve starts it anew when it gets to it


def test_a_learned_gate_that_has_no_good_file_lets_everybody_answer_until_it_has_one(tmp_path: Path) -> None:
    file = tmp_path / "gate.safetensors"

    def write(best: int) -> None:
        w_gate = np.zeros((WIDTH + 1, 2), np.float32)
        w_gate[-1, best] = 9.0
        GateFile("noisy_top_k", ("a1", "a2"), "e", {"w_gate": w_gate}).write(file)

    with embedding() as endpoint:
        gate = {"kind": "noisy_top_k", "k": 1, "file": str(file), "timeout_s": 5}
        with up(gated(panel(), **gate, embeddings={"base_url": endpoint.url, "model": "e"})) as url:

            def told() -> tuple[set[str], str]:
                answer = client(url).chat.completions.create(model="panel", messages=WHY)
                moa = (answer.model_extra or {})["moa"]
                return {row["agent"] for row in moa["agents"]}, moa["gates"][0]["failed"] or moa["gates"][0]["note"]

            everybody, why = told()
            assert everybody == {"a1", "a2", "chief"} and "there is no gate file" in why
            write(1)
            assert told() == ({"a2", "chief"}, "")
            file.write_bytes(os.urandom(400))
            chosen, why = told()
            assert chosen == {"a2", "chief"} and "cannot be read" in why
            write(0)
            assert told() == ({"a1", "chief"}, "")


def test_a_gateway_that_dies_costs_its_own_connections_alone() -> None:
    callers = 6
    with up(panel(ttft_s=0.05), settings=ServerSettings(gateways=2)) as url, Load(url, callers) as load:
        app = url.rpartition("/")[2]
        load.goes_on()
        assert len(replicas(app)["gateway"]) == 2
        pid = next(r["pid"] for r in details_of(app)["deployments"]["gateway"]["replicas"])
        os.kill(pid, signal.SIGKILL)
        load.goes_on(100)
    assert len(load.failures) <= callers
    assert set(load.texts) == {load.texts[0]}


def test_scaling_beyond_the_cluster_is_told_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_ray.cluster.deploy.PLACE_TIMEOUT_S", 5.0)
    with up(panel(resources={"num_gpus": 4})) as url:
        app = url.rpartition("/")[2]
        with pytest.raises(ResourcesShort, match="engine 'one' needs 4 GPU for each replica; the cluster has 8"):
            operate.scale(app, {"one": 3})
        assert details_of(app)["deployments"]["engine.panel.one"]["target_num_replicas"] == 1
        assert client(url).chat.completions.create(model="panel", messages=WHY).choices


def test_every_agent_with_an_engine_of_its_own_has_a_gpu_of_its_own() -> None:
    own = {"kind": "scripted", "model": "m", "resources": {"num_gpus": 1}}
    names = ("a1", "a2", "a3", "chief")
    graph = from_dict(
        {
            "version": 1,
            "name": "panel",
            "agents": {name: {"engine": own} for name in names},
            "layers": [list(names[:3])],
            "aggregator": "chief",
        }
    )
    with up(graph) as url:
        actors = [next(iter(replicas(url.rpartition("/")[2])[f"engine.panel.{name}"])) for name in names]
        table = {actor["actor_id"]: actor for actor in _actors()}
        gpus = [tuple(table[actor]["gpu_ids"]) for actor in actors]
        assert all(len(ids) == 1 for ids in gpus) and len(set(gpus)) == len(names)


def _actors() -> list[dict[str, Any]]:
    """Every engine replica with the GPUs that it was given."""
    found = []
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if "#engine." in entry["name"]:
            actor = ray.get_actor(entry["name"], namespace=entry["namespace"])
            ids = ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_accelerator_ids()["GPU"]))
            found.append({"actor_id": actor._actor_id.hex(), "gpu_ids": ids})
    return found


# ---------------------------------------------------------------- keys, and the file for `serve deploy`


def test_keys_come_from_the_environment_and_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# ours\nsk-file\n\nsk-both\n")
    monkeypatch.setenv("MOA_RAY_API_KEYS", "sk-one, sk-two,sk-both")
    assert [key.get_secret_value() for key in api_keys(tmp_path / "keys")] == ["sk-one", "sk-two", "sk-both", "sk-file"]
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(SpecError, match="holds no API key"):
        api_keys(tmp_path / "empty")
    with pytest.raises(SpecError, match="no header may have"):
        monkeypatch.setenv("MOA_RAY_API_KEYS", "schlüssel")
        api_keys()


def test_the_generated_file_builds_the_same_application(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    spec = panel().spec.model_dump(exclude_unset=True)
    settings = ServerSettings(api_keys=(SecretStr("sk-secret"),), drafts=True)
    text = config([spec], "panel", "/", Listen("0.0.0.0", 8123), settings)
    assert "sk-secret" not in text
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (app,) = schema.applications
    assert (app.import_path, schema.http_options.port) == ("moa_ray.server.deployed:application", 8123)
    with pytest.raises(SpecError, match=r"at 0\.0\.0\.0 anybody could ask"):
        application(app.args)
    monkeypatch.setenv("MOA_RAY_API_KEYS", "sk-one")
    serve.run(application(app.args), name="from-file", route_prefix="/from-file")
    try:
        caller = openai.OpenAI(base_url=f"http://127.0.0.1:{HTTP_PORT}/from-file/v1", api_key="sk-one")
        assert "reasoning" in (
            caller.chat.completions.create(model="panel", messages=WHY).choices[0].message.model_extra or {}
        )
    finally:
        serve.delete("from-file")


def test_arguments_of_the_file_that_are_wrong_are_told_by_key() -> None:
    with pytest.raises(SpecError, match="grahps"):
        application({"grahps": []})
    with pytest.raises(SpecError, match="max_queud"):
        application({"graphs": [panel().spec.model_dump(exclude_unset=True)], "server": {"max_queud": 1}})


def test_http_that_serve_answers_elsewhere_is_told() -> None:
    with pytest.raises(ClusterError, match=rf"answers at 127\.0\.0\.1:{HTTP_PORT} on this cluster, not at"):
        Session(listen=Listen(port=9))
