"""What models and configurations refuse, in one clear message."""

from typing import Any

import pytest
import torch
from model_zoo import Consumer, boundaries, build, checkpoint_blocks, tokens
from transformers import DynamicCache, StaticCache

from attnkit._core.errors import InputError, OptionError, ShapeError, UnsupportedArchitecture, UnsupportedError
from attnkit.inference import apply
from attnkit.models import MIXERS, AttnkitDecoderConfig, AttnkitEncoderConfig, mixer
from attnkit.modules import MixerContext, RotaryEmbedding, SoftmaxAttention, make_norm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer_types": ["attention", "atention"], "num_hidden_layers": 2}, "layer 1: unknown mixer 'atention'; did you mean"),
        ({"mixer_types": ["attention"], "num_hidden_layers": 2}, "mixer_types has 1 entries for num_hidden_layers=2"),
        ({"mlp_types": ["swiglu", "moe"], "num_hidden_layers": 2}, "layer 1: mlp 'moe' is unknown; known: swiglu, mlp, none"),
        ({"mixer_types": ["attention", "test_consumer"], "num_hidden_layers": 2}, r"layer 1 \(test_consumer\) reads memory"),
        ({"mixer_types": "sliding_attention"}, r"layer 0 \(sliding_attention\) needs sliding_window"),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "contradicts mixer_types"),
        ({"num_attention_heads": 6}, "no multiple of num_attention_heads=6"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 33}, "head_dim=33 is odd"),
        ({"norm_type": "batchnorm"}, "norm_type='batchnorm'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "default rotary embedding only"),
        ({"partial_rotary_factor": 0.5}, "default rotary embedding only"),
    ],
)
def test_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttnkitDecoderConfig(**options)


def test_a_producer_must_come_before() -> None:
    for order, fine in ((["test_producer", "test_consumer"], True), (["test_consumer", "test_producer"], False)):
        if fine:
            AttnkitDecoderConfig(mixer_types=order, num_hidden_layers=2)
        else:
            with pytest.raises(OptionError, match=r"layer 0 .* no earlier layer produces"):
                AttnkitDecoderConfig(mixer_types=order, num_hidden_layers=2)


def test_an_encoder_takes_no_causal_mixer() -> None:
    with pytest.raises(UnsupportedError, match=r"layer 1 \(test_average\) is causal only"):
        AttnkitEncoderConfig(mixer_types=["attention", "test_average"], num_hidden_layers=2)


def test_a_changed_configuration_is_checked_again() -> None:
    model = build("dense")
    model.config.mixer_types = ["attention"]
    with pytest.raises(OptionError, match="mixer_types has 1 entries"):
        type(model)(model.config)


def test_registry() -> None:
    with pytest.raises(OptionError, match="'attention' is registered twice"):
        mixer("attention", cache_type=None)(Consumer)
    with pytest.raises(OptionError, match="cache_type='mamba'"):
        mixer("test_wrong", cache_type="mamba")(Consumer)
    with pytest.raises(OptionError, match="produces='gate'"):
        mixer("test_wrong", cache_type=None, produces=("gate",))(Consumer)
    assert "test_wrong" not in MIXERS


def test_a_broken_promise_is_noticed() -> None:
    name = "test_silent"
    if name not in MIXERS:
        mixer(name, cache_type="full_attention", produces=("memory",), needs_rope=False)(
            lambda config, index: SoftmaxAttention(64, 4, layer_idx=index, rope=False)
        )
    model = build("dense", mixer_types=[name])
    with pytest.raises(InputError, match=r"layer 0 \(test_silent\) is registered to produce memory, and did not"):
        model(tokens(1, 4))


IDS = tokens(1, 9)
CU = boundaries(4, 5)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("dense", {"attention_mask": torch.ones_like(IDS), **CU}, OptionError, "attention_mask and cu_seq_lens_q"),
        ("dense", {"past_key_values": DynamicCache(), **CU}, OptionError, "packed sequences and a cache"),
        ("dense", {"use_cache": True, **CU}, OptionError, "packed sequences and a cache"),
        ("dense", CU | {"cu_seq_lens_k": None}, OptionError, "belong together"),
        ("dense", CU | {"cu_seq_lens_k": boundaries(5, 4)["cu_seq_lens_k"]}, OptionError, "differ"),
        ("dense", {"max_length_q": 4}, OptionError, "give cu_seq_lens_q"),
        ("dense", boundaries(4, 4), ShapeError, "must rise from 0 to 9"),
        ("dense", {"attention_mask": torch.ones(1, 8)}, ShapeError, r"expected \[1, 9\]"),
        ("dense", {"attention_mask": torch.ones(1, 1, 9, 9)}, UnsupportedError, "prepared masks"),
        ("dense", {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, OptionError, "start again inside a row"),
        ("dense", {"position_ids": torch.arange(8)[None]}, ShapeError, "position_ids has shape"),
        ("dense", {"inputs_embeds": torch.zeros(1, 9, 64)}, OptionError, "one of input_ids and inputs_embeds"),
        ("dense", {"labels": IDS, "logits_to_keep": 1}, OptionError, "leave out logits_to_keep"),
        ("dense", {"logits_to_keep": -1}, OptionError, "logits_to_keep=-1"),
        ("states", CU, UnsupportedError, r"layer 0 \(test_average\) does not keep packed sequences apart"),
        ("states", {"attention_mask": (IDS > 20).long()}, UnsupportedError, r"layer 0 \(test_average\) does not leave padding"),
        ("no_keys", {"past_key_values": DynamicCache()}, UnsupportedError, "StateCache"),
    ],
)
def test_calls(name: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(name)(IDS, **arguments)


def test_packed_rows() -> None:
    with pytest.raises(ShapeError, match="one row"):
        build("dense")(tokens(2, 9), **CU)


def test_static_caches() -> None:
    model = build("dense")
    with pytest.raises(UnsupportedError, match="StaticCache is static"):
        model(IDS, past_key_values=StaticCache(model.config, max_cache_len=16))


def test_encoders_cache_nothing() -> None:
    with pytest.raises(UnsupportedError, match="use_cache"):
        build("encoder").model(IDS, use_cache=True)


def test_policies_say_that_they_do_not_serve_these_models() -> None:
    with pytest.raises(UnsupportedArchitecture, match="SoftmaxAttention computes attention on its own"):
        apply(build("dense"), "window")


def test_training() -> None:
    model = build("dense").train()
    assert model(IDS).past_key_values is None
    checkpoint_blocks(model)
    with pytest.raises(OptionError, match="set use_cache=False"):
        model(IDS, use_cache=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"window": 0}, "window=0"),
        ({"num_heads": 5}, "no multiple of num_heads=5"),
        ({"num_heads": 8}, r"head_dim=8 is outside 16\.\.256"),
    ],
)
def test_attention_modules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SoftmaxAttention(**({"hidden_size": 64, "num_heads": 4} | options))


def test_modules() -> None:
    with pytest.raises(OptionError, match=r"context\.rope is missing"):
        SoftmaxAttention(64, 4)(torch.zeros(1, 3, 64), MixerContext())
    with pytest.raises(OptionError, match="head_dim=7 is odd"):
        RotaryEmbedding(7)
    with pytest.raises(OptionError, match="norm_type='none'"):
        make_norm("none", 8)
