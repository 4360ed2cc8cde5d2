"""qkv_prologue on every backend and instruction set, against fp64 and against diffusers itself.

Each `check_*` takes a Runner and raises where the backend is wrong; the fault tests run the same
functions on kernels with planted faults.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdit import ops
from inputs import Guarded, Runner, Untouched, generator, misaligned, normal, poisoned
from tolerance import assert_close, assert_equal
from truth import eager_head_norm, eager_rotation, exact_head_norm, exact_rotation

NORMS = (None, "rms", "rms_rounded", "layer", "rms_across")
ACROSS = ("layer", "rms_across")


@dataclass
class Stream:
    """The arguments of one call, and what it is to write where."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    kv_heads: int
    stored: int  # S
    options: dict[str, Any] = field(default_factory=dict)  # arguments by name

    @property
    def dim(self) -> int:
        return self.q.shape[2] // self.heads

    @property
    def positions(self) -> Tensor:
        batch, tokens, _ = self.q.shape
        rows = self.options.get("rows")
        rows = torch.arange(tokens).expand(batch, tokens) if rows is None else rows
        return rows.long() + self.options.get("kv_offset", 0)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Poisoned q_out of exactly the tokens, and caches."""
        batch, tokens, _ = self.q.shape
        start = self.options.get("q_offset", 0)
        cache = (batch, self.stored, self.kv_heads, self.dim)
        q_out = poisoned((batch, start + tokens, self.heads, self.dim), self.q.dtype)
        return q_out, poisoned(cache, self.q.dtype), poisoned(cache, self.q.dtype)

    def run(self, run: Runner, outputs=None) -> tuple[Tensor, Tensor, Tensor]:
        outputs = outputs or self.outputs()
        run.qkv_prologue(self.q, self.k, self.v, *outputs, **self.options)
        return outputs

    def expected(self, norm_of, rotation) -> tuple[Tensor, ...]:
        """q, and k where there is one, [B, K, heads, d] as the functions of truth.py have them."""
        found = []
        for name, x, heads in (("q", self.q, self.heads), ("k", self.k, self.kv_heads)):
            if heads == 0:
                continue
            affine = [self.options.get(f"{name}_{part}") for part in ("weight", "bias")]
            x = norm_of(x, heads, self.options.get("norm"), *affine, self.options.get("eps", 1e-6))
            if self.options.get("cos") is not None:
                x = rotation(x, self.options["cos"], self.options["sin"], self.positions)
            found.append(x)
        return tuple(found)


def stream(
    dtype, batch=2, tokens=3, heads=4, kv_heads=2, dim=64, norm="rms", *, gaps=4, sparse=True,
    rope=True, per_batch=False, q_offset=0, kv_offset=0, index=torch.int64,
) -> Stream:  # fmt: skip
    """A random call; `gaps` rows of the caches stay unwritten behind kv_offset."""
    g = generator(batch, tokens, heads, kv_heads, dim, NORMS.index(norm), gaps)
    stored = kv_offset + tokens + gaps
    q, k, v = (normal((batch, tokens, n * dim), dtype, g) for n in (heads, kv_heads, kv_heads))
    options: dict[str, Any] = {"norm": norm, "q_offset": q_offset, "kv_offset": kv_offset}
    if sparse:
        picks = [torch.randperm(tokens + gaps, generator=g)[:tokens] for _ in range(batch)]
        options["rows"] = torch.stack(picks).sort(dim=1).values.to(index)
    if norm is not None:
        for name, n in (("q", heads), ("k", kv_heads)):
            if n == 0:
                continue
            width = n * dim if norm in ACROSS else dim
            options[f"{name}_weight"] = normal((width,), dtype, g)
            if norm == "layer":
                options[f"{name}_bias"] = normal((width,), dtype, g)
    if rope:
        shape = (batch,) if per_batch else ()
        angles = 6.3 * torch.rand((*shape, stored + 1, dim // 2), generator=g)
        options |= {"cos": angles.cos(), "sin": angles.sin()}
    return Stream(q, k, v, heads, kv_heads, stored, options)


def with_options(s: Stream, **options) -> Stream:
    return replace(s, options=s.options | options)


def gathered(store: Tensor, positions: Tensor) -> Tensor:
    return torch.stack([store[b, positions[b]] for b in range(store.shape[0])])


def compare(run: Runner, what: str, s: Stream, outputs, before=None) -> None:
    """The outputs of a call; `before` as they were, where not poisoned throughout."""
    what = f"qkv_prologue on {run.label}, {what}"
    q_out, k_cache, v_cache = outputs
    start, tokens = s.options.get("q_offset", 0), s.q.shape[1]
    before = before or s.outputs()
    found = (q_out[:, start : start + tokens], gathered(k_cache, s.positions))
    exact = s.expected(exact_head_norm, exact_rotation)
    eager = s.expected(eager_head_norm, eager_rotation)
    for name, got, truth, stock in zip("qk", found, exact, eager, strict=False):
        assert_close(f"{what}, {name}", got, truth.double(), stock)
        if run.backend.name == "reference":
            assert_equal(f"{what}, {name} against stock", got, stock)
    v = s.v.reshape(*s.v.shape[:2], s.kv_heads, s.dim)
    assert_equal(f"{what}, v", gathered(v_cache, s.positions), v)
    written = torch.arange(start, start + tokens).expand(q_out.shape[0], -1)
    for name, store, old, rows in (
        ("q_out", q_out, before[0], written),
        ("k_cache", k_cache, before[1], s.positions),
        ("v_cache", v_cache, before[2], s.positions),
    ):
        kept = torch.ones(store.shape[:2], dtype=torch.bool)
        kept.scatter_(1, rows, False)
        assert_equal(f"{what}, other rows of {name}", store[kept], old[kept])


def check_sizes(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in NORMS:
            for batch, tokens, heads, kv_heads, dim in (
                (1, 1, 1, 1, 8),
                (3, 2, 4, 4, 8),
                (2, 17, 8, 2, 64),
                (1, 2, 4, 4, 72),
                (2, 3, 8, 2, 96),
                (1, 33, 1, 1, 128),
            ):
                s = stream(dtype, batch, tokens, heads, kv_heads, dim, norm)
                compare(run, f"norm {norm}", s, s.run(run))


def check_odd_head_dims(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in (None, "rms", "layer", "rms_across"):
            for dim in (10, 12, 20, 34, 46, 80, 88, 112, 160, 250, 256):
                s = stream(dtype, 1, 2, 2, 1, dim, norm)
                compare(run, f"norm {norm}", s, s.run(run))


def check_model_heads(run: Runner) -> None:
    for dtype in run.dtypes():
        for heads, kv_heads, dim, norm in (
            (24, 24, 128, "rms"),
            (38, 38, 64, "rms_rounded"),
            (24, 8, 96, "rms_rounded"),
            (32, 8, 72, "layer"),
            (40, 40, 128, "rms_across"),
            (16, 16, 72, None),
        ):
            s = stream(dtype, 1, 2, heads, kv_heads, dim, norm)
            compare(run, f"{heads} heads", s, s.run(run))


def check_queries_alone(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in NORMS:
            for heads, dim in ((4, 64), (32, 72)):
                for sparse in (False, True):
                    s = stream(dtype, 2, 3, heads, 0, dim, norm, sparse=sparse, q_offset=1)
                    compare(run, f"{heads} heads, no keys", s, s.run(run))


def check_optional_parts(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in ("rms", "layer", "rms_across"):
            full = stream(dtype, 2, 3, 4, 2, 72, norm)
            names = [name for name in full.options if name.endswith(("weight", "bias"))]
            for given in range(2 ** len(names)):
                parts = {
                    n: full.options[n] if given >> i & 1 else None for i, n in enumerate(names)
                }
                for table in ({}, {"cos": None, "sin": None}):
                    s = with_options(full, **parts, **table, eps=1e-3)
                    compare(run, f"norm {norm}, parts {given:b}", s, s.run(run))


def check_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        for index in (torch.int64, torch.int32):
            for sparse in (False, True):
                for per_batch in (False, True):
                    for norm in ("rms", "layer"):
                        s = stream(
                            dtype, 3, 5, norm=norm, gaps=9, sparse=sparse, per_batch=per_batch,
                            q_offset=2, kv_offset=3, index=index,
                        )  # fmt: skip
                        compare(run, f"sparse {sparse}, tables {per_batch}", s, s.run(run))


def check_other_rows(run: Runner) -> None:
    """Stores that hold numbers, inside larger buffers: what is not written keeps its bits."""
    for dtype in run.dtypes():
        for norm in (None, "rms", "layer"):
            s = stream(dtype, 2, 5, 2, 1, 72, norm, gaps=6, q_offset=1, kv_offset=2)
            g = generator(1)
            before = [normal(t.shape, dtype, g) for t in s.outputs()]
            guarded = [Guarded(t) for t in before]
            affine = {n: t for n, t in s.options.items() if isinstance(t, Tensor)}
            inputs = Untouched(q=s.q, k=s.k, v=s.v, **affine)
            outputs = s.run(run, tuple(t.tensor for t in guarded))
            compare(run, f"norm {norm}", s, outputs, before)
            for t in guarded:
                t.assert_intact(f"qkv_prologue on {run.label}")
            inputs.check(f"qkv_prologue on {run.label}")


def check_strides(run: Runner) -> None:
    """Slices of a fused projection, misaligned and padded views: the same bits as plain ones."""
    for dtype in run.dtypes():
        for norm in (None, "rms", "layer"):
            for dim in (64, 72):
                plain = stream(dtype, 2, 2, 4, 2, dim, norm, kv_offset=1)
                expected = plain.run(run)
                what = f"qkv_prologue on {run.label}, norm {norm}, d {dim}"
                sizes = [t.shape[2] for t in (plain.q, plain.k, plain.v)]
                fused = torch.cat([plain.q, plain.k, plain.v], dim=2)
                s = replace(plain, **dict(zip("qkv", fused.split(sizes, dim=2), strict=True)))
                _same(f"{what}, fused", s.run(run), expected)
                for name in "qkv":
                    s = replace(plain, **{name: misaligned(getattr(plain, name))})
                    _same(f"{what}, {name} misaligned", s.run(run), expected)
                for i in range(3):
                    outputs = [misaligned(t) if j == i else t for j, t in enumerate(s.outputs())]
                    _same(f"{what}, output {i} misaligned", plain.run(run, outputs), expected)
                for name, t in plain.options.items():
                    if isinstance(t, Tensor) and name != "rows":
                        s = with_options(plain, **{name: misaligned(t)})
                        _same(f"{what}, {name} misaligned", s.run(run), expected)
                padded = [_padded(t) for t in plain.outputs()]
                _same(f"{what}, padded", plain.run(run, padded), expected)


def _same(what: str, outputs, expected) -> None:
    for name, got, want in zip(("q_out", "k_cache", "v_cache"), outputs, expected, strict=True):
        assert_equal(f"{what}, {name}", got, want)


def _padded(t: Tensor) -> Tensor:
    """The same values in a view with two heads more to a token and a token more to a sample."""
    batch, tokens, heads, dim = t.shape
    buffer = poisoned((batch, tokens + 1, heads + 2, dim), t.dtype)
    return buffer[:, :tokens, 1 : heads + 1].copy_(t)


def check_two_streams_fill_one_buffer(run: Runner) -> None:
    """Text and image write one joint buffer as one dense call on their concatenation does."""
    for dtype in run.dtypes():
        for norm in (None, "rms", "layer"):
            joint = stream(dtype, 2, 8, norm=norm, gaps=0, sparse=False)
            expected, outputs = joint.run(run), joint.outputs()
            for start, end in ((0, 3), (3, 8)):
                part = {n: getattr(joint, n)[:, start:end] for n in "qkv"}
                one = with_options(replace(joint, **part), q_offset=start, kv_offset=start)
                one.run(run, outputs)
            _same(f"qkv_prologue on {run.label}, two streams", outputs, expected)


def check_permuted_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in ("rms", "layer"):
            s = stream(dtype, 2, 7, norm=norm, gaps=9)
            order = torch.randperm(7, generator=generator(2))
            part = {n: getattr(s, n)[:, order] for n in "qkv"}
            moved = with_options(replace(s, **part), rows=s.options["rows"][:, order].contiguous())
            q_out, k_cache, v_cache = s.run(run)
            what = f"qkv_prologue on {run.label}, permuted"
            _same(what, moved.run(run), (q_out[:, order], k_cache, v_cache))


def check_identity_rows(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in (None, "rms", "layer"):
            dense = stream(dtype, 2, 9, norm=norm, gaps=2, sparse=False, kv_offset=1)
            by_rows = with_options(dense, rows=torch.arange(9).expand(2, 9))
            what = f"qkv_prologue on {run.label}, identity rows"
            _same(what, by_rows.run(run), dense.run(run))


def check_repeats(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in ("rms", "layer"):
            s = stream(dtype, 2, 17, 12, 4, 128, norm)  # above 32768 elements the kernels do split
            first = s.run(run)
            threads = torch.get_num_threads()
            try:
                for i in range(run.repeats(10)):
                    torch.set_num_threads(1 + i % 2)
                    _same(f"qkv_prologue on {run.label}, repeat {i}", s.run(run), first)
            finally:
                torch.set_num_threads(threads)


def check_special_values(run: Runner) -> None:
    """NaN in one head stays in that head, or in that token where the norm spans all heads."""
    for dtype in run.dtypes():
        for norm in NORMS:
            s = stream(dtype, 1, 4, 8, 2, 72, norm)
            plain = s.run(run)
            s.q[0, 1, 3 * 72 + 5] = float("nan")
            s.k[0, 2, 72] = float("inf")
            s.v[0, 3, :2] = torch.tensor([-0.0, float("nan")], dtype=dtype)
            q_out, k_cache, v_cache = outputs = s.run(run)
            compare(run, f"special values, norm {norm}", s, outputs)
            at = s.positions[0, 2]
            if norm in ACROSS:
                q_out[0, 1], k_cache[0, at] = plain[0][0, 1], plain[1][0, at]
            else:
                q_out[0, 1, 3], k_cache[0, at, 1] = plain[0][0, 1, 3], plain[1][0, at, 1]
            v_cache[0, s.positions[0, 3], 0, :2] = plain[2][0, s.positions[0, 3], 0, :2]
            _same(f"qkv_prologue on {run.label}, beside NaN", outputs, plain)


def check_offset_rows(run: Runner) -> None:
    """A mean of 1e4 with a deviation of 1e-2: E[x^2] - m^2 has no digit left."""
    for dtype in run.dtypes():
        s = stream(dtype, 1, 3, norm="layer", rope=False)
        for name in ("q", "k"):
            values = getattr(s, name).double() * 1e-2 + 1e4
            s = replace(s, **{name: values.to(dtype)})
        compare(run, "mean 1e4, deviation 1e-2", s, s.run(run))


def check_constant_heads(run: Runner) -> None:
    for dtype in run.dtypes():
        for norm in ("rms", "layer", "rms_across"):
            # Of all heads stock's sum may be exact by luck; of powers of two all sums are.
            numbers = (0.5, -(2.0**15)) if norm == "rms_across" else (0.1, -3.3e4)
            for value in (0.0, *numbers, 1e-7):
                s = stream(dtype, 1, 2, norm=norm, rope=False)
                s = replace(s, q=torch.full_like(s.q, value), k=torch.full_like(s.k, value))
                compare(run, f"all elements {value}", s, s.run(run))


def check_empty(run: Runner) -> None:
    for dtype in run.dtypes():
        for batch, tokens in ((0, 3), (2, 0)):
            for norm in (None, "rms", "layer"):
                for sparse in (False, True):
                    s = stream(dtype, max(batch, 1), tokens, norm=norm, sparse=sparse)
                    if batch == 0:
                        part = {n: getattr(s, n)[:0] for n in "qkv"}
                        s = replace(s, **part)
                        s = with_options(s, rows=s.options["rows"][:0]) if sparse else s
                    _same(f"qkv_prologue on {run.label}, empty", s.run(run), s.outputs())


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_qkv_prologue(check, runner):
    check(runner)


# --- against diffusers: what its processors hand to attention


def stock(monkeypatch, module, name: str) -> list[Tensor]:
    """The query, key and value that reach attention, captured in place of attention."""
    captured: list[Tensor] = []

    def attention(query, key, value, **options):
        captured[:] = query, key, value
        return query

    monkeypatch.setattr(module, name, attention)
    return captured


def projections(attn, x: Tensor, names=("to_q", "to_k", "to_v")) -> list[Tensor]:
    return [getattr(attn, name)(x) for name in names]


def randomised(module, dtype):
    """The module with weights of its norms that are not one."""
    for name, parameter in module.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return module.to(dtype).requires_grad_(False)


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


@DTYPES
def test_it_equals_the_attention_processor_of_flux(dtype, monkeypatch):
    from diffusers.models.transformers import transformer_flux as flux

    captured = stock(monkeypatch, flux, "dispatch_attention_fn")
    heads, dim, text, image = 4, 72, 3, 6
    attn = randomised(
        flux.FluxAttention(64, heads, dim, added_kv_proj_dim=64, bias=True, eps=1e-6), dtype
    )
    x, y = torch.randn(2, image, 64).to(dtype), torch.randn(2, text, 64).to(dtype)
    positions = flux.FluxPosEmbed(theta=10000, axes_dim=[8, 32, 32])
    cos, sin = positions(torch.randint(50, (text + image, 3)).double())
    attn(x, encoder_hidden_states=y, image_rotary_emb=(cos, sin))
    outputs = [poisoned(t.shape, dtype) for t in captured]
    table = {"cos": cos[:, ::2].contiguous(), "sin": sin[:, ::2].contiguous()}
    added = projections(attn, y, ("add_q_proj", "add_k_proj", "add_v_proj"))
    for start, stream, q, k in (
        (0, added, attn.norm_added_q, attn.norm_added_k),
        (text, projections(attn, x), attn.norm_q, attn.norm_k),
    ):
        options = {"norm": "rms", "eps": q.eps, "q_weight": q.weight, "k_weight": k.weight}
        ops.qkv_prologue(
            *stream, *outputs, q_offset=start, kv_offset=start, **options, **table,
            backend="reference",
        )  # fmt: skip
    _same("FLUX", outputs, captured)


@DTYPES
def test_it_equals_the_attention_processor_of_stable_diffusion_3(dtype, monkeypatch):
    from diffusers.models import attention_processor
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    captured = stock(monkeypatch, attention_processor.F, "scaled_dot_product_attention")
    heads, dim, text, image = 3, 64, 4, 5
    attn = randomised(
        Attention(
            query_dim=64, added_kv_proj_dim=64, dim_head=dim, heads=heads, out_dim=64,
            context_pre_only=False, bias=True, qk_norm="rms_norm", eps=1e-6,
            processor=JointAttnProcessor2_0(),
        ),
        dtype,
    )  # fmt: skip
    x, y = torch.randn(2, image, 64).to(dtype), torch.randn(2, text, 64).to(dtype)
    attn(x, encoder_hidden_states=y)
    expected = [t.transpose(1, 2) for t in captured]
    outputs = [poisoned(t.shape, dtype) for t in expected]
    added = projections(attn, y, ("add_q_proj", "add_k_proj", "add_v_proj"))
    for start, stream, q, k in (
        (0, projections(attn, x), attn.norm_q, attn.norm_k),
        (image, added, attn.norm_added_q, attn.norm_added_k),
    ):
        options = {"norm": "rms_rounded", "q_weight": q.weight, "k_weight": k.weight}
        ops.qkv_prologue(
            *stream, *outputs, q_offset=start, kv_offset=start, eps=q.eps, **options,
            backend="reference",
        )  # fmt: skip
    _same("SD3.5", outputs, expected)


@DTYPES
def test_it_is_the_attention_processor_of_lumina(dtype, monkeypatch):
    """By the rule: torch's complex product takes an fma in some elements and none in others."""
    from diffusers.models import attention_processor
    from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0

    captured = stock(monkeypatch, attention_processor.F, "scaled_dot_product_attention")
    heads, kv_heads, dim, tokens = 4, 2, 72, 7
    attn = randomised(
        Attention(
            query_dim=64, dim_head=dim, heads=heads, kv_heads=kv_heads, qk_norm="layer_norm_across_heads",
            bias=False, out_bias=False, eps=1e-5, processor=LuminaAttnProcessor2_0(),
        ),
        dtype,
    )  # fmt: skip
    x = torch.randn(2, tokens, 64).to(dtype)
    angles = 6.3 * torch.rand(1, tokens, dim // 2)
    table = torch.polar(torch.ones_like(angles), angles)
    attn.processor(attn, x, x, torch.ones(2, tokens), query_rotary_emb=table, key_rotary_emb=table)
    query, key, value = (t.transpose(1, 2) for t in captured)
    q, k, v = projections(attn, x)
    options = {
        "norm": "layer", "eps": 1e-5, "cos": table[0].real.contiguous(),
        "sin": table[0].imag.contiguous(),
        "q_weight": attn.norm_q.weight, "q_bias": attn.norm_q.bias,
        "k_weight": attn.norm_k.weight, "k_bias": attn.norm_k.bias,
    }  # fmt: skip
    s = Stream(q, k, v, heads, kv_heads, tokens, options)
    q_out, k_cache, v_cache = s.outputs()
    ops.qkv_prologue(q, k, v, q_out, k_cache, v_cache, **options, backend="reference")
    exact_q, exact_k = s.expected(exact_head_norm, exact_rotation)
    assert_close("Lumina-Next, q", q_out, exact_q, query)
    # The processor repeats the heads of k and v.
    assert_close("Lumina-Next, k", k_cache, exact_k, key[:, :, :: heads // kv_heads])
    assert_equal("Lumina-Next, v", v_cache, value[:, :, :: heads // kv_heads])
    plain = with_options(s, cos=None, sin=None)
    q_out, k_cache, _ = plain.outputs()
    ops.qkv_prologue(q, k, v, q_out, k_cache, v_cache, **plain.options, backend="reference")
    assert_equal("Lumina-Next, norm of q", q_out.flatten(2), attn.norm_q(q))
    assert_equal("Lumina-Next, norm of k", k_cache.flatten(2), attn.norm_k(k))
