"""Position policies against transformers' own scaled embeddings and against closed forms."""

import math

import pytest
import torch
from oracles import assert_within, oracle_logits, prompt
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from attnkit._core.errors import OptionError, PolicyError, UnsupportedArchitecture
from attnkit.inference import NTK, PI, Policy, RopeSpec, Window, YaRN, apply
from attnkit.testing import FAMILIES, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)


def scaled_model(family, rope):
    """The same weights under a configuration that scales full-attention layers itself."""
    theta = RopeSpec.from_config(tiny_model(family).config).theta
    parameters = {"rope_theta": theta, **rope}
    if family == "phi3":
        parameters["partial_rotary_factor"] = 0.5
    if family == "gemma3":
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    model = tiny_model(family)
    model.config.rope_parameters = parameters  # set afterwards: Phi3Config would turn yarn into longrope
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def equivalents(family):
    spec = RopeSpec.from_config(tiny_model(family).config)
    width = spec.rotary_dim
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    return [
        (PI(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (NTK(factor=4.0), {"rope_type": "default", "rope_theta": spec.theta * 4.0 ** (width / (width - 2))}),
        (YaRN(factor=4.0), yarn),
        (YaRN(factor=4.0, beta_fast=16.0, beta_slow=2.0), {**yarn, "beta_fast": 16.0, "beta_slow": 2.0}),
    ]


@every_family
@pytest.mark.parametrize("number", range(4), ids=["pi", "ntk", "yarn", "yarn-betas"])
def test_a_policy_equals_the_configuration_that_says_the_same(family, number):
    method, rope = equivalents(family)[number]
    model, ids = tiny_model(family), prompt(2, 40)
    theirs = scaled_model(family, rope)
    wanted = RopeSpec.from_model(theirs)
    with torch.no_grad():
        plain = model(ids).logits
        with apply(model, Policy(position=method)):
            installed = RopeSpec.from_model(model)
            ours = model(ids).logits
        torch.testing.assert_close(installed.inv_freq, wanted.inv_freq, rtol=1e-6, atol=0)
        assert installed.attention_factor == pytest.approx(wanted.attention_factor, rel=1e-12)
        assert_within(
            ours, theirs(ids).logits, oracle_logits(model, ids, inv_freq=wanted.inv_freq, factor=wanted.attention_factor)
        )
    assert (ours - plain).abs().max() > 0.1


def test_formulas_are_those_of_transformers():
    rope = {"rope_theta": 50_000.0, "original_max_position_embeddings": 4096}
    model = tiny_model(
        "llama", head_dim=64, max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}
    )
    spec = RopeSpec.from_config(model.config)
    for factor in (1.0, 1.5, 8.0):
        for method, rope_type in ((PI(factor), "linear"), (YaRN(factor), "yarn")):
            model.config.rope_parameters = {**rope, "rope_type": rope_type, "factor": factor}
            inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](model.config)
            scaled = method.rescale(spec)
            torch.testing.assert_close(scaled.inv_freq, inv_freq, rtol=1e-6, atol=0)
            assert scaled.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_ends_of_the_spectrum():
    spec = RopeSpec.from_config(tiny_model("llama", head_dim=64, max_position_embeddings=4096).config)
    fast, slow = spec.inv_freq[0], spec.inv_freq[-1]
    ntk, yarn = NTK(8.0).rescale(spec), YaRN(8.0).rescale(spec)
    assert ntk.inv_freq[0] == fast
    torch.testing.assert_close(ntk.inv_freq[-1], slow / 8)
    assert yarn.inv_freq[0] == fast
    torch.testing.assert_close(yarn.inv_freq[-1], slow / 8)
    assert yarn.attention_factor == 1 + 0.1 * math.log(8)
    assert torch.equal(PI(8.0).rescale(spec).inv_freq, spec.inv_freq / 8)


def test_factor_one_changes_nothing():
    spec = RopeSpec.from_config(tiny_model("llama").config)
    for method in (PI(1.0), NTK(1.0), YaRN(1.0)):
        scaled = method.rescale(spec)
        assert torch.equal(scaled.inv_freq, spec.inv_freq)
        assert scaled.attention_factor == 1.0


def test_scaled_models_are_scaled_further():
    model = tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0})
    before = RopeSpec.from_model(model).inv_freq
    with apply(model, "pi"):
        assert torch.equal(RopeSpec.from_model(model).inv_freq, before / 2)
    with pytest.raises(
        PolicyError, match="yarn starts from unscaled frequencies, but the model's rope_type is 'linear'; use pi or ntk"
    ):
        apply(model, "yarn")


def test_local_layers_of_gemma3_keep_their_embedding():
    model = tiny_model("gemma3")
    before = model.model.rotary_emb.sliding_attention_inv_freq.clone()
    with apply(model, "yarn"):
        assert torch.equal(model.model.rotary_emb.sliding_attention_inv_freq, before)
        assert model.model.rotary_emb.sliding_attention_attention_scaling == 1.0
        assert model.model.rotary_emb.full_attention_attention_scaling > 1.0


@every_family
def test_undo_restores_the_buffers_bit_by_bit(family):
    model = tiny_model(family)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    scaling = {name: value for name, value in vars(model.model.rotary_emb).items() if name.endswith("attention_scaling")}
    h = apply(model, "yarn")
    assert any(not torch.equal(buffer, kept) for buffer, kept in buffers.values())
    h.undo()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert {name: getattr(model.model.rotary_emb, name) for name in scaling} == scaling


def test_undo_follows_a_model_that_was_moved():
    model = tiny_model("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    h = apply(model, "pi")
    model.model.rotary_emb.register_buffer(
        "inv_freq", model.model.rotary_emb.inv_freq.clone(), persistent=False
    )  # as .to() does
    h.undo()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


@every_family
def test_windows_rotate_by_the_new_frequencies(family):
    model, ids = tiny_model(family), prompt(2, 30)
    rules = {"window": 6, "sink": 3, "rerotate": True}
    with torch.no_grad(), apply(model, Policy(prefill=Window(**rules), position=YaRN(factor=4.0))):
        out, spec = model(ids).logits, RopeSpec.from_model(model)
    rules |= {"inv_freq": spec.inv_freq, "factor": spec.attention_factor}
    assert_within(out, oracle_logits(model, ids, dtype=torch.float32, **rules), oracle_logits(model, ids, **rules))


def test_a_dynamic_embedding_is_refused_before_anything_is_touched():
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    with pytest.raises(UnsupportedArchitecture, match="'dynamic' changes its frequencies"):
        apply(model, "ntk")
    assert model.config._attn_implementation == "sdpa"
    apply(model, "window").undo()  # needs no rotation of its own


@pytest.mark.parametrize("method", [PI, NTK, YaRN])
@pytest.mark.parametrize("factor", [0.5, -1.0, math.inf, math.nan])
def test_factors_below_one_are_refused(method, factor):
    with pytest.raises(OptionError, match="how many times longer the context becomes, at least 1"):
        method(factor=factor)


def test_yarn_refuses_betas_in_the_wrong_order():
    with pytest.raises(OptionError, match=r"beta_fast=1.0 and beta_slow=2.0 must satisfy beta_fast > beta_slow > 0"):
        YaRN(beta_fast=1.0, beta_slow=2.0)
