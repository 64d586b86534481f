"""`wancli batch report`: the videos of a batch as a page."""

from pathlib import Path
from typing import Annotated

import typer

from wancli.cli.batch_ledger import SCHEMA, Existing
from wancli.cli.options import OutputOptions, Overwrite, takes_output_options


@takes_output_options
def report(
    *,
    output_options: OutputOptions,
    ledger: Existing,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", show_default="NAME.html beside the ledger",
            help="HTML page to write; an earlier report is replaced.",
        ),
    ] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="Put videos of up to 2 MiB into the page.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Write a gallery of all jobs as one HTML page: videos, failures with hints, records.

    The page has a picture of each video and plays the files beside it: keep them together.

    wancli batch report videos -o videos/index.html
    """
    from wancli.cli.messages import with_flags
    from wancli.cli.screen import Screen
    from wancli.records.ledger import DONE, SKIPPED, open_ledger
    from wancli.utils.files import write_whole
    from wancli.utils.outputs import OutputFile, OutputSet
    from wancli.video.batch_report import is_report, render_report

    screen = Screen(output_options)
    with open_ledger(ledger) as opened:
        page = output or opened.path.with_suffix(".html")
        outputs = OutputSet(overwrite=overwrite, reads=[opened.path])
        outputs.add(OutputFile(page, "`output`", ours=is_report))
        with outputs.locked():
            counts = opened.counts()
            screen.note(f"taking a picture of each of {counts[DONE] + counts[SKIPPED]:,} videos")
            content = render_report(opened, page, embed=embed, in_words=with_flags)
            replace = page in outputs.replaced
            write_whole(page, content, hint="another `output`", overwrite=replace)
    screen.answer(str(page), {"schema": SCHEMA, "path": str(page), "bytes": len(content)})
