"""Our decoder and transformers' Llama with the same weights give the same logits."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnkit._core.errors import InputError, UnsupportedError
from attnkit.models import PRESETS, AttnkitDecoderForCausalLM, from_llama, llama_config, parity
from attnkit.models.decoder.conversion import RENAMED
from attnkit.testing import tiny_model

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
    "all_heads": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_equal(variant: str) -> None:
    found = parity(tiny_model("llama", **VARIANTS[variant]))
    assert found.ok, found
    assert found.largest_logit > 1


def test_a_difference_is_noticed() -> None:
    """The base of the rotary embedding is a small thing to lose."""
    llama = tiny_model("llama")
    ours = from_llama(llama)
    ours.model.rotary.theta = 9_000.0
    ids = torch.randint(61, (2, 64))
    with torch.no_grad():
        apart = (ours(ids).logits - llama(ids).logits).abs().max()
    assert apart > 100 * parity(llama).allowed


def test_generation_is_equal_with_padding() -> None:
    llama = tiny_model("llama")
    ours = from_llama(llama)
    ids = torch.randint(1, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for options in ({}, {"num_beams": 3}):
        texts = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options) for m in (ours, llama)]
        assert torch.equal(*texts)


def test_gradients_are_equal() -> None:
    llama = tiny_model("llama")
    ours = from_llama(llama)
    ids = torch.randint(1, 61, (2, 17))
    for model in (ours, llama):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, theirs in llama.named_parameters():
        mine = ours.get_parameter(".".join(RENAMED.get(part, part) for part in name.split(".")))
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_from_a_folder_and_apart_from_the_source(tmp_path: Path) -> None:
    llama = tiny_model("llama", tie_word_embeddings=True)
    llama.save_pretrained(tmp_path)
    ours, loaded = from_llama(llama), from_llama(tmp_path)
    ids = torch.randint(61, (1, 9))
    assert torch.equal(ours(ids).logits, loaded(ids).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    before = llama(ids).logits
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    assert torch.equal(llama(ids).logits, before)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(AttnkitDecoderForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits, ours(ids).logits)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Qwen2ForCausalLM is no LlamaForCausalLM"):
        from_llama(tiny_model("qwen2"))
    with pytest.raises(UnsupportedError, match="hidden_act='gelu'"):
        from_llama(tiny_model("llama", hidden_act="gelu"))
    with pytest.raises(UnsupportedError, match="default rotary embedding only"):
        from_llama(tiny_model("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}))
    with pytest.raises(InputError, match=r"no folder with a config\.json"):
        from_llama(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        from_llama(tmp_path)


@pytest.mark.needs_asset("lm")
def test_smollm2_is_the_same_model() -> None:
    from attnkit.lab.compare.loading import load, locate

    loaded = load(locate("smollm2"), torch.device("cpu"), torch.float32)
    found = parity(loaded.model, tokens=48)
    assert found.ok, found
    assert found.parameters > 100e6


@pytest.mark.parametrize("preset", ["decoder-tiny", "decoder-50m"])
def test_a_decoder_is_described_as_a_llama_and_back(preset: str) -> None:
    config = PRESETS[preset](rope_parameters={"rope_type": "default", "rope_theta": 20_000.0}, norm_eps=1e-4)
    with torch.device("meta"):
        llama = LlamaForCausalLM(llama_config(config))
    assert from_llama(llama).config.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["attention", "attention_nope"]}, "mixer_types=.* is no Llama's"),
        ({"mlp_types": "mlp"}, "mlp_types=.* is no Llama's"),
        ({"norm_type": "layernorm"}, "norm_type='layernorm' is no Llama's, which has 'rmsnorm'"),
        ({"hidden_size": 66, "head_dim": 16}, "hidden_size=66 is no multiple of num_attention_heads=4"),
    ],
    ids=str,
)
def test_what_llama_lacks_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        llama_config(PRESETS["decoder-tiny"](**changes))
