"""Shared by the whole suite: no network, fresh seeds, and uninitialised memory that cannot pass for a result."""

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from attnkit._core import devices

pytest_plugins = ["record"]

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes wait for each other while they spin
    torch.set_num_threads(1)

try:
    import pytest_socket
except ModuleNotFoundError:  # a machine without a network lacks the plugin, and needs it least
    pytest_socket = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        marker = item.get_closest_marker("needs_asset")
        if marker is not None:
            from attnkit import assets

            missing = [key for key in marker.args if not assets.installed(key)]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"missing assets; run: attnkit assets fetch {' '.join(missing)} --run"))


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    if pytest_socket is not None:
        pytest_socket.disable_socket(allow_unix_socket=True)
    torch.manual_seed(0)
    devices._capabilities.clear()  # what a test said the GPU can do
    yield
    frames = sys.modules.get("torch._dynamo.eval_frame")
    assert frames is None or frames._stance.stance == "default", "the test has switched torch.compile off for all after it"
    if pytest_socket is not None:
        pytest_socket.enable_socket()


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Choose how many threads torch uses; the test that follows gets the old number back."""
    threads = torch.get_num_threads()
    yield lambda count: torch.set_num_threads(min(count, threads))
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty holds NaN (integers: the largest value), so that an element nobody writes is seen."""
    fill, strict = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = fill
