"""Drop three quarters of the keys of a long context, write the rest in 8 bits, and ask questions about it.

The model and its tokenizer are tiny, random and built here, so nothing is downloaded and answers mean nothing; real ones are
used the same way.

Run it with: python examples/compress_cache.py   (needs pip install "attnkit[hf]")
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnkit import inference, kv

CONTEXT = " ".join(f"Ship {number} came in at hour {number % 24}." for number in range(60))
QUESTIONS = ("When did ship 7 come in?", "Which ship was the last?")


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Two layers, four heads, and a token for each byte."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=257,
        bos_token_id=256,
        eos_token_id=257,
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={**{c: i for i, c in enumerate(letters)}, "<s>": 256, "</s>": 257}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return LlamaForCausalLM(config).eval(), tokenizer


def main() -> None:
    """The same context under several presses, and what their caches weigh; then questions."""
    model, tokenizer = tiny_model()
    ids = tokenizer(CONTEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    for word, codec in ((None, None), ("snapkv@0.75", None), ("adakv:snapkv@0.75", None), ("adakv:snapkv@0.75", "int8")):
        policy = inference.Policy(cache=None if word is None else kv.parse(word))
        with torch.inference_mode(), inference.apply(model, policy) as h:
            cache = h.new_cache(codec=codec, page_size=16)
            model(ids, past_key_values=cache)
        layer = cache.kv_layers[0]
        heads = layer.stored if layer.pages is None else layer.pages.store.lengths[0].tolist()
        name = word or "dense"
        print(f"{name:18} {codec or 'raw':5} seen {layer.seen}, key heads store {heads}, {cache.nbytes() / 1024:.0f} KiB")

    cache = kv.KVCache(model.config, codec="int8")
    answers = inference.generate_with_context(
        model, tokenizer, CONTEXT, QUESTIONS, policy="adakv:snapkv", cache=cache, max_new_tokens=12
    )
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer!r}")
    print(f"read once: {cache.get_seq_length()} tokens, not the questions")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is small
    main()
