"""`wancli doctor`: which models this machine can run, and how to fix what is broken."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.cli.messages import with_flags
from wancli.cli.options import Folder, OutputOptions, folder, takes_output_options
from wancli.cli.screen import Screen
from wancli.config.settings import Machine
from wancli.errors import SetupError
from wancli.utils.units import gib

if TYPE_CHECKING:
    from wancli.cost.estimate import Rates
    from wancli.doctor.checks import Finding

Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Measure this machine's speed, from which plans tell times, and attention kernels, of "
        "which runs take the fastest that is right; takes less than a minute.",
    ),
]


@takes_output_options
def doctor(
    *, output_options: OutputOptions, output_dir: Folder = None, measure: Measure = False
) -> None:
    """Check what this machine can run, and how to fix the rest.

    First, whether each known model fits with its own preset, how long it takes if this machine was
    measured, and what would make it fit; then packages, devices, disks, ffmpeg and attention
    kernels. Exit 4 if generate cannot run.

    wancli doctor --measure
    """
    from wancli.cli.plan_table import models_json, show_models
    from wancli.cost.capacity import check_models
    from wancli.doctor.checks import run_checks

    screen, place = Screen(output_options), folder(output_dir)
    rates = _measure(screen) if measure else None
    models = check_models()
    if not output_options.json:
        show_models(models, screen)
    screen.note("checking packages, devices and disks; this takes some seconds")
    findings = list(run_checks(place))
    broken = [finding for finding in findings if finding.fatal]
    if not broken:
        from wancli.doctor.attention import attention_backends
        from wancli.models.load import pick_device

        findings += attention_backends(pick_device("auto"))
    findings = [_with_flags(finding) for finding in findings]
    if output_options.json:
        checked = {
            "models": [models_json(check) for check in models],
            "findings": [asdict(finding) for finding in findings],
        }
        screen.json({"ok": not broken, **checked, **({"rates": asdict(rates)} if rates else {})})
    else:
        groups = ["", *(finding.group for finding in findings)]
        rows = [
            ("" if f.group == before else f.group, f.name, _value(f))
            for before, f in zip(groups, findings, strict=False)
        ]
        screen.table("", "", "", rows=rows)
    if broken:
        names = ", ".join(finding.name for finding in broken)
        raise SetupError(f"generate cannot run on this machine: {names}.", hint=broken[0].fix)


def _measure(screen: Screen) -> "Rates":
    """Measure the speed of this machine, save it and print it."""
    from wancli.cost.devices import find_device
    from wancli.cost.estimate import write_rates
    from wancli.doctor.kernels import describe, measure_kernels
    from wancli.doctor.measure import measure
    from wancli.models.load import pick_device

    device = pick_device("auto")
    screen.note("measuring this machine; this takes less than a minute")
    kernels = measure_kernels(device)
    rates = measure(device, kernels)
    write_rates(find_device(Machine(device=device.type)), rates)
    for name, rate in rates.matmul.items():
        attention = rates.attention.get(name)
        also = f", attention {attention / 1e12:.3g} TFLOP/s" if attention else ""
        screen.note(f"{name}: matmul {rate / 1e12:.3g} TFLOP/s{also}")
    convolution = rates.convolution / 1e12
    small = rates.small_convolution / 1e12
    fast = f", fast {rates.fast_convolution / 1e12:.3g} TFLOP/s" if rates.fast_convolution else ""
    screen.note(
        f"convolution {convolution:.3g} TFLOP/s, small {small:.3g} TFLOP/s{fast}, "
        f"copy {gib(rates.copy)}/s"
    )
    for line in describe(kernels):
        screen.note(with_flags(line))
    return rates


def _value(finding: "Finding") -> str:
    """A finding as printed: a state that is not ok, the value, and how to fix it."""
    state = "" if finding.state in ("ok", "note") else finding.state
    return ": ".join(filter(None, (state, finding.value, finding.fix)))


def _with_flags(finding: "Finding") -> "Finding":
    return replace(finding, value=with_flags(finding.value), fix=with_flags(finding.fix))
