"""`wancli doctor`: what this machine can run, and how to fix the rest."""

from dataclasses import asdict
from typing import Annotated

import typer

from wancli.cli.options import Folder, OutputOptions, folder, takes_output_options
from wancli.cli.screen import Screen
from wancli.config.settings import Machine
from wancli.cost.devices import find_device
from wancli.cost.estimate import Rates, write_rates
from wancli.errors import SetupError
from wancli.utils.units import gib

Measure = Annotated[
    bool,
    typer.Option(
        "--measure", help="Measure this machine's speed for some seconds, for the times in plans."
    ),
]


@takes_output_options
def doctor(
    *, output_options: OutputOptions, output_dir: Folder = None, measure: Measure = False
) -> None:
    """Check what this machine can run, and how to fix the rest.

    Exit 4 if generate cannot run.

    wancli doctor --measure
    """
    from wancli.doctor.checks import find_all

    screen, place = Screen(output_options), folder(output_dir)
    screen.say("checking this machine; this takes some seconds")
    rates = _measured(screen) if measure else None
    findings = list(find_all(place))
    broken = [finding for finding in findings if finding.fatal]
    if not broken:
        from wancli.doctor.attention import attention_backends
        from wancli.models.load import pick_device

        findings += attention_backends(pick_device("auto"))
    if output_options.json:
        report = {"ok": not broken, "findings": [asdict(finding) for finding in findings]}
        screen.json(report | ({"rates": asdict(rates)} if rates else {}))
    else:
        rows = [(f.group, f.name, f.value, _word(f.state), f.mend) for f in findings]
        screen.table("", " ", "found", "", "how to fix it", rows=rows)
    if broken:
        names = ", ".join(finding.name for finding in broken)
        raise SetupError(f"generate cannot run on this machine: {names}.", hint=broken[0].mend)


def _measured(screen: Screen) -> Rates:
    """Measure the speed of this machine, save it and print it."""
    from wancli.doctor.measure import measure
    from wancli.models.load import pick_device

    device = pick_device("auto")
    rates = measure(device)
    write_rates(find_device(Machine(device=device.type)), rates)
    for name, rate in rates.matmul.items():
        attention = rates.attention[name] / 1e12
        screen.say(f"{name}: products {rate / 1e12:.3g} TFLOP/s, attention {attention:.3g} TFLOP/s")
    convolution = rates.convolution / 1e12
    small = rates.small_convolution / 1e12
    screen.say(
        f"convolution {convolution:.3g} TFLOP/s, small {small:.3g} TFLOP/s, "
        f"copying {gib(rates.copy)}/s"
    )
    return rates


def _word(state: str) -> str:
    return "" if state == "note" else state
