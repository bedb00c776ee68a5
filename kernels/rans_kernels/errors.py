"""The exception that stands for a device our kernels do not run on, and those of torch for one that is not there."""

ABSENT = (RuntimeError, AssertionError, NotImplementedError)
"""What torch raises for a device that it lacks, by kind of device and build."""


class DeviceError(Exception):
    """A GPU or a backend without kernels: its message is one line that says what to do."""
