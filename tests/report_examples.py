"""Hand-written result envelopes in the shape that `attnkit compare` and the race harness write."""

from typing import Any

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# method -> loss at 1K, 2K, 4K; depths whose key is found at each length; prefill factor; decode tok/s; KV share
_METHODS: dict[str, tuple[tuple[float, ...], tuple[int, ...], float, float, float, str]] = {
    "dense": ((2.713, 2.652, 2.598), (5, 5, 5), 1.0, 22.4, 1.0, "prefill=dense"),
    "window": ((2.781, 2.793, 2.802), (5, 3, 1), 0.81, 22.1, 1.0, "prefill=window(1024, sink 4)"),
    "streaming": ((2.804, 2.821, 2.846), (4, 2, 1), 0.78, 31.7, 0.26, "prefill=window(1024, sink 4), rerotate"),
    "yarn": ((2.731, 2.671, 2.611), (5, 5, 4), 1.0, 22.3, 1.0, "position=yarn(2)"),
    "snapkv": ((2.716, 2.661, 2.619), (5, 5, 4), 1.0, 29.8, 0.5, "cache=snapkv(0.5)"),
}


def compare_envelope(
    lengths: tuple[int, ...] = (1024, 2048, 4096), methods: tuple[str, ...] = tuple(_METHODS)
) -> dict[str, Any]:
    rows = []
    for place, length in enumerate(lengths):
        for method in methods:
            losses, found, prefill, speed, kv, policy = _METHODS[method]
            hits, trials = 2 * found[place], 2 * len(DEPTHS)
            rows.append(
                {
                    "method": method,
                    "length": length,
                    "loss": losses[place],
                    "loss_low": losses[place] - 0.031,
                    "loss_high": losses[place] + 0.029,
                    "passkey_hits": hits,
                    "passkey_trials": trials,
                    "passkey_low": max(0.0, hits / trials - 0.18),
                    "passkey_high": min(1.0, hits / trials + 0.12),
                    "agreement": 1.0 if method == "dense" else 0.93 - 0.02 * place,
                    "kl": 0.0 if method == "dense" else 0.021 * (1 + place),
                    "prefill_s": prefill * 3.1 * (length / 1024) ** 1.3,
                    "decode_tok_s": speed - place,
                    "peak_mib": 710.0 + 60 * kv * length / 1024,
                    "kv_mib": kv * 22.5 * length / 1024,
                    "policy": policy,
                    "trials": [
                        {
                            "depth": depth,
                            "key": "48213",
                            "answer": "48213" if index < found[place] else "the",
                            "hit": index < found[place],
                        }
                        for depth, index in zip(DEPTHS, (4, 3, 2, 1, 0), strict=True)
                        for _ in range(2)
                    ],
                }
            )
    return {
        "schema": "attnkit.compare/1",
        "command": "attnkit compare --model lm --lengths 1k,2k,4k",
        "seed": 0,
        "versions": {
            "python": "3.11.2",
            "attnkit": "0.1.0",
            "torch": "2.13.0",
            "triton": None,
            "transformers": "5.23.0",
            "numpy": "2.4.6",
        },
        "device": "cpu",
        "dtype": "float32",
        "wall_s": 312.4,
        "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "text": "wiki",
        "tail": 256,
        "shared_prefill": ["dense", "snapkv"],
        "rows": rows,
    }


def race_envelope(lengths: tuple[int, ...] = (4096, 16384)) -> dict[str, Any]:
    peers = {"flash-attn-4": 0.97, "sdpa-cudnn": 1.12, "flex_attention": 1.71}
    return {
        "schema": "attnkit.race/1",
        "device": "NVIDIA H200",
        "commit": "0000000",
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "rows": [
            {
                "op": "attention",
                "shape": {"B": 1, "T": length, "H": 32, "D": 128},
                "dtype": "bf16",
                "pass": step,
                "peer": peer,
                "ours_ms": 1.7 * (length / 4096) ** 2,
                "peer_ms": 1.7 * (length / 4096) ** 2 * ratio,
                "ratio": ratio,
                "spread": 0.013,
                "first_call_s": 3.2,
                "peak_mib": 512.0,
                "peer_peak_mib": 540.0,
            }
            for length in lengths
            for step in ("fwd", "fwd+bwd")
            for peer, ratio in peers.items()
        ],
    }


def skipped_entries() -> list[dict[str, Any]]:
    """Who was not raced in a race of five shapes: one peer nowhere, one on some."""
    shapes = [{"B": 1, "T": length, "H": 32, "D": 128} for length in (1024, 2048, 4096, 8192, 16384)]
    common = {"dtype": "bf16", "pass": "fwd"}
    return [
        *({"peer": "fa4", "shape": shape, **common, "reason": "flash_attn is not installed"} for shape in shapes),
        {"peer": "attnkit", "shape": shapes[-1], **common, "reason": "out of memory"},
    ]
