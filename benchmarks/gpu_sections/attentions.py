"""Attention of a share of the image tokens over all: torch's, each of its backends, and the op's."""

from __future__ import annotations

from typing import Any

import attention as forms
from fastdit.ops import sparse_attention
from gpu_sections.place import Place
from op_cases import backends
from timing import race


def attention(place: Place) -> None:
    """All models at full share before any at a lower one: full attention is what every dense step needs."""
    models = forms.TINY_MODELS if place.rehearsal else forms.MODELS
    cases = [(form, share) for share in forms.SHARES for form in models]
    place.promise([_name(form, share) for form, share in cases])
    for form, share in cases:
        place.attempt(_name(form, share), lambda form=form, share=share: _row(place, form, share))


def _name(form: forms.Attention, share: float) -> str:
    return f"{form.model}, {share:g}"


def _row(place: Place, form: forms.Attention, share: float) -> dict[str, Any]:
    q, k, v = forms.inputs(form, share, place.device, place.dtype)
    calls = forms.torch_contenders(q, k, v)
    if "triton" in backends("sparse_attention", place.device, place.dtype):
        calls["triton"] = lambda: sparse_attention(q, k, v, backend="triton")
    contenders = {name: lambda i, call=call: call() for name, call in calls.items()}
    found = race(contenders, 1, place.device, min(place.turns, 5))
    flops = form.flops(share)
    return {
        "model": form.model,
        "share": share,
        "queries": form.queries(share),
        "keys": form.keys,
        "tflop_s": {name: flops / seconds / 1e12 for name, seconds in found.seconds.items()},
        **found.asdict(),
    }
