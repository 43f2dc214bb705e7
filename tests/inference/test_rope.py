import importlib

import pytest
import torch
from oracles import prompt
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from attnkit._core.errors import ShapeError, UnsupportedArchitecture
from attnkit.inference import RopeSpec, compat
from attnkit.testing import FAMILIES, tiny_model

MODULES = {"gemma3_text": "gemma3"}


def spec(*, interleaved=False, width=8):
    inv_freq = 10.0 ** -torch.arange(width // 2, dtype=torch.float32)
    return RopeSpec(inv_freq, 1.0, interleaved, "default", 10_000.0, 512, "test")


@pytest.mark.parametrize("model_type", sorted(compat.HALF_SPLIT | compat.INTERLEAVED))
def test_rotation_is_that_of_the_architecture(model_type):
    module = MODULES.get(model_type, model_type)
    theirs = importlib.import_module(f"transformers.models.{module}.modeling_{module}").apply_rotary_pos_emb
    ours = RopeSpec(
        torch.tensor([1.0, 0.3, 0.05, 0.01]), 1.0, compat.rope_interleaved(model_type), "default", 1e4, 512, model_type
    )
    x, positions = torch.randn(2, 5, 3, 8), torch.tensor([[0, 1, 7, 30, 200], [5, 4, 3, 2, 1]])
    angle = positions[..., None] * ours.inv_freq
    # what the architecture's own embedding hands over: cohere repeats each angle, the others repeat the list
    angle = angle.repeat_interleave(2, -1) if model_type == "cohere" else torch.cat([angle, angle], -1)
    expected, _ = theirs(x.transpose(1, 2), x.transpose(1, 2), angle.cos(), angle.sin())
    torch.testing.assert_close(ours.rotate(x, positions), expected.transpose(1, 2), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_add_up(interleaved):
    rope, x = spec(interleaved=interleaved), torch.randn(2, 5, 3, 12, dtype=torch.float64)
    first, second = torch.randint(-50, 50, (2, 2, 5))
    both = rope.rotate(rope.rotate(x, first), second)
    torch.testing.assert_close(both, rope.rotate(x, first + second))
    torch.testing.assert_close(rope.rotate(both, -first - second), x)
    assert torch.equal(both[..., 8:], x[..., 8:])  # channels beyond the rotary width pass
    assert torch.equal(rope.rotate(x, torch.zeros(5, dtype=torch.long)), x)


def test_scores_depend_on_distance_alone():
    rope = spec()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    score = lambda i, j: float((rope.rotate(q, torch.tensor([i])) * rope.rotate(k, torch.tensor([j]))).sum())  # noqa: E731
    assert score(30, 10) == pytest.approx(score(100_020, 100_000), abs=1e-9)
    assert score(30, 10) != pytest.approx(score(30, 11), abs=1e-3)


def test_angles_are_exact_at_large_positions():
    x = torch.randn(1, 1, 1, 8)
    there = spec().rotate(x, torch.tensor([1_000_003]))
    exact = spec().rotate(x.double(), torch.tensor([1_000_003]))
    assert (there - exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rotation_keeps_the_dtype(dtype):
    assert spec().rotate(torch.randn(1, 2, 1, 8).to(dtype), torch.arange(2)).dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_and_its_config_say_the_same(family):
    model = tiny_model(family)
    live, planned = RopeSpec.from_model(model), RopeSpec.from_config(model.config)
    assert torch.equal(live.inv_freq, planned.inv_freq)
    for name in ("attention_factor", "interleaved", "rope_type", "theta", "max_positions", "model_type", "rotary_dim"):
        assert getattr(live, name) == getattr(planned, name)
    assert (live.interleaved, live.max_positions, live.rotary_dim) == (False, 512, 8 if family == "phi3" else 16)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_embeddings_are_read_as_they_are(rope):
    model = tiny_model("llama", rope_parameters={**rope, "rope_theta": 10_000.0})
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](model.config)
    for read in (RopeSpec.from_model(model), RopeSpec.from_config(model.config)):
        assert torch.equal(read.inv_freq, expected)
        assert read.attention_factor == factor
        assert read.max_positions == rope.get("original_max_position_embeddings", 512)


def test_gemma3_global_layers_are_meant():
    model = tiny_model("gemma3")
    assert RopeSpec.from_model(model).theta == 1_000_000.0
    assert torch.equal(RopeSpec.from_model(model).inv_freq, model.model.rotary_emb.full_attention_inv_freq)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_change_are_refused(rope_type):
    options = {"dynamic": {"factor": 2.0}, "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}}[
        rope_type
    ]
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, "original_max_position_embeddings": 128, **options}
    config = LlamaConfig(head_dim=16, rope_parameters=rope)
    with pytest.raises(UnsupportedArchitecture, match=f"rope_type '{rope_type}' changes its frequencies with the length"):
        RopeSpec.from_config(config)


def test_models_without_rotary_embeddings_are_refused():
    with pytest.raises(UnsupportedArchitecture, match="'gpt2' has no rotary embedding"):
        RopeSpec.from_config(AutoConfig.for_model("gpt2"))


def test_two_rotary_embeddings_are_one_too_many():
    model = tiny_model("llama")
    model.model.second = model.model.rotary_emb.__class__(model.config)
    with pytest.raises(UnsupportedArchitecture, match="has 2 rotary embeddings for full-attention layers"):
        RopeSpec.from_model(model)


def test_rotation_refuses_to_guess_and_to_overflow():
    with pytest.raises(UnsupportedArchitecture, match="channel order of 'test', which attnkit does not know"):
        spec(interleaved=None).rotate(torch.zeros(1, 1, 1, 8), torch.zeros(1))
    with pytest.raises(ShapeError, match="head width 4; the rotary embedding turns 8 channels"):
        spec().rotate(torch.zeros(1, 1, 1, 4), torch.zeros(1))


def test_a_spec_owns_its_frequencies():
    model = tiny_model("llama")
    before = RopeSpec.from_model(model)
    kept = before.inv_freq.clone()
    model.model.rotary_emb.inv_freq.mul_(2)
    assert torch.equal(before.inv_freq, kept)
    with torch.no_grad():
        model(prompt(1, 3))
