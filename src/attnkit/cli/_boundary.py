"""Where exceptions become exit codes: one line on stderr for every mistake that was foreseen, never a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from attnkit._core.errors import AttnkitError, DeviceUnavailable

__all__ = ["DEFAULT_MEMORY_HINT", "error_boundary"]

INTERRUPTED = 130
DEFAULT_MEMORY_HINT = "use --dtype bf16, or --device cpu"


@contextmanager
def error_boundary(memory_hint: str = DEFAULT_MEMORY_HINT) -> Iterator[None]:
    """Turn foreseen exceptions into one line and an exit code; anything else is a defect of ours and keeps its traceback.

    Args:
        memory_hint: the smallest change that makes this verb need less memory.
    """
    try:
        yield
    except AttnkitError as error:
        _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt:
        _fail("interrupted; finished parts are kept", INTERRUPTED)
    except BrokenPipeError:
        raise  # click ends quietly when the reader of stdout has gone
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", AttnkitError.exit_code, error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "the allocation failed"
        _fail(f"out of memory ({reason}); {memory_hint}", DeviceUnavailable.exit_code, error)


def _fail(message: str, exit_code: int, cause: BaseException | None = None) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    raise click.exceptions.Exit(exit_code) from cause


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # the CPU allocator raises a plain RuntimeError
