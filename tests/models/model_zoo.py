"""Small models of every kind, and mixers as a third party would add them."""

from typing import Any

import torch
from torch import Tensor, nn

from attnkit.models import (
    PRESETS,
    AttnkitDecoderForCausalLM,
    AttnkitEncoderForMaskedLM,
    AttnkitXLSTMForCausalLM,
    mixer,
)
from attnkit.modules import MixerContext, Shared
from attnkit.testing import randomise

VOCABULARY = 64


@mixer("test_average", cache_type="linear_attention")
class Average(nn.Module):
    """A running average with a state; it keeps neither to boundaries nor to padding, and does not say that it does."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, context: MixerContext, shared: Shared) -> Any:
        state = context.read_state(self.layer_idx)
        state = torch.zeros_like(x[:, 0]) if state is None else state
        rows = []
        for row in x.unbind(1):
            state = 0.7 * state + 0.3 * row
            rows.append(state)
        context.write_state(state, self.layer_idx)
        return self.out_proj(torch.stack(rows, 1))


@mixer("test_producer", cache_type="linear_attention", produces=("memory",))
class Producer(Average):
    def forward(self, x: Tensor, context: MixerContext, shared: Shared) -> Any:
        out = super().forward(x, context, shared)
        return out, shared._replace(memory=out)


@mixer("test_consumer", cache_type=None, consumes=("memory",))
class Consumer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, context: MixerContext, shared: Shared) -> Any:
        return shared.memory * torch.sigmoid(self.gate_proj(x))


DECODERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_type": "layernorm",
        "mlp_types": ["mlp", "none"],
        "head_dim": 24,
    },
    "sliding": {"mixer_types": ["sliding_attention", "attention_nope", "sliding_attention_nope"], "sliding_window": 5},
    "entmax": {"mixer_types": ["entmax", "sliding_entmax", "entmax_nope"], "sliding_window": 5},
    "learned_entmax": {"mixer_types": ["entmax", "attention"], "entmax_alpha": "learned"},
    "hashed": {"mixer_types": ["hash_sparse_attention", "attention"], "sparse": {"num_buckets": 4}},
    "hashed_shared": {
        "mixer_types": ["hash_sparse_attention"] * 2,
        "num_key_value_heads": None,
        "sparse": {"num_buckets": 4, "qk_shared": True, "rounds": 2, "self_attend": False},
    },
    "dropped": {"mixer_types": ["drop_sparse_attention", "attention"]},
    "mlstm": {"mixer_types": ["mlstm", "mlstm_sigmoid"], "mlstm": {"igate_bias_init": 0.0, "qk_ratio": 1.0}},
    "lightning": {"mixer_types": ["lightning", "lightning_nope"]},
    "simple_gla": {"mixer_types": ["simple_gla", "simple_gla"]},
    "recurrent_hybrid": {
        "mixer_types": ["lightning", "attention", "mlstm"],
        "attention_bias": True,
        "mlstm": {"igate_bias_init": None},
        "lightning": {"silu": True, "layerwise_decay": False},
    },
    "xlstm": {},
    "states": {"mixer_types": ["test_average", "attention"]},
    "shared": {"mixer_types": ["test_producer", "attention", "test_consumer"]},
    "no_keys": {"mixer_types": ["test_producer", "test_consumer"]},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "encoder": {},
    "sliding_encoder": {"mixer_types": "sliding_attention", "sliding_window": 4, "norm_type": "layernorm"},
}
HEADS: dict[str, Any] = {
    "decoder": AttnkitDecoderForCausalLM,
    "encoder": AttnkitEncoderForMaskedLM,
    "xlstm": AttnkitXLSTMForCausalLM,
}
RECURRENT = ("mlstm", "lightning", "simple_gla", "recurrent_hybrid", "xlstm")
ATTENTION = ("dense", "tied", "sliding", "entmax", "learned_entmax", "hashed", "hashed_shared", *RECURRENT)  # padded, packed


def build(name: str, **options: Any) -> Any:
    """A random model in eval mode whose attention is far from uniform."""
    chosen = {**(ENCODERS if name in ENCODERS else DECODERS)[name], **options}
    if isinstance(chosen.get("mixer_types"), list):
        chosen["num_hidden_layers"] = len(chosen["mixer_types"])
    family = "encoder" if name in ENCODERS else "xlstm" if name == "xlstm" else "decoder"
    return randomise(HEADS[family](PRESETS[f"{family}-tiny"](**chosen)).eval())


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def boundaries(*lengths: int) -> dict[str, Any]:
    """The arguments that describe packed sequences."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def checkpoint_blocks(model: Any, **options: Any) -> None:
    """Switch gradient checkpointing on, under the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
