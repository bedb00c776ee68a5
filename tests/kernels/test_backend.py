"""Which kernels a device has, and one line where there are none."""

import importlib.util

import pytest
import torch
from rans_kernels.errors import DeviceError
from rans_kernels.ops.coded import backend_of


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that cuda:7 is a GPU of some compute capability."""
    backend_of.cache_clear()

    def make(capability, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda", 7)

    yield make
    backend_of.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "kernels"),
    [((9, 0), None, "gluon"), ((8, 0), None, "gluon"), ((7, 5), None, "triton"), ((9, 4), "6.4", "triton")],
)
def test_kernels_by_generation(capability, hip, kernels, gpu):
    assert backend_of(gpu(capability, hip)) == kernels


def test_devices_without_kernels_are_one_line(gpu, monkeypatch):
    with pytest.raises(DeviceError, match=r"Some GPU has compute capability 6.1 .*need 7.0: use the CPU") as old:
        backend_of(gpu((6, 1)))
    with pytest.raises(DeviceError, match="no kernels for mps: use the CPU"):
        backend_of(torch.device("mps"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="pip install triton"):
        backend_of(gpu((8, 0)))
    assert "\n" not in str(old.value)
