"""Every example runs as a user would run it, in under a minute, and shows what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWS = {
    "apply_policy": ["seen 2015, stored 2015", "seen 2015, stored 1106", "restored bit by bit after undo: True"],
    "attention_basics": ["(2, 100, 8, 64)", "   x x x . . .\n   . x x x . .", "attention: torch", "not sdpa: softcap"],
    "check_my_operator": [
        "mine              float32   pass",
        "one_key_too_many  float32   FAIL",
        "rounds_scores     bfloat16  FAIL",
    ],
    "compress_cache": [
        "dense              raw   seen 1639, key heads store 1639",
        "snapkv@0.75        raw   seen 1639, key heads store [409, 409]",
        "adakv:snapkv@0.75  int8  seen 1639",
        "read once: 1640 tokens, not the questions",
    ],
    "sparse_attention": ["16384 keys   softmax 0.0", "head 3: 9", "half dropped: 25 % of the pairs", "a layer: (2, 100, 128)"],
    "train_tiny": ["step   0 ", "step  99 "],
}


def test_every_example_is_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    for text in SHOWS[name]:
        assert text in done.stdout
