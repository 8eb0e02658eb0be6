"""On whose account a session's work is done, and with what weight."""

from __future__ import annotations

from typing import Protocol

from tinsmith.control.sessions import SessionBook
from tinsmith.types.shares import Payer


class Weights(Protocol):
    def weight_of(self, project_id: str | None) -> float:
        """Above 0; a project of weight 2 is given twice the tokens of one of weight 1 while both have work waiting.

        `None` stands for the work of a user outside any project.
        """
        ...


class Fairness:
    def __init__(self, sessions: SessionBook, weights: Weights) -> None:
        self._sessions = sessions
        self._weights = weights

    def payer(self, session_id: str, flow: str) -> Payer:
        """`flow` is the model or sampler that does the work."""
        session = self._sessions.find(session_id)
        if session is None:  # it ended so long ago that it is forgotten
            return Payer("", flow)
        return Payer(session.account, flow, self._weights.weight_of(session.project_id))
