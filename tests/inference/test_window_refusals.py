"""What window policies refuse."""

import pytest
import torch
from oracles import padded, prompt
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from attnkit._core.errors import OptionError, PolicyError, UnsupportedArchitecture, UnsupportedError
from attnkit.inference import Policy, Window, apply
from attnkit.testing import tiny_model


def windowed(**options):
    return Policy(prefill=Window(**options))


def test_padding_between_tokens_is_refused():
    model = tiny_model("llama")
    ids, mask, _ = padded([20, 9], side="right")
    with (
        apply(model, windowed(window=6, sink=2)),
        pytest.raises(UnsupportedError, match=r"padding between its tokens.*pad on the left"),
    ):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)


def test_a_cache_thinned_out_by_another_policy_is_refused(small_slack):
    model, ids = tiny_model("llama"), prompt(1, 60)
    with torch.no_grad():
        with apply(model, windowed(window=6, sink=2)) as h:
            cache = h.new_cache()
            model(ids, past_key_values=cache)
        with (
            apply(model, windowed(window=9, sink=2)),
            pytest.raises(PolicyError, match=r"thinned out by Window\(window=6.*h.new_cache"),
        ):
            model(ids[:, :1], past_key_values=cache)
        with apply(model, windowed(window=6, sink=2)):
            model(ids[:, :1], past_key_values=cache)


class _Forgetful(DynamicLayer):
    def get_seq_length(self):
        return 2 * super().get_seq_length()


def test_a_cache_that_drops_keys_without_saying_which_is_refused():
    model = tiny_model("llama")
    cache = Cache(layers=[_Forgetful(), _Forgetful()])
    with (
        torch.no_grad(),
        apply(model, windowed(window=6, sink=2)),
        pytest.raises(PolicyError, match="holds 20 keys of 40 tokens"),
    ):
        model(prompt(1, 20), past_key_values=cache)


def test_bidirectional_models_are_refused():
    model = tiny_model("llama")
    model.config.is_causal = False
    with pytest.raises(PolicyError, match="needs a causal model; LlamaModel attends in both directions"):
        apply(model, "window")


def test_rerotation_refuses_to_guess_the_channel_order():
    from transformers import OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=61)
    model = OlmoForCausalLM(config)
    with pytest.raises(UnsupportedArchitecture, match="channel order of 'olmo', which attnkit does not know"):
        apply(model, windowed(rerotate=True))
    apply(model, "window").undo()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 0}, "window=0 is not allowed; the query's own key counts"), ({"sink": -1}, "sink=-1 is not allowed")],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(OptionError, match=message):
        Window(**options)
