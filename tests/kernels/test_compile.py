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
from rans_kernels.ops.rans_decode.gluon import rans_decode_kernel
from rans_kernels.ops.rans_linear.gluon import rans_linear_kernel

capability = int(sys.argv[1])
tensors = {"heads": "*i32", "words": "*i16", "offsets": "*i32", "table": "*i32", "scale": "*fp32", "bias": "*bf16",
           "x": "*bf16", "y": "*bf16", "weight": "*i8", "out": "*fp16"}
constants = {"CODED": 1, "RAW": 7, "PRECISION": 10, "COLUMN_BLOCKS": 2, "HAS_BIAS": True, "BFLOAT16": True, "WARPS": 4,
             "STAGES": 3, "WORD_BYTES": 512, "TILES": 6, "OVERLAP": capability >= 90,
             "SHARED0": 4096, "SHARED1": 2048, "SHARED2": 2048, "FLOAT": False, "RAGGED": False}
floats = {"CODED": 2, "RAW": 3, "FLOAT": True, "RAGGED": True}
kernels = (rans_linear_kernel, int8_linear_kernel, rans_decode_kernel)
for kernel, changes in [*((kernel, {}) for kernel in kernels), (kernels[0], floats), (kernels[2], floats)]:
    names = kernel.arg_names
    values = constants | changes
    signature = {n: "constexpr" if n in values else tensors.get(n, "i32") for n in names}
    used = {n: value for n, value in values.items() if n in names}
    source = GluonASTSource(kernel, signature, constexprs=used)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    print(kernel.__name__, compiled.metadata.shared, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_warp_level_kernels_compile_without_a_gpu(capability):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE_GLUON, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    kernels = ("rans_linear_kernel", "int8_linear_kernel", "rans_decode_kernel")
    kernels += ("rans_linear_kernel", "rans_decode_kernel")
    # all of the shared memory is what the kernel asked for: the compiler adds none, the assembly may use it from 0
    assert result.stdout.split() == [word for name in kernels for word in (name, "32768", "True")], result.stderr
