"""What one warp does with a tile, in registers: rANS steps, raw bits, and weights as MMA operands.

The words of a tile lie in shared memory and are shared by the warp: a ballot says which lanes need one, and a lane's
word is found by counting the lanes below it. See docs/format.md for the order of everything.
"""

# tuples grow in loops that are unrolled
# mypy: disable-error-code="assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rans_kernels.ops.simt import copy_async, execute, load_global, load_shared, permute, wait_text
from rans_kernels.ops.table import has_top_bits

can_sign = gluon.constexpr_function(has_top_bits)
"""For the kernels: whether weights can come out signed (`half_codes`)."""


@gluon.constexpr_function
def entry_words(coded):
    """32-bit words of a table entry: one where a symbol is one weight, whose look-ups are many, else two."""
    return 1 if coded == 8 else 2


@gluon.constexpr_function
def step_asm(coded, precision, ring):
    """One rANS step. Results: state, cursor, coded bits; operands: state, cursor, table, lanes below, factors, ring.

    Entries: frequency << 16 | offset in the symbol, and the coded bits in place; or, where a symbol is one weight,
    frequency << 20 | offset << 8 | symbol. The factors are two of `open_factors`, the second of which is also the
    bound under which a state wants a word: 0 for a lane that is to take none.
    """
    if coded == 8:
        look_up = "ld.shared.u32 $2, [a]; shr.u32 f, $2, 20; mul.lo.u32 o, $2, 4096; shr.u32 o, o, 20;"
    else:
        look_up = "ld.shared.v2.u32 {o, $2}, [a]; shr.u32 f, o, 16; and.b32 o, o, 0xffff;"
    wrap = f"and.b32 a, a, {ring - 1}; or.b32 a, a, $9;" if ring else ""
    return f"""{{
    .reg .pred q; .reg .b32 a, f, o, x, m, n; .reg .b16 h;
    and.b32 a, $3, {(1 << precision) - 1}; mad.lo.u32 a, a, $7, $5;
    {look_up}
    shr.u32 x, $3, {precision}; mad.lo.u32 x, f, x, o;
    setp.lt.u32 q, x, $8;
    vote.sync.ballot.b32 m, q, 0xffffffff;
    and.b32 n, m, $6; popc.b32 n, n; mad.lo.u32 a, n, 2, $4; {wrap}
    @q ld.shared.u16 h, [a];
    cvt.u32.u16 f, h;
    @q mad.lo.u32 x, x, $8, f;
    popc.b32 n, m; mad.lo.u32 $1, n, 2, $4;
    mov.u32 $0, x;
    }}"""


@gluon.jit
def open_factors(lane, entry_bytes, word_base):
    """The bytes of an entry, 2^16 and 1, for products in place of shifts and sums.

    Were they constants, the assembler would make these shifts and sums again, and the pipe of shifts and logic is the
    one that is full.
    """
    base = gl.full_like(lane, 1) * word_base
    return gl.full_like(lane, 1) * entry_bytes, base, base >> 16


@gluon.jit
def factors_where(live, factors):
    """The factors for a unit that is there; for one that is not, such that its lanes take no words.

    What such a unit decodes is nobody's, but the words it would read may be written at the same time.
    """
    return factors[0], gl.where(live, factors[1], 0), factors[2]


