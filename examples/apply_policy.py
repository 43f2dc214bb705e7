"""Switch a window with a bounded cache on for a Hugging Face model, look at what is stored, and switch it off again.

The model is tiny, random and built here, so nothing is downloaded; a real one is used the same way.

Run it with: python examples/apply_policy.py   (needs pip install "attnkit[hf]")
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnkit import inference

PROMPT, NEW = 2000, 16


def tiny_llama() -> LlamaForCausalLM:
    """Two layers, four heads, 4,096 positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def generate(model: LlamaForCausalLM, prompt: torch.Tensor, policy: inference.Policy | str) -> torch.Tensor:
    """Generate under a policy with a cache of its own; print what the first layer saw and what it stores."""
    with inference.apply(model, policy) as h:
        cache = h.new_cache()
        tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        layer = cache.layers[0]
        print(f"{h.policy.prefill}\n   seen {layer.seen}, stored {layer.stored}, cache {cache.nbytes() / 1024:.0f} KiB")
    assert layer.seen == PROMPT + NEW - 1  # the last token is returned and never read
    return tokens


@torch.inference_mode()
def main() -> None:
    """Dense, the registered window, a shorter one; then proof that the model is as it was."""
    model = tiny_llama()
    prompt = torch.randint(1, 100, (1, PROMPT))
    before = model(prompt).logits

    generate(model, prompt, "dense")
    generate(model, prompt, "window")
    generate(model, prompt, inference.Policy(prefill=inference.Window(window=256, sink=4)))

    h = inference.apply(model, "window")  # outside a `with` block: in force until undo()
    changed = model(prompt).logits
    h.undo()
    after = model(prompt).logits
    print(f"logits changed by the window: {not torch.equal(before, changed)}")
    print(f"logits restored bit by bit after undo: {torch.equal(before, after)}")
    assert torch.equal(before, after)
    assert not torch.equal(before, changed)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is small
    main()
