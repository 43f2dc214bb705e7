"""Switching policies on and off: what is refused, and that nothing is left behind."""

import copy
import pickle
import threading

import pytest
import torch
from oracles import prompt
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import QuantizedLayer

from attnkit._core.errors import PolicyError, UnsupportedArchitecture, UnsupportedError
from attnkit.inference import Policy, Window, apply, compat
from attnkit.testing import FAMILIES, tiny_model

EVERYTHING = Policy(prefill=Window(window=4, sink=2, rerotate=True), position="yarn")


def state(model):
    """All that a policy may touch."""
    text = model.get_decoder()
    return {
        "names": [model.config._attn_implementation, text.config._attn_implementation],
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": [len(hooks) for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)],
        "hook options": [len(text._forward_hooks_always_called), len(text._forward_pre_hooks_with_kwargs)],
        "registries": [sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping)],
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
        "scaling": {name: value for name, value in vars(text.rotary_emb).items() if "scaling" in name},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_the_block_restores_the_model(family):
    model, ids = tiny_model(family), prompt(2, 20)
    before = state(model)
    with torch.no_grad():
        logits = model(ids).logits
        with apply(model, EVERYTHING) as h:
            assert state(model) != before
            assert not torch.equal(model(ids).logits, logits)
            model.generate(ids, max_new_tokens=3, past_key_values=h.new_cache(), do_sample=False)
        assert state(model) == before
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_restores_the_model_too(error):
    model, ids = tiny_model("llama"), prompt(1, 20)
    before = state(model)

    def fail(*_):
        raise error

    with torch.no_grad(), pytest.raises(error), apply(model, EVERYTHING):  # noqa: PT012
        hook = model.model.layers[1].self_attn.register_forward_pre_hook(fail)
        try:
            model(ids)
        finally:
            hook.remove()
    assert state(model) == before


def test_apply_acts_at_once_and_undo_twice_is_once():
    model = tiny_model("llama")
    before = state(model)
    h = apply(model, "window")
    assert model.config._attn_implementation.startswith("attnkit_")
    assert h.policy == Policy(prefill="window")
    h.undo()
    assert state(model) == before
    second = apply(model, "dense")
    h.undo()
    assert model.config._attn_implementation.startswith("attnkit_")
    second.undo()
    assert state(model) == before


@pytest.mark.parametrize("step", ["register", "set_attention_name"])
def test_a_failure_half_way_leaves_nothing(step, monkeypatch):
    model = tiny_model("llama")
    before, working = state(model), getattr(compat, step)

    def fail(*arguments):
        monkeypatch.setattr(compat, step, working)
        raise RuntimeError("half way")

    monkeypatch.setattr(compat, step, fail)
    with pytest.raises(RuntimeError, match="half way"):
        apply(model, EVERYTHING)
    assert state(model) == before
    apply(model, "dense").undo()


def test_policies_do_not_nest():
    model = tiny_model("llama")
    with apply(model, "window"):
        for inner in (model, model.model):
            with pytest.raises(
                PolicyError, match=r"Policy\(prefill=Window\(.* is active on this model; leave its `with` block or call undo"
            ):
                apply(inner, "dense")
        assert model.config._attn_implementation.startswith("attnkit_")
    with apply(model.model, "dense"):
        pass


def test_every_apply_registers_a_name_of_its_own():
    first, second = tiny_model("llama"), tiny_model("llama")
    with apply(first, "dense"), apply(second, "window"):
        names = [model.config._attn_implementation for model in (first, second)]
        assert len(set(names)) == 2
        for name in names:
            assert name in AttentionInterface._global_mapping
            assert name in AttentionMaskInterface._global_mapping
            assert not any(trap in name for trap in ("flash", "sdpa", "flex_attention", "/", "|"))


def test_the_implementation_that_was_there_comes_back():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with apply(model, "dense"):
        pass
    assert model.config._attn_implementation == "eager"


