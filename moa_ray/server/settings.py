"""What a deployer sets of the HTTP edge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
)

from moa_ray.runtime.records import Recorder, Retention, default_path

KEYS = "MOA_RAY_API_KEYS"
"""Environment variable with the keys that callers need."""
_KEPT = Retention()


def _off(value: object) -> object:
    return "off" if value is False else value  # YAML reads `off` so


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
    feedback: Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())] | None = None
    """File that `/v1/feedback` writes to, on the node that runs it; not given: nothing is kept of answers."""
    records: Annotated[Path | Literal["off"] | None, BeforeValidator(_off)] = None
    """SQLite file that runs are recorded in, on the gateway's node, or `off`. Not given: `$MOA_RAY_RECORDS` there, or
    `moa-ray/runs.sqlite` in its user's state folder."""
    records_days: PositiveFloat = _KEPT.days
    """Older runs are removed."""
    records_runs: PositiveInt = _KEPT.runs
    """Of more runs than these, the oldest are removed."""
    records_texts: bool = _KEPT.texts
    """Whether questions, drafts and answers are recorded; else their lengths in their place."""
    traces: AnyHttpUrl | None = None
    """Base URL of an OpenTelemetry collector that spans are sent to over HTTP, such as `http://127.0.0.1:4318`."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call from a browser; none by default, `*` for all."""

    def recorder(self) -> Recorder | None:
        """Who records runs, as the settings say; None where nobody does."""
        path = default_path() if self.records is None else None if self.records == "off" else self.records
        kept = Retention(self.records_days, self.records_runs, self.records_texts)
        return Recorder(Path(path).expanduser().absolute(), kept) if path else None
