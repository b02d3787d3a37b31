"""What many runs add up to, in whatever keeps counters and histograms: a consumer of their accounts.

A gateway keeps them for its `/metrics`, and each router in Ray's own metrics; the names are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from moa_ray.runtime.events import GateDecided
from moa_ray.runtime.ledger import CallRecord, Ledger

Add = Callable[..., None]
"""Called with a value, and the labels in the order in which they were named."""

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_GATE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 20)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_CALL = ("model", "layer", "agent", "engine")
_GATE = ("model", "agent")


class Keeper(Protocol):
    """What keeps metrics."""

    def counter(self, name: str, help: str, labels: Sequence[str]) -> Add:
        """Something that only grows; `_total` is added to its name where it is shown."""
        ...

    def histogram(self, name: str, help: str, labels: Sequence[str], buckets: Sequence[float]) -> Add:
        """How values are spread over `buckets`, given by their upper bounds."""
        ...


class RunMetrics:
    """Metrics of the runs of any number of graphs.

    Args:
        keeper: What keeps them.
    """

    def __init__(self, keeper: Keeper) -> None:
        count, spread = keeper.counter, keeper.histogram
        self._runs = count("moa_ray_runs", "Runs by how they ended.", ["model", "state"])
        self._seconds = spread("moa_ray_request_seconds", "Duration of a run.", ["model"], SECONDS)
        self._ttft = spread("moa_ray_ttft_seconds", "Time to the answer's first token.", ["model"], SECONDS)
        self._tokens = count("moa_ray_tokens", "Tokens by who used them.", [*_CALL, "kind"])
        self._dollars = count("moa_ray_dollars", "Dollars, of engines that have a price.", _CALL)
        self._calls = count("moa_ray_calls", "Engine calls by end.", [*_CALL, "state"])
        self._repeats = count("moa_ray_repeats", "Retries, hedges, and attempts cut off.", [*_CALL, "kind"])
        self._call_s = spread("moa_ray_call_seconds", "Duration of a call, retries elsewhere included.", _CALL, SECONDS)
        self._call_ttft = spread("moa_ray_call_ttft_seconds", "Time to a call's first token.", _CALL, SECONDS)
        self._itl = spread("moa_ray_itl_seconds", "Mean inter-token latency of a call.", _CALL, _TOKEN_SECONDS)
        self._importance = count("moa_ray_gate_importance", "Sum of the gate's weights.", _GATE)
        self._load = count("moa_ray_gate_load", "Requests that the gate gave an agent.", _GATE)
        self._gate_s = spread("moa_ray_gate_seconds", "Time that the gate took.", ["model"], _GATE_SECONDS)
        self._gate_failed = count("moa_ray_gate_failures", "Requests that went without their gate.", ["model"])

    def add(self, model: str, ledger: Ledger) -> None:
        """Book a run that is over, or that its caller left; one that never began is none."""
        if not ledger.graph:
            return
        end = ledger.end
        self._runs(1, model, "left" if end is None else "failed" if end.error else "finished")
        if end is not None and not end.error:
            self._seconds(end.t, model)
            if end.ttft_s is not None:
                self._ttft(end.ttft_s, model)
        if ledger.gate is not None:
            self._add_gate(model, ledger.gate)
        for record in ledger.records:
            self._add_call(model, record)
        for by, usage in ledger.used.items():
            who = model, str(by.layer), by.agent, by.engine
            for kind in ("retries", "hedges", "cancelled"):
                self._repeats(ledger.repeats[by, kind], *who, kind)
            self._tokens(usage.prompt_tokens, *who, "prompt")
            self._tokens(usage.cached_tokens, *who, "cached")
            self._tokens(usage.completion_tokens, *who, "completion")
        for by, dollars in ledger.spent.items():
            self._dollars(dollars, model, str(by.layer), by.agent, by.engine)

    def _add_call(self, model: str, record: CallRecord) -> None:
        who = model, str(record.layer), record.agent, record.engine
        self._calls(1, *who, "left" if record.state == "running" else record.state)
        if record.state != "finished":
            return
        self._call_s(record.seconds, *who)
        if record.ttft_s is not None:
            self._call_ttft(record.ttft_s, *who)
        if record.itl_s is not None:
            self._itl(record.itl_s, *who)

    def _add_gate(self, model: str, gate: GateDecided) -> None:
        self._gate_s(gate.seconds, model)
        if gate.failed:
            self._gate_failed(1, model)
            return
        for agent, share in gate.shares.items():
            self._importance(share, model, agent)
            self._load(1, model, agent)
