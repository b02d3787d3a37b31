"""What the user writes: the YAML spec, its loader, the DAG that it describes, its drawings, and the prompts.

Plain Python and pydantic; imports nothing of moa-ray but `errors`.
"""

from moa_ray.graph.dag import Call, Graph
from moa_ray.graph.loader import from_dict, load, loads
from moa_ray.graph.messages import Message, conversation
from moa_ray.graph.schema import json_schema
from moa_ray.graph.source import Source
from moa_ray.graph.spec import ANSWER, RANK, Agent, EngineSpec, GraphSpec, Policy, Resources

__all__ = [
    "ANSWER",
    "RANK",
    "Agent",
    "Call",
    "EngineSpec",
    "Graph",
    "GraphSpec",
    "Message",
    "Policy",
    "Resources",
    "Source",
    "conversation",
    "from_dict",
    "json_schema",
    "load",
    "loads",
]
