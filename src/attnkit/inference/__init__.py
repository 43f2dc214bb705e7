"""Methods for existing Hugging Face models: `apply(model, policy)` switches one on, and off without a trace."""

from attnkit._core.lazy import lazy_attributes

__all__ = [
    "CORRECTIONS",
    "NTK",
    "PI",
    "POSITIONS",
    "PREFILLS",
    "Applied",
    "Dense",
    "Hashed",
    "Policy",
    "RopeSpec",
    "Window",
    "YaRN",
    "apply",
    "available",
    "calibrate",
    "generate_with_context",
    "reconstruction_error",
    "register_entmax",
    "register_hash_attention",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    names={
        "CORRECTIONS": "attnkit.inference.policy",
        "NTK": "attnkit.inference.positions",
        "PI": "attnkit.inference.positions",
        "POSITIONS": "attnkit.inference.policy",
        "PREFILLS": "attnkit.inference.policy",
        "Applied": "attnkit.inference.applied",
        "Dense": "attnkit.inference.prefill",
        "Hashed": "attnkit.inference.prefill",
        "Policy": "attnkit.inference.policy",
        "RopeSpec": "attnkit.inference.rope",
        "Window": "attnkit.inference.prefill",
        "YaRN": "attnkit.inference.positions",
        "apply": "attnkit.inference.applied",
        "available": "attnkit.inference.policy",
        "calibrate": "attnkit.inference.calibrating",
        "generate_with_context": "attnkit.inference.answers",
        "reconstruction_error": "attnkit.inference.reconstruction",
        "register_entmax": "attnkit.inference.entmax",
        "register_hash_attention": "attnkit.inference.implementation",
    },
)
