"""Other people's clients against our server, each as docs/serving.md shows it.

What `.venv` cannot hold beside the openai SDK of moa-ray lives in an environment of its own, `.venv-clients`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.commands import ROOT
from tests.server.local import Served, serving
from tests.test_docs import SERVING, snippets

CLIENTS = ROOT / ".venv-clients" / "bin"
ANSWER = "Air scatters blue light."


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(2, spec={"name": "quickstart"}, replies={"chief": ANSWER}) as served:
        yield served


def _run(python: Path, code: str, **environment: str) -> str:
    command = [str(python), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def _snippet(importing: str, url: str, language: str = "python") -> str:
    (text,) = [text for text in snippets(SERVING, language) if importing in text]
    return text.replace("http://127.0.0.1:8000", url)


@pytest.mark.parametrize(
    ("importing", "python", "answers"),
    [
        ("moa_ray.client", Path(sys.executable), 1),
        ("from openai", Path(sys.executable), 1),
        ("langchain_openai", CLIENTS / "python", 2),
        ("llama_index", CLIENTS / "python", 2),
    ],
)
def test_a_client_asks_as_the_docs_say(served: Served, importing: str, python: Path, answers: int) -> None:
    assert python.exists(), "`make setup` makes .venv-clients"
    assert _run(python, _snippet(importing, served.url)).count(ANSWER) >= answers


def test_the_llm_command_line_asks_as_the_docs_say(served: Served, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(_snippet("model_id: quickstart", served.url, "yaml"))
    code = "from llm.cli import cli; cli(['-m', 'quickstart', 'Why is the sky blue?'])"
    keys = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    assert _run(CLIENTS / "python", code, **keys).strip() == ANSWER


def test_langchain_passes_tools_to_the_aggregator_and_streams_its_call() -> None:
    code = """
from langchain_openai import ChatOpenAI
def look_up(word: str) -> str:
    "Look a word up."
model = ChatOpenAI(base_url="{url}/v1", api_key="none", model="panel").bind_tools([look_up])
print(model.invoke("why?").tool_calls[0]["args"])
whole = None
for chunk in model.stream("why?"):
    whole = chunk if whole is None else whole + chunk
print(whole.tool_calls[0]["name"])
"""
    with serving(2, tool_call={"name": "look_up", "arguments": {"word": "why"}}) as served:
        assert _run(CLIENTS / "python", code.replace("{url}", served.url)).split("\n")[:2] == [
            "{'word': 'why'}",
            "look_up",
        ]


async def test_the_asynchronous_openai_sdk_asks_and_streams(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        asked = {"model": "quickstart", "messages": [{"role": "user", "content": "why?"}]}
        answer = await client.chat.completions.create(**asked)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == ANSWER
        stream = await client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER
