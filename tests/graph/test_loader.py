from __future__ import annotations

import copy
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moa_ray.errors import SpecError
from moa_ray.graph import load, loads

SPEC = """\
version: 1
name: panel
engines:
  smol: {kind: scripted, model: m}
  remote:
    kind: openai
    model: gpt
    api_key: ${PANEL_KEY}
    headers:
      X-Team: blue
agents:
  skeptic: {engine: smol, system: "Doubt ${nothing}.", temperature: 0.5}
  builder:
    engine: remote
    max_tokens: 20
  chief: {engine: smol}
layers:
  - [skeptic, builder]
  - [skeptic]
aggregator: chief
policy: {quorum: 1}
"""


@pytest.fixture(autouse=True)
def panel_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANEL_KEY", "sk-very-secret")


def failure(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        loads(text, file="panel.yaml")
    return caught.value


def test_a_file_is_read_with_the_line_of_every_key(tmp_path: Path) -> None:
    (tmp_path / "panel.yaml").write_text(SPEC)
    graph = load(tmp_path / "panel.yaml")
    assert [call.id for call in graph.calls] == ["1/skeptic", "1/builder", "2/skeptic"]
    assert graph.source.line(("agents", "builder", "max_tokens")) == 15
    assert graph.source.line(("layers", 1, 0)) == 19
    assert graph.source.line(("policy", "no such key")) == 21


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "says", "hint"),
    [
        ("policy:", "polcy:", 21, "polcy", "unknown key", "did you mean 'policy'?"),
        ("temperature", "temprature", 12, "agents.skeptic.temprature", "unknown key", "did you mean 'temperature'?"),
        ("max_tokens: 20", "max_tokens: many", 15, "agents.builder.max_tokens", "must be a whole number", ""),
        ("max_tokens: 20", "max_tokens: 0", 15, "agents.builder.max_tokens", "must be greater than 0, not 0", ""),
        ("0.5", "3", 12, "agents.skeptic.temperature", "must be at most 2", ""),
        ("engine: remote", "engine: remot", 14, "agents.builder.engine", "there is no engine", "mean 'remote'?"),
        ("- [skeptic]", "- [sceptic]", 19, "layers[1][0]", "there is no agent", "did you mean 'skeptic'?"),
        ("aggregator: chief", "aggregator: cheif", 20, "aggregator", "there is no agent", "did you mean 'chief'?"),
        ("- [skeptic]", "- []", 19, "layers[1]", "must not be empty", ""),
        ("- [skeptic]", "- skeptic", 19, "layers[1]", "must be a list", ""),
        ("version: 1", "version: 2", 1, "version", "must be 1", ""),
        ("name: panel", "name: a b", 2, "name", "is no name", ""),
        ("quorum: 1", "quorum: 2", 21, "policy.quorum", "2 answers can never be had", ""),
        ("{quorum: 1}", "{grace_s: 900}", 21, "policy.grace_s", "not shorter than the deadline", ""),
        ("{quorum: 1}", "{grace_s: 9, layer_deadline_s: 9}", 21, "policy.grace_s", "than the layer deadline", ""),
        ("{quorum: 1}", "{layer_deadline_s: 900}", 21, "policy.layer_deadline_s", "longer than the whole request", ""),
        ("{quorum: 1}", "{hedge: {after: p95}}", 21, "policy.hedge", "no engine has a second replica", "replicas: 2"),
        ("temperature: 0.5", "patience_s: 9", 12, "agents.skeptic.patience_s", "waits for everybody", "policy.grace_s"),
        ("temperature: 0.5", "fallbacks: [smoll]", 12, "agents.skeptic.fallbacks[0]", "no engine", "mean 'smol'?"),
        ("temperature: 0.5", "fallbacks: [smol]", 12, "agents.skeptic.fallbacks[0]", "asked already", "another engine"),
        ("aggregator: chief", "aggregator: {vote: {extrakt: x}}", 20, "aggregator.vote.extrakt", "unknown", "extract"),
        ("kind: openai", "kind: openai\n    replicas: {min: 1}", 7, "engines.remote.replicas.max", "is missing", ""),
        ("name: panel\n", "name: panel\nname: again\n", 3, "name", "stands twice, first in line 2", ""),
        ("model: gpt", "model: ${PANEL_KEY}", 7, "engines.remote.model", "for secrets only", ""),
        ("${PANEL_KEY}", "${PANEL_KEI}", 8, "engines.remote.api_key", "PANEL_KEI is not set", "export PANEL_KEI"),
        ("name: panel", "name: [panel", 3, "", "this is no YAML", ""),
        ("name: panel", "name: &a [*a]", 2, "", "an alias contains itself", ""),
        ("- [skeptic]", "- [skeptic, skeptic]", 19, "layers[1][1]", "stands twice in this layer", "samples: 2"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line_key_and_what_was_meant(
    old: str, new: str, line: int, key: str, says: str, hint: str
) -> None:
    assert old in SPEC
    error = failure(SPEC.replace(old, new, 1))
    assert (error.file, error.key) == ("panel.yaml", key)
    assert error.line == line
    assert says in error.message and hint in str(error)


def test_all_mistakes_are_told_at_once_in_the_files_order() -> None:
    error = failure(
        SPEC.replace("aggregator: chief", "aggregator: nobody").replace("engine: remote", "engine: nowhere")
    )
    first, second = error.message.splitlines()
    assert first.startswith("panel.yaml:14: agents.builder.engine: there is no engine 'nowhere'")
    assert second.startswith("panel.yaml:20: aggregator: there is no agent 'nobody'")


@pytest.mark.parametrize(("text", "says"), [("", "is empty"), ("[1]", "a mapping of keys"), ("a: \b", "no YAML")])
def test_what_is_no_spec_at_all_is_told(text: str, says: str) -> None:
    assert says in failure(text).message


def test_missing_and_unreadable_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("name: \xe9".encode("latin-1"))
    for name, says in (("missing", "there is no such file"), ("latin", "not UTF-8"), (".", "cannot be read")):
        with pytest.raises(SpecError, match=says):
            load(tmp_path / name)


def test_secrets_are_filled_in_and_never_shown() -> None:
    graph = loads(SPEC)
    options = graph.engines["remote"].options
    assert options["api_key"].get_secret_value() == "sk-very-secret"
    assert options["headers"]["X-Team"].get_secret_value() == "blue"
    assert "sk-very-secret" not in f"{graph!r} {graph.spec!r} {graph.spec.model_dump_json()}"
    assert "Doubt ${nothing}." in graph.spec.agents["skeptic"].system


def test_merge_keys_and_anchors_work() -> None:
    text = SPEC.replace("{kind: scripted, model: m}", "&s {kind: scripted, model: m}").replace(
        "  remote:", "  third: {<<: *s, model: other}\n  remote:"
    )
    graph = loads(text.replace("chief: {engine: smol}", "chief: {engine: third}"))
    assert (graph.engines["third"].kind, graph.engines["third"].model) == ("scripted", "other")


# ---------------------------------------------------------------- any mutation is either a graph or a SpecError

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=True),
    st.text(string.printable, max_size=8),
    st.sampled_from(["skeptic", "chief", "smol", "all", "${PANEL_KEY}"]),
    st.just([]),
    st.just({}),
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in items for deeper in _paths(item, (*path, key)))]


@given(st.data())
def test_no_mutation_of_a_spec_breaks_the_loader(data: st.DataObject) -> None:
    spec = yaml.safe_load(SPEC)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(_paths(spec)[1:]))
        parent = spec
        for part in path[:-1]:
            parent = parent[part]
        if data.draw(st.booleans()):
            parent[path[-1]] = copy.deepcopy(data.draw(_scalars))
        elif isinstance(parent, dict):
            parent[data.draw(st.text(string.ascii_letters + "_.-", max_size=8))] = parent.pop(path[-1])
        else:
            parent.pop()
        if not _paths(spec)[1:]:
            break
    try:
        loads(yaml.safe_dump(spec, allow_unicode=True), file="panel.yaml")
    except SpecError as error:
        assert error.file == "panel.yaml" and error.message.strip()
        assert "pydantic" not in str(error) and "sk-very-secret" not in str(error)


@given(st.text(max_size=200))
def test_no_text_breaks_the_loader(text: str) -> None:
    with pytest.raises(SpecError):
        loads(text)
