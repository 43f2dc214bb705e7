"""What the operators with scalar decay publish about themselves: cases, oracle, invariances, capabilities, refusals."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit._core.checks import FLOATS
from attnkit._core.invariance import alone
from attnkit._core.opspec import Case, OpSpec, Refusal
from attnkit.ops._chunkwise_core.conformance import (
    STEP_CAPABILITIES,
    Make,
    arguments,
    draw,
    flattened,
    linear,
    packed,
    rechunked,
    step_arguments,
    whole,
)
from attnkit.ops._chunkwise_core.state import RecurrentState
from attnkit.ops._chunkwise_core.step import STEP_BACKENDS
from attnkit.ops.scalar_decay.api import lightning_attention, lightning_slopes, scalar_decay_attention, scalar_decay_step
from attnkit.ops.scalar_decay.backends import BACKENDS
from attnkit.ops.scalar_decay.call import ScalarDecayCall, prepare, prepare_lightning, prepare_step
from attnkit.ops.scalar_decay.reference import MAX_PAIRS, parallel, recurrent

__all__ = ["SPECS"]

HALVES = (torch.float16, torch.bfloat16)
Prepare = Callable[..., ScalarDecayCall]


def _make(
    length: int | list[int],
    *,
    heads: tuple[int, int] = (2, 2),
    width: int = 16,
    width_v: int = 24,
    batch: int = 1,
    state: bool = False,
    mean: float = 0.0,
    positive: bool = False,
    decay: str = "",
    slope: float | None = None,
    **options: Any,
) -> Make:
    """`decay` "token": one for each token; "extreme": some of them 0, -1e3 and -inf; else slopes, all `slope` where given."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        rows = (sum(length),) if isinstance(length, list) else (batch, length)
        count = (len(length) if isinstance(length, list) else batch) if state else 0
        inputs = draw(generator, rows, heads, width, width_v, states=count, mean=mean, positive=positive)
        if decay:
            inputs["g"] = -torch.rand(*rows, heads[1], generator=generator)
            if decay == "extreme":
                inputs["g"][..., 7::5, :] = 0
                inputs["g"][..., 20:23, :], inputs["g"][..., 40, :] = -1e3, -torch.inf
        else:
            inputs["slopes"] = lightning_slopes(heads[1]) if slope is None else torch.full((heads[1],), slope)
        if isinstance(length, list):
            inputs = packed(inputs, length)
        return inputs | options

    return make


