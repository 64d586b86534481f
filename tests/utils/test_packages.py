"""Packages by version, and the noise of one of them."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_importing_torchao_says_nothing():
    code = (
        "from wancli.utils.packages import silence_torchao; silence_torchao()\n"
        "import diffusers.quantizers.torchao"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
