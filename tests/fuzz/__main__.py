"""`python -m tests.fuzz [GROUP...]`: try the campaign, and say what failed by cause."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.campaign import GROUPS, LIGHT, Campaign, Tried, causes, in_processes, module, rooted

QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch and the hub are imported


def main() -> int:
    """Exit 1 where anything failed."""
    asked = _asked()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is in memory goes
    if any(os.environ.get(name) != value for name, value in QUIET.items()):
        os.execve(sys.executable, [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]],
                  os.environ | QUIET)  # fmt: skip
    with rooted() as root:
        groups = asked.groups or [group for group in GROUPS if group != LIGHT]
        campaign = Campaign(root, light=groups == [LIGHT])
        if asked.case is not None:
            return _one(campaign, asked)
        failed = 0
        for group in groups:
            failed += _group(campaign, group, asked)
        return int(failed > 0)


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    told = "; ".join(f"{name}: {words}" for name, words in GROUPS.items())
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=told)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one, with all it says")
    parser.add_argument("--cases", type=int, help="so many of each group; else all")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the folder of --case")
    parser.add_argument("--report", type=Path, help="file for what failed, by cause")
    asked = parser.parse_args()
    if unknown := set(asked.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    if asked.case is not None and len(asked.groups) != 1:
        parser.error("--case is of one group")
    return asked


def _one(campaign: Campaign, asked: argparse.Namespace) -> int:
    """Try one case and say everything about it."""
    (group,) = asked.groups
    tried = campaign.try_one(group, asked.seed, asked.case, keep=asked.keep)
    for line in tried.lines:
        _say(line)
    for fault in tried.faults:
        _say(f"{fault.kind}: {fault.cause}\n    {fault.detail}")
    _say(f"{group} {asked.case}: {len(tried.faults) or 'nothing'} wrong")
    return int(bool(tried.faults))


def _group(campaign: Campaign, group: str, asked: argparse.Namespace) -> int:
    since, cpu = time.monotonic(), sum(os.times()[2:4])
    if reason := getattr(module(group), "left_out", lambda _: "")(campaign.root):
        _say(f"{group:8} left out: {reason}")
        return 0
    whole = module(group).SIZE
    numbers = range(asked.first, asked.first + (asked.cases or whole))
    seen: set[tuple[str, str]] = set()

    def say(one: Tried) -> None:
        new = {(fault.kind, fault.cause) for fault in one.faults} - seen
        seen.update(new)
        for kind, cause in sorted(new):
            _say(f"  {kind}: {cause}\n    {one.again}\n    {one.lines[-1] if one.lines else ''}")

    failed = in_processes(campaign, group, asked.seed, numbers, processes=asked.processes, say=say)
    spent = time.monotonic() - since
    spent_cpu = sum(os.times()[2:4]) - cpu
    _say(f"{group:8} {len(numbers):6} tried {len(failed):6} failed "
         f"({len(causes(failed))} causes)  {spent:.0f} s, {spent_cpu:.0f} s of CPUs")  # fmt: skip
    if asked.report:
        with asked.report.open("a", errors="backslashreplace") as file:
            file.write(_report(group, failed))
    return len(failed)


def _report(group: str, failed: Sequence[Tried]) -> str:
    out = [f"## {group}\n"]
    for (kind, cause), cases in causes(failed).items():
        one = min(cases, key=lambda case: sum(map(len, case.lines)))
        detail = next(f.detail for f in one.faults if (f.kind, f.cause) == (kind, cause))
        lines = "\n    ".join(one.lines)
        out.append(f"- {kind}: {cause} ({len(cases)} cases)\n    {one.again}\n    {lines}\n"
                   f"    {detail[-700:]!r}\n")  # fmt: skip
    return "\n".join(out)


def _say(text: str) -> None:
    sys.stdout.write(text.encode(errors="backslashreplace").decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
