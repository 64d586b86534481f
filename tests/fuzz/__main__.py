"""`python -m tests.fuzz [GROUP...]`: run the campaign and report failures by cause."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.campaign import (
    GROUPS,
    LIGHT,
    Campaign,
    CaseResult,
    group_by_cause,
    module,
    run_in_processes,
    scratch_folder,
)

QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch and the hub are imported


def main() -> int:
    """Run the chosen groups; returns 1 if anything failed."""
    args = _parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the scratch folder
    if any(os.environ.get(name) != value for name, value in QUIET.items()):
        os.execve(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]],
                  os.environ | QUIET)  # fmt: skip
    with scratch_folder() as root:
        groups = args.groups or [group for group in GROUPS if group != LIGHT]
        campaign = Campaign(root, light=groups == [LIGHT])
        if args.case is not None:
            return _run_one(campaign, args)
        failed = 0
        for group in groups:
            failed += _run_group(campaign, group, args)
        return int(failed > 0)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    descriptions = "; ".join(f"{name}: {words}" for name, words in GROUPS.items())
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=descriptions)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--case", type=int, help="run only this case, and print everything about it"
    )
    parser.add_argument("--cases", type=int, help="number of cases per group (default: all)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the folder of --case")
    parser.add_argument("--report", type=Path, help="write failures by cause to this file")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    if args.case is not None and len(args.groups) != 1:
        parser.error("--case needs exactly one group")
    return args


def _run_one(campaign: Campaign, args: argparse.Namespace) -> int:
    """Run one case and print everything about it."""
    (group,) = args.groups
    result = campaign.run_case(group, args.seed, args.case, keep=args.keep)
    for line in result.lines:
        _say(line)
    for fault in result.faults:
        _say(f"{fault.kind}: {fault.cause}\n    {fault.detail}")
    _say(f"{group} {args.case}: {len(result.faults) or 'nothing'} wrong")
    return int(bool(result.faults))


def _run_group(campaign: Campaign, group: str, args: argparse.Namespace) -> int:
    since, cpu = time.monotonic(), sum(os.times()[2:4])
    if reason := getattr(module(group), "skip_reason", lambda _: "")(campaign.root):
        _say(f"{group:8} skipped: {reason}")
        return 0
    whole = module(group).SIZE
    numbers = range(args.first, args.first + (args.cases or whole))
    seen: set[tuple[str, str]] = set()

    def report(result: CaseResult) -> None:
        new = {(fault.kind, fault.cause) for fault in result.faults} - seen
        seen.update(new)
        for kind, cause in sorted(new):
            line = result.lines[-1] if result.lines else ""
            _say(f"  {kind}: {cause}\n    {result.rerun}\n    {line}")

    failed = run_in_processes(
        campaign, group, args.seed, numbers, processes=args.processes, report=report
    )
    spent = time.monotonic() - since
    spent_cpu = sum(os.times()[2:4]) - cpu
    causes = len(group_by_cause(failed))
    _say(f"{group:8} {len(numbers):6} tried {len(failed):6} failed "
         f"({causes} causes)  {spent:.0f} s, {spent_cpu:.0f} s of CPUs")  # fmt: skip
    if args.report:
        with args.report.open("a", errors="backslashreplace") as file:
            file.write(_format_report(group, failed))
    return len(failed)


def _format_report(group: str, failed: Sequence[CaseResult]) -> str:
    out = [f"## {group}\n"]
    for (kind, cause), cases in group_by_cause(failed).items():
        result = min(cases, key=lambda case: sum(map(len, case.lines)))
        detail = next(f.detail for f in result.faults if (f.kind, f.cause) == (kind, cause))
        lines = "\n    ".join(result.lines)
        out.append(f"- {kind}: {cause} ({len(cases)} cases)\n    {result.rerun}\n    {lines}\n"
                   f"    {detail[-700:]!r}\n")  # fmt: skip
    return "\n".join(out)


def _say(text: str) -> None:
    sys.stdout.write(text.encode(errors="backslashreplace").decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