def test_a_bare_text_model_takes_positional_arguments():
    model, ids = tiny_model("llama").model, prompt(1, 12)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        with apply(model, "dense") as h:
            cache = h.new_cache()
            out = model(ids, None, None, cache).last_hidden_state
    torch.testing.assert_close(out, expected)
    assert cache.get_seq_length() == 12
    with apply(model, "dense"), pytest.raises(PolicyError, match="StaticCache is static"):
        model(ids, None, None, StaticCache(model.config, max_cache_len=20))


def test_the_cache_is_not_held_on_to():
    import gc
    import weakref

    model = tiny_model("llama")
    with torch.no_grad(), apply(model, "dense") as h:
        cache = h.new_cache()
        model(prompt(1, 4), past_key_values=cache)
        watch = weakref.ref(cache)
        del cache
        gc.collect()
        assert watch() is None


def test_threads_do_not_mix_their_caches():
    model, ids = tiny_model("llama"), prompt(2, 12)
    with apply(model, Policy(prefill=Window(window=4, sink=2))) as h:
        with torch.no_grad():
            expected = [model(row[None]).logits for row in ids]
        inside, results = threading.Barrier(2), [None, None]
        first = model.model.layers[0]

        def meet(*_):  # both threads are past the hook of the text model before either attends
            inside.wait(timeout=10)

        hook = first.register_forward_pre_hook(meet)

        def run(number):
            with torch.no_grad():
                results[number] = model(ids[number][None], past_key_values=h.new_cache()).logits

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted)


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


def test_training_without_dropout_works():
    model, ids = tiny_model("llama").train(), prompt(1, 10)
    model(ids, labels=ids).loss.backward()
    expected = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    with apply(model, "dense"):
        model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, expected)


def test_a_config_shared_by_two_models_is_noticed():
    model, ids = tiny_model("llama"), prompt(1, 4)
    sibling = type(model)(model.config).eval()
    with torch.no_grad(), apply(model, "dense"):
        model(ids)
        with pytest.raises(PolicyError, match="LlamaAttention belongs to another model, which shares its config"):
            sibling(ids)


def test_models_are_copied_without_their_policy():
    model = tiny_model("llama")
    with apply(model, "dense"):
        for copier in (copy.deepcopy, pickle.dumps):
            with pytest.raises(PolicyError, match=r"is active on this model; call undo\(\) before you copy or pickle"):
                copier(model)
    copy.deepcopy(model)


def test_saving_a_model_does_not_save_the_policy(tmp_path):
    model = tiny_model("llama")
    with apply(model, "dense"):
        model.save_pretrained(tmp_path)
    assert "attnkit" not in (tmp_path / "config.json").read_text()


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


def test_only_the_text_part_of_a_multimodal_model_changes():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**tiny_model("gemma3").config.to_dict(), "vocab_size": 61}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=60, boi_token_id=59, eoi_token_id=58
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    parts = (model.config, model.config.vision_config, model.config.text_config)
    before = [part._attn_implementation for part in parts]
    ids = prompt(1, 20).clamp(max=57)
    with torch.no_grad():
        expected = model(ids, token_type_ids=torch.zeros_like(ids)).logits
        with apply(model, "dense") as h:
            assert [part._attn_implementation for part in parts[:2]] == before[:2]
            out = model(ids, token_type_ids=torch.zeros_like(ids), past_key_values=h.new_cache()).logits
            image = torch.zeros_like(ids)
            image[:, 5:9] = 1
            with pytest.raises(UnsupportedError, match="bidirectional image blocks"):
                model(ids, token_type_ids=image)
    assert [part._attn_implementation for part in parts] == before
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_dynamic_cache_without_a_config_works():
    model, ids = tiny_model("gemma3"), prompt(1, 20)
    with torch.no_grad(), apply(model, "dense") as h:
        outs = [model(ids, past_key_values=cache).logits for cache in (DynamicCache(), h.new_cache())]
    assert torch.equal(*outs)
