"""Which tile sizes a kernel runs with: small tables by (architecture, bits, width), and what `attnkit tune` measured here.

The choice never changes what is computed beyond the order of sums, and nothing is tuned while a user waits.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from attnkit._core.devices import capability, device_name
from attnkit._core.errors import InputError
from attnkit._core.files import write_text
from attnkit._core.settings import settings

__all__ = ["WIDTHS", "Config", "ConfigTable", "Key", "by_width"]

Key = tuple[str, int, int]
WIDTHS = (16, 32, 64, 128, 256)
_SCHEMA = "attnkit.tuned/1"


@dataclass(frozen=True)
class Config:
    """Query rows and keys of a tile, warps of a program, stages of its load pipeline.

    Raises:
        InputError: no kernel can be built like that.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        numbers = (self.block_m, self.block_n, self.num_warps, self.num_stages)
        if not all(type(number) is int and number > 0 for number in numbers):
            raise InputError(f"{self}: all four are positive integers")
        if min(self.block_m, self.block_n) < 16 or any(number & (number - 1) for number in numbers[:3]):
            raise InputError(f"{self}: rows, keys and warps are powers of two, rows and keys at least 16")

    def __str__(self) -> str:
        return f"{self.block_m} x {self.block_n}, {self.num_warps} warps, {self.num_stages} stages"


def by_width(kernel: str, bits: int, *configs: tuple[int, int, int, int]) -> dict[Key, Config]:
    """One configuration of a kernel, (rows, columns, warps, stages), for each of `WIDTHS`."""
    return {(kernel, bits, width): Config(*config) for width, config in zip(WIDTHS, configs, strict=True)}


class ConfigTable:
    """The configurations of an operator's kernels.

    Args:
        operator: its name.
        default: (kernel, bits of the inputs, padded width) -> configuration.
        by_architecture: compute capability, (9, 0) -> entries that differ there.
    """

    def __init__(
        self, operator: str, default: Mapping[Key, Config], by_architecture: Mapping[tuple[int, int], Mapping[Key, Config]]
    ) -> None:
        self.operator = operator
        self._default = default
        self._by_architecture = by_architecture
        self._tables: dict[torch.device, Mapping[Key, Config]] = {}

    def pick(self, kernel: str, bits: int, width: int, device: torch.device) -> Config:
        """The user's tuned entry, else the architecture's, else the default.

        Raises:
            InputError: the user's file is not a table of tuned configurations.
        """
        table = self._tables.get(device)
        if table is None:
            table = self._tables[device] = self._load(device)
        return table[kernel, bits, width]

    def keys(self) -> tuple[Key, ...]:
        """Every (kernel, bits, width) that has a configuration."""
        return tuple(self._default)

    def path(self, device: torch.device) -> Path:
        """Where the user's tuned table lives."""
        name = device_name(device)
        return settings().cache_path() / "tuned" / f"{self.operator}-{name.replace(' ', '-').replace('/', '-')}.json"

    def store(self, tuned: Mapping[Key, Config], device: torch.device) -> Path:
        """Keep tuned entries in the user's cache, those of earlier runs included, and use them from now on.

        Raises:
            InputError: the file of earlier runs is not a table of tuned configurations.
        """
        path = self.path(device)
        merged = {**_read(path), **tuned} if path.exists() else dict(tuned)
        rows = [{"kernel": kernel, "bits": bits, "width": width, **asdict(c)} for (kernel, bits, width), c in merged.items()]
        write_text(path, json.dumps({"schema": _SCHEMA, "rows": rows}, indent=1) + "\n")
        self._tables.clear()  # all of them: another GPU of this name reads the same file
        return path

    def _load(self, device: torch.device) -> Mapping[Key, Config]:
        table = dict(self._default)
        if device.type == "cuda":
            table.update(self._by_architecture.get(capability(device), {}))
            path = self.path(device)
            if path.exists():
                table |= _read(path)
        return table


def _read(path: Path) -> dict[Key, Config]:
    advice = "remove it; attnkit tune writes a new one"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != _SCHEMA:
            raise KeyError(document["schema"])
        return {
            (row["kernel"], row["bits"], row["width"]): Config(
                row["block_m"], row["block_n"], row["num_warps"], row["num_stages"]
            )
            for row in document["rows"]
        }
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a table of tuned configurations; {advice}") from error
