"""`wancli batch`: many videos of a file of jobs, on models that load once."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from wancli.cli import batch_ledger, batch_report
from wancli.cli.lazy import WancliCommand, WancliGroup
from wancli.cli.options import DryRun, Folder, OutputOptions, folder, takes_output_options
from wancli.errors import closest


class _FileOrCommand(WancliGroup):
    """A group whose command is `run`, where a file stands in its place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in ctx.help_option_names or self._is_command(args[0])
        return super().parse_args(ctx, args if named else ["run", *args])

    def _is_command(self, name: str) -> bool:
        """Whether it is a command, or meant as one: nearly its name, and no file."""
        if name in self.commands:
            return True
        near, path = closest(name, self.commands), Path(name)
        return near is not None and not path.suffix and not path.exists()


app = typer.Typer(
    cls=_FileOrCommand, add_completion=False, help=(
        "Make the videos of a file of jobs, or prompts.\n\n"
        "A FILE in the place of COMMAND is run; wancli batch run --help has the flags.\n\n"
        "wancli batch jobs.jsonl --output-dir videos"
    ),
)  # fmt: skip
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
Retries = Annotated[
    int,
    typer.Option(
        "--retries", min=0, max=100,
        help="Try again, so often, what may pass: out of memory, unexpected failures.",
    ),
]  # fmt: skip
Adapt = Annotated[
    bool,
    typer.Option("--adapt", help="Out of memory: go on with offload, VAE tiling, a smaller dtype."),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", metavar="SECONDS", min=1, help="End a job that takes longer, at its next step."
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers", metavar="N|auto", show_default="1, in this process",
        help="Worker processes, each with its model; auto: one for each GPU.",
    ),
]  # fmt: skip
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices", metavar="LIST", help="GPUs to use, such as 0,2, with a worker for each."
    ),
]  # fmt: skip
Engine = Annotated[
    str,
    typer.Option(
        "--engine", metavar="NAME",
        help="local: processes of this machine; ray: actors of a Ray cluster, a GPU each.",
    ),
]  # fmt: skip
Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="HOST:PORT", show_default="RAY_ADDRESS, or this machine's cluster",
        help="The Ray cluster.",
    ),
]  # fmt: skip
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N|auto",
        help="Only every N-th job, from the I-th on; auto: by SLURM's array.",
    ),
]  # fmt: skip


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
    retries: Retries = 0,
    adapt: Adapt = False,
    timeout: Timeout = None,
    workers: Workers = None,
    devices: Devices = None,
    engine: Engine = "local",
    address: Address = None,
    shard: ShardOption = None,
    dry_run: DryRun = False,
) -> None:
    """Make the videos of a file of jobs; each model loads once.

    wancli batch jobs.jsonl --output-dir videos
    """
    from wancli.batches.jobs import JOB_KEYS
    from wancli.cli.batch_plan import (
        new_batch,
        show_existing,
        show_new,
        warn_of_comments,
        warn_of_folder,
    )
    from wancli.cli.batch_run import RAY, HowToWork, choose_workers, make_batch
    from wancli.cli.screen import Screen
    from wancli.planning.job_rows import STDIN
    from wancli.planning.jobs import read_jobs
    from wancli.planning.shards import parse_shard
    from wancli.records.ledger import SUFFIX, create_ledger, open_batch
    from wancli.utils.packages import package_version

    screen, place = Screen(output_options), folder(output_dir)
    places, more = choose_workers(workers, devices, engine=engine, address=address)
    part = parse_shard(shard, os.environ) if shard is not None else None
    batch = read_jobs(file, JOB_KEYS)
    digest = f"{batch.digest}-{part}" if part else batch.digest
    stem = "batch" if file == STDIN else file.stem
    path = ledger or place / (f"{stem}.{part}{SUFFIX}" if part else f"{stem}{SUFFIX}")
    if os.path.lexists(path):
        opened = open_batch(path, digest)
        if ledger and output_dir:
            warn_of_folder(opened, output_dir, screen)
        if dry_run:
            show_existing(opened, places, screen)
            return
    else:
        planned, kept = new_batch(
            batch, place, part, skip_existing=skip_existing, elsewhere=engine == RAY
        )
        warn_of_comments(planned.batch, screen)
        if dry_run:
            show_new(planned, path, places, screen, kept=kept)
            return
        version = package_version("wancli") or ""
        opened = create_ledger(path, digest, planned.settings, planned.jobs, version=version)
    most = 1 if fail_fast else max_failures
    options = {
        "skip_existing": skip_existing, "retries": retries, "adapt": adapt, "timeout": timeout,
        **more,
    }  # fmt: skip
    make_batch(opened, HowToWork(places, options, most), screen)


for name, function in {**batch_ledger.COMMANDS, "report": batch_report.report}.items():
    command(name)(function)
