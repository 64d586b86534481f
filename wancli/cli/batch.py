"""`wancli batch`: many videos of a file of jobs, on models that load once."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.cli import batch_ledger, batch_report
from wancli.cli.lazy import WancliCommand, WancliGroup
from wancli.cli.options import DryRun, Folder, OutputOptions, folder, takes_output_options
from wancli.errors import BatchError, WancliError

if TYPE_CHECKING:
    from wancli.api.batch import PlannedBatch
    from wancli.api.batch_worker import JobOutcome
    from wancli.cli.screen import Screen


class _FileOrCommand(WancliGroup):
    """A group whose command is `run`, where a file stands in its place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if named else ["run", *args])


app = typer.Typer(
    cls=_FileOrCommand, add_completion=False, help="Make the videos of a file of jobs, or prompts."
)
command = partial(app.command, cls=WancliCommand)

JobFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", help="Jobs as JSON lines, CSV or TOML, or prompts; - reads standard input."
    ),
]
LedgerFile = Annotated[
    Path | None,
    typer.Option(
        "--ledger", metavar="FILE", show_default="NAME.ledger beside the videos",
        help="What is done and what is not; a batch that is started again goes on.",
    ),
]  # fmt: skip
Skip = Annotated[
    bool, typer.Option("--skip-existing", help="Keep videos that already exist for the same job.")
]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")]
MaxFailures = Annotated[
    int | None, typer.Option("--max-failures", min=1, help="Stop after that many failures.")
]


@command("run")
@takes_output_options
def run(  # noqa: PLR0913 - one parameter per flag
    *,
    output_options: OutputOptions,
    file: JobFile,
    output_dir: Folder = None,
    ledger: LedgerFile = None,
    skip_existing: Skip = False,
    fail_fast: FailFast = False,
    max_failures: MaxFailures = None,
    dry_run: DryRun = False,
) -> None:
    """Make the videos of a file of jobs; each model loads once.

    wancli batch jobs.jsonl --output-dir videos
    """
    from wancli.api.batch import plan_batch
    from wancli.api.batch_outputs import check_new
    from wancli.api.batch_worker import BatchWorker
    from wancli.api.jobs import JOB_KEYS
    from wancli.api.requests import Listener
    from wancli.cli.screen import Screen
    from wancli.planning.jobs import STDIN, read_jobs
    from wancli.records.ledger import create_ledger
    from wancli.utils.packages import package_version

    screen, place = Screen(output_options), folder(output_dir)
    batch = read_jobs(file, JOB_KEYS)
    planned = plan_batch(batch, place, Listener(None))
    path = ledger or place / f"{'batch' if file == STDIN else file.stem}.ledger"
    if not os.path.lexists(path):
        check_new(batch, planned.settings, planned.jobs, skip_existing=skip_existing)
    if dry_run:
        _show(planned, screen)
        return
    version = package_version("wancli") or ""
    most = 1 if fail_fast else max_failures
    failures = 0
    with create_ledger(
        path, batch.digest, planned.settings, planned.jobs, version=version
    ) as opened:
        opened.retry(opened.numbers("failed"))  # of an earlier run
        outcomes = BatchWorker(opened, skip_existing=skip_existing, warn=screen.warn).run()
        try:
            for outcome in outcomes:
                _print(outcome, screen)
                failures += outcome.status == "failed"
                if failures == most:
                    break
        finally:
            outcomes.close()
        counts = opened.counts()
    screen.note(batch_ledger.in_words(counts))
    if failed := counts["failed"]:
        message = f"{failed:,} of {len(planned.jobs):,} jobs failed."
        raise BatchError(message, hint=f"wancli batch status {path}; the same command tries again")


for name, function in {**batch_ledger.COMMANDS, "report": batch_report.report}.items():
    command(name)(function)


def _show(planned: "PlannedBatch", screen: "Screen") -> None:
    models = len({one.model for one in planned.settings})
    if screen.options.json:
        for job in planned.jobs:
            screen.json({"line": job.line, "seed": job.seed, "output": {"path": job.output}})
        return
    from wancli.utils.units import duration

    time = duration(planned.seconds) if planned.seconds else "not known"
    rows = [("videos", f"{len(planned.jobs):,}"), ("models", str(models)), ("time", time)]
    screen.table("", "", rows=rows)


def _print(outcome: "JobOutcome", screen: "Screen") -> None:
    """Print a job that has ended: its path, or its record with --json."""
    job, error = outcome.job, outcome.error
    if error:
        if os.environ.get("WANCLI_DEBUG") == "1":
            raise error
        others = f" and {outcome.others:,} that need the same model" if outcome.others else ""
        screen.warn(f"{job.output.name}{others}: {error}", hint=error.hint)
    if not screen.options.json:
        if not error:
            screen.result(str(job.output))
        return
    screen.json({"job": job.number, **_json(outcome)})


def _json(outcome: "JobOutcome") -> dict[str, Any]:
    from wancli.records.record import error_json

    error: WancliError | None = outcome.error
    if error:
        path = {"path": str(outcome.job.output)}
        others = {"others": outcome.others} if outcome.others else {}
        return {"status": outcome.status, "error": error_json(error), "output": path, **others}
    return {**(outcome.record or {}), "status": outcome.status}
