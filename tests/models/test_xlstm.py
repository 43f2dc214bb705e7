"""Our xLSTM and transformers' with the same weights give the same logits; sizes, states, and what is refused."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, xLSTMConfig, xLSTMForCausalLM

from attnkit import ops
from attnkit._core.errors import InputError, OptionError, UnsupportedError
from attnkit.models import (
    PRESETS,
    AttnkitXLSTMConfig,
    AttnkitXLSTMForCausalLM,
    from_xlstm,
    random_xlstm,
    summarise,
    xlstm_parity,
)
from attnkit.models.xlstm.conversion import rename
from attnkit.testing import tiny_model

# with that package transformers runs its kernels, which are none of ours to test
fallback = pytest.mark.skipif(importlib.util.find_spec("xlstm") is not None, reason="xlstm is installed")


def exact(seed: int = 0) -> Any:
    """Transformers' xLSTM in float64, whose norms do not go through float32."""
    xlstm = random_xlstm(seed).double()
    for module in xlstm.modules():
        if hasattr(module, "force_float32_reductions"):
            module.force_float32_reductions = False
    return xlstm


def ids(length: int, batch: int = 2) -> torch.Tensor:
    """Tokens but for padding, 1, whose embedding learns nothing with us."""
    return torch.randint(2, 512, (batch, length), generator=torch.Generator().manual_seed(1))


@fallback
def test_what_we_compare_with_is_the_recurrence() -> None:
    """Transformers' own form of several chunks, in float64, against our loop over tokens."""
    backend = exact().backbone.blocks[0].mlstm_layer.mlstm_backend
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 48, 4, width, generator=draw, dtype=torch.float64) for width in (16, 16, 32))
    i, f = torch.randn(2, 48, 4, generator=draw, dtype=torch.float64), torch.randn(2, 48, 4, generator=draw).double() + 3
    theirs, _ = backend(*(t.transpose(1, 2) for t in (q, k, v, i, f)))
    ours, _ = ops.mlstm_recurrent(q, k, v, i, f)
    torch.testing.assert_close(theirs.transpose(1, 2), ours, rtol=1e-4, atol=1e-5)


@fallback
@pytest.mark.parametrize("tokens", [1, 16, 71])
def test_logits_are_equal(tokens: int) -> None:
    """A step, a chunk, and four chunks with a rest that goes token by token."""
    found = xlstm_parity(random_xlstm(tokens), tokens=tokens)
    assert found.ok, found
    assert found.largest_logit > 1


@fallback
def test_logits_are_equal_in_float64() -> None:
    xlstm = exact()
    ours = from_xlstm(xlstm)
    with torch.no_grad():
        found, expected = ours(ids(64)).logits, xlstm(ids(64)).logits  # theirs ends in float32
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=1e-6)


@fallback
@pytest.mark.parametrize("part", ["igate_proj", "fgate_proj", "ogate_proj"])
def test_a_lost_gate_is_noticed(part: str) -> None:
    xlstm = random_xlstm()
    ours = from_xlstm(xlstm)
    with torch.no_grad():
        for layer in ours.model.layers:
            getattr(layer.mixer, part).weight.zero_()
        apart = (ours(ids(64)).logits - xlstm(ids(64)).logits).abs().max()
    assert apart > 1000 * xlstm_parity(xlstm).allowed


@fallback
def test_gradients_are_equal() -> None:
    xlstm = exact().train()
    ours = from_xlstm(xlstm)
    for model in (ours, xlstm):
        model(ids(32), labels=ids(32), use_cache=False).loss.backward()
    for name, theirs in xlstm.named_parameters():
        mine = ours.get_parameter(rename(name))
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@fallback
def test_generation_is_equal() -> None:
    xlstm = random_xlstm()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(ids(19), **options) for model in (from_xlstm(xlstm), xlstm)]
    assert torch.equal(*texts)


