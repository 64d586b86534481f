"""Checks of the doctor: what is broken, and how to fix it."""

from pathlib import Path

import pytest
import torch

from wancli.doctor import checks
from wancli.doctor.attention import attention_backends
from wancli.doctor.checks import (
    Finding,
    check_disks,
    check_ffmpeg,
    check_imports,
    check_packages,
)
from wancli.doctor.measure import DTYPES, _fast_rate, measure


def test_installed_packages_meet_their_requirements():
    findings = list(check_packages())
    assert {"torch", "diffusers", "typer"} <= {finding.name for finding in findings}
    assert [finding for finding in findings if finding.fatal] == []
    assert list(check_imports()) == []


@pytest.mark.parametrize(
    ("requirement", "state"),
    [("torch>=99", "broken"), ("nosuch-package>=1", "missing"), ("torch>=2", "ok")],
)
def test_a_package_is_checked_against_its_required_version(
    requirement: str, state: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checks, "requires", lambda _: [requirement, "x>1; extra == 'dev'"])
    (finding,) = check_packages()
    assert finding.state == state
    assert finding.fatal == (state != "ok")
    assert finding.fix == ("" if state == "ok" else f"pip install '{requirement}'")


def test_a_library_that_does_not_load_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_build.py").write_text("raise OSError('libcudart.so.12: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checks, "IMPORTED", ("torch", "broken_build"))
    (finding,) = check_imports()
    assert finding.fatal
    assert "libcudart" in finding.value
    assert "broken_build" in finding.fix


def test_ffmpeg_is_checked_by_encoding():
    finding = check_ffmpeg()
    assert finding.state == "ok"
    assert "3 frames read back" in finding.value


def test_an_ffmpeg_that_cannot_encode_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    assert check_ffmpeg().fatal
    program.unlink()
    finding = check_ffmpeg()
    assert finding.fatal
    assert "imageio-ffmpeg" in finding.fix


def test_disk_space_is_checked_where_files_will_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "x").write_bytes(b"0" * 2**20)
    findings = {finding.name: finding for finding in check_disks(tmp_path / "not" / "made")}
    assert str(tmp_path / "not" / "made") in findings["output"].value
    assert findings["models cached"].value == "1.0 MiB"


def test_working_backends_match_attention():
    findings = {finding.name: finding for finding in attention_backends(torch.device("cpu"))}
    assert findings["native"].state == findings["_native_math"].state == "ok"
    assert "sage" in findings["unavailable"].value
    assert not any(finding.fatal for finding in findings.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "as it is"]
)
def test_rates_cover_what_a_plan_needs(small: bool, monkeypatch: pytest.MonkeyPatch):
    if small:
        monkeypatch.setattr("wancli.doctor.measure.LAYERS", ((96, 2, 32),))
    rates = measure(torch.device("cpu"), budget_s=0.005)
    assert set(rates.matmul) == set(rates.attention) == set(DTYPES[:2])
    products = (*rates.matmul.values(), *rates.attention.values())
    for rate in (*products, rates.convolution, rates.small_convolution):
        assert 1e8 < rate < 1e14
    assert rates.copy > 1e7
    assert rates.fast_convolution is None  # only GPUs decode fast by default


def test_the_rate_of_fast_decoding_is_measured_with_its_layers():
    assert 1e6 < _fast_rate(torch.device("cpu"), 0.005, [(8, 1, 16)]) < 1e14


def test_a_note_is_never_fatal():
    assert not Finding("x", "y", "z", "note", needed=True).fatal
    assert Finding("x", "y", "z", "missing", needed=True).fatal
    assert not Finding("x", "y", "z", "missing").fatal
