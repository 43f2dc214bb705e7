"""Launching the attention kernels: shapes, strides and options in, contiguous results out. No host synchronisation."""

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnkit._core.triton.configs import Config
from attnkit._core.triton.launcher import launch, power_of_two, precision
from attnkit.ops._attention_core._triton import backward as kb
from attnkit.ops._attention_core._triton import forward as kf
from attnkit.ops._attention_core._triton import tiles as kt
from attnkit.ops._attention_core._triton.configs import CONFIGS

__all__ = [
    "Launch",
    "backward",
    "backward_keys",
    "backward_queries",
    "forward",
    "lists_shape",
]

_UNBOUNDED = 1 << 30
_TINY = 1e-30  # a scale of 0 would turn a masked score, -inf, into NaN
_NORMS = {"off": "softmax", "delta": "consistent", "exact_delta": "consistent", "dynamic_max": "dynamic_max"}
_DECODE_ROWS = 16
_REGISTERS = {4: 128, 3: 168}  # of a thread, for so many programs of 128 threads on a multiprocessor
_LISTED_WIDTH = 128
_COPIED_FROM = 4096  # keys of a sequence from which on its queries are copied into the order in which keys visit them
_PACK_ROWS = 64  # up to so many query rows a head, the heads that share a key head run as one tile


