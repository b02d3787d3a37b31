"""Feedback as a Ray Serve deployment, one for all gateways: any of them may be told of an answer that another gave."""

from __future__ import annotations

import asyncio
from pathlib import Path

from moa_ray.gates.feedback import Answered, Feedback, Judgement

_ON_ITS_WAY_S = 1.0
_LOOK_EVERY_S = 0.05


class FeedbackReplica:
    """The deployment class.

    Args:
        path: The file that judgements go to, on the node of this actor.
    """

    def __init__(self, path: Path) -> None:
        self._feedback = Feedback(path)

    async def remember(self, answered: Answered) -> None:
        """Keep an answer that may be judged."""
        self._feedback.remember(answered)

    async def judge(self, judgement: Judgement) -> None:
        """Write down what is said of one, which may still be on its way here from another gateway."""
        for _ in range(int(_ON_ITS_WAY_S / _LOOK_EVERY_S)):
            if judgement.id in self._feedback:
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        self._feedback.judge(judgement)
