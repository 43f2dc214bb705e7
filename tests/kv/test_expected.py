"""Expected attention in the cache's layout, and beside kvpress, whose scores rope="mean" reproduces."""

from typing import Any

import pytest
import torch
from kvpress_peer import peer
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from attnkit import errors, kv, ops

HEADS, KV_HEADS, WIDTH, TOKENS = 6, 2, 32, 400


@pytest.fixture
def press() -> Any:
    return peer().ExpectedAttentionPress


def _layer() -> Any:
    config = LlamaConfig(
        hidden_size=96, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=WIDTH, max_position_embeddings=4096
    )
    layer: Any = LlamaAttention(config, layer_idx=0)
    layer.rotary_emb = LlamaRotaryEmbedding(config)
    torch.nn.init.normal_(layer.q_proj.weight, std=0.2)
    return layer


@torch.no_grad()
def _ours(layer: Any, hidden: Tensor, keys: Tensor, values: Tensor, *, covariance: bool, norm: str, eps: float) -> Tensor:
    queries = layer.q_proj(hidden).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    moments = kv.QueryMoments(sinks=4)
    for part in queries.split(150, 2):
        moments.update(part)
    mean, cov = ops.future_query_moments(
        moments.mean,
        moments.covariance() if covariance else None,
        inv_freq=layer.rotary_emb.inv_freq,
        start=TOKENS,
        rope="mean",
    )
    return kv.expected_attention_scores(keys, values, mean, cov, eps=eps, value_norm=norm)


@pytest.mark.parametrize(
    ("covariance", "norm", "eps"), [(True, "l2", 0.0), (True, "l2", 0.02), (False, "l2", 0.0), (True, "none", 0.0)]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_paper_s_scores(press: Any, batch: int, covariance: bool, norm: str, eps: float) -> None:
    layer = _layer()
    hidden = torch.randn(batch, TOKENS, 96)
    keys, values = torch.randn(2, batch, KV_HEADS, TOKENS, WIDTH).unbind()
    theirs = press(0.5, use_covariance=covariance, use_vnorm=norm == "l2", epsilon=eps)
    with torch.no_grad():
        wanted = theirs.score(layer, hidden, keys, values, None, {})
    found = _ours(layer, hidden, keys, values, covariance=covariance, norm=norm, eps=eps)
    assert (found[..., 4:] - wanted[..., 4:]).abs().max() <= 1e-5 * wanted[..., 4:].abs().max()
    ranks, theirs_ranked = (t[..., 4:].argsort(-1).argsort(-1) for t in (found, wanted))
    assert (ranks == theirs_ranked).float().mean() >= 0.999
    if batch == 1:  # its sinks are above the largest score of the whole batch, ours above those of their row
        torch.testing.assert_close(found[..., :4], wanted[..., :4])


def test_the_layout_is_the_cache_s() -> None:
    keys, values = torch.randn(2, 2, KV_HEADS, 30, WIDTH).unbind()
    mean, cov = torch.randn(2, HEADS, WIDTH), torch.eye(WIDTH).expand(2, HEADS, -1, -1)
    for valid in (None, torch.rand(2, 30) < 0.7, torch.rand(2, KV_HEADS, 30) < 0.7):
        found = kv.expected_attention_scores(keys, values, mean, cov, valid=valid, eps=0.01)
        assert found.is_contiguous()
        own = valid.transpose(1, 2) if valid is not None and valid.dim() == 3 else valid
        wanted = ops.expected_attention_scores(keys.transpose(1, 2), values.transpose(1, 2), mean, cov, valid=own, eps=0.01)
        assert torch.equal(found, wanted.transpose(1, 2))
    with pytest.raises(errors.ShapeError, match="keys has shape"):
        kv.expected_attention_scores(keys[0], values, mean, cov)
