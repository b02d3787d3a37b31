"""The example package, installed for real, and one whose plug-ins are broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_ray.engines import registry as engine_kinds
from moa_ray.errors import RequestError, SpecError
from moa_ray.evaluate.scorers import SCORERS, scorer
from moa_ray.gates import registry as gate_kinds
from moa_ray.graph import Graph, aggregators, agreement, load, loads, plugins
from moa_ray.runtime import AgentSkipped, AnswerDelta, GateDecided, RunFinished, Runner
from tests.commands import COMMAND, ROOT, environment
from tests.conftest import EXAMPLES
from tests.test_docs import snippets

EXAMPLE = EXAMPLES / "plugin"
LONG = "Say all of this again"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages, as pip installs them."""
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copytree(EXAMPLE, folder / "example")
    (folder / "broken").mkdir()
    (folder / "broken" / "broken_parrots.py").write_text('raise RuntimeError("the cage is open")\n')
    text = (EXAMPLE / "pyproject.toml").read_text()
    text = text.replace("moa-ray-parrots", "broken-parrots").replace("moa_ray_parrots", "broken_parrots")
    for name in ("parrot", "by_length", "longest", "brief", "opening"):
        text = text.replace(f"\n{name} = ", f"\nbroken_{name} = ")
    (folder / "broken" / "pyproject.toml").write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps", "--no-build-isolation"]
    packages = [str(folder / "example"), str(folder / "broken")]
    subprocess.run([*pip, "--target", str(folder / "site"), *packages], check=True, timeout=240)
    return folder / "site"


@pytest.fixture
def here(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both packages on this process's path, and forgotten afterwards."""
    registries = engine_kinds.KINDS, gate_kinds.KINDS, aggregators.KINDS, SCORERS, agreement.MEASURES
    for registry in registries:
        monkeypatch.setattr(registry, "_found", {})
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("moa_ray_parrots", None)
    invalidate_caches()


def command(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    env = {**environment(), "PYTHONPATH": paths, "COLUMNS": "160"}
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=180, env=env)


async def events_of(graph: Graph, question: str) -> list[object]:
    engine_kinds.check(graph)
    gate_kinds.check(graph)
    engines = {name: await engine_kinds.create(spec) for name, spec in graph.engines.items()}
    runner = Runner(graph, engines, gate=gate_kinds.for_runner(graph))
    return [event async for event in runner.stream(question)]


@pytest.mark.usefixtures("here")
async def test_a_graph_may_be_made_of_plugins_of_every_sort() -> None:
    events = await events_of(load(EXAMPLE / "parrots.yaml"), LONG)
    (end,) = [event for event in events if isinstance(event, RunFinished)]
    assert end.source == "2/cleo" and end.note == "longest took proposal 3 of 3"
    assert "".join(event.text for event in events if isinstance(event, AnswerDelta)).split() == 3 * LONG.split()
    # All open with the same word, so the second layer is skipped.
    assert {event.call for event in events if isinstance(event, AgentSkipped)} == {"2/ann", "2/bob", "2/cleo"}
    short = await events_of(load(EXAMPLE / "parrots.yaml"), "Say it")
    (decided,) = [event for event in short if isinstance(event, GateDecided)]
    (end,) = [event for event in short if isinstance(event, RunFinished)]
    assert (decided.note, end.source, end.note) == ("2 words", "2/ann", "longest took proposal 1 of 1")
    assert SCORERS.find("brief")("four", ["fives"]) == 1.0 and scorer("brief")("fives", ["four"]) == 0.0


@pytest.mark.usefixtures("here")
async def test_an_aggregator_may_write_a_text_of_its_own() -> None:
    text = (EXAMPLE / "parrots.yaml").read_text().replace("at_most: 4000", "at_most: 7")
    events = await events_of(loads(text), LONG)
    (end,) = [event for event in events if isinstance(event, RunFinished)]
    assert (end.source, end.text, end.finish_reason) == ("answer", "Say all", "stop")
    assert end.note == "longest wrote it out of 3 proposals"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: longest", "kind: longst", r"12: aggregator\.kind: there is no aggregator kind 'longst'\n.*'longest'"),
        ("at_most: 4000", "at_mots: 400", r"12: aggregator\.at_mots: unknown key\n.*'at_most'"),
        ("at_most: 4000", "at_most: 0", r"12: aggregator\.at_most: must be greater than 0, not 0"),
        ("kind: longest, at_most: 4000", "kind: broken_longest", r"12: .*RuntimeError: the cage is open"),
        ("measure: opening", "measure: openin", r"13: policy\.early_exit\.measure: .*\n.*'opening'"),
        ("measure: opening", "measure: broken_opening", r"13: .*RuntimeError: the cage is open"),
        ("kind: parrot, model: none, times: 3", "kind: broken_parrot, model: none", "5: .*the cage is open"),
        ("kind: by_length, words: 4", "kind: broken_by_length", "11: .*the cage is open"),
    ],
)
def test_a_mistake_or_a_broken_plugin_is_told_with_its_line(old: str, new: str, message: str) -> None:
    text = (EXAMPLE / "parrots.yaml").read_text()
    assert old in text
    with pytest.raises(SpecError, match=message):
        graph = loads(text.replace(old, new), file="parrots.yaml")
        engine_kinds.check(graph)
        gate_kinds.check(graph)


