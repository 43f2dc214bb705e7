"""Methods that read the context again against kvpress, from prefill to what is to be kept, on a tiny Llama."""

import sys

import pytest
import torch
from kvpress_peer import peer
from transformers import DynamicCache

from attnkit import inference, kv
from attnkit.inference import calibrate
from attnkit.kv.budgets_joint import AcrossLayers, Composite
from attnkit.kv.line import MUST_STAY
from attnkit.testing import tiny_model

SIZE, CHUNK = 40, 13
PROMPTS = {"\n\nRepeat the previous context exactly.": [3, 9], "\n": [7]}
LATER = [5, 4, 3]


class Tokenizer:
    """Theirs takes the repeat prompts from a tokenizer."""

    chat_template = None

    def encode(self, text, **_):
        return torch.tensor([PROMPTS.get(text, LATER if text else [])], dtype=torch.long)


def tokens(length=SIZE, seed=1):
    return torch.randint(1, 61, (1, length), generator=torch.Generator().manual_seed(seed))


def theirs(name, monkeypatch, **options):
    """Their scores [layers, 1, Hkv, SIZE] when the context has been read twice."""
    kvpress = peer()
    monkeypatch.setattr(
        sys.modules["kvpress.presses.kvzip_press"], "AutoTokenizer", type("A", (), {"from_pretrained": lambda _: Tokenizer()})
    )
    held = []
    cls = getattr(kvpress, name)
    monkeypatch.setattr(cls, "compress_post", lambda self, model: held.append(self.score_val.clone()))
    model = tiny_model("llama")
    with torch.no_grad(), cls(compression_ratio=0.5, **options)(model):
        model(tokens(), past_key_values=DynamicCache(config=model.config))
    return held[0]


def ours(spec, ids, monkeypatch, *, ratio=0.5, **options):
    """Our scores of each layer, and what stays [layers, 1, Hkv, SIZE]."""
    model = tiny_model("llama")
    made = kv.press(spec, ratio=ratio, **options)
    held = []
    replay = type(made.scorer).replay

    def noted(*args):
        held.append(replay(*args))
        return held[-1]

    monkeypatch.setattr(type(made.scorer), "replay", noted)
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=made)) as h:
        cache = h.new_cache()
        model(ids, past_key_values=cache)
        kept = torch.zeros(len(cache.layers), 1, 2, ids.shape[1], dtype=torch.bool)
        for layer, mask in zip(cache.kv_layers, kept, strict=True):
            stored = layer.view()
            for head in range(2):
                mask[
                    0, head, stored.positions.expand(stored.shape)[0, head, stored.real.expand(stored.shape)[0, head]].long()
                ] = True
    return torch.stack(held[-1]), kept


@pytest.mark.parametrize(
    ("spec", "name", "theirs_options"),
    [
        ("kvzip", "KVzipPress", {}),
        ("kvzip_plus", "KVzipPress", {"kvzip_plus_normalization": True}),
        ("kvgrad", "KVgradPress", {}),
    ],
)
def test_scores_are_theirs(spec, name, theirs_options, monkeypatch):
    expected = theirs(name, monkeypatch, chunk_size=CHUNK, **theirs_options)
    options = {"prompt_ids": (3, 9), "later_ids": LATER, "suffix_ids": [7], "chunk": CHUNK}
    scores, kept = ours(spec, tokens(), monkeypatch, **options)
    assert bool((scores[..., :4] >= MUST_STAY).all())
    torch.testing.assert_close(scores[..., 4:], expected[..., 4:], rtol=1e-5, atol=1e-9)
    assert kept.sum() == kept.numel() // 2
    assert bool(kept[..., :4].all())
    lowest = scores.masked_fill(~kept, torch.inf).amin()
    dropped = scores.masked_fill(kept, -torch.inf).amax()
    assert lowest > dropped


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("queries", ["max", "mean"])
def test_kvcompose_keeps_what_theirs_keeps(structured, queries, monkeypatch):
    kvpress = peer()
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    held = []
    cls = kvpress.KVComposePress
    monkeypatch.setattr(cls, "compress_cache", lambda self, model: held.append((self.scores, self.important_mask_per_kv_head)))
    their = cls(structured, 0.5, agg_task=queries)
    with torch.no_grad(), their(model):
        model(tokens(), past_key_values=DynamicCache(config=model.config))
    scores, mask = held[0]
    mask = torch.stack([torch.stack(each) for each in mask])
    found, kept = ours("kvcompose", tokens(), monkeypatch, queries=queries, structured=structured)
    torch.testing.assert_close(found[:, 0], scores, rtol=1e-5, atol=1e-9)
    assert torch.equal(kept[:, 0], mask)
    assert kept.sum() == kept.numel() // 2


