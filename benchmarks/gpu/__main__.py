"""`python -m benchmarks.gpu`: measure cases 0 to 9, each a line as soon as it is measured."""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging

from benchmarks.gpu.decoder import decoding, decoding_compiled, decoding_parts
from benchmarks.gpu.denoiser import compiled, eager, fp8, kernels, more
from benchmarks.gpu.kernels import attention, card, convolutions, products
from benchmarks.gpu.loop import more_rollouts, rollouts
from benchmarks.gpu.session import Item, Session

CASES: Sequence[tuple[int, Callable[[Session], Iterator[Item]]]] = (  # the most valuable first
    (0, card),
    (6, compiled),
    (9, rollouts),
    (7, decoding),
    (5, eager),
    (7, decoding_compiled),
    (8, fp8),
    (9, more_rollouts),
    (1, attention),
    (4, kernels),
    (6, more),
    (7, decoding_parts),
    (3, convolutions),
    (2, products),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=480.0, help="time for all cases")
    parser.add_argument("--cases", default="", help="such as 1,4,7 (default: all)")
    parser.add_argument("--out", type=Path, help="file to which the lines are appended")
    parser.add_argument("--commit", default="", help="of wancli, where git cannot say")
    parser.add_argument("--small", action="store_true", help="small sizes, as without CUDA")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("bench").setLevel(logging.INFO)
    warnings.simplefilter("ignore")
    diffusers_logging.set_verbosity_error()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    session = Session(device, args.small or not cuda, args.seconds, args.out, args.commit)
    wanted = [int(number) for number in args.cases.split(",") if number]
    for case, items in CASES:
        if case in (wanted or [case]):
            session.run(case, items)
    session.write({"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