class _Half(aggregators.Aggregator):
    """Lacks what it is for."""


@pytest.mark.parametrize(
    ("made", "message"), [(len, "'joined' is no subclass of"), (_Half, "abstract")], ids=["function", "half"]
)
def test_an_aggregator_of_the_wrong_shape_is_told_with_its_line(
    made: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregators.KINDS, "_built_in", {"joined": made})
    monkeypatch.setattr(aggregators.KINDS, "_found", {})
    text = (EXAMPLE / "parrots.yaml").read_text()
    spec = yaml.safe_load(text) | {"aggregator": {"kind": "joined"}, "policy": {}, "gate": {"kind": "all"}}
    with pytest.raises(SpecError, match=message) as told:
        loads(yaml.safe_dump(spec), file="g.yaml")
    assert "g.yaml:" in str(told.value) and "aggregator.kind" in str(told.value)


@pytest.mark.usefixtures("here")
def test_a_broken_scorer_is_told() -> None:
    with pytest.raises(RequestError, match=r"scorer 'broken_brief' .*RuntimeError: the cage is open"):
        scorer("broken_brief")


def test_without_its_package_an_aggregator_is_unknown() -> None:
    with pytest.raises(SpecError, match=r"there is no aggregator kind 'longest'\n  hint: there are: none"):
        load(EXAMPLE / "parrots.yaml")


def test_what_is_installed_is_listed_with_what_cannot_be_loaded_and_why(site: Path) -> None:
    done = command(site, "plugins", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = dict(zip(plugins.GROUPS, ("parrot", "by_length", "longest", "brief", "opening"), strict=True))
    loaded = {each["group"]: each["name"] for each in found if not each["error"]}
    assert loaded == names
    broken = [each for each in found if each["error"]]
    assert [each["name"] for each in broken] == [f"broken_{name}" for name in names.values()]
    assert {each["error"] for each in broken} == {"RuntimeError: the cage is open"}
    assert {(each["package"], each["version"]) for each in found} == {
        ("moa-ray-parrots", "1.0"),
        ("broken-parrots", "1.0"),
    }
    table = command(site, "plugins")
    assert table.returncode == 0
    (line,) = [line for line in table.stdout.splitlines() if line.startswith(" moa_ray.gates") and " by_length" in line]
    assert line.split() == ["moa_ray.gates", "by_length", "moa-ray-parrots", "1.0", "loaded"]
    assert table.stdout.count("the cage is open") == 5


@pytest.mark.xdist_group("ray")
def test_a_graph_of_plugins_runs_on_ray(site: Path) -> None:
    done = command(site, "run", str(EXAMPLE / "parrots.yaml"), LONG, "--json")
    assert done.returncode == 0, done.stderr
    assert " ".join(3 * LONG.split()) in done.stdout


def test_the_aggregator_of_the_docs_works() -> None:
    page = ROOT / "docs" / "plugins.md"
    names: dict[str, Any] = {}
    exec(compile(snippets(page, "python")[0], str(page), "exec"), names)
    assert names["Joined"](between=", ").aggregate(["a", "b"]) == "a, b"
    assert all(f"`{group}`" in page.read_text() for group in plugins.GROUPS)


@pytest.mark.usefixtures("here")
def test_a_plugin_goes_before_a_built_in_thing_of_its_name() -> None:
    measures: plugins.Plugins[agreement.Measure] = plugins.Plugins(
        "moa_ray.agreement", "measure of agreement", {"opening": agreement.exact}
    )
    assert measures.find("opening")(["Yes, it is", "Yes, I think"]) == 1.0
