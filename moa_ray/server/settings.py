"""What a deployer sets of the HTTP edge."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, SecretStr


class ServerSettings(BaseModel):
    """How a gateway behaves. Bounds are those of one gateway replica."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    api_keys: Annotated[tuple[SecretStr, ...], Field(repr=False)] = ()
    """Keys of which a request needs one; none lets everybody in."""
    drafts: bool = False
    """Whether proposals are sent as reasoning where a request does not say."""
    max_running: PositiveInt = 256
    """Requests answered at once; more wait."""
    max_queued: NonNegativeInt = 256
    """Requests that wait; more are refused with 429."""
    queue_timeout_s: PositiveFloat = 60.0
    """Longest wait, in seconds; then 429."""
    max_body_bytes: PositiveInt = 4 * 1024 * 1024
    """Largest body of a request; more is refused with 413."""
    max_n: PositiveInt = 4
    """Largest `n` of a request: each is a run of the whole graph."""
    silence_s: PositiveFloat = 10.0
    """A stream begins after so many seconds at the latest, and is never silent for longer: comments keep it open.
    Until it begins, a failure has its own HTTP status."""
    gateways: PositiveInt = 1
    """Replicas of the gateway; one that dies costs its own connections alone."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call from a browser; none by default, `*` for all."""
