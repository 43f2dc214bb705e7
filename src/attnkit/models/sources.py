"""Reading models of transformers from folders, for conversion."""

from pathlib import Path
from typing import Any

import torch

from attnkit._core.errors import InputError

__all__ = ["read_source"]


def read_source(source: Any, model_class: Any) -> Any:
    """A model of transformers as it is, or from the folder that `source` names.

    Args:
        source: a model, or a folder with config.json and safetensors.
        model_class: of the model in a folder.
    Raises:
        InputError: the folder cannot be read; nothing is downloaded, unpickled or executed.
    """
    if not isinstance(source, str | Path):
        return source
    path, name = Path(source).expanduser(), model_class.__name__
    if not (path / "config.json").is_file():
        raise InputError(f"{str(source)!r} is no folder with a config.json; give a {name} or where one was saved")
    try:
        return model_class.from_pretrained(path, local_files_only=True, use_safetensors=True, trust_remote_code=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise whatever the reader of the day raises
        raise InputError(
            f"the {name} in {str(source)!r} cannot be read: {str(error).strip() or type(error).__name__}"
        ) from error
