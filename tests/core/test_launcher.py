"""The memory of kernel variants: what counts as the same kind of arguments."""

from typing import Any

import pytest
import torch

from attnkit._core.triton import launcher


class Compiled:
    """Stands for a compiled variant: notes what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))


class Kernel:
    """Stands for a function under triton.jit: notes what it had to work out."""

    arg_names = ("x", "n", "FLAG", "BLOCK")

    def __init__(self) -> None:
        self.derived = 0
        self.compiled = Compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Compiled:
            self.derived += 1
            return self.compiled

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launcher, "_variants", {})
    return Kernel()


def _launch(kernel: Kernel, x: torch.Tensor, n: int = 3, flag: bool = True, warps: int = 4) -> None:
    launcher.launch(kernel, (7,), (x, n), {"BLOCK": 16, "FLAG": flag}, num_warps=warps)


def test_the_same_kind_is_worked_out_once(kernel: Kernel) -> None:
    first, second = torch.zeros(64), torch.zeros(64)
    _launch(kernel, first)
    _launch(kernel, second)
    assert kernel.derived == 1
    ((grid, x, n, flag, block),) = kernel.compiled.launches
    assert grid[:3] == (7, 1, 1)
    assert x is second
    assert (n, flag, block) == (3, True, 16)  # flags in the kernel's order, not in the caller's


def test_what_may_change_the_variant(kernel: Kernel) -> None:
    x = torch.zeros(64)
    _launch(kernel, x)
    _launch(kernel, x[1:])  # another alignment
    _launch(kernel, x.half())
    _launch(kernel, x, n=4)
    _launch(kernel, x, flag=False)
    _launch(kernel, x, warps=8)
    assert kernel.derived == 6
    assert not kernel.compiled.launches


def test_variants_do_not_pile_up(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_CAPACITY", 8)
    for n in range(100):
        _launch(kernel, torch.zeros(64), n=n)
    assert len(launcher._variants) <= 8
