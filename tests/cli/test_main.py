"""The command line as a whole: help, laziness, exit codes, one line for every foreseen mistake."""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner, Result

from attnkit._core import errors
from attnkit.cli import EXIT_CODES, VERBS, _boundary, main
from attnkit.cli._common import Verb, verb


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def raising(error: BaseException) -> Verb:
    @verb("raising", examples=("a", "b"), python="c", memory_hint="halve --lengths")
    def command() -> None:
        """Fail."""
        raise error

    return command


def fresh(code: str) -> str:
    """Run Python in a new process and return its output."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_help_lists_every_verb_and_exit_code() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in VERBS:
        assert re.search(rf"^  {name} ", result.output, re.MULTILINE)
    for code, _ in EXIT_CODES:
        assert re.search(rf"^  {code} ", result.output, re.MULTILINE)


def test_exit_codes_of_the_documentation_are_those_of_the_exceptions() -> None:
    documented = {int(code) for code, _ in EXIT_CODES}
    raised = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AttnkitError)
    }
    assert raised <= documented
    assert _boundary.INTERRUPTED in documented


def test_help_imports_no_verb_and_nothing_heavy() -> None:
    code = """
import sys
from attnkit.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "numpy", "rich", "jinja2", "transformers", "attnkit.cli.ops", "attnkit.assets"}
print("LOADED", sorted(heavy & set(sys.modules)))
"""
    assert fresh(code).splitlines()[-1] == "LOADED []"


def test_help_is_quick() -> None:
    """The budget is 0.2 s; the best of five tells the command's own cost from a busy machine's."""
    command = [sys.executable, "-c", "from attnkit.cli import main; main(['--help'])"]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.2


@pytest.mark.parametrize(
    "module", ["attnkit.assets", "attnkit.report", "attnkit.systems", "attnkit.cli._common", "attnkit.cli.ops"]
)
def test_modules_load_without_torch(module: str) -> None:
    assert fresh(f"import sys, {module}; print('torch' in sys.modules, 'matplotlib' in sys.modules)") == "False False"


@pytest.mark.parametrize(
    "path",
    [
        *("doctor", "compare", "demo", "ops list", "ops show", "ops check"),
        *("tune", "systems", "assets list", "assets fetch", "report"),
    ],
)
def test_every_command_ends_with_two_examples_and_python(path: str) -> None:
    result = run(*path.split(), "--help")
    assert result.exit_code == 0
    examples, python = result.output.split("Examples:")[1].split("In Python:")
    assert [line.split()[:1] for line in examples.strip().splitlines()] == [["attnkit"], ["attnkit"]]
    compile("\n".join(line[2:] for line in python.strip("\n").splitlines()), "example", "exec")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.InputError("q has shape (1,); expected 4"), 4, "error: q has shape (1,); expected 4"),
        (errors.MissingExtra('run: pip install "attnkit[hf]"'), 3, 'error: run: pip install "attnkit[hf]"'),
        (errors.MissingAsset("run: attnkit assets fetch lm --run"), 3, "error: run: attnkit assets fetch lm --run"),
        (errors.DeviceUnavailable("no CUDA device"), 5, "error: no CUDA device"),
        (errors.CheckFailed("2 of 3 fail"), 6, "error: 2 of 3 fail"),
        (KeyboardInterrupt(), 130, "error: interrupted; finished parts are kept"),
        (PermissionError(13, "Permission denied", "/x/y"), 4, "error: /x/y: Permission denied"),
        (MemoryError(), 5, "error: out of memory (the allocation failed); halve --lengths"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 5, "error: out of memory (CUDA out of memory.); halve --lengths"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            5,
            "error: out of memory (DefaultCPUAllocator: can't allocate memory: you tried 9 bytes); halve --lengths",
        ),
    ],
)
def test_foreseen_errors_are_one_line_and_a_code(error: BaseException, code: int, message: str) -> None:
    result = CliRunner().invoke(raising(error), [])
    assert result.exit_code == code
    assert result.stderr.splitlines() == [message]
    assert result.stdout == ""


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError("no file name"), ZeroDivisionError()])
def test_defects_of_ours_keep_their_traceback(error: Exception) -> None:
    result = CliRunner().invoke(raising(error), [])
    assert result.exception is error


def test_import_errors_of_a_verb_are_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> SimpleNamespace:
        raise errors.MissingExtra("install it")

    monkeypatch.setattr("attnkit.cli.importlib", SimpleNamespace(import_module=fail))
    result = run("doctor")
    assert (result.exit_code, result.stderr) == (3, "error: install it\n")


def test_unknown_verbs_and_options_are_usage_errors() -> None:
    for arguments in (["nope"], ["systems", "--nope"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Usage:" in result.stderr


def test_version() -> None:
    import attnkit

    assert run("--version").output == f"attnkit {attnkit.__version__}\n"


def test_exit_of_click_passes_through() -> None:
    @verb("partial", examples=("a", "b"), python="c")
    @click.pass_context
    def command(ctx: click.Context) -> None:
        """Stop early."""
        ctx.exit(1)

    assert CliRunner().invoke(command, []).exit_code == 1
