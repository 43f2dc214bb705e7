"""The command line. Nothing heavy loads before a verb is chosen: `attnkit --help` imports click and this file only."""

import importlib
from collections.abc import Mapping

import click

from attnkit import __version__
from attnkit.cli._boundary import error_boundary

__all__ = ["main"]

# verb -> (module that defines `command`, the line that `attnkit --help` shows)
VERBS: Mapping[str, tuple[str, str]] = {
    "doctor": ("attnkit.cli.doctor", "What runs here, what refuses, and why."),
    "compare": ("attnkit.cli.compare", "Methods x lengths: quality, time and memory on your model and text."),
    "demo": ("attnkit.cli.demo", "The same on a packaged model and text, on the CPU: minutes, no network."),
    "kv": ("attnkit.cli.kv", "Compress the key-value cache: methods, ratios, memory."),
    "ops": ("attnkit.cli.ops", "List operators, show what they accept, check their numerics here."),
    "models": ("attnkit.cli.models", "Model presets, their layers and sizes; our decoder against transformers' Llama."),
    "bench": ("attnkit.cli.bench", "Race operators against other implementations on this machine."),
    "train": ("attnkit.cli.train", "Train a model on a text or a synthetic task."),
    "eval": ("attnkit.cli.eval", "Judge a trained model: exact scores of tasks, bits a byte of texts."),
    "numerics": (
        "attnkit.cli.numerics",
        "How far attention is from float64, and what rounding does to training.",
    ),
    "claims": ("attnkit.cli.claims", "What papers claim, tested small: list, show, run."),
    "tune": ("attnkit.cli.tune", "Measure tile sizes of the kernels on this GPU and keep the best."),
    "systems": ("attnkit.cli.systems", "The thirty-one systems and how far each one is."),
    "assets": ("attnkit.cli.assets", "Models and texts that packages carry: list, fetch, verify."),
    "report": ("attnkit.cli.report", "Turn result files into one self-contained HTML page."),
}

EXIT_CODES = (
    ("0", "everything asked for was done"),
    ("1", "partly done; what is missing is listed"),
    ("2", "the command line is wrong"),
    ("3", "an optional package or an asset is missing; the message is the install line"),
    ("4", "unsupported or bad input"),
    ("5", "the device is missing or its memory does not suffice"),
    ("6", "a check failed"),
    ("130", "interrupted; finished parts are kept"),
)


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports one when it is chosen."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and return its `command`."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(VERBS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table, so that help imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, summary) for verb, (_, summary) in VERBS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Document the exit codes."""
        with formatter.section("Exit codes"):
            formatter.write_dl(list(EXIT_CODES))

    def invoke(self, ctx: click.Context) -> object:
        """Run the verb; errors that were foreseen end in one line on stderr."""
        with error_boundary():
            return super().invoke(ctx)


@click.group("attnkit", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="attnkit %(version)s")
def main() -> None:
    """Efficient attention and long context: thirty-one published systems in one PyTorch package.

    Results go to stdout, progress and warnings to stderr. Nothing here uses the network, except `assets fetch --run`.
    """
