"""The portable Triton kernels: same integers as the CPU decoder, same products as float64, on a GPU or interpreted."""

import numpy as np
import pytest
import torch
from rans_kernels.coder import encode_tiles
from rans_kernels.format import LANES, SPLITS, Split, TileLayout
from rans_kernels.ops.table import slot_table, table_frequencies

triton = pytest.importorskip("triton")
from rans_kernels.ops.rans_decode.triton import rans_decode_triton  # noqa: E402
from rans_kernels.ops.rans_linear.triton import rans_linear_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def encode(shape, split, lanes, seed=0):
    """Random weights that fill the split's range, and their tensors on the device."""
    rng = np.random.default_rng(seed)
    w = np.clip(np.rint(rng.normal(0, -split.low / 3, shape)), split.low, -split.low - 1).astype(np.int8)
    layout = TileLayout(shape, split, lanes)
    e = encode_tiles(w, layout)
    stream, offsets, freqs = (torch.from_numpy(a).to(DEVICE) for a in (e.stream, e.offsets, e.freqs))
    return torch.from_numpy(w).to(DEVICE), stream, offsets, slot_table(freqs), layout


def relative_error(y, reference):
    return ((y.double() - reference).norm() / reference.norm()).item()


# 1024 lanes decode few symbols each: the interpreter manages some thousand operations a second
SMALL = [((33, 40), Split(8, 0), 1024), ((1, 1), Split(4, 2), 1024), ((63, 257), Split(2, 3), 1024)]
SMALL += [((20, 70), Split(1, 7), 512), ((40, 33), Split(1, 1), 512)]


@pytest.mark.parametrize(("shape", "split", "lanes"), SMALL, ids=str)
def test_decode_kernel_equals_the_weights(shape, split, lanes):
    w, stream, offsets, table, layout = encode(shape, split, lanes)
    assert torch.equal(rans_decode_triton(stream, offsets, table, layout), w)


@pytest.mark.parametrize(("shape", "split", "lanes"), SMALL[:3], ids=str)
@pytest.mark.parametrize(("rows", "group_size"), [(1, None), (3, 32)])
def test_fused_kernel_equals_the_product(shape, split, lanes, rows, group_size):
    w, stream, offsets, table, layout = encode(shape, split, lanes)
    groups = 1 if group_size is None else -(-shape[1] // group_size)
    scale = torch.rand(shape[0], groups, device=DEVICE) + 0.5
    x = torch.randn(rows, shape[1], device=DEVICE)
    y = rans_linear_triton(x, stream, offsets, table, scale, layout, group_size)
    expanded = scale.repeat_interleave(group_size or shape[1], 1)[:, : shape[1]]
    assert relative_error(y, x.double() @ (w.double() * expanded.double()).T) < 1e-6


def test_slot_table_holds_the_frequencies():
    freqs = torch.zeros(256, dtype=torch.int16)
    freqs[[0, 7, 255]] = torch.tensor([1, 4000, 95], dtype=torch.int16)
    assert torch.equal(table_frequencies(slot_table(freqs)), freqs)


@pytest.mark.gpu
class TestOnGpu:
    # every combination is compiled: each split once, each lane count once
    @pytest.mark.parametrize(
        ("split", "lanes"), [(split, 256) for split in SPLITS] + [(Split(4, 3), lanes) for lanes in LANES], ids=str
    )
    def test_decode(self, split, lanes):
        w, stream, offsets, table, layout = encode((573, 801), split, lanes)
        assert torch.equal(rans_decode_triton(stream, offsets, table, layout), w)

    @pytest.mark.parametrize(
        ("split", "lanes", "rows", "group_size", "dtypes"),
        [
            (Split(8, 0), 32, 1, None, (torch.float32, torch.float16, torch.bfloat16)),
            (Split(8, 0), 64, 5, 64, (torch.bfloat16,)),
            (Split(4, 3), 128, 3, None, (torch.bfloat16,)),
            (Split(4, 0), 256, 16, 32, (torch.float16,)),
            (Split(2, 4), 512, 16, None, (torch.float32,)),
            (Split(1, 5), 1024, 2, 96, (torch.bfloat16,)),
        ],
        ids=str,
    )
    def test_fused(self, split, lanes, rows, group_size, dtypes):
        shape = (573, 801)
        w, stream, offsets, table, layout = encode(shape, split, lanes)
        groups = 1 if group_size is None else -(-shape[1] // group_size)
        scale = torch.rand(shape[0], groups, device=DEVICE) + 0.5
        expanded = scale.repeat_interleave(group_size or shape[1], 1)[:, : shape[1]]
        for dtype in dtypes:
            x = torch.randn(rows, shape[1], device=DEVICE, dtype=dtype)
            y = rans_linear_triton(x, stream, offsets, table, scale, layout, group_size)
            assert relative_error(y, x.double() @ (w.double() * expanded.double()).T) < 1e-6
            again = rans_linear_triton(x, stream, offsets, table, scale, layout, group_size)
            assert torch.equal(y, again)

    @pytest.mark.parametrize("rows", [1, 16, 17, 100])
    def test_module(self, rows):
        from rans_kernels.checkpoint import LayerEntry
        from rans_kernels.linear import CompressedLinear

        w = torch.randint(-4, 4, (700, 300), dtype=torch.int8)
        layout = TileLayout((700, 300), Split(4, 0), 256)
        e = encode_tiles(w.numpy(), layout)
        module = CompressedLinear(layout, len(e.stream), (700, 1), bias=True)
        scale = torch.rand(700, 1)
        _, buffers = LayerEntry.describe("linear", e, scale, None, True)
        module.load_state_dict({**buffers, "bias": module.bias})
        module.bias.data.uniform_(-1, 1)
        x = torch.randn(rows, 300)
        reference = x.double() @ (w.double() * scale.double()).T + module.bias.double()
        y = module.to(DEVICE)(x.to(DEVICE))
        assert relative_error(y.cpu(), reference) < 1e-5
        assert torch.equal(module.decode().cpu(), w)
        assert "triton-fused" in repr(module)
