"""The weights that a training run has left behind, read one tensor at a time."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from attnkit._core.errors import InputError

__all__ = ["SavedWeights", "snapshots"]

_FILES = "model*.safetensors"  # one file, or the parts of a large model
_NUMBERED = re.compile(r"(snapshot|checkpoint)-(\d+)")


class SavedWeights(Mapping[str, Tensor]):
    """Weights in a folder as a mapping, whose tensors are read when they are asked for and not kept.

    Args:
        folder: with model.safetensors, or the parts of it.
    Raises:
        InputError: no such file, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, Path] = {}
        for path in sorted(folder.glob(_FILES)):
            try:
                with safe_open(path, framework="pt") as file:
                    self._places |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} cannot be read as safetensors ({error}); delete its folder") from error
        if not self._places:
            raise InputError(f"{folder} holds no {_FILES}; pickled weights are not read, save them with save_pretrained()")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._places[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._places  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def snapshots(run: Path) -> dict[int, Path]:
    """Where the weights of a run are, by optimizer step, rising.

    Args:
        run: the folder of a run of `attnkit.training`: its `snapshot-*`, the `checkpoint-*` that are whole, and `model`,
            which holds the last step. A folder with safetensors of its own is one set of weights, of step 0.
    Raises:
        InputError: there are none.
    """
    found = {}
    for folder in run.iterdir() if run.is_dir() else ():
        match = _NUMBERED.fullmatch(folder.name)
        whole = match is not None and (match[1] == "snapshot" or (folder / "manifest.json").is_file())
        if match is not None and whole and any(folder.glob(_FILES)):
            found[int(match[2])] = folder
    last = _last_step(run)
    if last is not None and any((run / "model").glob(_FILES)):
        found[last] = run / "model"
    if not found and any(run.glob(_FILES)):
        found[0] = run
    if not found:
        raise InputError(f"{run} holds no weights; give the --out of attnkit train, or a folder with model.safetensors")
    return dict(sorted(found.items()))


def _last_step(run: Path) -> int | None:
    try:
        return int(json.loads((run / "run.json").read_text("utf-8"))["recipe"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
