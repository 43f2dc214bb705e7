"""The race of expected attention: scoring the keys of one layer and choosing half of them, against NVIDIA's kvpress.

Everybody is given the moments of queries. What runs at the end of a prefill runs while the host is ahead, so calls are
replayed from a CUDA graph where they can be. A whole layer's prefill, as a baseline, says what share of it they are.
"""

import importlib
import importlib.util
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnkit import ops
from attnkit._core.registry import Registry
from attnkit.lab.bench.attention import few_heads, sizes
from attnkit.lab.bench.inputs import normal
from attnkit.lab.bench.race import Facts, Operator, Peer, Race, Shape
from attnkit.lab.bench.timing import Calls, Entrant

__all__ = ["RACE"]

_SINKS = 4  # tokens that stay, as kvpress has it
_VARIANCE = 1 / 8  # of queries
_FEED_FORWARD = 3.5  # times the width, as in Llama 3 8B
_TIMED = 5  # measurements of a part


def _kept(shape: Shape) -> int:
    return shape.sizes["T"] // 2


def _inputs(shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """Keys and values as a cache has them, heads before tokens in memory."""
    s, device = shape.sizes, generator.device
    rows = (s["B"], s["Hkv"], s["T"], s["D"])
    root = torch.randn(s["B"], s["H"], s["D"], s["D"], generator=generator, device=device)
    return {
        "k": normal(rows, generator, shape.dtype).transpose(1, 2),
        "v": normal(rows, generator, shape.dtype).transpose(1, 2),
        "mean": torch.randn(s["B"], s["H"], s["D"], generator=generator, device=device),
        "cov": root @ root.mT * (_VARIANCE / s["D"]),
    }


@dataclass(frozen=True)
class _Race(Race):
    """Ours chooses keys as the cache does, in every call."""

    def own(self, backend: str) -> Operator:
        """Our operator with a backend, and the choice."""
        from attnkit.kv.selectors import best

        score = super().own(backend)

        def run(k: Tensor, **others: Any) -> Tensor:
            scores: Tensor = score(k=k, **others)
            best(scores.transpose(1, 2), k.shape[1] // 2)
            return scores

        return run


def _facts(shape: Shape, inputs: dict[str, Any]) -> Facts:
    """Milliseconds of scoring and of choosing, each alone."""
    from attnkit.kv.selectors import best

    scores = ops.expected_attention_scores(**inputs).transpose(1, 2)
    parts: dict[str, Operator] = {
        "score_ms": ops.expected_attention_scores,
        "select_ms": lambda **_: best(scores, _kept(shape)).index,
    }
    found = {}
    for name, part in parts.items():
        entrant = Entrant.ready(name, shape.device, Calls(part, [inputs]), graph=True)
        found[name] = 1e3 * statistics.median(entrant.measure() for _ in range(_TIMED))
    return found


def _traffic(shape: Shape) -> float:
    """Bytes of keys and values."""
    s = shape.sizes
    return float(2 * s["B"] * s["T"] * s["Hkv"] * s["D"] * shape.dtype.itemsize)


def _flops(shape: Shape) -> float:
    """Of x . m and x . C x for every query head."""
    s = shape.sizes
    return float(2 * s["B"] * s["T"] * s["H"] * s["D"] * (s["D"] + 2))


@contextmanager
def _bare_kvpress() -> Iterator[None]:
    """The package without what its own __init__ loads (pipelines, data sets) and patches; nothing of it stays."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "kvpress"}
    for name in before:
        del sys.modules[name]
    spec = importlib.util.find_spec("kvpress")
    assert spec is not None  # it is looked for beforehand
    assert spec.origin is not None
    root = Path(spec.origin).parent
    for name, folder in (("kvpress", root), ("kvpress.presses", root / "presses")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "kvpress"]:
            del sys.modules[name]
        sys.modules.update(before)


def _kvpress(shape: Shape) -> Operator:
    """Its scores of moments that are given to it, in the keys' dtype as it makes them, and its choice."""
    with _bare_kvpress():
        press: Any = importlib.import_module("kvpress.presses.expected_attention_press").ExpectedAttentionPress(0.5)
    module = SimpleNamespace(config=SimpleNamespace(num_attention_heads=shape.sizes["H"]))

    def run(k: Tensor, v: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
        press.get_query_statistics = lambda module, hidden: (mean.to(k.dtype), cov.to(k.dtype))
        scores: Tensor = press.score(module, None, k.transpose(1, 2), v.transpose(1, 2), None, {})
        scores.topk(k.shape[1] // 2, dim=-1)
        return scores.transpose(1, 2)

    return run


def _kvpress_limits(shape: Shape) -> list[str]:
    if importlib.util.find_spec("kvpress") is None:
        return ["kvpress is not installed; run: pip install --no-deps kvpress==0.5.5"]
    return [] if shape.sizes["T"] > _SINKS else [f"{shape.sizes['T']} tokens (it wants more than {_SINKS})"]


def _layer(shape: Shape) -> Operator:
    """A decoder layer of transformers' Llama with random weights, on hidden states of its own."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    s, device = shape.sizes, shape.device
    width = s["H"] * s["D"]
    options: dict[str, Any] = {"attn_implementation": "sdpa", "head_dim": s["D"], "max_position_embeddings": s["T"]}
    options |= {"hidden_size": width, "intermediate_size": int(_FEED_FORWARD * width)}
    config = LlamaConfig(num_attention_heads=s["H"], num_key_value_heads=s["Hkv"], **options)
    with torch.device(device):
        layer: Any = LlamaDecoderLayer(config, 0).to(shape.dtype).eval()
        rotary: Any = LlamaRotaryEmbedding(config)
        turns = rotary(torch.empty(0, dtype=shape.dtype), torch.arange(s["T"])[None])
    hidden = normal((s["B"], s["T"], width), torch.Generator(device).manual_seed(0), shape.dtype)

    def run(**_: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext():
            out: Tensor = layer(hidden, position_embeddings=turns)
        return out

    return run


def _unjudged_limits(shape: Shape) -> list[str]:
    judged = [] if shape.dtype.itemsize == 2 else [f"kvpress is who runs in {shape.dtype}"]
    return judged + _kvpress_limits(shape)


_KVPRESS = Peer(
    "kvpress",
    "kvpress's ExpectedAttentionPress, score and top k",
    _kvpress,
    _kvpress_limits,
    devices=("cpu", "cuda"),
    package="kvpress",
    plain="it waits for the device",
)
PEERS: Registry[Peer] = Registry("peer")
for _peer in (
    _KVPRESS,
    replace(
        _KVPRESS,
        name="kvpress-unjudged",
        summary=f"{_KVPRESS.summary}, whose scores in 16 bits are at the edge of the budget",
        limits=_unjudged_limits,
        same_result=False,
    ),
    Peer(
        "llama-8b-layer",
        "the prefill of one whole decoder layer of transformers' Llama, as wide as the heads (32 of 128: that of 8B), "
        "FlashAttention-2 on a GPU, without a cache",
        _layer,
        devices=("cpu", "cuda"),
        same_result=False,
        plain="the host is ahead",
    ),
):
    PEERS.register(_peer.name, _peer)

RACE = _Race(
    op="expected_attention_scores",
    peers=PEERS,
    passes=("fwd",),
    lengths={"cuda": (8192, 32768, 131072), "cpu": (1024, 4096)},
    dims=(128,),
    heads=(32, 8),
    sizes=sizes,
    inputs=_inputs,
    reduced=few_heads(8),
    grads=(),
    flops=_flops,
    traffic=_traffic,
    fixed=("mean", "cov"),
    facts=_facts,
    replayed=True,
)
