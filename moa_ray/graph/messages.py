"""The one shape of a conversation in moa-ray: OpenAI's chat messages, as plain JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NotRequired, TypedDict

from moa_ray.errors import RequestError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn: `role` and `content`; the other keys only as OpenAI defines them for tools."""

    role: Role
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


def conversation(prompt: str | Iterable[Message]) -> list[Message]:
    """A prompt, or a whole conversation, as a checked list of messages.

    Raises:
        RequestError: If it is empty, has an unknown role, or does not end with somebody's
            turn that can be answered (a user's or a tool's).
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = list(prompt)
    if not messages:
        raise RequestError("the conversation is empty", hint="give at least one user message")
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise RequestError(f"message {number} has the role {message.get('role')!r}; use one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RequestError(f"message {number} has no text: 'content' must be a string")
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        raise RequestError(f"the last message is from the {last['role']}; nothing is asked")
    if not last["content"].strip():
        raise RequestError("the prompt is empty", hint="write a question")
    return messages
