"""Budgets learnt from what later queries look at: against exhaustive choice, by hand, and in models."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface

from attnkit import inference, kv
from attnkit._core.errors import InputError, OptionError
from attnkit.inference import calibrate
from attnkit.kv.utility import _at_steps, falling, shares
from attnkit.testing import tiny_model

TEXT, LATER = 48, 12


def texts(count=3, length=TEXT):
    return [torch.randint(1, 61, (length,), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_concave_curve_is_the_least_one_above():
    for seed in range(5):
        gains = draw(3, 12, seed=seed) ** 4
        slopes = falling(gains)
        curve, above = (torch.cat([torch.zeros(3, 1), each.cumsum(-1)], -1) for each in (gains, slopes))
        assert bool((slopes.diff(dim=-1) <= 1e-12).all())
        for head in range(3):
            for place in range(13):  # the highest chord over the place
                chords = [
                    curve[head, a] + (curve[head, b] - curve[head, a]) * (place - a) / max(b - a, 1)
                    for a, b in itertools.product(range(place + 1), range(place, 13))
                ]
                torch.testing.assert_close(above[head, place], torch.stack(chords).max(), rtol=1e-9, atol=1e-12)


def test_shares_are_the_best_of_all():
    """Against dynamic programming over all ways to spend the steps."""
    heads = 4
    slopes = falling(draw(heads, 100) ** 3 * torch.tensor([1.0, 5.0, 0.2, 1.5])[:, None])
    value = torch.cat([torch.zeros(heads, 1), slopes.cumsum(-1)], -1)
    best = value[0]
    for head in range(1, heads):
        size = len(best) + 100
        new = torch.full((size,), -torch.inf, dtype=torch.float64)
        for taken in range(101):
            new[taken : taken + len(best)] = torch.maximum(new[taken : taken + len(best)], best + value[head, taken])
        best = new
    kept = shares(slopes)
    assert kept.shape == (99, heads)
    for row in range(99):
        assert int(kept[row].sum()) == (99 - row) * heads
        got = value[torch.arange(heads), kept[row]].sum()
        torch.testing.assert_close(got, best[(99 - row) * heads], rtol=1e-9, atol=1e-12)
    assert bool((kept.diff(dim=0) <= 0).all())
    assert shares(torch.ones(3, 100))[49].tolist() == [50, 50, 50]


def test_a_curve_at_its_hundredths():
    worth = torch.tensor([[8.0, 4.0, 2.0, 1.0]], dtype=torch.float64)
    curve = _at_steps(worth).cumsum(-1)[0]
    torch.testing.assert_close(curve[[24, 49, 74, 99]], torch.tensor([8.0, 12.0, 14.0, 15.0], dtype=torch.float64))
    torch.testing.assert_close(curve[[9, 29]], torch.tensor([3.2, 8.8], dtype=torch.float64))
    torch.testing.assert_close(_at_steps(draw(2, 1000)).sum(-1), draw(2, 1000).sum(-1))


def later_attention(model, ids):
    """[layer][Hkv, keys]: what the last quarter's queries give each earlier key, by an eager attention that is written here."""
    found = []

    def eager(module, query, key, value, attention_mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(group, 1) for states in (key, value))
        size = query.shape[2]
        scores = query @ key.mT * scaling
        weights = scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        found.append(weights[0, :, -LATER:, :-LATER].mean(1).unflatten(0, (-1, group)).mean(1))
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("written_here", eager)
    before = model.config._attn_implementation
    model.set_attn_implementation("written_here")
    try:
        model(ids[None], use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return found


@torch.no_grad()
def test_a_table_follows_from_the_norms_of_keys_and_the_attention_to_come(tmp_path):
    model = tiny_model("llama")
    path = tmp_path / "curves.safetensors"
    events = []
    found = calibrate(model, texts(), what=["lukv:knorm", "qfilter"], path=path, on_event=events.append)
    assert [(event.kind, event.done) for event in events] == [("plan", 0), ("step", 1), ("step", 2), ("step", 3)]
    assert set(load_file(path)) == {"lukv", "q_filters"}
    total = 0.0
    for ids in texts():
        cache = model(ids[None], use_cache=True).past_key_values
        gains = []
        for layer, mass in zip(cache.layers, later_attention(model, ids), strict=True):
            norm = layer.keys[0, :, :-LATER].norm(dim=-1)
            norm[:, :4], norm[:, -1] = torch.tensor([-2.0, -3.0, -4.0, -5.0]), -1  # what lukv keeps anyway, newer ones first
            order = norm.argsort(-1)
            gains.append(_at_steps(mass.double().gather(-1, order)))
        total = total + torch.stack(gains)
    expected = 1 - shares(falling(total.flatten(0, 1))).unflatten(1, total.shape[:2]) / 100
    torch.testing.assert_close(found["lukv"], expected, rtol=0, atol=0.0101)  # a step, where rounding decides between heads
    assert float((found["lukv"] - expected).abs().mean()) < 1e-3
    torch.testing.assert_close(found["lukv"].mean((1, 2)), torch.arange(1, 100) / 100)
    assert float(found["lukv"][49].std()) > 0.02
    kept = kv.press("lukv:knorm", curves=str(path))
    with inference.apply(model, inference.Policy(cache=kept)) as h:
        cache = h.new_cache()
        model(texts()[0][None], past_key_values=cache)
    counts = torch.stack([layer.pages.store.lengths[0] for layer in cache.kv_layers])
    assert (counts - (1 - found["lukv"][49]) * TEXT).abs().max() <= 1
    assert len(set(counts.flatten().tolist())) > 1


@torch.no_grad()
def test_layers_with_a_window_of_their_own_have_no_budget():
    model = tiny_model("gemma3")
    table = calibrate(model, texts(2), what=["lukv:snapkv:window=8"])["lukv"]
    local = [kind == "sliding_attention" for kind in model.config.get_text_config().layer_types]
    assert any(local)
    assert not all(local)
    assert bool((table[:, local] == 0).all())
    whole = table[:, [not each for each in local]]
    torch.testing.assert_close(whole.mean((1, 2)), torch.arange(1, 100) / 100)


@pytest.mark.parametrize("method", ["expected_attention", "kvzap", "observed_attention", "adakv:leverage_score"])
@torch.no_grad()
def test_methods_get_what_they_need(method):
    from learned_files import learned

    model = tiny_model("llama")
    weights = f":weights={learned('kvzap', kv_heads=2, width=model.config.hidden_size, layers=2)}" if method == "kvzap" else ""
    table = calibrate(model, texts(2), what=[f"lukv:{method}{weights}"])["lukv"]
    assert table.shape == (99, 2, 2)
    assert bool((table.diff(dim=0) >= 0).all())


def test_what_cannot_be_learnt_is_refused():
    model = tiny_model("llama")
    for name in ("lukv:kvzip", "lukv:chunk:knorm", "lukv:decode:knorm", "lukv:knorm+decode:knorm"):
        with pytest.raises(OptionError, match="keep each head's highest scores after the prefill"):
            calibrate(model, texts(1), what=[name])
    with pytest.raises(OptionError, match="unknown cache method 'nothing'"):
        calibrate(model, texts(1), what=["lukv:nothing"])
    with pytest.raises(OptionError, match="a file holds the budgets of one method"):
        calibrate(model, texts(1), what=["lukv:knorm", "lukv:snapkv"])
    with pytest.raises(OptionError, match="duo, lukv:METHOD"):
        calibrate(model, texts(1), what=["lukv"])
    with pytest.raises(InputError, match="a text has 1 tokens"):
        calibrate(model, [[1]], what=["lukv:knorm"], sinks=0)