def test_kvcompose_weighs_by_values(monkeypatch):
    """Theirs fails with this option: its cache is longer than its scores by then."""
    plain, _ = ours("kvcompose", tokens(), monkeypatch, join_heads=False)
    weighed, _ = ours("kvcompose", tokens(), monkeypatch, join_heads=False, value_norm=True)
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    norms = torch.stack([layer.values.norm(dim=-1) for layer in cache.layers])
    torch.testing.assert_close(weighed, plain * norms)


def test_duo_scores_of_texts_are_theirs(monkeypatch):
    peer()
    module = sys.modules["kvpress.presses.duo_attention_press"]
    texts = [tokens(60, seed) for seed in range(3)]

    class Rows:
        def to_pandas(self):
            return self

        def sample(self, count, random_state):
            return {"chapter": type("Column", (), {"tolist": lambda self: list(range(3))})()}

    class Texts:
        @staticmethod
        def from_pretrained(name):
            encoding = type("Encoding", (dict,), {"to": lambda self, device: self})
            return lambda text, return_tensors: encoding(input_ids=texts[text])

    monkeypatch.setattr(module, "AutoTokenizer", Texts)
    monkeypatch.setattr(module, "load_dataset", lambda *_, **__: Rows())
    model = tiny_model("llama")
    expected = torch.as_tensor(module.duo_attention_on_the_fly(model, num_samples=3))
    found = calibrate(model, texts, what=["duo"])
    assert sorted(found) == ["duo"]
    torch.testing.assert_close(found["duo"], expected, rtol=1e-5, atol=1e-6)


def test_the_joint_budget_is_the_highest_scores_of_the_model():
    generator = torch.Generator().manual_seed(2)
    scores = [torch.randn(2, 3, 20, generator=generator) for _ in range(4)]
    scores[1][0, 1] = -50.0 - torch.rand(20, generator=generator)  # a head that nothing speaks for keeps its best key
    counts = AcrossLayers().share([None] * 4, scores, [7] * 4)
    assert all(bool((count >= 1).all()) for count in counts)
    assert sum(count.sum(-1) for count in counts).tolist() == [4 * 3 * 7] * 2
    assert counts[1][0, 1] == 1
    flat = torch.stack(scores).transpose(0, 1)[1].flatten()
    threshold = flat.topk(84).values[-1]
    assert torch.equal(torch.stack(counts)[:, 1], (torch.stack(scores)[:, 1] >= threshold).sum(-1))


def test_layers_share_by_their_heads_joint_places():
    """Two layers, two heads: the first layer's places get the higher score of both layers."""
    scores = [torch.tensor([[[5.0, 1.0, 0.0], [0.0, 3.0, 1.0]]]), torch.tensor([[[9.0, 8.0, 7.0], [6.0, 8.0, 9.0]]])]
    contexts = [type("Context", (), {"index": index})() for index in (0, 1)]
    # the heads' k-th best: 4, 1, 0 and 9, 8, 6.5; the first layer counts as 9, 8, 6.5 as well
    assert [counts.tolist() for counts in Composite().share(contexts, scores, [2, 2])] == [[[2, 2]], [[2, 2]]]
    assert [counts.tolist() for counts in Composite("max").share(contexts[::-1], scores[::-1], [1, 1])] == [[[1, 1]], [[1, 1]]]
    contexts[0].index = 5  # now the other one is the first layer
    assert [counts.tolist() for counts in Composite().share(contexts, scores, [2, 2])] == [[[1, 1]], [[3, 3]]]


@pytest.mark.parametrize("spec", ["kvzip", "kvzip_plus", "kvcompose", "kvgrad"])
def test_scores_behind_padding_are_those_of_the_row_alone(spec, monkeypatch):
    options = {} if spec == "kvcompose" else {"chunk": CHUNK, "prompt_ids": (3, 9)}
    alone, _ = ours(spec, tokens(29, 2), monkeypatch, **options)
    model = tiny_model("llama")
    made = kv.press(spec, **options)
    held, replay = [], type(made.scorer).replay
    monkeypatch.setattr(type(made.scorer), "replay", lambda *args: held.append(replay(*args)) or held[-1])
    ids = torch.cat([tokens(), torch.nn.functional.pad(tokens(29, 2), (11, 0))])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with torch.no_grad(), inference.apply(model, inference.Policy(cache=made)) as h:
        model(ids, attention_mask=mask, past_key_values=h.new_cache())
    first = 0 if spec == "kvcompose" else 4
    torch.testing.assert_close(torch.stack(held[-1])[:, 1:, :, 11 + first :], alone[..., first:], rtol=1e-4, atol=1e-7)
