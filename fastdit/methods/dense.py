"""Nothing is skipped: every component computes at every step. All other methods are compared with this one."""

from __future__ import annotations

from dataclasses import dataclass

from fastdit.methods.base import Method


@dataclass(frozen=True)
class Dense(Method):
    """This method runs the model as it is, on fastdit's ops; `patch` takes it when no method is given."""

    name = "Dense"


METHOD = Dense
