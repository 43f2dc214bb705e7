"""A model of a given size, new or from a folder."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attnkit._core.errors import InputError, OptionError
from attnkit._core.files import new_folder

__all__ = ["compile_parts", "load_model", "new_model", "quiet_transformers", "save_model"]

DATA_FILE = "training_data.json"  # beside the weights: what the model was trained on


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no notices of transformers, which would run into our own progress."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def new_model(
    *, vocab_size: int, dim: int, layers: int, heads: int, positions: int, mixer: str = "attention", seed: int = 0
) -> Any:
    """A fresh decoder of `attnkit.models` in float32.

    Args:
        vocab_size: number of tokens.
        dim: width; a multiple of `heads`. The feed-forward part is 8/3 as wide, rounded up to a multiple of 16, and from
            dim = 512 on of 128, the tiles that GPUs multiply in.
        layers: number of blocks.
        heads: of attention.
        positions: tokens of the longest sequence.
        mixer: what every block mixes tokens with, a name of `attnkit.models.MIXERS`. The sparse ones take options of
            `SparseCausalAttention`, mlstm and lightning those of `MLSTMLayer` and `LightningAttention`:
            "hash_sparse_attention:num_buckets=8:qk_shared=true", "mlstm:igate_bias_init=0".
        seed: of the weights.
    Raises:
        OptionError: an unknown mixer, or sizes that do not fit.
    """
    from attnkit.models import MIXERS, AttnkitDecoderConfig, AttnkitDecoderForCausalLM

    mixer, *given = mixer.split(":")
    MIXERS[mixer]  # names the ones there are
    key = "sparse" if mixer.endswith("_sparse_attention") else mixer.partition("_")[0]
    if given and key not in ("sparse", "mlstm", "lightning"):
        raise OptionError(f"mixer {mixer!r} takes no options; got {', '.join(given)}")
    options: dict[str, Any] = {key: dict(map(_option, given))} if given else {}
    if dim % heads:
        raise OptionError(f"dim={dim} is no multiple of heads={heads}; choose sizes that divide")
    multiple = 16 if dim < 512 else 128
    config = AttnkitDecoderConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=-(-8 * dim // (3 * multiple)) * multiple,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        mixer_types=[mixer] * layers,
        tie_word_embeddings=vocab_size > 4 * dim,  # a large table would be most of a small model
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AttnkitDecoderForCausalLM(config)


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE; numbers and true or false are what they say, everything else is a string."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def compile_parts(model: Any) -> None:
    """Compile the blocks and the loss of a language model in place; names of parameters stay as they are.

    Blocks of one kind share a graph, so compiling takes as long for thirty layers as for one. The embedding stays as it is:
    compiled, its backward pass adds in an order that differs from run to run.

    Args:
        model: of `attnkit.models`, or a decoder of transformers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what transformers calls a block
            module.compile()
    model.loss_function = torch.compile(model.loss_function)


def save_model(model: Any, folder: Path, facts: dict[str, Any], weights: dict[str, Any] | None = None) -> None:
    """Write a model with what it was trained on; the folder appears whole or not at all.

    Args:
        model: of transformers.
        folder: new.
        facts: to be found again by `load_model`.
        weights: whole, where the model has only a share of them; None takes the model's own.
    """
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        (temporary / DATA_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def load_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Read a model that `attnkit train` has written, and what it was trained on.

    Args:
        folder: `model` inside the folder of a run, or that folder itself.
    Raises:
        InputError: no model there, or one that cannot be read.
    """
    from transformers import AutoModelForCausalLM

    import attnkit.models  # noqa: F401  # registers its configurations

    place = folder / "model" if (folder / "model").is_dir() else folder
    if not (place / "config.json").is_file() or not (place / DATA_FILE).is_file():
        raise InputError(f"{folder} holds no finished model of attnkit train; give the --out of a run that has ended")
    try:
        facts = json.loads((place / DATA_FILE).read_text("utf-8"))
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(place, local_files_only=True, use_safetensors=True)
    except Exception as error:  # damaged files raise whatever their reader raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the model in {folder} cannot be read: {reason}") from error
    return model.eval(), facts
