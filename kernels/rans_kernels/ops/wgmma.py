"""Warpgroup products for Hopper: four warps multiply their panels, 64 rows of W, with up to 128 rows of x at once.

A comes from the registers that a warp decoded into, as for `mma`; B, the rows of x, from shared memory, where they lie
as 8 x 8 matrices of 128 bytes (no swizzle), brought there by bulk copies. wgmma adds in the order of mma.sync to the
bit (docs/kernels.md), so that a product does not depend on which of the two computed it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def operand_list(first, count):
    """Operands `first` and those that follow: {$4, $5, ...}."""
    return "{" + ", ".join(f"${i}" for i in range(first, first + count)) + "}"


@gluon.constexpr_function
def tied(count):
    """Constraints of `count` float32 that are written over: outputs, and inputs in the same registers."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)])


@gluon.constexpr_function
def product_asm(columns, dtype):
    """Two m64nNk16, the two MMAs of half a unit: sums (written over), 8 registers of A, where B lies."""
    sums = columns // 2
    shape = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype}"
    products = " ".join(
        f"{shape} {operand_list(0, sums)}, {operand_list(2 * sums + 4 * i, 4)}, d{i}, 1, 1, 1, 0;" for i in range(2)
    )
    # a descriptor's upper half: 8 rows of x after 8 rows of x are 128 bytes away
    upper = 128 // 16
    first = 2 * sums + 8
    return (
        f"{{ .reg .b32 l; .reg .b64 d0, d1; mov.b64 d0, {{${first}, {upper}}}; "
        f"add.u32 l, ${first}, {columns * 32 // 16}; "
        f"mov.b64 d1, {{l, {upper}}}; wgmma.fence.sync.aligned; {products} wgmma.commit_group.sync.aligned; }}"
    )


