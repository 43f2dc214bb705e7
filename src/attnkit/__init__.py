"""attnkit: efficient attention and long context as one coherent package.

Importing it loads no torch; the namespaces below load on first use.
"""

from attnkit._core.lazy import lazy_attributes

__version__ = "0.1.0"
__all__ = ["errors", "explain", "inference", "kv", "lab", "models", "modules", "ops", "training", "__version__"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    modules={
        "errors": "attnkit._core.errors",
        "inference": "attnkit.inference",
        "kv": "attnkit.kv",
        "lab": "attnkit.lab",
        "models": "attnkit.models",
        "modules": "attnkit.modules",
        "ops": "attnkit.ops",
        "training": "attnkit.training",
    },
    names={"explain": "attnkit.ops"},
)
