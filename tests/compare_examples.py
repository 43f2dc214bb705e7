"""What the tests of comparisons read: a text, and a tokenizer that needs no files."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The lighthouse keeper counted ships. ",
    "A storm came over the bay at night. ",
    "Nobody saw the small boat that was tied to the pier. ",
    "In the morning the harbour was quiet. ",
)


def byte_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    """One token a byte, a beginning and an end token: 258 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, "<s>": 256, "</s>": 257}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options)
