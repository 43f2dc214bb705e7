"""What the attention operators publish about themselves: oracle, rounding sites, invariances, capabilities, refusals."""

from typing import Any

from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import alone, permuted, scaled, shifted
from attnkit._core.opspec import OpSpec, Refusal
from attnkit.ops.attention.api import attention, query_sparse_attention
from attnkit.ops.attention.backends import BACKENDS
from attnkit.ops.attention.call import prepare
from attnkit.ops.attention.cases import CASES, SPARSE_CASES
from attnkit.ops.attention.reference import MAX_PAIRS, reference

__all__ = ["SPECS"]


def _outputs(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    call = prepare(*args, **kwargs)
    out, lse = reference(call)
    return (out, lse) if call.return_lse else (out,)


def _row_scale(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Sum of p_ij |v_jd|, the size of what is summed."""
    return _outputs(q, k, v.abs(), **options)[0]


def _sparse_prepare(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, **options: Any) -> Any:
    return prepare(q, k, v, q_pos=q_pos, causal=True, **options)


def _sparse_outputs(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return _outputs(q, k, v, q_pos=q_pos, causal=True, **options)


def _sparse_row_scale(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, **options: Any) -> Tensor:
    return _sparse_outputs(q, k, v.abs(), q_pos, **options)[0]


SITES = ("P", "O_out", "dS", "grad_out")
CAPABILITIES = {
    "cpu": "yes, at the speed of torch's fused kernel; the Triton kernels in the interpreter, float32, when named",
    "cuda": "yes: Triton kernels from compute capability 8.0; FlashAttention-4 or cuDNN where they are faster",
    "backward": "yes, LSE included; ours is deterministic",
    "packed": "yes",
    "grouped heads": "any H that is a multiple of Hkv",
    "compile": "yes, fullgraph; CUDA graphs with the Triton kernels, cuDNN and FlashAttention",
    "head width": "16..256, D != Dv",
    "batch": "a row's output has the same bits alone and in a batch, in the Triton kernels, where keys are not split",
    "decode": "few rows share a tile by group, and keys are split over the device",
    "stable": "delta, exact_delta, dynamic_max: in our own kernels",
    "float64": "CPU and CUDA, in plain torch",
}
REFUSALS = (
    Refusal("head width outside 16..256", "kernels pad to powers of two from 16; pad narrower heads with zeros"),
    Refusal("cu_seqlens of one side only", "boundaries are data and are never guessed"),
    Refusal(
        "H that is no multiple of Hkv, tensors of different dtypes or devices", "the message names which and how to fix it"
    ),
    Refusal("out_dtype other than the inputs' or float32", "conversions are the caller's"),
    Refusal("softcap <= 0, windows below -1", "absent options are left out, not set to a value"),
    Refusal(
        'backend="triton" on a GPU before compute capability 8.0, or in float64', "no matrix units for it; plain torch serves"
    ),
    Refusal(f'backend="reference" above {MAX_PAIRS} scores a head', "it writes the whole score matrix down"),
    Refusal('stable with backend="fa4", "cudnn" or "sdpa"', "their backward pass starts from the rounded output"),
    Refusal("a backward pass of the backward pass", "gradients are first order"),
)
SPECS = (
    OpSpec(
        name="attention",
        summary="softmax attention: dense, causal, windowed, packed, with sinks, softcap and key bias",
        source="Vaswani et al. 2017 (arXiv:1706.03762); Dao 2023 (arXiv:2307.08691)",
        function=attention,
        outputs=("out", "lse"),
        cases=CASES,
        oracle=_outputs,
        naive=_outputs,
        prepare=prepare,
        backends=BACKENDS,
        dtypes=FLOATS,
        sites=SITES,
        row_scale=_row_scale,
        invariances=(
            shifted(("causal, grouped heads", "values around 2")),
            permuted("keys", {"k": 1, "v": 1, "key_bias": 1}, ("dense, one key head", "key bias")),
            scaled("v", ("values around 2",)),
            alone({"q": 0, "k": 0, "v": 0}, ("causal, grouped heads",), ("triton",)),
        ),
        capabilities=CAPABILITIES,
        refusals=REFUSALS,
    ),
    OpSpec(
        name="query_sparse_attention",
        summary="causal attention of selected query rows over every key",
        source="Delta Attention (arXiv:2505.11254, section 3)",
        function=query_sparse_attention,
        outputs=("out", "lse"),
        cases=SPARSE_CASES,
        oracle=_sparse_outputs,
        naive=_sparse_outputs,
        prepare=_sparse_prepare,
        backends=BACKENDS,
        dtypes=FLOATS,
        sites=SITES,
        row_scale=_sparse_row_scale,
        invariances=(shifted(("sorted positions",)),),
        capabilities=CAPABILITIES | {"packed": "yes; positions rise within a sequence"},
        refusals=(*REFUSALS, Refusal("positions outside the keys", "a row must stand on a key")),
    ),
)
