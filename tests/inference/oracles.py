"""Attention written out from its definition, put into whole models: the oracle of every policy.

The model runs with all position_ids 0, so that its own rotary embedding turns nothing; the oracle turns each pair of
query and key by the distance that the policy's definition gives the two, in the dtype of the model.
"""

import copy
import itertools

import torch
from torch import Tensor
from transformers import AttentionInterface, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from attnkit._core.opspec import Budget

_numbers = itertools.count()


def real_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def window_rules(real: Tensor, window: int, sink: int, rerotate: bool, dense_rows: int = 0) -> tuple[Tensor, Tensor]:
    """seen [B, T, T] and distance [B, T, T], token by token; the first `dense_rows` tokens of a row see all before them."""
    batch, length = real.shape
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    distance = torch.zeros(batch, length, length, dtype=torch.float64)
    for row in range(batch):
        tokens = real[row].nonzero()[:, 0].tolist()
        for rank, query in enumerate(tokens):
            dense = query < dense_rows
            cached = [r for r in range(rank + 1) if dense or r < sink or r > rank - window]
            for place, r in enumerate(cached):
                seen[row, query, tokens[r]] = True
                distance[row, query, tokens[r]] = len(cached) - 1 - place if rerotate else rank - r
    return seen, distance


def oracle_logits(
    model,
    ids,
    mask=None,
    *,
    window=10**6,
    sink=0,
    rerotate=False,
    dense_rows=0,
    dtype=torch.float64,
    inv_freq=None,
    factor=1.0,
):
    """Logits [B, T, V] of a copy of the model in `dtype`, with written-out attention; rows of padding mean nothing.

    `inv_freq` and `factor` replace the rotary embedding of full-attention layers.
    """
    real = real_tokens(ids, mask)
    model = copy.deepcopy(model).to(dtype)
    rotary = model.model.rotary_emb

    def attention(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        local = sliding_window is not None
        rules = (sliding_window, 0, False) if local else (window, sink, rerotate, dense_rows)
        seen, distance = window_rules(real, *rules)
        own = rotary.inv_freq if hasattr(rotary, "inv_freq") else getattr(rotary, f"{module.layer_type}_inv_freq")
        replaced = inv_freq is not None and not local
        frequencies = (inv_freq if replaced else own).double()
        width = 2 * frequencies.numel()
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        pairs = lambda x: torch.complex(x[..., : width // 2], x[..., width // 2 : width])  # noqa: E731
        turn = torch.polar(torch.ones(()).double(), distance[:, None, :, :, None] * frequencies)
        turn = turn.to(pairs(query).dtype)
        scores = (pairs(query)[:, :, :, None] * pairs(key).conj()[:, :, None] * turn).real.sum(-1)
        scores = scores * (factor**2 if replaced else 1.0)
        scores = scores + query[..., width:] @ key[..., width:].transpose(-1, -2)
        scores = (scores * scaling).masked_fill(~seen[:, None], -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        return (weights @ value).transpose(1, 2), None

    name = f"oracle_{next(_numbers)}"
    AttentionInterface.register(name, attention)
    model.set_attn_implementation(name)
    with torch.no_grad():
        logits = model(ids, position_ids=torch.zeros_like(ids), use_cache=False).logits
    AttentionInterface._global_mapping.pop(name)
    return logits


def assert_within(out: Tensor, naive: Tensor, oracle: Tensor, rows: Tensor | None = None) -> None:
    """The operators' error budget, applied to logits: as close to the oracle as the naive form in the same precision."""
    if rows is not None:
        out, naive, oracle = out[rows], naive[rows], oracle[rows]
    budget = Budget()
    slack = budget.ulps * torch.finfo(out.dtype).eps / 2 * oracle.abs().max()
    for size in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
        error, allowed = size(out - oracle), budget.forward * size(naive - oracle) + slack
        assert error <= allowed, f"error {error:.3e} exceeds {allowed:.3e}"


def prompt(batch: int, length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (batch, length), generator=generator)


def padded(lengths: list[int], *, side: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids and mask [B, T] of rows of these lengths, and position_ids as `generate` counts them."""
    width = max(lengths)
    ids = prompt(len(lengths), width, seed=seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(width - length, None) if side == "left" else slice(0, length)] = 1
    ids = ids.masked_fill(mask == 0, 0)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def special_models():
    """Models with softcapped scores and with learned sinks; each has a local layer (7 keys) and a full one; eager attention."""
    shape = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "sliding_window": 7, "pad_token_id": 0,
        "initializer_range": 0.3, "attn_implementation": "eager",
    }  # fmt: skip
    capped = Gemma2Config(**shape, attn_logit_softcapping=0.5)
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
    with_sinks = GptOssConfig(**shape, **experts, rope_parameters=rope)
    return Gemma2ForCausalLM(capped).eval(), GptOssForCausalLM(with_sinks).eval()
