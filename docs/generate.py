"""Writes the pages that are derived from code: python docs/generate.py. A test fails where a committed page is stale."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from attnkit import kv, report, systems
from attnkit._core.dispatch import only_when_named
from attnkit.cli import EXIT_CODES, main
from attnkit.ops import OPS

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "benchmarks" / "results"
NOTICE = "<!-- Written by docs/generate.py. Edit the code it comes from, then run: python docs/generate.py -->"

# measured on SmolLM2-135M: 48 numbers with the command, and 48 others in other texts, for which it has no setting
SHARED = """\
`adakv` compares scores of different heads, so their size has to mean the same in all of them. Those of `expected_attention` do
not: on SmolLM2, half of the keys gone, equal budgets answer 28 of 96 questions for hidden numbers, shared ones none. (In the
paper's form, `rope=mean`, the kept keys are those of kvpress 0.5.5.) Most of it is one head, which looks at the numbers (key
head 2 of layer 18, from 0): the Gaussian gives up to 97 % of its attention to one key, so it gets 38 keys where equal budgets
give 192. With equal budgets and 38 keys in this head alone, 0 of 48 are right instead of 12; with all keys in it 22. Shared
budgets stay below 12 with scores without value norms (0 of 48), scores divided by their sum in each head (1), a larger `alpha`
(0.5: 2, 0.9: 10), one budget for all layers (0) and `critical_adakv` (1); scores standardised in each head, which no press
does, reach 21. `eps` helps most, which the paper sets to 0.02 except for needles, where it is 0 as here: with 0.02 equal
budgets answer 63 of 96, shared ones 69. Write `adakv:expected_attention:eps=0.02`. It is no cure everywhere: on the model of
`kv-recall` that is trained on a CPU, shared budgets lose 0.025 of accuracy without it and 0.013 with it. `keydiff` gains from
shared budgets as it is: 19 of 96, shared 67.

```console
$ attnkit claims run kv-needles --set contexts=12 --only expected_attention --out runs/heads
```"""


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    return {
        "cli.md": _cli(),
        "operators.md": _operators(),
        "presses.md": _presses(),
        "systems.md": _systems(),
        "results.md": _results(),
    }


def _cli() -> str:
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES)
    parts = [
        NOTICE,
        "# Command line",
        "Results go to stdout, progress and warnings to stderr. `--json` prints one object instead of tables. Every command "
        "ends its help with two examples and the same thing in Python.",
        f"## Exit codes\n\n| code | meaning |\n| ---: | --- |\n{codes}",
    ]
    for name, depth, text in _commands(main, click.Context(main, info_name="attnkit")):
        parts.append(f"{'#' * min(depth + 2, 4)} {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, int, str]]:
    """Walk the tree: the full name of each command, its depth, and its help as printed 100 columns wide."""
    context.terminal_width, context.help_option_names = 100, ["-h", "--help"]
    help_text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield context.command_path, context.command_path.count(" "), help_text
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _commands(child, click.Context(child, info_name=name, parent=context))


def _operators() -> str:
    parts = [
        NOTICE,
        "# Operators",
        "What every registered operator can do and what it refuses, as `attnkit ops show NAME` prints it.",
    ]
    for spec in OPS.values():
        can = "\n".join(f"| {_cell(name)} | {_cell(limit)} |" for name, limit in spec.capabilities.items())
        cannot = "\n".join(f"| {_cell(refusal.what)} | {_cell(refusal.why)} |" for refusal in spec.refusals)
        names = ", ".join(
            f"`{backend.name}`" + (" (only when named)" if backend.avoids is only_when_named else "")
            for backend in spec.backends
        )
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in spec.dtypes)
        parts += [
            f"## {spec.name}",
            f"{spec.summary[0].upper()}{spec.summary[1:]}.",
            f"- Source: {spec.source}\n- Backends, in order of preference: {names}\n- Dtypes: {dtypes}\n"
            f"- Conformance cases: {len(spec.cases)}\n- In 16 bits it rounds at: {', '.join(spec.sites)}\n"
            f"- Invariances: {', '.join(invariance.name for invariance in spec.invariances) or 'none'}",
            f"| it can | how far |\n| --- | --- |\n{can}",
            f"| it refuses | because |\n| --- | --- |\n{cannot}",
        ]
    return "\n\n".join(parts) + "\n"


def _presses() -> str:
    bases, wrappers = kv.catalogue.bases(), kv.catalogue.wrappers()
    return "\n\n".join(
        [
            NOTICE,
            "# Methods of the cache",
            "Every press that there is, as `attnkit kv list` prints it. [Compressing the cache](kv.md) says what a press is "
            "and how names are put together. *Needs*: what a method wants of the model beside keys and the newest queries, "
            "or a file from its user; *one pass* and *second reading* exclude a prefill in chunks.",
            f"## Base methods\n\n{_described(bases, needs=True)}",
            "## Wrappers\n\nA wrapper goes before a method: `adakv:snapkv`.",
            _described(wrappers, needs=False),
            f"## Heads that share a budget\n\n{SHARED}\n",
        ]
    )


def _described(methods: Iterable[kv.catalogue.About], *, needs: bool) -> str:
    headers = ["name", "what it does", "options", *(["needs"] if needs else []), "source"]
    rows = [
        [
            f"`{each.name}`",
            _cell(each.summary.replace("|", "\u2223")),
            ", ".join(f"`{name}={value!r}`" for name, value in each.options.items()),
            *([", ".join(each.needs)] if needs else []),
            each.source or "-",
        ]
        for each in methods
    ]
    return report.markdown_table(headers, rows)


def _systems() -> str:
    catalogue = systems.load()
    # in the table links are relative to the root of the repository, where README.md is
    table = re.sub(r"\]\((?!https?:)", "](../", systems.markdown(catalogue))
    return "\n\n".join(
        [
            NOTICE,
            "# The thirty-one systems",
            f"{systems.summary(catalogue)}. *Planned*: nothing yet. *Partial*: a usable part. *Works*: all of it, tested. "
            "*Measured*: raced against its peers. `attnkit systems` prints the same list.",
            f"{table}\n",
        ]
    )


def _results() -> str:
    parts = [
        NOTICE,
        "# Results of races",
        "Every race in `benchmarks/results`. [Races](race.md) says how they are run and how to read a row; "
        "`attnkit report FILE` draws one as a page.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        document = report.read_envelope(path)
        if document["schema"] == "attnkit.race/1":
            section = report.SECTIONS[document["schema"]].draw(document)
            known = {"commit": document["commit"], "command": document["command"]} | document["versions"]
            facts = [*section.facts, *((name, value) for name, value in known.items() if value)]
            parts += [f"## {path.name}", "\n".join(f"- {name}: `{value}`" for name, value in facts)]
            parts += ["\n".join(f"- {line}" for line in section.lead)]
            for block in section.blocks:
                if isinstance(block, report.Table):
                    parts += [f"### {block.title} of {path.stem}", report.markdown_table(block.headers, block.rows)]
                    parts += [block.note] if block.note else []
    if len(parts) == 3:
        parts.append("None is there yet: `make bench` runs one.")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def write() -> None:
    """Rewrite every generated page."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
