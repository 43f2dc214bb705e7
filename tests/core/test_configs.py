"""Tables of tile sizes: who wins, what is kept, and what a damaged file says."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attnkit import errors
from attnkit._core import devices
from attnkit._core.triton.configs import Config, ConfigTable

GPU, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
DEFAULT, HOPPER, TUNED = Config(64, 64, 4, 2), Config(128, 64, 8, 3), Config(64, 128, 4, 3)
KEYS = [("fwd", 16, 64), ("fwd", 32, 64), ("decode", 16, 64)]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ConfigTable]:
    """A table whose Hopper entries differ for one kernel, on a machine that says it has two such GPUs."""
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X/2")
    return ConfigTable("toy", dict.fromkeys(KEYS, DEFAULT), {(9, 0): {KEYS[0]: HOPPER}})


def test_tuned_comes_before_the_architecture_and_that_before_the_default(
    table: ConfigTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [table.pick(*key, GPU) for key in KEYS] == [HOPPER, DEFAULT, DEFAULT]
    table.store({KEYS[0]: TUNED, KEYS[2]: TUNED}, GPU)
    assert [table.pick(*key, GPU) for key in KEYS] == [TUNED, DEFAULT, TUNED]
    assert table.pick(*KEYS[0], torch.device("cpu")) == DEFAULT
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    devices._capabilities.clear()
    again = ConfigTable("toy", dict.fromkeys(KEYS, DEFAULT), {(9, 0): {KEYS[1]: HOPPER}})
    assert [again.pick(*key, GPU) for key in KEYS] == [TUNED, DEFAULT, TUNED]
    assert again.keys() == tuple(KEYS)


def test_a_gpu_is_asked_once_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    assert [devices.capability(gpu) for gpu in (GPU, SECOND, GPU, SECOND)] == [(9, 0)] * 4
    assert asked == [GPU, SECOND]


def test_results_are_added_to_earlier_ones_and_used_at_once(table: ConfigTable, tmp_path: Path) -> None:
    assert table.pick(*KEYS[0], SECOND) == HOPPER
    path = table.store({KEYS[0]: TUNED}, GPU)
    assert path == table.path(GPU) == tmp_path / "tuned" / "toy-GPU-X-2.json"
    assert table.pick(*KEYS[0], SECOND) == TUNED, "a GPU of the same name reads the same file"
    table.store({KEYS[1]: TUNED, KEYS[0]: DEFAULT}, GPU)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["kernel"], row["bits"], row["block_n"]) for row in rows] == [("fwd", 16, 64), ("fwd", 32, 128)]
    assert [table.pick(*key, GPU) for key in KEYS] == [DEFAULT, TUNED, DEFAULT]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(table: ConfigTable, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table.store({KEYS[0]: TUNED}, GPU)
    before = path.read_text()

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        table.store({KEYS[1]: TUNED}, GPU)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


ROW = {"kernel": "fwd", "bits": 16, "width": 64, "block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        json.dumps({"schema": "attnkit.tuned/2", "rows": []}),
        json.dumps({"schema": "attnkit.tuned/1", "rows": [{"kernel": "fwd"}]}),
        json.dumps({"schema": "attnkit.tuned/1", "rows": [ROW | {"block_m": "64"}]}),
        json.dumps({"schema": "attnkit.tuned/1", "rows": [ROW | {"block_m": 48}]}),
    ],
)
def test_a_damaged_file_is_named_with_the_fix(content: str, table: ConfigTable) -> None:
    path = table.store({KEYS[0]: TUNED}, GPU)
    path.write_text(content)
    for call in (lambda: table.pick(*KEYS[0], GPU), lambda: table.store({KEYS[0]: TUNED}, GPU)):
        with pytest.raises(errors.InputError) as caught:
            call()
        assert str(caught.value).startswith(str(path))
        assert str(caught.value).endswith("remove it; attnkit tune writes a new one")
    path.unlink()
    table.store({KEYS[0]: TUNED}, GPU)
    assert table.pick(*KEYS[0], GPU) == TUNED


@pytest.mark.parametrize("numbers", [(48, 64, 4, 2), (8, 64, 4, 2), (64, 64, 3, 2), (64, 64, 4, 0), (64.0, 64, 4, 2)])
def test_impossible_configurations_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(errors.InputError, match="warps"):
        Config(*numbers)
