"""Compiles every kernel for GPUs of compute capability 8.0 and 9.0, without one; prints what it compiled.

The interpreter runs kernels as Python and never asks whether types fit, where a compiler does. Run by test_kernels.py in a
process of its own, because the interpreter's switch is read when Triton is imported.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnkit.ops._attention_core._triton import backward, forward
from attnkit.ops._attention_core._triton.tiles import spans
from attnkit.ops._chunkwise_core._triton import gates, gradients, outputs, states
from attnkit.ops._chunkwise_core._triton.step import step
from attnkit.ops.entmax._triton import rows
from attnkit.ops.expected_attention._triton import kernels as expected
from attnkit.ops.indexed._triton.kernels import order
from attnkit.ops.query_moments._triton.kernels import gather
from attnkit.ops.ragged_decode._triton import kernels as ragged

# what a pointer of this name points to; "input" stands for the type of q
POINTERS = {
    **dict.fromkeys(
        [
            "x",
            "prob",
            "d_prob",
            "d_x",
            "q",
            "k",
            "v",
            "out",
            "rest",
            "d_out",
            "d_q",
            "to_q",
            "to_d_out",
            "d_k",
            "d_v",
            "key_bias",
        ],
        "input",
    ),
    **dict.fromkeys(
        ("gaps", "d_alphas", "slopes", "sinks", "lse", "lse2", "delta", "d_lse", "d_bias", "part_out", "part_max", "part_sum"),
        "fp32",
    ),
    **dict.fromkeys(("cu", "cu_other", "cu_q", "cu_k", "q_pos", "spans", "found", "q_rows", "k_rows", "tiles", "live"), "i32"),
}
NEEDS = {
    "d_alphas": "ALPHAS",
    "slopes": "SLOPES",
    "sinks": "BIAS",
    "out": "OUT",
    "rest": "BIAS",
    "key_bias": "BIAS",
    "d_bias": "BIAS",
    "q_rows": "GATHERED",
    "k_rows": "GATHERED",
    "to_q": "COPIED",
    "to_d_out": "COPIED",
}  # pointers that are absent unless a flag is set
PLAIN: dict[str, Any] = {
    "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_DV": 64, "BLOCK_P": 16, "GROUP": 1, "ROWS": "dense", "WINDOW": False,
    "SOFTCAP": False, "BIAS": False, "NORM": "softmax", "SPLIT": False, "DELTA": False, "EVEN": True, "PRECISION": "ieee",
    "GATHERED": False, "COPIED": False, "SLOPES": False, "OUT": True,
}  # fmt: skip
EVERYTHING = PLAIN | {
    "BLOCK_D": 32, "GROUP": 2, "WINDOW": True, "SOFTCAP": True, "BIAS": True, "NORM": "dynamic_max", "SPLIT": True,
    "DELTA": True, "EVEN": False,
}  # fmt: skip
SMALL = PLAIN | {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_DV": 16}
VARIANTS = (
    ("bf16", PLAIN),
    ("bf16", PLAIN | {"NORM": "consistent"}),
    ("bf16", PLAIN | {"NORM": "entmax15"}),
    ("bf16", PLAIN | {"NORM": "entmax15", "OUT": False}),
    ("fp16", PLAIN | {"NORM": "sparsemax", "ROWS": "packed", "WINDOW": True}),
    ("bf16", PLAIN | {"NORM": "entmax", "SLOPES": True}),
    ("fp32", SMALL | {"NORM": "entmax", "SLOPES": True, "ROWS": "packed", "WINDOW": True, "SOFTCAP": True}),
    ("fp16", EVERYTHING | {"ROWS": "packed"}),
    ("fp32", SMALL | {"ROWS": "positions", "WINDOW": True}),
    ("bf16", PLAIN | {"ROWS": "indexed"}),
    ("bf16", PLAIN | {"ROWS": "indexed", "GATHERED": True}),
    ("bf16", PLAIN | {"ROWS": "indexed", "GATHERED": True, "COPIED": True}),
    ("fp16", EVERYTHING | {"ROWS": "indexed", "GATHERED": True, "COPIED": True}),
    ("fp16", SMALL | {"ROWS": "indexed", "WINDOW": True, "num_seqs": 1}),  # Triton makes a constant of every 1
)
ROWS = tuple(
    (dtype, {"KIND": kind, "ALPHAS": kind == "general", "SHORT": short, "BLOCK_R": 2 if short else 1, "BLOCK_N": 256})
    for dtype, kind, short in (
        ("bf16", "1.5", True),
        ("fp16", "2", False),
        ("fp32", "general", True),
        ("bf16", "general", False),
    )
)
CHUNK_POINTERS = {
    **dict.fromkeys(
        ["x", "y", "q", "k", "v", "states", "other", "out", "d_out", "d_q", "d_k", "d_v", "d_states", "rest"], "input"
    ),
    **dict.fromkeys(("whole", "best"), "fp64"),
    **dict.fromkeys(["cu_rows", "first_chunk", "chunk_seq", "chunk_start", "chunk_len", "place", "source"], "i64"),
}
TABLES = ("cu_rows", "first_chunk", "chunk_seq", "chunk_start", "chunk_len")
NORMALISER = ("start_n", "sums", "last_n", "other_n", "ratio", "delta", "m", "den", "d_sums", "unit", "d_m")
CHUNKS: dict[str, Any] = {
    "BLOCK_M": 32, "BLOCK_D": 64, "BLOCK_K": 64, "BLOCK_V": 64, "BLOCK_L": 64, "BLOCK_R": 32, "BLOCK_H": 4, "BLOCK_C": 128,
    "BLOCK": 1024, "NORM": True, "REVERSE": True, "PRECISION": "ieee",
}  # fmt: skip
# the type of q, flags, pointers that are absent, numbers that are 1
CHUNK_VARIANTS: tuple[tuple[str, dict[str, Any], tuple[str, ...], tuple[str, ...]], ...] = (
    ("bf16", CHUNKS, TABLES, ("group", "segments")),
    ("fp16", CHUNKS | {"NORM": False}, NORMALISER, ("each", "heads", "num_seqs", "num_chunks")),
    (
        "fp32",
        CHUNKS | {"REVERSE": False},
        ("start", "left", "other", "other_n", "passing", "gain", "m0", "rest"),
        ("tiles", "eps"),
    ),
)
CHUNK_NUMBERS = ("num_rows", "each", "heads", *(f"stride_{x}b" for x in "xqdf"))  # one of them is the first after pointers
CHUNK_KERNELS = {  # with the pointers that may be absent, besides tables
    states.walk: "start start_n states rest sums last last_n left other other_n passing ratio delta",
    states.merge: "start",
    outputs.outputs: "m sums den",
    gradients.d_queries: "den m sums ratio delta unit",
    gradients.d_keys: "ratio delta d_sums rest",
    gradients.d_values: "ratio",
    gradients.d_gates: "unit d_m",
    gates.chunk_sums: "gain",
    gates.chunk_maxima: "",
    gates.scan_maxima: "m0",
    gates.running_maxima: "m0",
    gates.apply_units: "m0",
}
ABSENT = {"sigmoid": ("m", "m_new"), "decay": ("i", "m", "m_new", "n", "n_new")}
STATES = dict.fromkeys(
    ("f", "i", "S", "n", "m", "S_new", "n_new", "m_new"), "fp32"
)  # pointers of a step; n is a size elsewhere
STEPS = tuple(
    (dtype, {"GATES": gates, "NORMALIZE": gates != "decay", "GROUP": 2, "BLOCK_G": 2, "BLOCK_D": 64, "BLOCK_V": 32})
    for dtype, gates in (("bf16", "exp"), ("fp16", "sigmoid"), ("fp32", "decay"))
)
EXPECTED_POINTERS = {"x": "input", "v": "input", "second": "input", "rest": "input", "scored": "u8"}
EXPECTED: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (  # the type of keys, what differs, absent pointers
    ("bf16", {}, ("unit",)),
    ("fp16", {"BLOCK_C": 32, "LINEAR": False, "SCORED": False, "NORM": "output"}, ("first", "scored", "v")),
    ("fp32", {"BLOCK_C": 32, "SPLIT": False, "GROUP": 1, "NORM": "none"}, ("rest", "unit", "v", "norms")),
    ("bf16", {"SQUARE": False, "SPLIT": False}, ("second", "rest", "unit", "norms")),
)
EXPECTED_FLAGS: dict[str, Any] = {
    "LINEAR": True, "SQUARE": True, "SPLIT": True, "SCORED": True, "PRECISION": "ieee", "NORM": "l2", "GROUP": 4, "BLOCK_N": 64,
    "BLOCK_D": 64, "BLOCK_C": 64, "BLOCK_P": 256,
}  # fmt: skip
GATHERS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (  # the type of queries, what differs, absent pointers
    ("bf16", {}, ("taken",)),
    ("fp16", {"WIDTH": 80, "TURNS": 16, "INTERLEAVED": True}, ()),
    ("bf16", {"TURNS": 0, "SPLIT": False}, ("cos", "sin", "shift")),
    ("bf16", {"WIDTH": 256, "TURNS": 128}, ()),
    ("fp32", {"SPLIT": False, "BLOCK_N": 16, "BLOCK_D": 64}, ()),
)
GATHER: dict[str, Any] = {
    "INTERLEAVED": False, "SPLIT": True, "PRECISION": "ieee", "WIDTH": 128, "TURNS": 64, "BLOCK_N": 64, "BLOCK_D": 128,
}  # fmt: skip
RAGGED_POINTERS = {
    **dict.fromkeys(("table", "lengths", "tail_lengths"), "i32"),
    **dict.fromkeys(("key_scale", "key_zero", "value_scale", "value_zero"), "fp16"),
    **dict.fromkeys(("q", "tail_keys", "tail_values", "out"), "input"),
    **dict.fromkeys(("bias", "tail_bias", "sinks", "lse", "part_out", "part_max", "part_sum"), "fp32"),
}
ZEROS, SCALED, BIASED = ("key_zero", "value_zero"), ("key_scale", "value_scale"), ("bias", "tail_bias")
RAGGED: dict[str, Any] = {
    "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_V": 64, "GROUP": 4, "CODE": "raw", "PAGE": 64, "SOFTCAP": False,
    "EVEN": True, "PRECISION": "ieee",
}  # fmt: skip
# the type of q, flags, pointers that are absent
RAGGED_VARIANTS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("bf16", RAGGED | {"PAGE": 16}, (*ZEROS, *SCALED, *BIASED, "tail_keys", "tail_values", "tail_lengths")),
    ("fp16", RAGGED | {"BLOCK_M": 64, "SOFTCAP": True, "EVEN": False}, (*ZEROS, *SCALED)),
    ("bf16", RAGGED | {"CODE": "int8"}, BIASED),
    ("fp16", RAGGED | {"CODE": "int8", "PAGE": 16, "BLOCK_N": 16, "EVEN": False}, ()),
    ("bf16", RAGGED | {"CODE": "int4"}, BIASED),
    ("fp16", RAGGED | {"CODE": "int4", "SOFTCAP": True}, ()),
    ("bf16", RAGGED | {"CODE": "fp8"}, (*ZEROS, *BIASED)),
    ("fp16", RAGGED | {"CODE": "fp8", "EVEN": False}, ZEROS),
    ("fp32", RAGGED | {"CODE": "int4", "BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_V": 32}, BIASED),
    ("fp32", RAGGED | {"CODE": "fp8", "BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_V": 32}, (*ZEROS, *BIASED)),
)
ORDER_POINTERS = {"q_group": "i32", "k_group": "i64", "q_keep": "u8", "k_keep": "u8"}
ORDER: dict[str, Any] = {
    "PLACE": True, "CAUSAL": True, "STRICT": False, "BLOCK_R": 128, "SHARE": 1, "BLOCK_H": 8, "BLOCK_W": 4, "BLOCK_F": 1024,
}  # fmt: skip
ORDERS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (  # what differs, pointers that are absent
    ({}, ("q_keep", "k_keep")),
    ({"STRICT": True, "SHARE": 4, "BLOCK_H": 2, "BLOCK_W": 16}, ()),
    ({"CAUSAL": False, "SHARE": 128, "BLOCK_H": 1, "BLOCK_W": 1, "kv_heads": 1, "num_groups": 1}, ("q_group", "k_group")),
)
WALKS = (forward.fwd, backward.bwd_dq, backward.bwd_dkdv)


def _compile(kernel: Any, dtype: str, flags: dict[str, Any], capability: int) -> None:
    signature, constants = {}, {}
    pointers = POINTERS | STATES if "GATES" in flags else POINTERS
    for name in kernel.arg_names:
        absent = name in NEEDS and not flags.get(NEEDS[name], True)
        absent |= name in ABSENT.get(flags.get("GATES", ""), ())
        absent |= name == "q_rows" and flags["COPIED"] and kernel is backward.bwd_dkdv
        absent |= name == "out" and kernel is backward.bwd_dq and flags["DELTA"]
        absent |= name == "lse" and kernel is backward.bwd_dq and not flags["OUT"]  # a second walk over queries
        absent |= name in ("cu_q", "cu_k") and flags["ROWS"] not in ("packed", "indexed")
        absent |= name == "q_pos" and flags["ROWS"] not in ("positions", "indexed")
        absent |= name == "spans" and flags["ROWS"] != "indexed"
        absent |= name in ("tiles", "live") and (flags["NORM"] not in ("entmax15", "entmax") or flags["ROWS"] != "dense")
        if name in flags or absent:
            signature[name], constants[name] = "constexpr", flags.get(name)
        elif name in pointers:
            signature[name] = "*" + pointers[name].replace("input", dtype)
        else:
            signature[name] = "fp32" if name in ("scale", "softcap", "shared_gap", "eps") else "i32"
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def _compile_chunks(
    kernel: Any, dtype: str, flags: dict[str, Any], absent: tuple[str, ...], ones: tuple[str, ...], capability: int
) -> None:
    signature, constants = {}, {}
    absent = tuple(name for name in absent if name in TABLES or name in CHUNK_KERNELS[kernel].split())
    numbers = kernel.arg_names[next(i for i, name in enumerate(kernel.arg_names) if name in CHUNK_NUMBERS) :]
    for name in kernel.arg_names:
        if name in flags or name in absent or name in ones:
            signature[name], constants[name] = "constexpr", flags.get(name, None if name in absent else 1)
        elif name in numbers:
            signature[name] = "fp32" if name in ("scale", "eps") else "i32"
        else:
            signature[name] = "*" + CHUNK_POINTERS.get(name, "fp32").replace("input", dtype)
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def _compile_expected(kernel: Any, dtype: str, changes: dict[str, Any], absent: tuple[str, ...], capability: int) -> None:
    flags, signature, constants = EXPECTED_FLAGS | changes, {}, {}
    numbers = kernel.arg_names[kernel.arg_names.index("num_keys") :]
    if kernel is expected.weigh:
        absent = tuple(name for name in absent if name != "scored")
    for name in kernel.arg_names:
        if name in flags or name in absent:
            signature[name], constants[name] = "constexpr", flags.get(name)
        elif name in numbers:
            signature[name] = "fp32" if name == "eps" else "i32"
        else:
            signature[name] = "*" + EXPECTED_POINTERS.get(name, "fp32").replace("input", dtype)
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def _compile_gather(dtype: str, changes: dict[str, Any], absent: tuple[str, ...], capability: int) -> None:
    flags, signature, constants = GATHER | changes, {}, {}
    numbers = gather.arg_names[gather.arg_names.index("num_tokens") :]
    for name in gather.arg_names:
        if name in flags or name in absent:
            signature[name], constants[name] = "constexpr", flags.get(name)
        elif name in numbers:
            signature[name] = "i32"
        else:
            signature[name] = "*" + {"q": dtype, "taken": "u8"}.get(name, "fp32")
    triton.compile(ASTSource(gather, signature, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def _compile_ragged(kernel: Any, dtype: str, flags: dict[str, Any], absent: tuple[str, ...], capability: int) -> None:
    signature, constants = {}, {}
    pool = "u8" if flags.get("CODE", "raw") != "raw" else dtype
    for name in kernel.arg_names:
        if name in flags or name in absent:
            signature[name], constants[name] = "constexpr", flags.get(name)
        elif name in ("keys", "values"):
            signature[name] = f"*{pool}"
        elif name in RAGGED_POINTERS:
            signature[name] = "*" + RAGGED_POINTERS[name].replace("input", dtype)
        else:
            signature[name] = "fp32" if name in ("scale", "softcap") else "i32"
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def _compile_order(changes: dict[str, Any], absent: tuple[str, ...], capability: int) -> None:
    flags, signature, constants = ORDER | changes, {}, {}
    numbers = order.arg_names[order.arg_names.index("batch") :]
    for name in order.arg_names:
        if name in flags or name in absent:
            signature[name], constants[name] = "constexpr", flags.get(name)
        else:
            signature[name] = "i32" if name in numbers else "*" + ORDER_POINTERS.get(name, "i32")
    triton.compile(ASTSource(order, signature, constants), target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})


if __name__ == "__main__":
    count = 0
    for capability in (80, 90):
        for kernel in WALKS:
            for dtype, flags in VARIANTS:
                _compile(kernel, dtype, flags, capability)
                count += 1
        _compile(forward.combine, "bf16", PLAIN, capability)
        count += 1
        for keys in (False, True):
            _compile(
                spans,
                "bf16",
                PLAIN | {"ROWS": "indexed", "WINDOW": keys, "KEYS": keys, "BLOCK": 64, "BLOCK_T": 128},
                capability,
            )
            count += 1
        for kernel in (rows.entmax_fwd, rows.entmax_bwd):
            for dtype, flags in ROWS:
                _compile(kernel, dtype, flags, capability)
                count += 1
        for kernel in CHUNK_KERNELS:
            for variant in CHUNK_VARIANTS[: 1 if capability == 80 else None]:
                _compile_chunks(kernel, *variant, capability)
                count += 1
        for dtype, flags in STEPS:
            _compile(step, dtype, flags | {"EARLY": capability >= 90}, capability)
            count += 1
        for kernel in (expected.quadratic, expected.weigh):
            for variant in EXPECTED:
                _compile_expected(kernel, *variant, capability)
                count += 1
        for variant in GATHERS:
            _compile_gather(*variant, capability)
            count += 1
        for changes, absent in ORDERS:
            for place in (False, True):
                _compile_order(changes | {"PLACE": place}, absent, capability)
                count += 1
        for variant in RAGGED_VARIANTS:
            _compile_ragged(ragged.decode, *variant, capability)
            count += 1
        _compile_ragged(ragged.combine, "bf16", {"BLOCK_P": 128, "BLOCK_V": 32}, ("sinks",), capability)
        count += 1
    print(f"{count} variants compiled")
