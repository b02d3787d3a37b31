"""A moa-ray model as a LangChain chat model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict
from typing import Any

from pydantic import Field, SecretStr

from moa_ray.client import Answer, AsyncClient, Client, Delta, Draft, Event, Finished
from moa_ray.integrations.asking import api_key
from moa_ray.integrations.needs import need

need("langchain_core", "langchain-core", "1.8", "langgraph")

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool


def _key() -> SecretStr | None:
    key = api_key()
    return SecretStr(key) if key else None


class ChatMoA(BaseChatModel):  # type: ignore[misc]  # LangChain is not where types are checked
    """A graph, or one of its agents, as a chat model.

    Whatever `Client.run` takes may be given to `invoke`, `stream` and `bind`: `temperature`, `tools`, `k`, `drafts` and
    so on. Every call is streamed, so that engines stop when a caller is gone. Drafts come as reasoning, and the account
    of every agent in `response_metadata["agents"]`. Errors are moa-ray's own.

    Args:
        server: The server's base URL, `/v1` included.
        model: A graph, or `graph/agent`; the server's first where not given.
        api_key: The server's key; the environment's `MOA_RAY_API_KEY` where not given.
        timeout_s: Longest silence of the server, in seconds.
        retries: Times that a request is tried again that failed before anything of its answer came.
    """

    server: str = "http://127.0.0.1:8000/v1"
    model: str | None = None
    api_key: SecretStr | None = Field(default_factory=_key)
    timeout_s: float = 600.0
    retries: int = 2

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **asked: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools for the aggregator.

        Args:
            tools: Functions, pydantic classes, LangChain's tools, or OpenAI's descriptions.
            tool_choice: Which is called: `auto`, `none`, `any`, a tool's name, or as OpenAI has it.
            asked: Whatever else `invoke` takes.
        """
        if tool_choice is not None:
            asked["tool_choice"] = _choice(tool_choice)
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **asked)

    @property
    def _llm_type(self) -> str:
        return "moa-ray"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **asked: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, **asked))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **asked: Any,
    ) -> ChatResult:
        async with aclosing(self._astream(messages, stop, **asked)) as pieces:
            return await agenerate_from_stream(pieces)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **asked: Any,
    ) -> Iterator[ChatGenerationChunk]:
        told = convert_to_openai_messages(messages)
        with Client(**self._settings) as client, closing(client.stream(told, **_with(stop, asked))) as events:
            for event in events:
                piece = ChatGenerationChunk(message=_piece(event))
                if run_manager:
                    run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **asked: Any,
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        told = convert_to_openai_messages(messages)
        async with (
            AsyncClient(**self._settings) as client,
            aclosing(client.stream(told, **_with(stop, asked))) as events,
        ):
            async for event in events:
                piece = ChatGenerationChunk(message=_piece(event))
                if run_manager:
                    await run_manager.on_llm_new_token(piece.text, chunk=piece)
                yield piece

    @property
    def _settings(self) -> dict[str, Any]:
        """A client's arguments; each call has its own, since an asynchronous one belongs to one event loop."""
        return {
            "base_url": self.server,
            "api_key": self.api_key.get_secret_value() if self.api_key else None,
            "model": self.model,
            "timeout_s": self.timeout_s,
            "retries": self.retries,
        }


def _choice(wanted: str | dict[str, Any] | bool) -> str | dict[str, Any]:
    """LangChain's way to say which tool, as OpenAI's."""
    if isinstance(wanted, bool):
        return "required" if wanted else "none"
    if isinstance(wanted, dict) or wanted in ("auto", "none", "required"):
        return wanted
    return "required" if wanted == "any" else {"type": "function", "function": {"name": wanted}}


def _with(stop: list[str] | None, asked: dict[str, Any]) -> dict[str, Any]:
    return asked | {"stop": stop} if stop else asked


def _piece(event: Event) -> AIMessageChunk:
    match event:
        case Draft(text):
            return AIMessageChunk(content="", additional_kwargs=_reasoning(text))
        case Delta(text, tool_calls):
            return AIMessageChunk(content=text, tool_call_chunks=[_tool_piece(call) for call in tool_calls])
        case Finished(answer):
            return AIMessageChunk(content="", chunk_position="last", **_account(answer))


def _tool_piece(call: dict[str, Any]) -> Any:
    function = call.get("function", {})
    return tool_call_chunk(
        name=function.get("name"), args=function.get("arguments"), id=call.get("id"), index=call.get("index")
    )


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning_content": text} if text else {}


def _account(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    return {
        "usage_metadata": {
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "input_token_details": {"cache_read": usage.cached_tokens},
            "output_token_details": {"reasoning": usage.reasoning_tokens},
        },
        "response_metadata": {
            "model_name": answer.model,
            "finish_reason": answer.finish_reason,
            "id": answer.id,
            "request_id": answer.request_id,
            "note": answer.note,
            "agents": [asdict(agent) for agent in answer.agents],
        },
    }
