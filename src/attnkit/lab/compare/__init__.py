"""Long-context methods side by side on one model and one text: what each keeps, and what it costs.

The protocol, the same for every method and length N:

*Text.* A window of N tokens of the text. The method reads all but its last `tail` tokens (at most 256) in one forward
pass, then the tail in a second one with the cache, and its next-token losses over the tail give `loss` in nats, with a
95 % interval from a moving-block bootstrap. `kl` is the mean of KL(dense || method) over the tail in nats per token,
`agreement` the share of tail positions where both would choose the same next token. Windows of different lengths end at
the same tokens, so that a loss changes with the length only because the context does. `trials` windows are read.

*Pass-keys.* A paragraph with a random five-digit key lies at a depth of 10, 50 or 90 % in real text, and the prompt, in
the model's chat template if it has one, asks for it at the end; prompts are exactly N tokens, text is trimmed to fit. The
prompt without its question is read in one forward pass, the question in a second, then at most 12 tokens are decoded
greedily; a hit is an answer with the five digits in it. `trials` keys at each depth; Wilson interval.

*Other questions* (`tasks`: vt, cwe, fwe, assoc) are asked and judged as pass-keys are, and counted apart, in `asked`; see
`attnkit.lab.compare.questions`.

`query_aware` reads the question in the same pass as the prompt, so that methods that drop keys know it.

*Cost.* `prefill_s` is the median time of the first passes, `decode_tok_s` the inverse of the median time of a greedy token
(32 after each text window, and those of the answers), `peak_mib` the median over first passes of the largest memory beyond
what was in use before (weights do not count), `kv_mib` the memory behind the cache after
the N tokens of a text window.

*Order.* All methods run on one input before the next input, in an order that rotates from input to input, so that a
machine that slows down slows all of them. On text dense runs first, because the others are compared with its logits.
Methods that differ from dense only after the prompt (`shares_dense_prefill`) start from a copy of dense's cache and report
the time and the peak of dense's first pass; the result lists them under `shared_prefill`.

*Presses.* Methods of the cache are named as `attnkit.lab.compare.methods.named` says. They compress at the end of the first
pass, so `prefill_s` and `peak_mib` count what that takes; `kept` holds what heads keep of the first input. `sweep` runs a
grid of ratios, `memory` weighs caches.

*Resume.* After each (input, method) everything measured so far is in `state.json`; a run that was cut short and resumed
gives the same quality columns as one that was not. Other arguments than those of the first call are refused.
"""

from attnkit._core.lazy import lazy_attributes

__all__ = ["METHODS", "Event", "LoadedModel", "Method", "grid", "memory", "run", "sweep"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={
        "METHODS": "attnkit.lab.compare.methods",
        "Event": "attnkit._core.events",
        "LoadedModel": "attnkit.lab.compare.loading",
        "Method": "attnkit.lab.compare.methods",
        "grid": "attnkit.lab.compare.presses",
        "memory": "attnkit.lab.compare.presses",
        "run": "attnkit.lab.compare.runner",
        "sweep": "attnkit.lab.compare.presses",
    },
)
