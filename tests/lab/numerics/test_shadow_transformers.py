"""Following models of transformers: masks, caches, implementations, and that nothing stays behind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attnkit._core.errors import UnsupportedError
from attnkit.lab.numerics import Shadow

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
IDS = torch.arange(40).view(2, 20)


def small(implementation: str = "sdpa", kind: str = "Llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(dtype)
    model.set_attn_implementation(implementation)
    return model


def worst(log: Shadow) -> float:
    assert log.left_out == []
    return max(float(row["ulp_row_max"]) for row in log.rows)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "sizes"), [("Llama", {}), ("Mistral", {"sliding_window": 7})], ids=["causal", "window"])
def test_results_are_near_the_true_ones(implementation: str, padded: bool, kind: str, sizes: dict[str, Any]) -> None:
    model = small(implementation, kind, **sizes)
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :6] = 0
    with torch.no_grad(), Shadow(model, every=1) as log:
        model(IDS, attention_mask=mask)
    assert {(row["layer"], row["head"]) for row in log.rows} == {
        (f"model.layers.{layer}.self_attn", head) for layer in range(2) for head in range(4)
    }
    assert worst(log) < 8


def test_decoding_with_a_cache_is_followed() -> None:
    model = small(dtype=torch.bfloat16)
    with Shadow(model, every=2) as log:
        model.generate(IDS, max_new_tokens=5, do_sample=False)
    assert {row["call"] for row in log.rows} == {1, 3, 5}
    assert worst(log) < 2
    assert {row["rms"] > 0 for row in log.rows} == {True}


def test_a_faulty_head_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    right = functions["sdpa"]

    def faulty(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out = right(module, *args, **kwargs)[0].clone()
        if module.layer_idx == 1:
            out[:, :, 3] *= 1.01
        return out, None

    monkeypatch.setitem(functions, "sdpa", faulty)
    model = small()
    with torch.no_grad(), Shadow(model) as log:
        small()(IDS)  # another model
        assert log.rows == []
        model(IDS)
    assert functions["sdpa"] is faulty
    found = {(row["layer"], row["head"]): row["rel_fro"] for row in log.rows}
    assert found.pop(("model.layers.1.self_attn", 3)) == pytest.approx(0.01, rel=1e-3)
    assert max(found.values()) < 1e-5


def test_another_implementation_is_compared_with() -> None:
    sdpa = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def doubled(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
        return sdpa(module, q.double(), k.double(), v.double(), mask, **options)[0], None

    model = small()
    padded = torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)
    with torch.no_grad(), Shadow(model, doubled, every=1) as log, Shadow(model, every=1) as golden:
        model(IDS, attention_mask=padded)
    assert log.report()["against"] == "doubled"
    assert 0 < worst(log) < 8
    assert [row["rms"] for row in log.rows] == pytest.approx([row["rms"] for row in golden.rows], rel=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_stays_behind(implementation: str) -> None:
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    before, local = dict(functions), dict(functions._local_mapping)
    model = small(implementation)
    expected = model(IDS).logits
    log = Shadow(model)

    def followed() -> None:
        with log:
            assert torch.equal(model(IDS).logits, expected)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        followed()
    assert len(log.rows) == 8
    assert (dict(functions), functions._local_mapping) == (before, local)
    assert functions["sdpa"].__module__ == "transformers.integrations.sdpa_attention"
    assert "eager" not in functions


def test_what_is_not_known_is_left_out_or_refused() -> None:
    model = small("eager", "Gemma2", head_dim=16, attn_logit_softcapping=5.0)
    with torch.no_grad(), Shadow(model) as log:
        model(IDS)
    assert log.rows == []
    assert {each["why"] for each in log.left_out} == {"softcap: not known here"}
    model = small("eager")
    added = torch.zeros(2, 1, 20, 20).masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -1.0)
    with torch.no_grad(), Shadow(model) as log:
        model(IDS, attention_mask=added)
    assert {each["why"] for each in log.left_out} == {"a mask with other numbers than 0 and very small ones"}
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="'flash_attention_2': known here are eager, sdpa"):
        Shadow(model)
