"""What makes tokens, behind one protocol: scripted, llama.cpp, OpenAI-compatible endpoints, and plug-ins.

Touches `graph` and `errors`. Each engine imports its own library when it is made, not before.
"""

from moa_ray.engines.protocol import (
    Chunk,
    Engine,
    EngineInfo,
    EngineRequest,
    FinishReason,
    Sampling,
    Usage,
)
from moa_ray.engines.scripted import Fault, Scripted, ScriptedOptions

__all__ = [
    "Chunk",
    "Engine",
    "EngineInfo",
    "EngineRequest",
    "Fault",
    "FinishReason",
    "Sampling",
    "Scripted",
    "ScriptedOptions",
    "Usage",
]