def _spec(name: str, gate: str, prepare: Prepare, cases: tuple[Case, ...], **texts: Any) -> OpSpec:
    def oracle(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return flattened(recurrent(prepare(*args, **kwargs)))

    def naive(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return flattened(parallel(prepare(*args, **kwargs)))

    def row_scale(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        state = options.pop("initial_state", None)
        positive = None if state is None else state._replace(S=state.S.abs())
        return parallel(prepare(q.abs(), k.abs(), v.abs(), **options, initial_state=positive))[0]

    batched = dict.fromkeys(("q", "k", "v", "S", *(["g"] if gate == "g" else [])), 0)
    return OpSpec(
        name=name,
        outputs=("out", "S"),
        cases=cases,
        oracle=oracle,
        naive=naive,
        prepare=prepare,
        backends=BACKENDS,
        dtypes=FLOATS,
        sites=("O_out", "grad_out"),
        row_scale=row_scale,
        arguments=arguments,
        wide=("S",),
        invariances=(
            linear(("values around 2",)),
            rechunked(16, ("grouped heads",)),
            rechunked(512, ("grouped heads",)),
            alone(batched, ("grouped heads",), exact=False),
        ),
        capabilities={
            "cpu": "yes, chunk by chunk in plain torch",
            "cuda": "yes, Triton kernels where D is at most 256 and chunks have at most 512 rows, else plain torch",
            "backward": f"yes, {gate} and states included; deterministic",
            "packed": "yes, empty sequences included",
            "grouped heads": "any H that is a multiple of Hkv; decays and states belong to the heads of k",
            "compile": "yes, fullgraph",
            "head width": "any, D != Dv",
            "memory": "linear in T: one state a chunk beyond inputs and outputs, in backward two",
            "float64": "yes",
        },
        **texts,
    )


def _shared(decay: str, gate: str) -> tuple[Case, ...]:
    grads, fixed = ("q", "k", "v", gate), (gate, "S")
    return (
        Case("grouped heads", _make(127, heads=(4, 2), batch=2, decay=decay), grads, fixed),
        Case("from a state", _make(65, batch=2, state=True, decay=decay), (*grads, "S"), fixed),
        Case("packed, empty sequences, from states", _make([40, 0, 1, 63, 0], state=True, decay=decay), (*grads, "S"), fixed),
        Case(
            "values around 2",
            _make(100, heads=(4, 2), width=64, width_v=64, mean=2.0, positive=True, decay=decay),
            (),
            fixed,
            bias=HALVES,
        ),
        Case("no tokens", _make(0, state=True, decay=decay), (), fixed),
    )


def _make_step(batch: int, heads: tuple[int, int], width: int = 16, width_v: int = 24, *, special: bool = False) -> Make:
    """Log decays of which one is 0 and one -inf if `special`."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        inputs = draw(generator, (batch,), heads, width, width_v, states=batch)
        inputs["g"] = -torch.rand(batch, heads[1], generator=generator)
        if special:
            inputs["g"][0, 0], inputs["g"][0, 1] = 0, -torch.inf
        return inputs

    return make


def _step_form(form: Callable[[ScalarDecayCall], Any]) -> Callable[..., tuple[Tensor, ...]]:
    def run(**inputs: Any) -> tuple[Tensor, ...]:
        out, *state = flattened(form(prepare(**whole(inputs))))
        return out[:, 0], *state

    return run


def _step_row_scale(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: RecurrentState) -> Tensor:
    return _step_form(parallel)(q=q.abs(), k=k.abs(), v=v.abs(), g=g, state=state.each(torch.abs))[0]


_CHUNKS = Refusal("chunk_size that is no power of two from 16 on", "kernels have no other tiles")
_LONG = Refusal(f'backend="reference" above {MAX_PAIRS} pairs of tokens', "it writes them all down")
_TWICE = Refusal("a backward pass of the backward pass", "gradients are first order")
SPECS = (
    _spec(
        "scalar_decay_attention",
        "g",
        prepare,
        (
            *_shared("token", "g"),
            Case("one token", _make(1, decay="token"), ("q", "k", "v"), ("g", "S")),
            Case("decays from none to all", _make(70, decay="extreme"), ("q", "k", "v"), ("g", "S")),
            Case("empty batch", _make(5, batch=0, decay="token"), (), ("g", "S")),
        ),
        summary="linear attention with a log decay for each token and head (Mamba-2, simple GLA)",
        source="Dao & Gu 2024 (arXiv:2405.21060); chunks as in Beck et al. 2025 (arXiv:2503.14376)",
        function=scalar_decay_attention,
        refusals=(Refusal("g above 0 (checked on the CPU)", "states would grow without bound"), _CHUNKS, _LONG, _TWICE),
    ),
    _spec(
        "lightning_attention",
        "slopes",
        prepare_lightning,
        (
            *_shared("", "slopes"),
            Case("nothing forgotten", _make(100, slope=0.0), ("q", "k", "v"), ("slopes", "S")),
            Case("twenty heads, steep", _make(45, heads=(20, 20), slope=1.05), ("q", "k", "v"), ("slopes", "S")),
            Case("4,096 tokens, slope 0.9", _make(4096, slope=0.9), (), ("slopes", "S"), level="full"),
        ),
        summary="linear attention with a constant decay for each head (lightning attention)",
        source="Ling Team 2025 (arXiv:2510.19338); Qin et al. 2024 (arXiv:2401.04658)",
        function=lightning_attention,
        refusals=(Refusal("slopes below 0 (checked on the CPU)", "states would grow without bound"), _CHUNKS, _LONG, _TWICE),
    ),
    OpSpec(
        name="scalar_decay_step",
        summary="one token of linear attention with scalar decay, for decoding",
        source="Dao & Gu 2024 (arXiv:2405.21060)",
        function=scalar_decay_step,
        outputs=("out", "S"),
        cases=(
            Case("grouped heads", _make_step(2, (4, 2)), ("q", "k", "v", "g", "S"), ("g", "S")),
            Case("wide heads, decays from none to all", _make_step(1, (6, 2), 300, 40, special=True), (), ("g", "S")),
        ),
        oracle=_step_form(recurrent),
        naive=_step_form(recurrent),
        prepare=prepare_step,
        backends=STEP_BACKENDS,
        dtypes=FLOATS,
        sites=("O_out", "grad_out"),
        row_scale=_step_row_scale,
        arguments=step_arguments,
        wide=("S",),
        invariances=(alone(dict.fromkeys(("q", "k", "v", "g", "S"), 0), ("grouped heads",), ("triton",)),),
        capabilities=STEP_CAPABILITIES,
    ),
)
