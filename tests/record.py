"""`pytest --record FILE`: what ran, how it ended and what it measured, as a result file that can be committed.

A test adds what it measured with pytest's own `record_property(name, value)`.
"""

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit._core.devices import device_name
from attnkit.report import envelope, write_json

SCHEMA = "attnkit.tests/1"


class Record:
    """Collects reports, of workers too, and writes them when the session ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.begin = path, time.time()
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row a test; skipped ones and set-ups that failed end without being called."""
        if report.when == "call" or not report.passed:
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.rows.append(row | dict(report.user_properties))

    def pytest_sessionfinish(self) -> None:
        """Write the file, also of a session that failed or was broken off."""
        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        count = torch.cuda.device_count() if place.type == "cuda" else 0
        document = envelope(
            SCHEMA, sorted(self.rows, key=lambda row: row["test"]), command=shlex.join(["pytest", *sys.argv[1:]]), seed=0,
            device=device_name(place), dtype="as each test says", wall_s=time.time() - self.begin, extra={"gpus": count},
        )  # fmt: skip
        write_json(self.path, document)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write what ran and how it ended to FILE, a result file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(path))
