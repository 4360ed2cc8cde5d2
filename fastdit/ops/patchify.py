"""Between a field and its tokens, some of which cover one cell and others a square of cells.

    unpatchify:  pixel (p, q) of a token is drawn over 2^level x 2^level pixels of the field,
                 from (y ph + 2^level p, x pw + 2^level q) on
    patchify:    reads the first of them

A field is [B, gh, gw, ph, pw, C], a grid of cells that hold a patch of pixels each: a view, with
any strides, of latents [B, C, gh ph, gw pw] or of packed tokens [B, gh gw, C ph pw], as for
token_select. The table, int32 [B, n, 3], says of each token its level, and y and x of its first
cell. So tokens of several sizes are read from, and drawn into, pictures of one size; a token of
level 1 covers 2 x 2 cells, and is drawn there twice as large. Images of a batch have tables of
their own, of one length.

The elements of a token are in the order (C, ph, pw), that of packed latents, or (ph, pw, C).

Values are copied, bit for bit. Cells that no token covers stay as they were; where tokens overlap,
any of them wins. Bytes moved: the tokens, and the cells that they cover. No gradient, no wait for
a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.ops import checks
from fastdit.ops.registry import define, op, refuse_gradients, resolve, traced

PATCHIFY = (
    "patchify(Tensor field, Tensor table, bool channels_last, Tensor(a!) out, str? backend) -> ()"
)
UNPATCHIFY = (
    "unpatchify(Tensor tokens, Tensor table, bool channels_last, Tensor(a!) out, str? backend)"
    " -> ()"
)


@op
def patchify(
    field: Tensor,
    table: Tensor,
    *,
    channels_last: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The tokens of a field.

    Args:
        field: [B, gh, gw, ph, pw, C], floating, with any strides.
        table: int32 [B, n, 3], (level, y, x) of each token; may be expanded over the batch.
        channels_last: whether a token is in the order (ph, pw, C), and not (C, ph, pw).
        out: [B, n, C ph pw], where to write; a new tensor by default.
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `out`.

    Raises:
        ArgumentError: an argument has the wrong type, dtype, device, shape, stride or memory, or
            requires a gradient while grad is enabled; a token lies outside of the grid (which is
            looked at on the CPU only).
        BackendError: the backend that was named cannot serve this dtype or device.

    Example:
        >>> latents.shape  # [B, C, H, W], in patches of 2 x 2
        >>> field = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1)
        >>> tokens = patchify(field, table)  # [B, n, 4 C]
        >>> packed.shape  # [B, gh gw, 4 C]: a token of it is a patch of one pixel
        >>> tokens = patchify(packed.view(B, gh, gw, 1, 1, 4 * C), table)
    """
    refuse_gradients("field, out", field, out)
    if traced():
        out = _new(field, table) if out is None else out
        torch.ops.fastdit.patchify.default(field, table, channels_last, out, backend)
        return out
    if out is None:
        _check(field, table)
        out = _new(field, table)
    _patchify(field, table, channels_last, out, backend)
    return out


@op
def unpatchify(
    tokens: Tensor,
    table: Tensor,
    out: Tensor,
    *,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Draw tokens into a field, each as large as the cells that it covers.

    Args:
        tokens: [B, n, C ph pw], floating, with any batch and token strides.
        table: int32 [B, n, 3], (level, y, x) of each token; may be expanded over the batch.
        out: [B, gh, gw, ph, pw, C], written where a token covers it; any strides.
        channels_last: whether a token is in the order (ph, pw, C), and not (C, ph, pw).
        backend: a backend by name; None for FASTDIT_BACKEND or the automatic choice.

    Returns:
        `out`.

    Raises:
        ArgumentError, BackendError: as patchify.

    Example:
        >>> velocity = torch.empty_like(latents)
        >>> field = velocity.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1)
        >>> unpatchify(projected, table, field, channels_last=True)  # fills velocity
    """
    refuse_gradients("tokens, out", tokens, out)
    if traced():
        torch.ops.fastdit.unpatchify.default(tokens, table, channels_last, out, backend)
    else:
        _unpatchify(tokens, table, channels_last, out, backend)
    return out


def in_patches(tokens: Tensor, field: Tensor, channels_last: bool) -> Tensor:
    """[B, n, D] as a view [B, n, ph, pw, C]."""
    height, width, channels = field.shape[3:]
    if channels_last:
        return tokens.unflatten(2, (height, width, channels))
    return tokens.unflatten(2, (channels, height, width)).permute(0, 1, 3, 4, 2)


def _new(field: Tensor, table: Tensor) -> Tensor:
    return field.new_empty((field.shape[0], table.shape[1], field.shape[3:].numel()))


def _patchify(field, table, channels_last, out, backend=None) -> None:
    """Also what torch.ops calls once a trace runs."""
    size = _check(field, table)
    checks.operand("out", out, size, field.dtype, field.device)
    checks.alone("out", out, (("field", field), ("table", table)))
    patches = in_patches(out, field, channels_last)
    resolve("patchify", field.device, field.dtype, backend)(field, table, patches)


def _unpatchify(tokens, table, channels_last, out, backend=None) -> None:
    """Also what torch.ops calls once a trace runs."""
    size = _check(out, table, "out")
    checks.operand("tokens", tokens, size, out.dtype, out.device)
    checks.alone("out", out, (("tokens", tokens), ("table", table)))
    patches = in_patches(tokens, out, channels_last)
    resolve("unpatchify", out.device, out.dtype, backend)(patches, table, out)


define(PATCHIFY, _patchify)
define(UNPATCHIFY, _unpatchify)


def _check(field: Tensor, table: Tensor, name: str = "field") -> tuple[int, int, int]:
    """The shape of the tokens."""
    shape = checks.field(name, field)
    checks.store("table", table, (shape[0], -1, 3), torch.int32, field.device)
    return *table.shape[:2], shape[3:].numel()
