"""Muon: momentum whose matrix updates are made orthogonal, for the transformer's blocks.

Only the update rule, batched over equally shaped matrices, since short training on processors
needs few, large operations. Vectors, embeddings and modulation layers belong to AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, tuned for fast growth


def orthogonalize(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """This brings the singular values of ``[n, rows, columns]`` matrices near 1 (Newton-Schulz)."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """This is momentum with orthogonal updates, scaled to the size of AdamW's.

    Parameters
    ----------
    params : iterable
        Matrices (two dimensions) only.
    lr : float
        Comparable to an AdamW rate.
    momentum : float
        Decay of the momentum; updates look ahead as Nesterov's do.
    weight_decay : float
        Decoupled, as in AdamW.
    dtype : torch.dtype
        In which updates are made orthogonal, which need not be exact; all else is float32.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """This updates all parameters; ``closure`` is not supported and must be ``None``."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                self._update(parameters, group, 0.2 * max(shape) ** 0.5)

    def _update(
        self, parameters: list[torch.nn.Parameter], group: dict[str, Any], scale: float
    ) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        updates = orthogonalize(torch.stack(list(ahead)).to(self.dtype)).float().unbind()
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-group["lr"] * scale)
