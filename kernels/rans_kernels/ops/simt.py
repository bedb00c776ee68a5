"""Warp-level building blocks for Gluon kernels in SIMT style: a tensor has one element a thread, [32 * warps].

Gluon gives launch, control flow and arithmetic; what it has no word for (shared memory at an address, `ld` and
`cp.async` by vectors, one MMA on one warp's registers) is a line of PTX here. All of it assembles for sm_80 and later.
"""

from functools import lru_cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WORD_RING_BYTES = 2048
"""Ring that the words of a tile pass through where it has more: twice what half a unit takes at most (warp.fills)."""

block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Waits for every thread of the block; Triton 3.9 renamed it."""


@gluon.constexpr_function
def thread_layout(warps):
    """Layout of a tensor with one element a thread."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def registers(n):
    """Operands of a vector of n registers: {$0, $1, ...}, or $0 for one."""
    names = ", ".join(f"${i}" for i in range(n))
    return f"{{{names}}}" if n > 1 else names


@gluon.constexpr_function
def load_asm(space, n, predicate):
    """Vector load of n 32-bit registers; operands: n results, address, and a predicate that leaves zeros where 0."""
    vector = f".v{n}" if n > 1 else ""
    load = f"ld{space}{vector}.u32 {registers(n)}, [${n}];"
    if not predicate:
        return load
    zeros = " ".join(f"mov.u32 ${i}, 0;" for i in range(n))
    return f"{{ .reg .pred p; setp.ne.u32 p, ${n + 1}, 0; {zeros} @p {load} }}"


@gluon.constexpr_function
def constraints(result, n, operands):
    """Constraint string of n results and the operands."""
    return ",".join([result] * n) + "," + operands


@gluon.jit
def load_shared(address, N: gl.constexpr):
    """N consecutive 32-bit values at a shared address: tuple of uint32."""
    return gl.inline_asm_elementwise(
        load_asm(".shared", N, False), constraints("=r", N, "r"), [address], dtype=(gl.uint32,) * N,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_global(pointer, on, N: gl.constexpr, KEEP: gl.constexpr = True):
    """N consecutive 32-bit values at a global address (uint64), read-only data; zeros where `on` is 0.

    KEEP false passes the L1 by, for what is read once.
    """
    SPACE: gl.constexpr = ".global.nc" if KEEP else ".global.nc.L1::no_allocate"
    return gl.inline_asm_elementwise(
        load_asm(SPACE, N, True), constraints("=&r", N, "l,r"), [pointer, on], dtype=(gl.uint32,) * N,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_shared2(address, a, b):
    """Two float32 at a shared address."""
    gl.inline_asm_elementwise(
        "st.shared.v2.f32 [$1], {$2, $3}; mov.u32 $0, 0;", "=r,r,f,f", [address, a, b], dtype=gl.uint32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def copy_asm(size):
    """cp.async of 4, 8 or 16 bytes, predicated; only 16 bytes can pass the L1 by."""
    cache = "cg" if size == 16 else "ca"
    copy = f"@p cp.async.{cache}.shared.global [$1], [$2], {size};"
    return f"{{ .reg .pred p; setp.ne.u32 p, $3, 0; {copy} mov.u32 $0, 0; }}"


@gluon.jit
def copy_async(address, pointer, on, SIZE: gl.constexpr):
    """Begin to copy SIZE bytes from a global (uint64) to a shared address, where `on` is not 0."""
    gl.inline_asm_elementwise(
        copy_asm(SIZE), "=r,r,l,r", [address, pointer, on], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def statement(text):
    """A PTX statement with a result that nobody reads, as the builtin wants one."""
    return f"{text} mov.u32 $0, $1;"


@gluon.jit
def execute(like, TEXT: gl.constexpr):
    """A PTX statement without operands, by every thread of `like`'s layout."""
    gl.inline_asm_elementwise(statement(TEXT), "=r,r", [like], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.constexpr_function
def wait_text(pending):
    """Wait until at most `pending` of this thread's committed copies are under way."""
    return f"cp.async.wait_group {pending};"


@gluon.jit
def shared_base(like):
    """Shared address of the block's dynamic shared memory, which the kernel must have allocated."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem; // $1", "=r,r", [like], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def align(address, SIZE: gl.constexpr):
    """The address, or the next that is a multiple of SIZE, a power of two."""
    return (address + (SIZE - 1)) & (0x100000000 - SIZE)


@gluon.jit
def open_block(WARPS: gl.constexpr, SHARED0: gl.constexpr, SHARED1: gl.constexpr, SHARED2: gl.constexpr):
    """Thread and lane, warp, the shared memory of a kernel and its address; give it back to `close_block`."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    tid = gl.arange(0, 32 * WARPS, layout=thread_layout(WARPS))
    pieces = (
        gl.allocate_shared_memory(gl.int32, [SHARED0], LAYOUT),
        gl.allocate_shared_memory(gl.int32, [SHARED1], LAYOUT),
        gl.allocate_shared_memory(gl.int32, [SHARED2], LAYOUT),
    )
    return tid, (tid % 32).to(gl.uint32), tid // 32, pieces, shared_base(tid)


@gluon.jit
def close_block(pieces, tid, WARPS: gl.constexpr):
    """Keep the shared memory until here.

    The one store that Gluon sees declares what the assembly addresses.
    """
    block_barrier()
    pieces[0].slice(0, 32 * WARPS).store(tid)
    pieces[1]._keep_alive()
    pieces[2]._keep_alive()


@gluon.constexpr_function
def mma_asm(dtype):
    """m16n8k16 of half or bfloat16 operands: 4 results, 4 sums, 4 of A, 2 of B."""
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};"
    )


@gluon.jit
def mma(c, a, b0, b1, DTYPE: gl.constexpr):
    """c + A B for one warp: c four float32, a four and b two registers of pairs; DTYPE "f16" or "bf16"."""
    return gl.inline_asm_elementwise(
        mma_asm(DTYPE), "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r", [c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def permute(a, b, SELECTOR: gl.constexpr):
    """PRMT: four bytes of the eight of (a, b), by the nibbles of SELECTOR, lowest first."""
    return gl.inline_asm_elementwise(permute_asm(SELECTOR), "=r,r,r", [a, b], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.constexpr_function
def permute_asm(selector):
    """PRMT with a constant selector."""
    return f"prmt.b32 $0, $1, $2, {selector};"


@lru_cache
def shared_pieces(size: int) -> tuple[int, int, int]:
    """Three powers of two (of int32) that hold `size` bytes together: Triton allocates in powers of two only."""
    need = -(-size // 1024)
    powers = [1 << i for i in range(9)]
    sums = [(a + b + c, a, b, c) for a in powers for b in powers if b <= a for c in powers if c <= b]
    return tuple(256 * piece for piece in min(s for s in sums if s[0] >= need)[1:])  # type: ignore[return-value]


def word_buffer_bytes(rows: int) -> tuple[int, bool]:
    """Shared memory for so many rows of words, in few sizes, lest every weight compiles anew; whether it is a ring."""
    if 16 * rows > WORD_RING_BYTES:
        return WORD_RING_BYTES, True
    return 512 * max(1, -(-rows // 32)), False
