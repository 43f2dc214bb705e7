"""The mixers and feed-forward parts that come with attnkit."""

from functools import partial
from typing import Any

from torch import nn

from attnkit._core.errors import OptionError
from attnkit.models.registry import MLPS, mixer
from attnkit.modules import (
    MLP,
    EntmaxAttention,
    LightningAttention,
    MLSTMLayer,
    SimpleGLA,
    SoftmaxAttention,
    SparseCausalAttention,
    SwiGLU,
)

__all__: list[str] = []


def _attention(config: Any, layer_idx: int, *, rope: bool, sliding: bool) -> nn.Module:
    return SoftmaxAttention(
        config.hidden_size, config.num_attention_heads, **_heads(config), layer_idx=layer_idx, rope=rope,
        window=config.sliding_window if sliding else None,
    )  # fmt: skip


def _entmax(config: Any, layer_idx: int, *, rope: bool, sliding: bool) -> nn.Module:
    """`config.entmax_alpha` is a number or "learned"; where it is absent, 1.5."""
    return EntmaxAttention(
        config.hidden_size, config.num_attention_heads, **_heads(config), layer_idx=layer_idx, rope=rope,
        window=config.sliding_window if sliding else None, alpha=getattr(config, "entmax_alpha", 1.5),
    )  # fmt: skip


def _heads(config: Any) -> dict[str, Any]:
    return {"num_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "bias": config.attention_bias}


for _name, _build, _rope, _sliding in (
    ("attention", _attention, True, False),
    ("attention_nope", _attention, False, False),
    ("sliding_attention", _attention, True, True),
    ("sliding_attention_nope", _attention, False, True),
    ("entmax", _entmax, True, False),
    ("entmax_nope", _entmax, False, False),
    ("sliding_entmax", _entmax, True, True),
):
    mixer(
        _name,
        cache_type="sliding_attention" if _sliding else "full_attention",
        needs_rope=_rope,
        bidirectional=True,
        packing=True,
        padding=True,
    )(partial(_build, rope=_rope, sliding=_sliding))


_SPARSE = ("qk_shared", "num_buckets", "rounds", "self_attend", "drop_rate", "seed", "resample")


def _sparse(config: Any, layer_idx: int, *, mode: str) -> nn.Module:
    """Reads `sparse`, a dictionary of further arguments of SparseCausalAttention, from the configuration.

    Raises:
        OptionError: an option that it does not have.
    """
    options = _options(config, "sparse", _SPARSE)
    return SparseCausalAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layer_idx=layer_idx,
        bias=config.attention_bias,
        mode=mode,
        seed=layer_idx + options.pop("seed", 0),
        **options,
    )


for _mode in ("hash", "drop"):
    mixer(f"{_mode}_sparse_attention", cache_type="full_attention", needs_rope=True, packing=True, padding=True)(
        partial(_sparse, mode=_mode)
    )

_MLSTM = (
    "qk_ratio", "v_ratio", "gate_soft_cap", "input_gate", "normalize", "eps", "chunk_size", "igate_bias_init", "norm_eps",
)  # fmt: skip
_LIGHTNING = ("rotary_share", "silu", "norm_groups", "layerwise_decay")


def _mlstm(config: Any, layer_idx: int, **defaults: Any) -> nn.Module:
    """Reads `mlstm`, a dictionary of further arguments of MLSTMLayer, from the configuration.

    Raises:
        OptionError: an option that it does not have.
    """
    options = defaults | _options(config, "mlstm", _MLSTM)
    return MLSTMLayer(
        config.hidden_size, config.num_attention_heads, layer_idx=layer_idx, bias=config.attention_bias, **options
    )


def _lightning(config: Any, layer_idx: int, *, rope: bool) -> nn.Module:
    """Reads `lightning`, a dictionary of further arguments of LightningAttention, from the configuration.

    `layerwise_decay` (True) lets deeper layers forget more slowly.

    Raises:
        OptionError: an option that it does not have.
    """
    options = _options(config, "lightning", _LIGHTNING)
    layers = config.num_hidden_layers if options.pop("layerwise_decay", True) else None
    return LightningAttention(
        config.hidden_size, config.num_attention_heads, head_dim=config.head_dim, layer_idx=layer_idx, num_layers=layers,
        rope=rope, bias=config.attention_bias, **options,
    )  # fmt: skip


def _simple_gla(config: Any, layer_idx: int) -> nn.Module:
    return SimpleGLA(config.hidden_size, config.num_attention_heads, layer_idx=layer_idx, bias=config.attention_bias)


def _options(config: Any, key: str, known: tuple[str, ...]) -> dict[str, Any]:
    options = dict(getattr(config, key, None) or {})
    for name in options:
        if name not in known:
            raise OptionError(f"{key} has no option {name!r}; it has {', '.join(known)}")
    return options


_SIGMOID: dict[str, Any] = {"input_gate": "sigmoid", "normalize": False}
mixer("mlstm", cache_type="linear_attention", packing=True, padding=True)(_mlstm)
mixer("mlstm_sigmoid", cache_type="linear_attention", packing=True, padding=True)(partial(_mlstm, **_SIGMOID))
mixer("simple_gla", cache_type="linear_attention", packing=True, padding=True)(_simple_gla)
for _name, _rope in (("lightning", True), ("lightning_nope", False)):
    mixer(_name, cache_type="linear_attention", needs_rope=_rope, packing=True, padding=True)(partial(_lightning, rope=_rope))

MLPS.register("swiglu", lambda config, _: SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias))
MLPS.register("mlp", lambda config, _: MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias))
MLPS.register("none", None)
