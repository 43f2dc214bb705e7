"""What the indexed operators publish about themselves."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import alone, permuted, scaled
from attnkit._core.opspec import OpSpec, Refusal
from attnkit.ops.indexed.api import hash_sparse_attention, indexed_attention, qk_sparse_attention
from attnkit.ops.indexed.backends import BACKENDS
from attnkit.ops.indexed.call import IndexedCall, prepare, prepare_hash, prepare_qk
from attnkit.ops.indexed.cases import HASH_CASES, INDEXED_CASES, QK_CASES
from attnkit.ops.indexed.reference import reference

__all__ = ["SPECS"]

Prepare = Callable[..., IndexedCall]


def _outputs(prepare: Prepare) -> Callable[..., tuple[Tensor, ...]]:
    def outputs(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        call = prepare(*args, **kwargs)
        out, lse = reference(call)
        return (out, lse) if call.base.return_lse else (out,)

    return outputs


def _row_scale(prepare: Prepare) -> Callable[..., Tensor]:
    """Sum of p_ij |v_jd|, the size of what is summed."""
    return lambda q, k, v, *args, **options: _outputs(prepare)(q, k, v.abs(), *args, **options)[0]


CAPABILITIES = {
    "cpu": "yes: torch's fused kernel on sorted rows; the Triton kernels in the interpreter, float32, when named",
    "cuda": "yes: Triton kernels on rows where they are, in sorted order, compute capability 8.0",
    "backward": "yes, LSE included; deterministic",
    "packed": "sequences are groups: a row's group says which it belongs to",
    "grouped heads": "any H that is a multiple of Hkv; query heads of a group may differ in everything",
    "compile": "yes, fullgraph, where the number of groups is given",
    "host": "nothing is read on the host where the number of groups is given, so calls fit into CUDA graphs",
    "head width": "16..256, D != Dv",
    "float64": "CPU and CUDA, in plain torch",
}
REFUSALS = (
    Refusal("packed [R, H, D] tensors", "sequences are groups here"),
    Refusal("groups of one side only, groups from num_groups on (on the CPU)", "who sees whom is never guessed"),
    Refusal("positions beyond 32 bits", "rows are sorted by one 64-bit number of group and position"),
    Refusal("window_size", "it would need a first key for each row in the kernels; groups and key_keep serve many windows"),
    Refusal("sinks, key_bias, out_dtype, stable", "not passed on to the kernels, which know them: no user yet"),
    Refusal("counting a key once that several rounds share", "the merge knows sums, not pairs"),
    Refusal("H that is no multiple of Hkv, tensors of different dtypes or devices", "the message names which"),
)


def _spec(
    name: str, summary: str, function: Callable[..., Any], prepare: Prepare, cases: Any, invariances: tuple[Any, ...]
) -> OpSpec:
    return OpSpec(
        name=name,
        summary=summary,
        source="Pagliardini et al. 2023 (arXiv:2306.01160)",
        function=function,
        outputs=("out", "lse"),
        cases=cases,
        oracle=_outputs(prepare),
        naive=_outputs(prepare),
        prepare=prepare,
        backends=BACKENDS,
        dtypes=FLOATS,
        sites=("P", "O_out", "dS", "grad_out"),
        row_scale=_row_scale(prepare),
        invariances=invariances,
        capabilities=CAPABILITIES,
        refusals=REFUSALS,
    )


_KEY_ROWS = {"k": 1, "v": 1, "k_pos": 1, "k_group": 1}
SPECS = (
    _spec(
        "indexed_attention",
        "attention within groups, ordered by positions: any rows, any order, each head its own",
        indexed_attention,
        prepare,
        INDEXED_CASES,
        (
            permuted("keys with their positions", _KEY_ROWS, ("positions and groups of each head",)),
            scaled("v", ("wider values around 2",)),
        ),
    ),
    _spec(
        "qk_sparse_attention",
        "causal attention of the queries and keys that each head keeps",
        qk_sparse_attention,
        prepare_qk,
        QK_CASES,
        (
            scaled("v", ("values around 2",)),
            alone(
                {"q": 0, "k": 0, "v": 0, "q_keep": 0, "k_keep": 0},
                ("half kept, grouped heads, fewer queries than keys",),
                ("triton",),
            ),
        ),
    ),
    _spec(
        "hash_sparse_attention",
        "causal attention within hash buckets, exact for any sizes of buckets",
        hash_sparse_attention,
        prepare_hash,
        HASH_CASES,
        (scaled("v", ("two rounds, values around 2",)),),
    ),
)
