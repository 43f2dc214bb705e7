"""Models from this machine only: the packaged one, a folder of safetensors, or a GGUF file."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnkit import assets
from attnkit._core.errors import InputError, OptionError
from attnkit._core.lazy import require

__all__ = ["LoadedModel", "Source", "load", "locate"]

PACKAGED = "smollm2"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer.

    Attributes:
        name: for tables.
        model: a transformers model in eval mode.
        tokenizer: its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        return {"class": type(self.model).__name__, "parameters": sum(p.numel() for p in self.model.parameters())}


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        name: for tables.
        folder: where its files are.
        gguf: the name of its GGUF file, or None for a folder of safetensors.
    """

    name: str
    folder: Path
    gguf: str | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must find unchanged: names and sizes of the files with weights."""
        names = [self.gguf] if self.gguf else sorted(path.name for path in self.folder.glob("*.safetensors"))
        return {"files": {name: (self.folder / name).stat().st_size for name in names}}


def locate(model: str | Path) -> Source:
    """Find a model's files without loading them.

    Args:
        model: "smollm2", a folder with config.json and *.safetensors, or a .gguf file.
    Raises:
        OptionError: none of the three.
        InputError: a folder that lacks a configuration or safetensors.
        MissingAsset: the packaged model is not installed; the message ends with the fetch line.
    """
    path = assets.lm_path() if str(model) == PACKAGED else Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.name, path.parent, path.name)
    if not path.is_dir():
        raise OptionError(
            f"model {str(model)!r} is neither a folder nor a .gguf file; give {PACKAGED}, a folder with config.json and "
            f"*.safetensors, or a .gguf file"
        )
    for pattern, fix in (
        ("config.json", "save the model there with save_pretrained()"),
        ("*.safetensors", "pickled weights are not read, convert them with save_pretrained()"),
    ):
        if not any(path.glob(pattern)):
            raise InputError(f"model folder {str(model)!r} has no {pattern}; {fix}")
    return Source(path.resolve().name, path, None)


def load(source: Source, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load a model and its tokenizer; nothing is downloaded, unpickled or executed from the folder.

    Raises:
        MissingExtra: transformers, or for GGUF files gguf or accelerate, is not installed.
        InputError: transformers cannot read the files; the message has its reason.
    """
    require("transformers", extra="hf")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if source.gguf:
        for package in ("gguf", "accelerate"):
            require(package, extra="gguf")
        options["gguf_file"] = source.gguf
    with _quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **options)
            if source.gguf is None:
                options["use_safetensors"] = True
            model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # damaged files raise whatever the reader of the day raises
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"model {source.name!r} cannot be read: {reason}") from error
    return LoadedModel(source.name, model.eval().to(device), tokenizer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no notices of transformers, which would run into our own progress."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # some of its bars have no switch
            yield
    finally:
        logging.set_verbosity(level)
