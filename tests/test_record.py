"""`pytest --record FILE` keeps what ran, how it ended and what it measured."""

import os
import subprocess
import sys
from pathlib import Path

from attnkit.report import read_envelope

TESTS = """
def test_measures(record_property):
    record_property("error", 0.5)

def test_fails():
    assert 0

def test_skipped():
    import pytest
    pytest.skip("no reason")
"""


def test_a_record_of_a_session_that_failed(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "empty.ini").write_text("", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "empty.ini",
        "-p",
        "record",
        "--record",
        "record.json",
        "test_three.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    document = read_envelope(tmp_path / "record.json")
    found = {row["test"].split("::")[1]: (row["outcome"], row.get("error")) for row in document["rows"]}
    assert document["schema"] == "attnkit.tests/1"
    assert found == {"test_measures": ("passed", 0.5), "test_fails": ("failed", None), "test_skipped": ("skipped", None)}
