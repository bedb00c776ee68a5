"""The kernels compile for GPUs that are not here: no driver is asked."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rans_kernels.ops.rans_decode.triton import rans_decode_kernel
from rans_kernels.ops.rans_linear.triton import add_partial_kernel, rans_linear_kernel

tensors = {"heads": "*i32", "words": "*i16", "offsets": "*i32", "table": "*i32", "out": "*i8", "x": "*bf16",
           "scale": "*fp32", "partial": "*fp32", "y": "*bf16"}
constants = {"UNITS": 16, "CODED": 4, "RAW": 3, "PROBABILITY_BITS": 12, "TILES": 4, "GROUP_SIZE": 32, "BLOCK_M": 2,
             "SLICES": 2, "SCALED": True, "BLOCK": 256, "FLOAT": False}
for kernel in (rans_decode_kernel, rans_linear_kernel, add_partial_kernel, rans_decode_kernel):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else tensors.get(n, "i32") for n in names}
    used = {n: value for n, value in constants.items() if n in names}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=used), target=target, options={"num_warps": 4})
    print(kernel.__name__, len(compiled.asm["cubin"]) > 0)
    # the last one decodes floats
    constants |= {"FLOAT": True}
    tensors["out"] = "*i16"
"""


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_portable_kernels_compile_without_a_gpu(capability):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    kernels = ("rans_decode_kernel", "rans_linear_kernel", "add_partial_kernel", "rans_decode_kernel")
    assert result.stdout.split() == [word for kernel in kernels for word in (kernel, "True")], result.stderr


COMPILE_GLUON = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from rans_kernels.ops.int8_linear.gluon import int8_linear_kernel
from rans_kernels.ops.rans_decode.gluon import rans_decode_kernel, rans_decode_many_kernel
from rans_kernels.ops.rans_linear.gluon import rans_linear_kernel
from rans_kernels.ops.rans_linear.gluon_grouped import rans_linear_grouped_kernel

capability = int(sys.argv[1])
tensors = {"heads": "*i32", "words": "*i16", "offsets": "*i32", "table": "*i32", "scale": "*fp32", "bias": "*bf16",
           "x": "*bf16", "y": "*bf16", "weight": "*i8", "out": "*i8", "descriptors": "*i64", "blocks": "*i32"}
constants = {"CODED": 1, "RAW": 7, "PRECISION": 10, "COLUMN_BLOCKS": 2, "HAS_BIAS": True, "BFLOAT16": True, "WARPS": 4,
             "STAGES": 3, "WORD_BYTES": 512, "WORD_RING": False, "TILES": 6, "SPAN": 2, "OVERLAP": capability >= 90,
             "DTYPE": "i8", "LINES": 2, "CACHE": "", "DESCRIPTOR": 13, "FLOAT": False, "RAGGED": False,
             "SHARED0": 4096, "SHARED1": 2048, "SHARED2": 2048}
half = {"DTYPE": "f16", "LINES": 0, "STAGES": 1}
compact = {"CODED": 8, "RAW": 0, "PRECISION": 12, "STAGES": 1, "WORD_BYTES": 2048, "WORD_RING": True}
floats = {"CODED": 2, "RAW": 3, "DTYPE": "bf16", "LINES": 0, "FLOAT": True, "RAGGED": True}
kinds = [(rans_linear_kernel, {}), (rans_linear_grouped_kernel, {}), (int8_linear_kernel, {}), (rans_decode_kernel, {}),
         (rans_decode_kernel, half), (rans_decode_kernel, compact), (rans_decode_many_kernel, {}),
         (rans_linear_kernel, floats), (rans_decode_kernel, floats)]
for kernel, others in kinds:
    names = kernel.arg_names
    types = {n: tensors.get(n.rstrip("012"), "i32") for n in names}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    used = {n: value for n, value in {**constants, **others}.items() if n in names}
    source = GluonASTSource(kernel, signature, constexprs=used)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    print(kernel.__name__, compiled.metadata.shared, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_warp_level_kernels_compile_without_a_gpu(capability):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE_GLUON, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    kernels = ("rans_linear_kernel", "rans_linear_grouped_kernel", "int8_linear_kernel", "rans_decode_kernel",
               "rans_decode_kernel", "rans_decode_kernel", "rans_decode_many_kernel", "rans_linear_kernel",
               "rans_decode_kernel")  # fmt: skip
    # all of the shared memory is what the kernel asked for: the compiler adds none, the assembly may use it from 0
    assert result.stdout.split() == [word for name in kernels for word in (name, "32768", "True")], result.stderr


COMPILE_WIDE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from rans_kernels.ops.rans_linear.hopper import add_spans_kernel, arrange_x_kernel, rans_linear_hopper_kernel

tensors = {"heads": "*i32", "words": "*i16", "offsets": "*i32", "table": "*i32", "scale": "*fp32", "bias": "*bf16",
           "x": "*bf16", "y": "*bf16", "out": "*bf16", "partial": "*fp32"}
constants = {"CODED": 1, "RAW": 7, "PRECISION": 10, "COLUMNS": 64, "HAS_BIAS": True, "BFLOAT16": True, "WARPS": 4,
             "STAGES": 4, "WORD_BYTES": 512, "WORD_RING": False, "TILES": 6, "SPAN": 2, "CHAIN": False,
             "OVERLAP": True, "SPANS": 3, "SHARED0": 8192, "SHARED1": 4096, "SHARED2": 4096}
compact = {"CODED": 8, "RAW": 0, "PRECISION": 12, "WORD_BYTES": 2048, "WORD_RING": True}
chain = {"COLUMNS": 256, "CHAIN": True, "SPAN": 6, "SHARED0": 32768, "SHARED1": 4096}
for kernel, others in ((rans_linear_hopper_kernel, {}), (rans_linear_hopper_kernel, compact),
                       (rans_linear_hopper_kernel, chain), (arrange_x_kernel, {}), (add_spans_kernel, {})):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else tensors.get(n, "i32") for n in names}
    used = {n: value for n, value in {**constants, **others}.items() if n in names}
    source = GluonASTSource(kernel, signature, constexprs=used)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    asked = 4 * sum(used.get(f"SHARED{i}", 0) for i in range(3))
    print(kernel.__name__, compiled.metadata.shared == asked, compiled.asm["ptx"].count("wgmma.mma_async"))
"""


def test_wide_kernels_compile_for_hopper_without_a_gpu():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", COMPILE_WIDE], env=environment, capture_output=True, text=True)
    # four products a unit
    wide = ["rans_linear_hopper_kernel", "True", "4"]
    assert result.stdout.split() == [
        *wide, *wide, *wide, "arrange_x_kernel", "True", "0", "add_spans_kernel", "True", "0"
    ], result.stderr  # fmt: skip
