"""The portable kernels compile for GPUs that are not here: no driver is asked."""

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
from rans_kernels.ops.rans_linear.triton import rans_linear_kernel

tensors = {"stream": "*i32", "offsets": "*i32", "table": "*i32", "out": "*i8", "x": "*bf16", "scale": "*fp32",
           "partial": "*fp32"}
constants = {"CODED": 4, "RAW": 3, "GROUPS": 2, "PROBABILITY_BITS": 12, "GROUP_SIZE": 0, "BLOCK_M": 2}
for kernel in (rans_decode_kernel, rans_linear_kernel):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else tensors.get(n, "i32") for n in names}
    used = {n: value for n, value in constants.items() if n in names}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=used), target=target, options={"num_warps": 2})
    print(kernel.__name__, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_portable_kernels_compile_without_a_gpu(capability):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["rans_decode_kernel", "True", "rans_linear_kernel", "True"], result.stderr
