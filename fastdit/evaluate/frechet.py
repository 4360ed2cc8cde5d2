"""Fréchet distance between sets of pictures, on pooled features of a variational autoencoder's encoder.

The usual distance (Heusel et al. 2017, arXiv 1706.08500, eq. 6) takes its features from a network trained on
photographs, which says little of flat shapes. The encoder of the model in the package knows just these, so its last
feature map stands in: the mean and the spread of each channel over the picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH = 64


@torch.no_grad()
def features(vae: Any, pictures: np.ndarray) -> np.ndarray:
    """[n, 2 C] float64 features of pictures [n, h, w, 3], uint8 or in [0, 1]."""
    kept: list[Tensor] = []
    hook = vae.encoder.conv_act.register_forward_hook(lambda _, __, output: kept.append(output))
    found = []
    try:
        for start in range(0, len(pictures), BATCH):
            batch = torch.from_numpy(pictures[start : start + BATCH])
            batch = batch.float() / 255 if batch.dtype is torch.uint8 else batch.float()
            vae.encode(batch.permute(0, 3, 1, 2) * 2 - 1)
            maps = kept.pop().double().flatten(2)
            found.append(torch.cat([maps.mean(2), maps.std(2)], 1).numpy())
    finally:
        hook.remove()
    return np.concatenate(found)


def gaussian(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features [n, d]."""
    return rows.mean(0), np.cov(rows, rowvar=False)


def distance(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians."""
    (m1, s1), (m2, s2) = first, second
    # The square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric, are those of S1 S2.
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return float(np.sum((m1 - m2) ** 2) + np.trace(s1) + np.trace(s2) - 2 * trace)
