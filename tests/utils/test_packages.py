"""Packages by version, and the noise of one of them."""

import subprocess
import sys

import pytest

from wancli.utils.packages import package_version


def test_a_package_that_is_not_installed_has_no_version():
    assert package_version("pytest") == pytest.__version__
    assert package_version("no-such-package") == ""


@pytest.mark.slow
def test_importing_torchao_says_nothing():
    code = (
        "from wancli.utils.packages import silence_torchao; silence_torchao()\n"
        "import diffusers.quantizers.torchao"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
