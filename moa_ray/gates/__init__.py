"""Who of a layer answers: gates over agents, behind one protocol, and a registry that finds more by entry point.

Imports `graph` and `errors`.
"""

from moa_ray.gates.protocol import Answer, Ask, Choice, Gate, Question

__all__ = ["Answer", "Ask", "Choice", "Gate", "Question"]
