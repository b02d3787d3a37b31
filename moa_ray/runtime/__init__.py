"""One request through one graph, in plain asyncio.

Imports `graph`, `engines`' protocol and `errors`; no Ray, no torch. It sees engines through the
`Engine` protocol only, and tells everything that happens as a stream of events.
"""

from moa_ray.runtime.events import (
    AgentCancelled,
    AgentDelta,
    AgentEvent,
    AgentFailed,
    AgentFinished,
    AgentPaused,
    AgentSkipped,
    AgentStarted,
    AgentWarmed,
    AnswerDelta,
    Event,
    GateDecided,
    LayerStarted,
    Notice,
    RunFinished,
    RunStarted,
    from_json,
    to_json,
)
from moa_ray.runtime.health import Health
from moa_ray.runtime.ledger import CallRecord, Ledger, RunResult
from moa_ray.runtime.meter import EngineLoad, GateLoad, Meter
from moa_ray.runtime.metrics import RunMetrics
from moa_ray.runtime.plan import RunOptions
from moa_ray.runtime.runner import Runner
from moa_ray.runtime.spans import RunSpans
from moa_ray.runtime.timeline import Timeline

__all__ = [
    "AgentCancelled",
    "AgentDelta",
    "AgentEvent",
    "AgentFailed",
    "AgentFinished",
    "AgentPaused",
    "AgentSkipped",
    "AgentStarted",
    "AgentWarmed",
    "AnswerDelta",
    "CallRecord",
    "EngineLoad",
    "Event",
    "GateDecided",
    "GateLoad",
    "Health",
    "LayerStarted",
    "Ledger",
    "Meter",
    "Notice",
    "RunFinished",
    "RunMetrics",
    "RunOptions",
    "RunResult",
    "RunSpans",
    "RunStarted",
    "Runner",
    "Timeline",
    "from_json",
    "to_json",
]
