"""Scripts that measure wancli, without the noise of torchao; not part of the package."""

from wancli.utils.packages import silence_torchao

silence_torchao()
