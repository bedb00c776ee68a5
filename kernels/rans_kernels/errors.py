"""The one exception that stands for a device our kernels do not run on."""


class DeviceError(Exception):
    """A GPU or a backend without kernels: its message is one line that says what to do."""
