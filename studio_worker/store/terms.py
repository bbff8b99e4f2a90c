"""On which terms models are kept: how they may be fetched, which are required, how much there may be of them.

Whoever keeps them asks for the terms each time, since a reload changes them. Holds values, does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from studio_worker.models import ModelFile
from studio_worker.transfer.policy import Policy


@dataclass(frozen=True)
class Terms:
    """What the operator wants of the models folder.

    ``policy``: how patient downloads are, and which addresses they may use. ``required`` are files that are
    never removed to make room. ``budget_bytes``: how much all files together may be long; ``None`` = no
    limit.
    """

    policy: Policy
    required: tuple[ModelFile, ...] = ()
    budget_bytes: int | None = None

    def policy_for(self, url: str) -> Policy:
        """The ways for ``url``: those of offers, where the operator did not choose that address."""
        if any(file.url == url for file in self.required):
            return self.policy
        return dataclasses.replace(self.policy, networks=self.policy.offered)


AskTerms = Callable[[], Terms]


def fixed(
    policy: Policy | None = None, *, required: Iterable[ModelFile] = (), budget_bytes: int | None = None
) -> AskTerms:
    """Terms that stay what they are."""
    terms = Terms(policy or Policy(), tuple(required), budget_bytes)
    return lambda: terms
