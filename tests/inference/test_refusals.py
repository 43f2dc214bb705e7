"""What policies refuse, by name and before a wrong number comes out."""

import pytest
import torch
from oracles import prompt
from torch import nn
from transformers import Cache, StaticCache, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import QuantizedLayer

from attnkit._core.errors import PolicyError, UnsupportedArchitecture, UnsupportedError
from attnkit.inference import apply
from attnkit.testing import tiny_model


class _Quantized(QuantizedLayer):
    def __init__(self):
        pass

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, q_tensor):
        return q_tensor


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda config: StaticCache(config, max_cache_len=20),
            r"StaticCache is static \(compileable\).*pass h.new_cache\(\) or a DynamicCache",
        ),
        (lambda config: Cache(layers=[_Quantized(), _Quantized()]), "Cache stores quantised keys; pass h.new_cache"),
        (lambda config: object(), "object is not a decoder's cache"),
    ],
)
def test_caches_that_policies_cannot_serve(make, message):
    model = tiny_model("llama")
    with torch.no_grad(), apply(model, "window"), pytest.raises(PolicyError, match=message):
        model(prompt(1, 4), past_key_values=make(model.config))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_static_generation_is_refused_by_name(family):
    model = tiny_model(family)
    with apply(model, "window"), pytest.raises(PolicyError, match="StaticCache is static"):
        model.generate(prompt(2, 5), max_new_tokens=3, cache_implementation="static")


def test_attention_weights_are_refused():
    model, ids = tiny_model("llama"), prompt(1, 4)
    with apply(model, "dense"):
        with pytest.raises(PolicyError, match="output_attentions=True asks for attention weights"):
            model(ids, output_attentions=True)
        with pytest.raises(UnsupportedError, match=r"position_bias: .* do not support a bias for each pair"):
            model(ids, position_bias=torch.zeros(1))
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(PolicyError, match=r"config.output_attentions asks for attention weights"):
        apply(model, "dense")


def test_dropout_is_refused():
    model = tiny_model("llama", attention_dropout=0.1)
    with pytest.raises(PolicyError, match=r"training mode with attention dropout; .* call model.eval\(\) first"):
        apply(model.train(), "dense")
    with torch.no_grad(), apply(model.eval(), "dense"):
        model(prompt(1, 4))
        with pytest.raises(PolicyError, match=r"attention dropout 0.1 is on"):
            model.train()(prompt(1, 4))


def test_a_config_shared_by_two_models_is_noticed():
    model, ids = tiny_model("llama"), prompt(1, 4)
    sibling = type(model)(model.config).eval()
    with torch.no_grad(), apply(model, "dense"):
        model(ids)
        with pytest.raises(PolicyError, match="LlamaAttention belongs to another model, which shares its config"):
            sibling(ids)


class _OwnAttention(nn.Module):
    is_causal = True

    def forward(self, x):
        return x


def test_models_that_do_not_use_the_interface_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn = _OwnAttention()
    with pytest.raises(
        UnsupportedArchitecture, match="_OwnAttention computes attention on its own; policies need modules that call ALL_ATT"
    ):
        apply(model, "dense")
    model.model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedArchitecture, match=r"LlamaModel has no module whose class is named ...Attention"):
        apply(model, "dense")
    with pytest.raises(UnsupportedArchitecture, match="Linear is not a transformers model"):
        apply(nn.Linear(2, 2), "dense")
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11))
    with pytest.raises(UnsupportedArchitecture, match="T5ForConditionalGeneration is an encoder-decoder"):
        apply(t5, "dense")


def test_attention_classes_without_source_are_refused():
    namespace = {"nn": nn}
    exec("class HiddenAttention(nn.Module):\n    pass", namespace)
    model = tiny_model("llama")
    model.model.layers[1].self_attn = namespace["HiddenAttention"]()
    with pytest.raises(UnsupportedArchitecture, match="HiddenAttention computes attention on its own"):
        apply(model, "dense")
