"""Skip nothing: every component computes at every step. The oracle all other methods are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from fastdit.methods.base import Method


@dataclass(frozen=True)
class Dense(Method):
    """Run the model as it is, on fastdit's ops. What `patch` uses when no method is given."""

    name = "Dense"


METHOD = Dense