def test_from_a_folder_and_apart_from_the_source(tmp_path: Path) -> None:
    xlstm = random_xlstm()
    xlstm.save_pretrained(tmp_path / "theirs")
    ours, loaded = from_xlstm(xlstm), from_xlstm(tmp_path / "theirs")
    assert torch.equal(ours(ids(9)).logits, loaded(ids(9)).logits)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
        xlstm.lm_head.weight.zero_()
    assert ours(ids(9)).logits.abs().max() > 1
    ours.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(again, AttnkitXLSTMForCausalLM)
    assert torch.equal(again(ids(9)).logits, ours(ids(9)).logits)
    assert again.config.to_diff_dict() | {"_name_or_path": ""} == ours.config.to_diff_dict() | {"_name_or_path": ""}


def test_names_do_not_clash() -> None:
    assert type(AutoConfig.for_model("attnkit_xlstm")) is AttnkitXLSTMConfig
    assert type(AutoConfig.for_model("xlstm")) is xLSTMConfig


def test_sizes_are_those_of_the_7b_model() -> None:
    with torch.device("meta"):
        theirs = xLSTMForCausalLM(xLSTMConfig())
    found = summarise("xlstm-7b")
    assert found.parameters == sum(weight.numel() for weight in theirs.parameters())
    assert 6.8e9 < found.parameters < 6.9e9
    d, heads = 4096, 8
    block = (
        d * (d + 2 * d + d) + 2 * heads * (d + 1) + 3 * d * 10_944 + 3 * d
    )  # q and k, v and o gate, out; gates; SwiGLU; norms
    assert {layer.parameters for layer in found.layers} == {block}
    assert 45e6 < summarise("xlstm-50m").parameters < 55e6


def test_the_state_does_not_grow() -> None:
    model = AttnkitXLSTMForCausalLM(PRESETS["xlstm-tiny"]()).eval()
    sizes = []
    for length in (5, 50):
        with torch.no_grad():
            cache = model(ids(length) % 64, use_cache=True).past_key_values
        assert cache.get_seq_length() == length
        states = [layer.recurrent_states for layer in cache.layers]
        sizes.append([state.numel() for state in (states[0].values() if isinstance(states[0], dict) else states)])
    assert sizes[0] == sizes[1]


def test_gates_begin_where_the_configuration_says() -> None:
    model = AttnkitXLSTMForCausalLM(
        AttnkitXLSTMConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    assert model.config.intermediate_size == 192
    assert model.model.layers[0].mixer.igate_bias.tolist() == [-10.0] * 4
    assert model.model.layers[0].mixer.fgate_bias.tolist() == [3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(("cap", "bound"), [(30.0, 30.0), (2.0, 2.0), (math.inf, math.inf)])
def test_logits_are_bounded(cap: float, bound: float) -> None:
    model = AttnkitXLSTMForCausalLM(PRESETS["xlstm-tiny"](output_logit_soft_cap=cap)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
        largest = model(ids(9) % 64).logits.abs().max()
    assert largest <= bound
    assert largest > min(bound, 50) * 0.99
    assert model.bfloat16()(ids(9) % 64).logits.dtype == torch.float32


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM is no xLSTMForCausalLM"):
        from_xlstm(tiny_model("llama"))
    small = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 4}
    for name, value in (("weight_mode", "fused"), ("use_bias", True), ("add_out_norm", False)):
        with torch.device("meta"):
            xlstm = xLSTMForCausalLM(xLSTMConfig(**small))
        setattr(xlstm.config, name, value)
        with pytest.raises(UnsupportedError, match=f"{name}={value!r}; our xLSTM has"):
            from_xlstm(xlstm)
    with pytest.raises(InputError, match=r"no folder with a config\.json; give a xLSTMForCausalLM"):
        from_xlstm(tmp_path)
    with pytest.raises(OptionError, match="output_logit_soft_cap=0 must be positive"):
        AttnkitXLSTMConfig(output_logit_soft_cap=0)
    with pytest.raises(OptionError, match="mlstm has no option 'qk_dim'"):
        AttnkitXLSTMForCausalLM(PRESETS["xlstm-tiny"](mlstm={"qk_dim": 1}))