@gluon.constexpr_function
def product_constraints(columns):
    """Constraints of `product_asm`."""
    return tied(columns // 2) + "," + ",".join(["r"] * 9)


@gluon.jit
def begin_product(c, g, h, descriptor, COLUMNS: gl.constexpr, DTYPE: gl.constexpr):
    """c + A B for half a unit, begun: c is COLUMNS / 2 float32, g and h the operands of rows g and g + 8.

    Until `finish_products` has waited, c, g and h stay as they are.
    """
    return gl.inline_asm_elementwise(
        product_asm(COLUMNS, DTYPE), product_constraints(COLUMNS),
        c + (g[0], h[0], g[1], h[1], g[2], h[2], g[3], h[3], descriptor),
        dtype=(gl.float32,) * (COLUMNS // 2), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def wait_asm(pending):
    """Wait until at most `pending` committed groups of wgmma are under way; a result that nobody reads."""
    return f"wgmma.wait_group.sync.aligned {pending}; mov.u32 $0, 0;"


@gluon.constexpr_function
def operands_constraints(count):
    """One result, `count` registers that must not be given to anything else before."""
    return ",".join(["=r"] + ["r"] * count)


@gluon.jit
def wait_products(g, h, PENDING: gl.constexpr):
    """Wait until at most PENDING products are under way; g and h are the operands of one that is then over."""
    gl.inline_asm_elementwise(
        wait_asm(PENDING), operands_constraints(8), [g[0], g[1], g[2], g[3], h[0], h[1], h[2], h[3]], dtype=gl.uint32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def finish_products(c, COLUMNS: gl.constexpr):
    """The sums, when every product is over."""
    return gl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0;", tied(COLUMNS // 2), c, dtype=(gl.float32,) * (COLUMNS // 2),
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def x_descriptor(address, COLUMNS: gl.constexpr):
    """Lower half of the matrix descriptor of COLUMNS rows of x and 16 columns, two matrices along K."""
    LEADING: gl.constexpr = COLUMNS * 16 // 16
    return (address >> 4) | (LEADING << 16)


@gluon.constexpr_function
def open_barrier_asm(count):
    """Predicated mbarrier.init."""
    return f"{{ .reg .pred p; setp.ne.u32 p, $2, 0; @p mbarrier.init.shared.b64 [$1], {count}; mov.u32 $0, 0; }}"


@gluon.jit
def open_barrier(barrier, COUNT: gl.constexpr, on):
    """Make a barrier in shared memory that COUNT arrivals complete, where `on` is not 0; a block barrier follows."""
    gl.inline_asm_elementwise(
        open_barrier_asm(COUNT),
        "=r,r,r", [barrier, on], dtype=gl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def stage_bytes(size):
    """A stage of a ring: what it holds, two barriers, and what keeps stages aligned."""
    return size + 128


@gluon.constexpr_function
def copy_stage_asm(size, stages):
    """Wait until a stage is free, arrive at its barrier, which expects `size` bytes, and begin to copy them."""
    return (
        "{ .reg .pred p, q; .reg .b32 s, b, t; .reg .b64 f; setp.ne.u32 p, $4, 0; @!p bra.uni OVER; "
        f"and.b32 s, $3, {stages - 1}; mad.lo.u32 s, s, {stage_bytes(size)}, $1; add.u32 b, s, {size}; "
        f"shr.u32 t, $3, {stages.bit_length() - 1}; add.u32 t, t, 1; and.b32 t, t, 1; "
        f"{wait_until('b+8', 't')} mad.wide.u32 f, $3, {size}, $2; setp.ne.u32 p, $5, 0; "
        f"@p mbarrier.arrive.expect_tx.shared.b64 _, [b], {size}; "
        f"@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [f], {size}, [b]; "
        "OVER: mov.u32 $0, 0; }"
    )


@gluon.constexpr_function
def wait_until(barrier, parity):
    """Wait for a phase, all lanes of a warp together: the vote tells the assembler that they do not part."""
    return (
        f"AGAIN: mbarrier.try_wait.parity.shared.b64 q, [{barrier}], {parity}; "
        "vote.sync.all.pred q, q, 0xffffffff; @!q bra.uni AGAIN;"
    )


@gluon.jit
def copy_stage(ring, pointer, index, on, first_lane, SIZE: gl.constexpr, STAGES: gl.constexpr):
    """Begin to copy piece `index`, of SIZE bytes, behind a global address (uint64) to its stage, where `on` is not 0.

    `on` is the same for all lanes, `first_lane` 1 in one of them. STAGES is a power of two. Behind what a stage holds
    stand two barriers: one that the copy completes, one that all warps complete when they are done with it.
    """
    gl.inline_asm_elementwise(
        copy_stage_asm(SIZE, STAGES), "=r,r,l,r,r,r", [ring, pointer, index, on, first_lane], dtype=gl.uint32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def release_stage_asm(size):
    """Predicated arrival at a stage's second barrier."""
    return f"{{ .reg .pred p; setp.ne.u32 p, $2, 0; @p mbarrier.arrive.shared.b64 _, [$1+{size + 8}]; mov.u32 $0, 0; }}"


@gluon.jit
def release_stage(stage, on, SIZE: gl.constexpr):
    """Say that a warp is done with what a stage held, where `on` is not 0: one lane of each."""
    gl.inline_asm_elementwise(release_stage_asm(SIZE), "=r,r,r", [stage, on], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.constexpr_function
def wait_stage_asm(size):
    """Wait for the phase of a stage's first barrier."""
    return f"{{ .reg .pred q; {wait_until(f'$1+{size}', '$2')} mov.u32 $0, 0; }}"


@gluon.jit
def wait_stage(stage, parity, SIZE: gl.constexpr):
    """Wait until what was to be copied to a stage for the even (0) or odd (1) time is there."""
    gl.inline_asm_elementwise(wait_stage_asm(SIZE), "=r,r,r", [stage, parity], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def store_word(pointer, value, on):
    """A 32-bit value to a global address (uint64), where `on` is not 0."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.u32 [$1], $2; mov.u32 $0, 0; }", "=r,l,r,r",
        [pointer, value, on], dtype=gl.uint32, is_pure=False, pack=1,
    )  # fmt: skip