@gluon.jit
def step(state, cursor, table, below, factors, ring, CODED: gl.constexpr, PRECISION: gl.constexpr, RING: gl.constexpr):
    """Next state, next cursor, and the symbol's coded bits in place.

    The cursor is the shared address of the tile's next word; in a ring of RING bytes at `ring`, how many bytes of the
    tile were taken.
    """
    return gl.inline_asm_elementwise(
        step_asm(CODED, PRECISION, RING), "=&r,=&r,=&r,r,r,r,r,r,r,r",
        [state, cursor, table, below, factors[0], factors[1], ring], dtype=(gl.uint32, gl.uint32, gl.uint32),
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def next_word(
    state, cursor, table, below, factors, ring, J: gl.constexpr, carry, CODED: gl.constexpr, RAW: gl.constexpr,
    PRECISION: gl.constexpr, RING: gl.constexpr, SIGNED: gl.constexpr,
):  # fmt: skip
    """Coded bits, in place, of the four weights of word J; `carry` is the pattern that two words of C = 1 share.

    With SIGNED, which takes C = 1, the top bits of the bytes are set too: the table has them in bits 7 and 0.
    """
    if CODED == 1:
        MASK: gl.constexpr = (0x01010101 << (RAW - 1)) | (0x80808080 if SIGNED else 0)
        if J % 2 == 0:
            state, cursor, carry = step(state, cursor, table, below, factors, ring, CODED, PRECISION, RING)
            coded = carry & MASK
        else:
            coded = ((carry >> 1) | (carry << 31)) & MASK
    elif CODED == 2:
        state, cursor, coded = step(state, cursor, table, below, factors, ring, CODED, PRECISION, RING)
    elif CODED == 4:
        state, cursor, low = step(state, cursor, table, below, factors, ring, CODED, PRECISION, RING)
        state, cursor, high = step(state, cursor, table, below, factors, ring, CODED, PRECISION, RING)
        coded = permute(low, high, 0x5410)
    else:
        state, cursor, a = step(state, cursor, table, below, factors, ring, CODED, PRECISION, RING)
        state, cursor, b = step(state, cursor, table, below, factors, ring, CODED, PRECISION, RING)
        state, cursor, c = step(state, cursor, table, below, factors, ring, CODED, PRECISION, RING)
        state, cursor, d = step(state, cursor, table, below, factors, ring, CODED, PRECISION, RING)
        coded = permute(permute(a, b, 0x0040), permute(c, d, 0x0040), 0x5410)
    return state, cursor, coded, carry


@gluon.jit
def stage_table(address, table, tid, BYTES: gl.constexpr, WARPS: gl.constexpr):
    """Begin to copy the table, all threads of the block together."""
    for i in gl.static_range((BYTES // 16 + 32 * WARPS - 1) // (32 * WARPS)):
        at = i * 32 * WARPS + tid
        inside = (at < BYTES // 16).to(gl.uint32)
        copy_async(address + (at * 16).to(gl.uint32), (table + at * 4).to(gl.uint64), inside, 16)


@gluon.jit
def stage_words(address, words, offsets, tile, tiles, lane, WORD_BYTES: gl.constexpr):
    """Begin to copy a tile's words."""
    inside = tile < tiles
    begin = gl.load(offsets + tile, mask=inside, other=0)
    rows = gl.load(offsets + tile + 1, mask=inside, other=0) - begin
    for first in range(0, WORD_BYTES // 16, 32):
        at = first + lane.to(gl.int32)
        copy_async(address + (at * 16).to(gl.uint32), (words + (begin + at).to(gl.int64) * 8).to(gl.uint64),
                   (at < rows).to(gl.uint32), 16)  # fmt: skip


@gluon.jit
def fill_ring(ring, words, filled, cursor, rows, lane, RING: gl.constexpr):
    """Begin to copy rows of a tile's words, as many as its ring has room for, but 32 at most; rows filled then.

    `words`: global address of the tile's words, of which there are `rows`.
    """
    stop = gl.minimum(cursor // 16 + RING // 16, rows)
    row = filled + lane
    copy_async(ring + (row * 16 & (RING - 1)), words + (row * 16).to(gl.uint64), (row < stop).to(gl.uint32), 16)
    return gl.minimum(filled + 32, stop)


@gluon.constexpr_function
def fills(coded):
    """Calls of `fill_ring` that refill the ring after half a unit.

    A lane takes a word for 16 bits, a symbol costs at most 12: half a unit of C coded bits, 2 C symbols, takes at most
    32 (2 C * 12 + 16) / 16 words: 832 bytes for C = 8, 448 for C = 4.
    """
    return 2 if coded == 8 else 1


@gluon.jit
def open_ring(ring, words, offsets, tile, tiles, lane, RING: gl.constexpr):
    """Begin to fill the ring with a tile's words: their global address, rows, and rows filled."""
    inside = tile < tiles
    begin = gl.load(offsets + tile, mask=inside, other=0)
    rows = (gl.load(offsets + tile + 1, mask=inside, other=0) - begin).to(gl.uint32)
    address = (words + begin.to(gl.int64) * 8).to(gl.uint64)
    filled = gl.full_like(lane, 0)
    # all lanes have read the tile before
    execute(lane, "bar.warp.sync 0xffffffff;")
    for _ in gl.static_range(RING // 512):
        filled = fill_ring(ring, address, filled, gl.full_like(lane, 0), rows, lane, RING)
    execute(lane, "cp.async.commit_group;")
    return address, rows, filled


@gluon.jit
def refill_ring(ring, opened, cursor, lane, CODED: gl.constexpr, RING: gl.constexpr):
    """Before half a unit: wait for what was begun before, and begin to copy what there is room for."""
    address, rows, filled = opened
    execute(lane, wait_text(0))
    # what is copied is there for all lanes, and all have read what is now written over
    execute(lane, "bar.warp.sync 0xffffffff;")
    for _ in gl.static_range(fills(CODED)):
        filled = fill_ring(ring, address, filled, cursor, rows, lane, RING)
    execute(lane, "cp.async.commit_group;")
    return address, rows, filled


@gluon.jit
def stage_raw(address, pointer, lane, on, RAW: gl.constexpr):
    """Begin to copy a unit's raw plane; each lane copies what it will read, so it need wait for nobody."""
    BEHIND: gl.constexpr = 128 * (RAW & 4)
    if RAW & 4:
        copy_async(address + lane * 16, pointer + (lane * 16).to(gl.uint64), on, 16)
    if RAW & 2:
        copy_async(address + BEHIND + lane * 8, pointer + (BEHIND + lane * 8).to(gl.uint64), on, 8)
    if RAW & 1:
        LAST: gl.constexpr = 128 * (RAW - 1)
        copy_async(address + LAST + lane * 4, pointer + (LAST + lane * 4).to(gl.uint64), on, 4)


@gluon.jit
def stage_unit(address, pointer, lane, on, RAW: gl.constexpr, FLOAT: gl.constexpr):
    """As `stage_raw`, and the low bytes of floats."""
    stage_raw(address, pointer, lane, on, RAW)
    if FLOAT:
        for h in gl.static_range(2):
            at = 128 * RAW + 512 * h + lane * 16
            copy_async(address + at, pointer + at.to(gl.uint64), on, 16)


@gluon.jit
def load_words(at, on, N: gl.constexpr, SHARED: gl.constexpr):
    """N words from shared memory, or from global memory where `on` is not 0 and past the L1, as they are read once."""
    if SHARED:
        return load_shared(at, N)
    else:
        return load_global(at, on, N, False)


@gluon.jit
def load_raw(at, lane, on, RAW: gl.constexpr, SHARED: gl.constexpr):
    """This lane's RAW words of a unit's raw plane; one of zeros if RAW is 0."""
    plane = ()
    if RAW & 4:
        plane = plane + load_words(at + (lane * 16).to(at.dtype), on, 4, SHARED)
    if RAW & 2:
        plane = plane + load_words(at + (128 * (RAW & 4) + lane * 8).to(at.dtype), on, 2, SHARED)
    if RAW & 1:
        plane = plane + load_words(at + (128 * (RAW - 1) + lane * 4).to(at.dtype), on, 1, SHARED)
    return plane if RAW else (gl.full_like(lane, 0),)


@gluon.constexpr_function
def unit_bytes(raw, is_float):
    """Bytes of a unit in a head: the raw plane, and the low bytes of floats."""
    return 128 * (raw + (8 if is_float else 0))


@gluon.jit
def load_low(at, lane, on, HALF: gl.constexpr, RAW: gl.constexpr, SHARED: gl.constexpr):
    """This lane's four words of low bytes of half a unit that begins at `at`."""
    return load_words(at + (128 * RAW + 512 * HALF + lane * 16).to(at.dtype), on, 4, SHARED)


@gluon.jit
def place(word, BIT: gl.constexpr, TO: gl.constexpr, WIDTH: gl.constexpr):
    """The WIDTH-bit field at BIT of every byte, moved to bit TO."""
    MASK: gl.constexpr = 0x01010101 * (((1 << WIDTH) - 1) << TO)
    if BIT > TO:
        return (word >> (BIT - TO)) & MASK
    elif BIT < TO:
        return (word << (TO - BIT)) & MASK
    else:
        return word & MASK


@gluon.jit
def field(word, BIT: gl.constexpr, FROM: gl.constexpr, WIDTH: gl.constexpr, FLOAT: gl.constexpr):
    """WIDTH raw bits, from FROM on, that stand at BIT of every byte, moved to their place in a code.

    Of a float's they are the lowest bits of its high byte, but for the first, which is the sign of the byte before.
    """
    if FLOAT and FROM == 0:
        MASK: gl.constexpr = 0x01010101 * (0x80 | ((1 << (WIDTH - 1)) - 1))
        return ((word >> (BIT + 1)) | (word << (31 - BIT))) & MASK
    elif FLOAT:
        return place(word, BIT, FROM - 1, WIDTH)
    else:
        return place(word, BIT, FROM, WIDTH)


@gluon.jit
def piece(word, bits, V: gl.constexpr, J: gl.constexpr, RAW: gl.constexpr, FLOAT: gl.constexpr):
    """`bits` and what word V of the unit, `word`, holds of a field that is in pieces, that of word J."""
    WHOLE: gl.constexpr = 8 // RAW
    LEFT: gl.constexpr = 8 - WHOLE * RAW
    FIRST: gl.constexpr = (J - WHOLE * RAW) * RAW
    BEGIN: gl.constexpr = max(FIRST, V * LEFT)
    END: gl.constexpr = min(FIRST + RAW, (V + 1) * LEFT)
    if BEGIN < END:
        bits = bits | field(word, WHOLE * RAW + BEGIN - V * LEFT, BEGIN - FIRST, END - BEGIN, FLOAT)
    return bits


@gluon.jit
def raw_bits(plane, J: gl.constexpr, RAW: gl.constexpr, FLOAT: gl.constexpr = False):
    """Raw bits of the four weights of word J, a byte each, from a lane's words of a unit (format.raw_pieces).

    FLOAT: signs, the lowest of them, on top of the bytes that they belong to, the others one bit lower.
    """
    bits = gl.full_like(plane[0], 0)
    if RAW > 0:
        WHOLE: gl.constexpr = 8 // RAW
        if J < WHOLE * RAW:
            bits = field(plane[J // WHOLE], J % WHOLE * RAW, 0, RAW, FLOAT)
        else:
            for v in gl.static_range(RAW):
                bits = piece(plane[v], bits, v, J, RAW, FLOAT)
    return bits


@gluon.constexpr_function
def add_asm(addend):
    """Sum with a constant, as a product with a factor that is 1 but no constant (`open_factors`)."""
    return f"mad.lo.u32 $0, $1, $2, {addend};"


@gluon.jit
def add_constant(word, one, ADDEND: gl.constexpr):
    """word + ADDEND in the pipe of products."""
    return gl.inline_asm_elementwise(add_asm(ADDEND), "=r,r,r", [word, one], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def codes(
    coded, raw, one, CODED: gl.constexpr, RAW: gl.constexpr, FLOAT: gl.constexpr = False, SIGNED: gl.constexpr = False
):
    """Weights plus their offset, a byte each, from coded and raw bits (format.Split); or the high bytes of floats.

    Coded bits of floats come from the table as the first high byte of their window, to which the raw bits are added.
    With SIGNED the weights themselves, whose top bits are still to be turned by those that `coded` then has set: their
    offset, 2^R, is a multiple of the coded bit, so that it can be taken off before.
    """
    if FLOAT and RAW > 1:
        return raw + coded
    elif SIGNED:
        return add_constant(raw, one, 0x01010101 * (128 - (1 << (RAW - 1)))) ^ coded
    elif CODED == 1:
        return add_constant(raw, one, 0x01010101 << (RAW - 1)) ^ coded
    else:
        return raw | coded


@gluon.jit
def half_codes(
    state, cursor, opened, table, below, factors, ring, lane, plane, carry, HALF: gl.constexpr,
    CODED: gl.constexpr, RAW: gl.constexpr, PRECISION: gl.constexpr, RING: gl.constexpr, FLOAT: gl.constexpr = False,
    SIGNED: gl.constexpr = False,
):  # fmt: skip
    """Decode half a unit: what goes on, and the codes of this lane's four words, high bytes of floats, or weights.

    SIGNED gives weights, where `can_sign` says so. `carry` of the first half is anything, of the second what the first
    gave. `opened`: of the ring, if there is one.
    """
    if RING:
        opened = refill_ring(ring, opened, cursor, lane, CODED, RING)
    u = ()
    for j in gl.static_range(4 * HALF, 4 * HALF + 4):
        state, cursor, coded, carry = next_word(
            state, cursor, table, below, factors, ring, j, carry, CODED, RAW, PRECISION, RING, SIGNED
        )
        u = u + (codes(coded, raw_bits(plane, j, RAW, FLOAT), factors[2], CODED, RAW, FLOAT, SIGNED),)
    return state, cursor, opened, carry, u


@gluon.constexpr_function
def operand_asm(coded, raw, dtype):
    """Four bytes to two registers of pairs, less the offset.

    half: 0x6400 | u is 1024 + u. bfloat16: 0x4300 | u is 128 + u for u below 128; bit 7 comes in as 2 * 64.
    """
    offset = 1 << (coded + raw - 1)
    if dtype == "f16":
        bias = (0x6400 | offset) * 0x10001
        return (
            "{ .reg .b32 m, b; mov.b32 m, 0x64646464; "
            f"mov.b32 b, {bias}; prmt.b32 $0, $2, m, 0x4140; prmt.b32 $1, $2, m, 0x4342; "
            "sub.f16x2 $0, $0, b; sub.f16x2 $1, $1, b; }"
        )
    one, minus = 0x3F803F80, (0xC300 | offset & 0x7F) * 0x10001
    if offset < 128:
        return (
            "{ .reg .b32 m, o, b; mov.b32 m, 0x43434343; "
            f"mov.b32 o, {one}; mov.b32 b, {minus}; prmt.b32 $0, $2, m, 0x4140; prmt.b32 $1, $2, m, 0x4342; "
            "fma.rn.bf16x2 $0, $0, o, b; fma.rn.bf16x2 $1, $1, o, b; }"
        )
    # 128 + low bits - 256, then 64 * 2 where bit 7 is set
    half = (
        "prmt.b32 h, $2, 0, {selector}; and.b32 l, h, 0x007f007f; or.b32 l, l, 0x43004300; "
        "and.b32 h, h, 0x00800080; shl.b32 h, h, 7; fma.rn.bf16x2 l, l, o, b; fma.rn.bf16x2 {result}, h, s, l; "
    )
    return (
        "{ .reg .b32 h, l, o, b, s; "
        f"mov.b32 o, {one}; mov.b32 b, {0xC380 * 0x10001}; mov.b32 s, {0x4280 * 0x10001}; "
        + half.format(selector="0x4140", result="$0")
        + half.format(selector="0x4342", result="$1")
        + "}"
    )


@gluon.jit
def operands(u, CODED: gl.constexpr, RAW: gl.constexpr, DTYPE: gl.constexpr):
    """Codes of four weights side by side to the two A registers they are: k halves 0 and 1."""
    return gl.inline_asm_elementwise(
        operand_asm(CODED, RAW, DTYPE), "=&r,=&r,r", [u], dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1
    )


@gluon.jit
def join_bytes(high, low):
    """High and low bytes of four floats to the two registers of pairs that they are: k halves 0 and 1 of A."""
    return permute(low, high, 0x5140), permute(low, high, 0x7362)


@gluon.constexpr_function
def scaled_asm(dtype):
    """Four weights in two registers of half pairs, times a float32, to two registers of `dtype`, rounded once."""
    halves = " ".join(
        f"mov.b32 {{l, h}}, ${2 + i}; cvt.f32.f16 a, l; cvt.f32.f16 b, h; mul.f32 a, a, $4; mul.f32 b, b, $4; "
        f"cvt.rn.{dtype}x2.f32 ${i}, b, a;"
        for i in range(2)
    )
    return f"{{ .reg .b16 l, h; .reg .f32 a, b; {halves} }}"


@gluon.jit
def scaled(u, scale, CODED: gl.constexpr, RAW: gl.constexpr, DTYPE: gl.constexpr):
    """Codes of four weights to float32(weight) * scale, rounded to DTYPE ("f16" or "bf16"): two registers of pairs."""
    low, high = operands(u, CODED, RAW, "f16")
    return gl.inline_asm_elementwise(
        scaled_asm(DTYPE), "=&r,=&r,r,r,f", [low, high, scale], dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1
    )
