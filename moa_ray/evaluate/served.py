"""The engines of all arms as Ray actors of one application, started with the first call that no cache answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moa_ray.engines.protocol import Engine
from moa_ray.errors import EngineRefused, MoARayError
from moa_ray.evaluate.cache import Cache, CachedEngine, content_of, key_of
from moa_ray.graph import EngineSpec, Graph
from moa_ray.graph.dag import build
from moa_ray.graph.source import Source
from moa_ray.graph.spec import Agent, GraphSpec

if TYPE_CHECKING:
    from moa_ray.cluster import MoA

_NAME = "eval"


class Served:
    """Engines by what they are: two arms with the same engine share its actors, and its cache.

    Args:
        graphs: The arms' graphs.
        cache: What was answered before.
        address: A running Ray cluster; a local one is started where it is None and there is none.

    Attributes:
        broken: Why they did not start; None unless that was tried.
    """

    def __init__(self, graphs: Iterable[Graph], cache: Cache, *, address: str | None = None) -> None:
        self._address = address
        self._specs: dict[str, EngineSpec] = {}
        self._engines: dict[str, CachedEngine] = {}
        self._live: dict[str, Engine] = {}
        self._moa: MoA | None = None
        self.broken: MoARayError | None = None
        for spec in (spec for graph in graphs for spec in graph.engines.values()):
            name = _name_of(spec)
            if name not in self._specs:
                self._specs[name] = spec
                self._engines[name] = CachedEngine(spec, cache, partial(self._start, name))

    def engines(self, graph: Graph) -> dict[str, CachedEngine]:
        """An engine for each name in the graph."""
        return {name: self._engines[_name_of(spec)] for name, spec in graph.engines.items()}

    async def _start(self, name: str) -> Engine:
        if self.broken:
            raise EngineRefused(self.broken.message)
        if self._moa is None:
            from moa_ray.cluster import MoA  # Ray takes a second to import

            agents = {name: Agent(engine=name) for name in self._specs}
            first = next(iter(agents))
            spec = GraphSpec(
                version=1, name=_NAME, engines=self._specs, agents=agents, layers=[list(agents)], aggregator=first
            )
            # Blocks the loop: all that is asked meanwhile waits for these engines.
            try:
                self._moa = MoA(build(spec, Source()), address=self._address)
            except MoARayError as error:
                self.broken = error
                raise EngineRefused(error.message) from error
        if name not in self._live:
            self._live[name] = self._moa.engine(name)
        return self._live[name]

    def close(self) -> None:
        """Take the actors down, and the cluster if it was started here."""
        if self._moa is not None:
            self._moa.close()
            self._moa = None


@contextmanager
def serving(graphs: Iterable[Graph], folder: Path, address: str | None = None) -> Iterator[Served]:
    """Engines of the arms' graphs with the cache in `folder`; all of it is closed at the end."""
    cache = Cache(folder)
    served = Served(graphs, cache, address=address)
    try:
        yield served
    finally:
        served.close()
        cache.close()


def _name_of(spec: EngineSpec) -> str:
    return f"e{key_of(content_of(spec))[:12]}"
