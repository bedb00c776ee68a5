"""Count what the kernels issue for a weight, without a GPU: `python -m benchmarks.instructions`.

Compiles the fused kernel and the decoder for a compute capability, disassembles them and counts the innermost loop, one
unit: 32 weights a lane. The pipe of shifts and logic (ALU) takes 64 lanes a clock and multiprocessor, half of what is
issued; it is the limit of the decode. Writes benchmarks/results/instructions-sm<capability>.json.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from rans_kernels.coder.plan import choose_probability_bits
from rans_kernels.format import LANE_WEIGHTS, Split
from rans_kernels.ops.rans_decode.gluon import rans_decode_kernel
from rans_kernels.ops.rans_linear.gluon import rans_linear_kernel
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from qat.report import environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
SPLITS = (Split(1, 3), Split(1, 4), Split(1, 5), Split(1, 7), Split(2, 4), Split(4, 3), Split(8, 0))
FLOAT_SPLITS = (Split(2, 3), Split(4, 1), Split(4, 3), Split(8, 0))
ALU = {"BMSK", "IADD3", "ISETP", "LEA", "LOP3", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD", "VIMNMX", "VOTE"}
POINTERS = {"heads": "*i32", "words": "*i16", "offsets": "*i32", "table": "*i32", "scale": "*fp32", "bias": "*fp16",
            "x": "*fp16", "y": "*fp16", "out": "*i8"}  # fmt: skip


def compile_kernel(kernel: Any, split: Split, stages: int, capability: int, is_float: bool = False) -> bytes:
    """Machine code: of the fused kernel for one row of x in float16, of the decoder to INT8 or float16."""
    # as it is where a tile has many words
    ring = split.coded_bits >= 4
    constants = {
        "TILES": 4, "SPAN": 1, "CODED": split.coded_bits, "RAW": split.raw_bits,
        "PRECISION": choose_probability_bits(split, (8192, 28672)), "COLUMN_BLOCKS": 1, "HAS_BIAS": False,
        "BFLOAT16": False,
        "WARPS": 4, "STAGES": stages, "WORD_BYTES": 2048 if ring else 512, "WORD_RING": ring,
        "OVERLAP": capability >= 90, "DTYPE": "f16" if is_float else "i8", "LINES": 0 if is_float else 2, "CACHE": "",
        "FLOAT": is_float, "RAGGED": False, "SHARED0": 4096, "SHARED1": 4096, "SHARED2": 4096,
    }  # fmt: skip
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS or name == "K"}
    source = GluonASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    return compiled.asm["cubin"]


def disassemble(cubin: bytes) -> list[tuple[int, str, str]]:
    """Address, operation and operands of every instruction."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    lines: list[tuple[int, str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^(\.L_\w+):", line.strip()):
            labels[label[1]] = len(lines)
        if found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)(.*)", line):
            lines.append((int(found[1], 16), found[2], found[3]))
    # branches name labels: give them the address
    address = {label: hex(lines[index][0]) for label, index in labels.items() if index < len(lines)}
    return [(at, op, re.sub(r"`\((\.L_\w+)\)", lambda m: address[m[1]], rest)) for at, op, rest in lines]


def inner_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """Operations of the smallest loop that decodes: its lanes ask each other who needs a word."""
    loops = []
    for at, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            body = [o for a, o, _ in code if int(target[1], 16) <= a <= at]
            if any(o.startswith("VOTE") for o in body):
                loops.append(body)
    return min(loops, key=len)


def main() -> None:
    """Count every split and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, kernel in (("rows", rans_linear_kernel), ("decode", rans_decode_kernel)):
        found[name] = rows = []
        kinds = [*((split, False) for split in SPLITS), *((split, True) for split in FLOAT_SPLITS)]
        for split, is_float in kinds:
            for stages in (1,) if split.coded_bits >= 4 else (1, 3):
                body = inner_loop(disassemble(compile_kernel(kernel, split, stages, args.capability, is_float)))
                counts = Counter(op.split(".")[0] for op in body)
                alu = sum(counts[op] for op in ALU)
                rows.append(
                    {
                        "split": f"{split} float" if is_float else str(split), "stages": stages,
                        "instructions": len(body), "alu": alu,
                        "per_weight": round(len(body) / LANE_WEIGHTS, 3),
                        "alu_per_weight": round(alu / LANE_WEIGHTS, 3),
                    }
                )  # fmt: skip
        title = f"{kernel.__name__}, a unit of 32 weights a lane"
        print_table(title, list(rows[0]), [list(row.values()) for row in rows])
    write_json(
        RESULTS / f"instructions-sm{args.capability}.json",
        {"environment": environment(), "capability": args.capability, **found},
    )


if __name__ == "__main__":
    main()
