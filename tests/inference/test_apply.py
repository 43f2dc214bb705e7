"""Switching policies on and off: what is refused, and that nothing is left behind."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from oracles import prompt
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    StaticCache,
)

from attnkit._core.errors import PolicyError, UnsupportedError
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


@pytest.mark.parametrize("fails", [False, True])
def test_the_cache_is_not_held_on_to(fails):
    model, ids = tiny_model("llama"), prompt(1, 4)
    with torch.no_grad(), apply(model, "dense") as h:
        cache = h.new_cache()
        try:
            model(ids, past_key_values=cache, attention_mask=torch.zeros(1, 1, 4, 4) if fails else None)
        except UnsupportedError:
            assert fails
        watch = weakref.ref(cache)
        del cache
        gc.collect()
        assert watch() is None


def test_threads_do_not_mix_their_caches():
    model = tiny_model("llama")
    prompts = [prompt(1, 12), prompt(1, 7, seed=1)]
    inside, results = threading.Barrier(2), [None, None]

    def meet(*_):  # both threads are past the hook of the text model before either attends
        inside.wait(timeout=10)

    with apply(model, Policy(prefill=Window(window=4, sink=2))) as h:
        with torch.no_grad():
            expected = [model(ids).logits for ids in prompts]

        def run(number):
            with torch.no_grad():
                results[number] = model(prompts[number], past_key_values=h.new_cache()).logits

        hook = model.model.layers[0].register_forward_pre_hook(meet)
        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted)


def test_training_without_dropout_works():
    model, ids = tiny_model("llama").train(), prompt(1, 10)
    model(ids, labels=ids).loss.backward()
    expected = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    with apply(model, "dense"):
        model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, expected)


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