def _cdiv(n: int, block: int) -> int:
    return -(-n // block)


@dataclass
class Launch:
    """One call in batched form: q [B, T, H, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv]; packed sequences as a batch of one."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    key_bias: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    q_pos: Tensor | None
    scale: float
    left: int
    right: int
    softcap: float
    stable: str
    _: KW_ONLY
    q_rows: Tensor | None = None  # [T] int32 or int64, a permutation: where the rows that cu_q counts lie in q, with
    k_rows: Tensor | None = None  # k_rows [S], for k and v; rows are contiguous, and results lie where the inputs do
    norm: str = "softmax"  # or "entmax15", "sparsemax", "entmax" with an alpha of each head
    gaps: Tensor | None = None  # [H] float32, alpha - 1 of "entmax"
    n_refine: int = 2  # updates of tau, at least
    tiles: Tensor | None = None  # [programs, 1 + tiles of keys] int32, the support of each tile of rows as the forward found it
    slopes: Tensor | None = (
        None  # [B, H, T] float32, gets the derivative of rows by their alpha in the backward pass of "entmax"
    )

    def __post_init__(self) -> None:
        if self.scale < 0:  # kernels take the maximum of raw products, which a negative factor would turn round
            self.q, self.scale, self.flipped = -self.q, -self.scale, True
        else:
            self.flipped = False
        self.scale = max(self.scale, _TINY)
        self.q, self.k, self.v = (t if t.stride(-1) == 1 else t.contiguous() for t in (self.q, self.k, self.v))
        small = (self.sinks, self.cu_q, self.cu_k, self.q_pos, self.q_rows, self.k_rows)  # kernels read these without strides
        self.sinks, self.cu_q, self.cu_k, self.q_pos, self.q_rows, self.k_rows = (
            None if t is None else t.contiguous() for t in small
        )
        self.batch, self.num_q, self.heads, self.width = self.q.shape
        _, self.num_k, self.kv_heads, self.width_v = self.v.shape
        self.group = self.heads // self.kv_heads
        kinds = ("dense", "packed") if self.q_pos is None else ("positions", "indexed")
        self.kind = kinds[self.cu_q is not None]
        self.num_seqs = 0 if self.cu_q is None else self.cu_q.shape[0] - 1
        self.block_d, self.block_dv = power_of_two(self.width, 16), power_of_two(self.width_v, 16)

    def config(self, kernel: str) -> Config:
        """Tile sizes of one kernel for this call."""
        walked = self.q_rows if kernel == "bwd_dkdv" else self.k_rows
        if walked is not None and kernel != "decode":
            kernel = "gather_" + kernel.removeprefix("bwd_")
        return CONFIGS.pick(kernel, self.q.element_size() * 8, max(self.block_d, self.block_dv), self.q.device)

    def strides(self) -> tuple[int, ...]:
        """Of q, k, v, key_bias and q_pos, as every kernel takes them; 0 along what is shared."""
        bias: tuple[int, ...] = (0, 0, 0)
        pos = 0
        if self.key_bias is not None:
            bias = (*self.key_bias.stride(), 0)[:3]
        if self.q_pos is not None and self.q_pos.dim() > 1:
            pos = self.q_pos.stride(0)
        return (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *bias, pos)

    def scalars(self) -> tuple[float | int, ...]:
        """scale, left, right, softcap, width, width_v."""
        left, right = (_UNBOUNDED if side < 0 else side for side in (self.left, self.right))
        return (self.scale, left, right, self.softcap, self.width, self.width_v)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], config: Config, registers: int = 0, **flags: Any
    ) -> None:
        """Run one of the kernels that walk over tiles, with the compile-time options that they share and `flags`.

        Args:
            registers: what a thread may have at most, 0 for the compiler's choice.
        """
        shared = {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "ROWS": self.kind,
            "WINDOW": self.left >= 0,
            "SOFTCAP": self.softcap > 0,
            "BIAS": self.key_bias is not None,
            "EVEN": self.block_d == self.width and self.block_dv == self.width_v,
            "NORM": self.norm,
            "PRECISION": precision(),
        }
        stages = config.num_stages
        if self.k_rows is not None and kernel is not kb.bwd_dkdv:
            stages = 2 * stages - 1  # an index is fetched as long before its row as the row before its use
        options = {"num_warps": config.num_warps, "num_stages": stages}
        if registers:
            options["maxnreg"] = registers
        launch(kernel, grid, arguments, shared | flags, **options)

    def keys_a_tile(self, block: int) -> int:
        """About how many keys a tile of so many rows walks over at most."""
        keys = self.num_k // max(self.num_seqs, 1)
        return min(keys, self.left + max(self.right, 0) + block) if self.left >= 0 else keys

    def spans(self, tiles: int, block: int, keys: bool = False) -> Tensor | None:
        """[tiles, 6] int32, where "indexed" tiles of queries (or of keys) lie and what they walk over (`tiles.spans`)."""
        if self.kind != "indexed":
            return None
        found = self.q.new_empty(tiles, 6, dtype=torch.int32)
        cu, other = (self.cu_k, self.cu_q) if keys else (self.cu_q, self.cu_k)
        _, left, right, *_ = self.scalars()
        arguments = (cu, other, self.q_pos, found, self.num_seqs, tiles, self.num_k if keys else self.num_q, left, right)
        flags = {"BLOCK": block, "KEYS": keys, "WINDOW": self.left >= 0, "BLOCK_T": 128}
        launch(kt.spans, (_cdiv(tiles, 128),), arguments, flags)
        return found

    def num_tiles(self, rows: int, block: int) -> int:
        """Tiles of a side; packed sequences may leave some of theirs empty, and need one for rows behind the last."""
        return rows // block + self.num_seqs + 1 if self.cu_q is not None else _cdiv(rows, block)


def forward(p: Launch, out_dtype: torch.dtype, need_grad: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """out [B, T, H, Dv], lse [B, T, H], float32, and what rounding took from out, where `stable` is "delta" and it did.

    Of entmax: out, tau, and, where gradients are needed, sum(u V) / sum(u).
    """
    config, block_m, group, tiles = _row_tiles(p)
    programs = tiles * (p.heads // group) * p.batch
    keys = p.keys_a_tile(block_m // group)
    parts = _parts(programs, keys, config.block_n, p.q.device) if p.norm == "softmax" else 1
    shape = (parts, p.batch, p.num_q, p.heads)
    out = p.q.new_empty(*shape, p.width_v, dtype=out_dtype if parts == 1 else torch.float32)
    lse = p.q.new_empty((2, *shape) if parts > 1 else shape, dtype=torch.float32)
    keeps = p.stable == "delta" and out_dtype.itemsize == 2 if p.norm == "softmax" else need_grad
    rest = out.new_empty(out.shape[1:], dtype=out_dtype) if keeps else None
    if lse.numel() == 0:
        return out[0], lse.new_empty(shape[1:]), rest
    listed = lists_shape(p)
    p.tiles = None if listed is None else p.q.new_empty(listed, dtype=torch.int32)
    spans = p.spans(tiles, block_m // group)
    inputs = (p.q, p.k, p.v, p.sinks, p.gaps, p.key_bias, p.cu_q, p.cu_k, p.q_pos, spans, p.q_rows, p.k_rows)
    others = (
        lse, p.tiles, *p.strides(),
        p.batch, p.num_q, p.num_k, p.heads, p.num_seqs, tiles, p.group, *p.scalars(), p.n_refine,
        0 if p.tiles is None else p.tiles.stride(0),
    )  # fmt: skip
    norm = _NORMS[p.stable] if p.norm == "softmax" else p.norm
    flags = {"BLOCK_M": block_m, "GROUP": group, "NORM": norm, "SPLIT": parts > 1}
    if p.norm != "softmax":
        p.launch(kf.fwd, (programs, parts), (*inputs, None, None, *others), config, _registers(p, config, True), **flags)
    results = (out, rest if parts == 1 else None)
    p.launch(kf.fwd, (programs, parts), (*inputs, *results, *others), config, _registers(p, config, False), **flags)
    if parts == 1:
        return out[0], lse[0], rest
    whole, whole_lse = out.new_empty(out.shape[1:], dtype=out_dtype), torch.empty_like(lse[0, 0])
    rows = whole_lse.numel()
    sizes = {"BLOCK_P": 16, "BLOCK_DV": p.block_dv}
    launch(kf.combine, (rows,), (out, *lse, whole, rest, whole_lse, rows, parts, p.width_v), sizes)
    return whole, whole_lse, rest


def _row_tiles(p: Launch) -> tuple[Config, int, int, int]:
    """Of the forward pass: the configuration, rows of a tile, heads that share it, and tiles of such heads."""
    packs = p.group > 1 and p.num_q <= _PACK_ROWS and p.gaps is None
    group = p.group if packs else 1
    config = p.config("decode" if p.num_q * group <= _DECODE_ROWS else "fwd")
    block_m = config.block_m if config.block_m >= group else power_of_two(group)
    return config, block_m, group, p.num_tiles(p.num_q, block_m // group)


def _registers(p: Launch, config: Config, search: bool) -> int:
    """How many a thread of entmax's forward kernels may have, so that more programs hide each other's waits.

    Three programs of width 64 instead of two made the forward pass 1.15x faster.
    """
    width = max(p.block_d, p.block_dv)
    if p.norm == "softmax" or not p.q.is_cuda or p.q.element_size() != 2 or width > (128 if search else 64):
        return 0
    small = config.block_m * config.block_n <= 1024 * config.num_warps
    return _REGISTERS[4 if search and small and width <= 64 else 3]


def lists_shape(p: Launch) -> tuple[int, int] | None:
    """Of entmax's lists of tiles of keys: one for every tile of rows, after its length. None where no lists are made."""
    if p.norm == "softmax" or p.left >= 0 or p.cu_q is not None or p.q_pos is not None:
        return None
    config, _, group, tiles = _row_tiles(p)
    few = p.num_q <= _DECODE_ROWS  # the backward pass has other tiles than a decoder's step
    wide = max(p.block_d, p.block_dv) > _LISTED_WIDTH  # and cannot have the forward pass's there
    if few or wide or group > 1:
        return None
    return tiles * p.heads * p.batch, 1 + _cdiv(p.num_k, config.block_n)


def _listed_config(p: Launch) -> Config:
    """Of the backward pass where there are lists: the forward pass's tiles. A warp takes 16 rows of a product, and with more
    of them than that warps do the same work twice."""
    config = p.config("fwd")
    if max(p.block_d, p.block_dv) <= 64:
        return config
    warps = max(config.num_warps, min(8, config.block_m // 16))
    return replace(config, num_warps=warps, num_stages=min(config.num_stages, 2))


def _parts(programs: int, keys: int, block_n: int, device: torch.device) -> int:
    """Into how many parts keys are split so that a few query tiles still fill the device; from shapes alone."""
    wanted = _multiprocessors(device) // max(programs, 1)
    return max(1, min(wanted, keys // (4 * block_n), 128))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def backward(
    p: Launch, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, rest: Tensor | None, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, sinks and key_bias (empty tensors for the last two where absent or not needed)."""
    d_out = d_out.to(p.q.dtype)  # the operands of a matrix product share a type; with out_dtype they come in float32
    if p.q_rows is not None or d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    copies = _room_for_copies(p, d_out)
    d_q, lse2, delta = backward_queries(p, d_out, d_lse, out, lse, rest, copies)
    if copies is not None:
        p, d_out = replace(p, q=copies[0], q_rows=None), copies[1]
    d_k, d_v, d_bias = backward_keys(p, d_out, lse2, delta)
    d_sinks, d_key_bias = p.q.new_empty(0), p.q.new_empty(0)
    if p.sinks is not None:  # the sink's probability times (0 - delta), summed over rows
        share = torch.exp2(p.sinks.float()[:, None] * math.log2(math.e) - lse2)
        d_sinks = -(share * delta).sum((0, 2)).to(p.sinks.dtype)
    if need_bias and p.key_bias is not None:
        d_bias = d_bias if p.key_bias.dim() == 3 else d_bias.sum(-1)
        d_key_bias = d_bias.to(p.key_bias.dtype)
    return -d_q if p.flipped else d_q, d_k, d_v, d_sinks, d_key_bias


def _room_for_copies(p: Launch, d_out: Tensor) -> tuple[Tensor, Tensor] | None:
    """For q and d_out in the order of `q_rows`, where keys visit a row so often that fetching it by its number costs more.

    The kernel that has a row anyway writes its copy, which costs next to nothing.
    """
    if p.q_rows is None or p.num_k < _COPIED_FROM * p.num_seqs:
        return None
    return torch.empty_like(p.q), torch.empty_like(d_out)


def backward_queries(
    p: Launch,
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    copies: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `p.q`, which is the caller's q up to `flipped`, and what `backward_keys` wants to know of rows.

    These are lse2, the LSE in base-2 logarithms, and delta, sum(d_out * (out + rest)) - d_lse, or with "exact_delta" from the
    probabilities as they are recomputed: float32 [B, H, T], by `q_rows`. `copies` get q and d_out by `q_rows`.
    """
    d_q = p.q.new_empty(p.q.shape)
    lse2, delta = p.q.new_empty(2, p.batch, p.heads, p.num_q, dtype=torch.float32).unbind(0)
    known = tuple(None if t is None else t.contiguous() for t in (out, rest, lse, d_lse))
    if p.stable == "exact_delta":
        _walk_queries(p, d_out, (None, None, *known[2:]), (lse2, delta), None)
        known = (None,) * 4
    _walk_queries(p, d_out, known, (lse2, delta), d_q, copies)
    return d_q, lse2, delta


def _walk_queries(
    p: Launch,
    d_out: Tensor,
    known: tuple[Tensor | None, ...],
    rows: tuple[Tensor, Tensor],
    d_q: Tensor | None,
    copies: tuple[Tensor, Tensor] | None = None,
) -> None:
    """One launch; `known`, (out, rest, lse, d_lse), is what `rows`, (lse2, delta), are made of, or four times None."""
    config = p.config("bwd_dq") if p.tiles is None else _listed_config(p)
    tiles = p.num_tiles(p.num_q, config.block_m)
    if p.q.numel():
        arguments = (
            p.q, p.k, p.v, p.gaps, p.key_bias, p.cu_q, p.cu_k, p.q_pos, p.spans(tiles, config.block_m), p.q_rows, p.k_rows,
            d_out, *known, *rows, d_q, *(copies or (None, None)), p.slopes, p.tiles,
            *p.strides(), *d_out.stride()[:3],
            p.num_q, p.num_k, p.heads, p.num_seqs, tiles, p.group, *p.scalars(),
            0 if p.tiles is None else p.tiles.stride(0),
        )  # fmt: skip
        p.launch(kb.bwd_dq, (tiles * p.heads * p.batch,), arguments, config, DELTA=d_q is None)


def backward_keys(p: Launch, d_out: Tensor, lse2: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and, float32 [B, S, Hkv], of the key bias."""
    config = p.config("bwd_dkdv") if p.tiles is None else _listed_config(p)
    tiles = p.num_tiles(p.num_k, config.block_n)
    programs = tiles * p.kv_heads * p.batch
    parts = _head_parts(programs, p.group, p.q.device)
    dtype = torch.float32 if parts > 1 else p.q.dtype
    d_k = p.k.new_empty(parts, *p.k.shape, dtype=dtype)
    d_v = p.v.new_empty(parts, *p.v.shape, dtype=dtype)
    d_bias = p.k.new_empty(parts, *p.k.shape[:3] if p.key_bias is not None else (0,), dtype=torch.float32)
    live = None
    if p.tiles is not None:
        live = p.tiles.new_empty(programs * parts, _cdiv(p.num_q, config.block_m))
    if d_k.numel():
        arguments = (
            p.q, p.k, p.v, p.gaps, p.key_bias, p.cu_q, p.cu_k, p.q_pos, p.spans(tiles, config.block_n, keys=True),
            p.q_rows, p.k_rows, d_out, lse2, delta, d_k, d_v, d_bias, p.tiles, live, *p.strides(), *d_out.stride()[:3],
            p.batch, p.num_q, p.num_k, p.heads, p.kv_heads, p.num_seqs, tiles, p.group, *p.scalars(),
            0 if p.tiles is None else p.tiles.stride(0), 0 if live is None else live.stride(0),
        )  # fmt: skip
        p.launch(kb.bwd_dkdv, (programs, parts), arguments, config)
    if parts > 1:
        return d_k.sum(0).to(p.k.dtype), d_v.sum(0).to(p.v.dtype), d_bias.sum(0)
    return d_k[0], d_v[0], d_bias[0]


def _head_parts(programs: int, group: int, device: torch.device) -> int:
    """Into how many parts the query heads of a group are dealt out, so that a few key tiles still fill the device."""
    wanted = 2 * _multiprocessors(device) // max(programs, 1)
    return max(parts for parts in range(1, group + 1) if group % parts == 0 and parts <= max(wanted, 1))
