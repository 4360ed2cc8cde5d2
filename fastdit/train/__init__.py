"""Training what the library runs: HarmoniCa's routers, on stock pipelines."""

from fastdit.train.harmonica import HarmoniCa, Progress

__all__ = ["HarmoniCa", "Progress"]
