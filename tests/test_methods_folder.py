"""A method is one file: a token rule, an adaptive cache and a forecaster put beside the others run and are exported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import fastdit

TOKEN_RULE = '''
"""Every other token, by turns, after a first step of all."""
import torch
from dataclasses import dataclass
from types import SimpleNamespace
from fastdit.methods.base import Method
from fastdit.tokens.active import TokenRun

class TurnsRun(TokenRun):
    def choose(self, velocity, delta, coming):
        if coming is None:
            return None
        first = (torch.arange(coming.keep) * 2 + self.run.step % 2).to(torch.int32)
        return first.expand(len(velocity), -1).contiguous()

@dataclass(frozen=True)
class Turns(Method):
    name = "Turns"
    writes = frozenset({"rows"})
    def active(self, steps, tokens):
        return [None] + [SimpleNamespace(keep=tokens // 2)] * (steps - 1)
    def begin(self, run):
        return TurnsRun(self, run)

METHOD = Turns
'''

ADAPTIVE = '''
"""Reuse everything while the latents have changed by less than a share since the last step that computed."""
from dataclasses import dataclass
from fastdit.methods.base import Method, MethodRun
from fastdit.schedules.actions import COMPUTE, KEEP, REUSE
from fastdit.schedules.plan import everywhere

class ThresholdRun(MethodRun):
    def __init__(self, method, run):
        super().__init__(method, run)
        self.seen = None
        self.chosen = []

    def actions(self, call, planned):
        latents = call.arguments.hidden_states
        near = self.seen is not None and (latents - self.seen).norm() < self.method.share * latents.norm()
        if not near:
            self.seen = latents.clone()
        self.chosen.append(near)
        flags = (REUSE if near else COMPUTE) | KEEP
        return everywhere(self.run.patched.spec, flags)

@dataclass(frozen=True)
class Threshold(Method):
    share: float = 0.5
    name = "Threshold"
    writes = frozenset({"reuse"})
    def begin(self, run):
        return ThresholdRun(self, run)

METHOD = Threshold
'''

FORECAST = '''
"""Every other step is the straight line through the last two outputs, by the sigmas."""
from dataclasses import dataclass
from fastdit.methods.base import Method, MethodRun
from fastdit.schedules.actions import COMPUTE, KEEP, REUSE
from fastdit.schedules.plan import everywhere

class LineRun(MethodRun):
    def __init__(self, method, run):
        super().__init__(method, run)
        self.nodes = {}

    def forecasts(self, call):
        return len(self.nodes.get(call.branch, ())) == 2 and self.run.step % 2 == 1

    def actions(self, call, planned):
        flags = (REUSE if self.forecasts(call) else COMPUTE) | KEEP
        return everywhere(self.run.patched.spec, flags)

    def output(self, call, sample):
        sigma = float(self.run.scheduler.sigmas[self.run.step])
        nodes = self.nodes.setdefault(call.branch, [])
        if not self.forecasts(call):
            nodes[:] = [*nodes[-1:], (sigma, sample.clone())]
            return sample
        (s0, v0), (s1, v1) = nodes
        return v1 + (v1 - v0) * ((sigma - s1) / (s1 - s0))

@dataclass(frozen=True)
class Line(Method):
    name = "Line"
    writes = frozenset({"reuse"})
    def begin(self, run):
        return LineRun(self, run)

METHOD = Line
'''

USE = """
import torch, fastdit, tiny_models
assert {"Turns", "Threshold", "Line"} <= set(fastdit.__all__), fastdit.__all__

def draw(*methods, family="sd3"):
    pipe = tiny_models.pipeline(family, torch.float64)
    handle = fastdit.patch(pipe, *methods, backend="reference")
    return tiny_models.generate(pipe, family, steps=6), handle.report(), handle

stock, _, _ = draw()
found, report, handle = draw(fastdit.Turns())
assert handle.explain(steps=6, height=8, width=16).tokens_per_step == (32, 16, 16, 16, 16, 16)
assert report.tokens_per_step == (32, 16, 16, 16, 16, 16), report
for step, mask in report.active.items():
    assert mask.reshape(1, -1)[0, (step - 1) % 2 :: 2].all()
assert not torch.equal(found, stock)

found, report, handle = draw(fastdit.Threshold())
reused = handle.last_run().methods[0].chosen
assert any(reused) and not all(reused), reused
assert report.reused == sum(reused) * report.computed // (6 - sum(reused))
same, report, _ = draw(fastdit.Threshold(share=0.0))
assert torch.equal(same, stock) and report.reused == 0

# The forecast against a plain loop over the stock pipeline's own scheduler, for one call a step and for two.
for family, calls in (("sd3", 1), ("flux-dev", 2)):
    found, report, _ = draw(fastdit.Line(), family=family)
    pipe = tiny_models.pipeline(family, torch.float64)
    nodes, count = [[] for _ in range(calls)], 0
    def plain(module, args, kwargs, output):
        global count
        step, place = divmod(count, calls)
        count += 1
        sigma = float(pipe.scheduler.sigmas[step])
        if len(nodes[place]) >= 2 and step % 2 == 1:
            (s0, v0), (s1, v1) = nodes[place][-2:]
            output[0].copy_(v1 + (v1 - v0) * ((sigma - s1) / (s1 - s0)))
        else:
            nodes[place].append((sigma, output[0].clone()))
    pipe.transformer.register_forward_hook(plain, with_kwargs=True)
    expected = tiny_models.generate(pipe, family, steps=6)
    assert count == 6 * calls
    assert torch.equal(found, expected), family
    # Steps 3 and 5 are forecasts; what no component holds is still computed.
    assert report.reused * 2 == report.computed > 0
    assert 1.3 < report.flop_speedup < 1.5, report.flop_speedup
print("all three ran")
"""


def test_three_new_files_are_three_new_methods(tmp_path):
    package = Path(fastdit.__file__).parent
    shutil.copytree(package, tmp_path / "fastdit", ignore=shutil.ignore_patterns("assets"))
    for name, text in (("turns", TOKEN_RULE), ("threshold", ADAPTIVE), ("line", FORECAST)):
        (tmp_path / "fastdit" / "methods" / f"{name}.py").write_text(text)
    use = tmp_path / "use.py"
    use.write_text(
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]\n{USE}"
    )
    done = subprocess.run([sys.executable, str(use)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all three ran" in done.stdout
