"""A searched model that costs nothing: losses and costs are closed forms over the bits.

Reusing an entry saves its cost and adds its own harm to the loss of every item, so the truth is known and a search of
some generations takes a second. Attention costs more in `true-macs`, which count its products, than in `macs`.
`FakeWorkers` may die like a process that is killed.
"""

from __future__ import annotations

import os
import signal

import numpy as np

from fastdit.search.evaluator import Work, genome_of

STEPS = 5
FACTS = {
    "family": "fake",
    "kinds": [("transformer_blocks", 3, ("attn", "ff"), [(2, "ff")], {})],
    "costs": {"macs": 250.0, "true-macs": 325.0},
    "model": "fake",
    "calls": STEPS,
    "repeats": False,
    "schedulers": {"None": "FakeScheduler"},
    "samplers": {"None": "FakeScheduler 0"},
}
GENOME = genome_of(FACTS)
WORK = Work(tuple(f"prompt {i}" for i in range(6)), steps=STEPS)
HARM = np.random.default_rng(7).uniform(0.1, 1.0, (WORK.items, GENOME.size))
COST = np.tile([10.0, 10.0, 10.0, 10.0, 10.0], STEPS)
PRODUCTS = np.tile([5.0, 0.0, 5.0, 0.0, 5.0], STEPS)


class FakeWorkers:
    """Measures by closed form; counts what it is asked.

    Args:
        dies_after: Measurements after which this process is killed.
        backwards: Answer in reverse order, as other timing would.
    """

    def __init__(self, dies_after: int | None = None, backwards: bool = False) -> None:
        self.asked: list = []
        self._dies_after, self._backwards = dies_after, backwards

    def facts(self):
        return FACTS

    def run(self, tasks):
        for task in reversed(tasks) if self._backwards else tasks:
            if len(self.asked) == self._dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.asked.append(task)
            yield task, self.measure(task)

    def measure(self, task):
        if task.bits is None:
            share = task.steps / STEPS
            found = {"costs": {name: dense * share for name, dense in FACTS["costs"].items()}}
            losses = [4.0 * (1 - share)] * (task.last - task.first)
        else:
            reused = ~GENOME.effective(GENOME.from_bytes(task.bits))
            linear, products = float(COST @ ~reused), float(PRODUCTS @ ~reused)
            found = {"costs": {"macs": linear, "true-macs": linear + products}}
            losses = (HARM[task.first : task.last] @ reused).tolist()
        if task.what == "latency":
            return {**found, "latency": found["costs"]["macs"] / 1000 + len(self.asked) * 1e-6}
        return {**found, "losses": losses}

    def close(self):
        pass
