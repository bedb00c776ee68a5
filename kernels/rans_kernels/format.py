"""The one definition of the tile format, version 3; needs numpy alone. docs/format.md specifies it in prose.

A weight matrix [N, K] of integers is cut into *tiles* of 16 rows x `units` * 64 columns, one for each warp of 32 lanes.
A *unit* is 16 rows x 64 columns; a lane's 32 weights of it are the A operands of four m16n8k16 MMAs. A weight has
`coded_bits` (C) coded and `raw_bits` (R) verbatim bits; a symbol, one byte, holds the coded bits of 8 / C weights. Each
lane has a rANS state of 32 bits; the lanes of a tile share one stream of 16-bit words. Of 16-bit floats the high byte
is coded so, and the low byte stored beside the raw bits: nothing is lost. A matrix of few columns may be *folded*: the
coded matrix has some of its rows one after another in each of its own.
"""

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 3
READ_VERSIONS = (2, FORMAT_VERSION)
"""Versions that are read: in 2 nothing is folded."""
LANES = 32
UNIT_ROWS = 16
UNIT_COLUMNS = 64
LANE_WEIGHTS = UNIT_ROWS * UNIT_COLUMNS // LANES
"""Weights of a unit that one lane holds: 32."""
STATE_LOW = 1 << 16
"""Lower bound of a state, and the state every lane ends in."""
ROW_WORDS = 8
"""Words are counted in rows of 8, 16 bytes, the most that one instruction copies to shared memory."""
CODED_BITS = (8, 4, 2, 1)
FLOATS = {"bfloat16": 0x80, "float16": 0x7C}
"""16-bit floats, and the high byte, without its sign, from which on they are not finite even if the low byte is 0."""
DTYPES = ("int8", *FLOATS)
LOW_ROWS = 8
"""Head rows of a unit that hold the low bytes of its floats."""
PROBABILITY_BITS = (10, 11, 12)


class FormatError(ValueError):
    """A file that is damaged, truncated, or of a version this code does not read."""


@dataclass(frozen=True, order=True)
class Split:
    """How a weight divides into coded and raw bits.

    C = 1 with T = 2^(R-1): the coded bit says that w lies outside [-T, T); raw = w + T inside, w mod 2T outside.
    Otherwise u = w + 2^(C+R-1), coded = u >> R, raw = u mod 2^R. Floats have a u of their own
    (`TileLayout.float_codes`).
    """

    coded_bits: int
    raw_bits: int

    def __post_init__(self) -> None:
        c, r = self.coded_bits, self.raw_bits
        if c not in CODED_BITS or not 0 <= r <= 8 - c or (c == 1 and r == 0):
            raise FormatError(f"no split of {c} coded and {r} raw bits: coded_bits is 8, 4, 2 or 1, together 8 at most")

    def __str__(self) -> str:
        return f"c{self.coded_bits}r{self.raw_bits}"

    @property
    def low(self) -> int:
        """Smallest weight it can hold; the largest is -low - 1."""
        return -(1 << (self.coded_bits + self.raw_bits - 1))

    @property
    def symbol_weights(self) -> int:
        """Weights whose coded bits make one symbol."""
        return 8 // self.coded_bits

    def holds(self, smallest: int, largest: int) -> bool:
        """True if every weight of [smallest, largest] can be coded."""
        return self.low <= smallest and largest < -self.low

    def parts(self, weights: NDArray[np.integer]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Coded and raw bits of each weight."""
        w, r = weights.astype(np.int64), self.raw_bits
        if self.coded_bits == 1:
            half = 1 << (r - 1)
            outside = (w < -half) | (w >= half)
            return outside.astype(np.uint8), np.where(outside, w % (2 * half), w + half).astype(np.uint8)
        u = w - self.low
        return (u >> r).astype(np.uint8), (u & ((1 << r) - 1)).astype(np.uint8)


SPLITS = tuple(Split(c, r) for c in CODED_BITS for r in range(9 - c) if c > 1 or r)


@dataclass(frozen=True)
class TileLayout:
    """Everything a decoder must know before it reads a weight.

    Attributes:
        shape: (N, K) of the weight, out and in features.
        split: coded and raw bits.
        units: of a tile, along K; the last tile of a panel (16 rows) may have fewer.
        probability_bits: frequencies of the table add up to 2 ** probability_bits.
        dtype: of the weights: int8, bfloat16 or float16.
        windows: of floats, where the ranges begin that their high bytes, without the signs, lie in; a coded value each.
        fold: rows of the weight that are one row of the coded matrix, one after another; 1 of floats.
    """

    shape: tuple[int, int]
    split: Split
    units: int = 8
    probability_bits: int = 12
    dtype: str = "int8"
    windows: tuple[int, ...] = ()
    fold: int = 1

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise FormatError(f"shape {self.shape} is not that of a matrix")
        if self.units < 1:
            raise FormatError(f"units is {self.units}; a tile has at least 1")
        if self.probability_bits not in PROBABILITY_BITS:
            raise FormatError(f"probability_bits is {self.probability_bits}; it is one of {PROBABILITY_BITS}")
        if self.dtype not in DTYPES:
            raise FormatError(f"no weights of dtype {self.dtype!r}: it is one of {DTYPES}")
        if self.is_float and self.split.coded_bits == 1:
            raise FormatError(f"{self.dtype} weights have no split {self.split}: coded_bits is 8, 4 or 2")
        # a coded value each; without raw bits its lowest bit is the sign
        most = 1 << self.split.coded_bits - (self.split.raw_bits == 0) if self.is_float else 0
        ascend = all(a < b for a, b in zip((-1, *self.windows), (*self.windows, 128), strict=True))
        if not ascend or not min(1, most) <= len(self.windows) <= most:
            raise FormatError(f"windows {self.windows} are not up to {most} numbers from 0 to 127, ascending")
        if not 1 <= self.fold <= max(1, self.shape[0]) or self.shape[0] % self.fold:
            raise FormatError(f"fold is {self.fold}, which does not divide the rows of shape {self.shape}")
        if self.is_float and self.fold > 1:
            # a product adds zero times the rows beside, which floats that are not finite make NaN
            raise FormatError(f"fold is {self.fold}; {self.dtype} weights are not folded")

    @property
    def is_float(self) -> bool:
        """True if weights are 16-bit floats, stored without loss."""
        return self.dtype in FLOATS

    @property
    def coded_shape(self) -> tuple[int, int]:
        """(N / fold, fold K) of the coded matrix: that of the panels, a plain reshape of the weight."""
        return self.shape[0] // self.fold, self.shape[1] * self.fold

    @property
    def grid(self) -> tuple[int, int]:
        """Panels along N and tiles along K; tiles are numbered panel by panel."""
        return -(-self.coded_shape[0] // UNIT_ROWS), -(-self.panel_units // self.units)

    @property
    def tiles(self) -> int:
        """Tiles of the matrix."""
        return self.grid[0] * self.grid[1]

    @property
    def panel_units(self) -> int:
        """Units of a panel."""
        return -(-self.coded_shape[1] // UNIT_COLUMNS)

    @property
    def most_units(self) -> int:
        """Units of the largest tile."""
        return min(self.units, self.panel_units)

    def tile_units(self, tile: int) -> int:
        """Units of one tile."""
        return min(self.units, self.panel_units - tile % self.grid[1] * self.units)

    @property
    def unit_symbols(self) -> int:
        """Symbols a lane decodes for one unit."""
        return LANE_WEIGHTS // self.split.symbol_weights

    @property
    def unit_rows(self) -> int:
        """Head rows of a unit: its raw plane, then the low bytes of floats."""
        return self.split.raw_bits + (LOW_ROWS if self.is_float else 0)

    @property
    def panel_rows(self) -> int:
        """Head rows of a panel."""
        return self.grid[1] + self.panel_units * self.unit_rows

    @property
    def head_rows(self) -> int:
        """Rows of the heads of all tiles."""
        return self.grid[0] * self.panel_rows

    def head_row(self, tile: int) -> int:
        """First row of a tile's head: one row of states, then `unit_rows` rows a unit."""
        panel, across = divmod(tile, self.grid[1])
        return panel * self.panel_rows + across * (1 + self.units * self.unit_rows)

    def low_rows(self) -> NDArray[np.int64]:
        """Rows of the low bytes of every unit, counted from the first head row of its panel: [panel_units, 8]."""
        across, unit = np.divmod(np.arange(self.panel_units), self.units)
        first = across * (1 + self.units * self.unit_rows) + 1 + unit * self.unit_rows + self.split.raw_bits
        return first[:, None] + np.arange(LOW_ROWS)

    @property
    def window(self) -> int:
        """High bytes, without their signs, of a window: those that the raw bits tell apart."""
        return 1 << max(0, self.split.raw_bits - 1)

    def float_codes(self) -> NDArray[np.int16]:
        """The code u of every high byte of a float, [256]; -1 for those in no window.

        u = (window << R - 1 | place in it) << 1 | sign; coded = u >> R, raw = u mod 2^R. If R > 0 the sign is the
        lowest raw bit, and is stored one weight later in each quad: one rotation of a word then puts it on top of its
        byte.
        """
        byte, starts = np.arange(256), np.array(self.windows)
        window = np.searchsorted(starts, byte % 128, "right") - 1
        place = byte % 128 - starts[window]
        held = (window >= 0) & (place < self.window)
        return np.where(held, (window * self.window + place) << 1 | byte >> 7, -1).astype(np.int16)

    def float_bytes(self) -> NDArray[np.uint8]:
        """The high byte of every code, [2^(C + R)]; for those that are not used, any."""
        u = np.arange(1 << (self.split.coded_bits + self.split.raw_bits))
        window, place = np.divmod(u >> 1, self.window)
        starts = np.resize(np.array(self.windows), window[-1] + 1)
        return ((starts[window] + place) & 0x7F | (u & 1) << 7).astype(np.uint8)

    def check(self, head_rows: int, word_rows: int, offsets: NDArray[np.integer], freqs: NDArray[np.integer]) -> None:
        """Check everything a decoder relies on to stay inside heads and words.

        Args:
            head_rows: rows of the heads.
            word_rows: rows of the words.
            offsets: first row of words of every tile, and the end: [tiles + 1].
            freqs: frequency of every symbol: [256].

        Raises:
            FormatError: with what is wrong.
        """
        if head_rows != self.head_rows:
            raise FormatError(f"{head_rows} rows of heads where {self.tiles} tiles have {self.head_rows}")
        if offsets.shape != (self.tiles + 1,):
            raise FormatError(f"{offsets.shape} offsets for {self.tiles} tiles")
        if freqs.shape != (256,):
            raise FormatError(f"frequency table of shape {freqs.shape}, it has 256 entries")
        if freqs.min() < 0 or int(freqs.sum(dtype=np.int64)) != 1 << self.probability_bits:
            raise FormatError(f"frequencies do not add up to 2^{self.probability_bits}")
        if offsets[0] != 0 or offsets[-1] != word_rows:
            raise FormatError(f"offsets run from {offsets[0]} to {offsets[-1]} over {word_rows} rows of words")
        sizes = np.diff(offsets.astype(np.int64))
        most = -(-LANES * self.unit_symbols * self.most_units // ROW_WORDS)
        if np.any(sizes < 0) or np.any(sizes > most):
            raise FormatError("offsets do not fit the tiles: they fall, or give a tile more words than it has symbols")

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        extra: dict[str, Any] = {"dtype": self.dtype, "windows": list(self.windows)} if self.is_float else {}
        if self.fold > 1:
            extra["fold"] = self.fold
        return extra | {
            "shape": list(self.shape),
            "coded_bits": self.split.coded_bits,
            "raw_bits": self.split.raw_bits,
            "units": self.units,
            "probability_bits": self.probability_bits,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TileLayout":
        """The layout that `to_json` wrote.

        Raises:
            FormatError: a key is missing or has a value out of range.
        """
        try:
            n, k = (int(size) for size in data["shape"])
            split = Split(int(data["coded_bits"]), int(data["raw_bits"]))
            dtype = str(data.get("dtype", "int8"))
            windows = () if dtype == "int8" else tuple(int(start) for start in data["windows"])
            fold = int(data.get("fold", 1))
            return cls((n, k), split, int(data["units"]), int(data["probability_bits"]), dtype, windows, fold)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"a layer's entry in config.json is damaged: {error!r}") from error


def lane_positions() -> NDArray[np.int32]:
    """Row and column, within a unit, of each lane's weights in stream order: [32, 32, 2].

    Lane 4 g + t, weight 16 h + 8 r + c (h, r of 2, c of 8): row g + 8 r, column 32 h + 8 t + c. So the columns of a
    lane's row are 8 bytes side by side, and with the columns of both operands permuted alike, four weights side by side
    are the two k halves of an MMA's A register pair.
    """
    lane, weight = np.arange(LANES)[:, None], np.arange(LANE_WEIGHTS)[None]
    row = lane // 4 + 8 * (weight // 8 % 2)
    column = 32 * (weight // 16) + 8 * (lane % 4) + weight % 8
    return np.stack([row, column], axis=-1).astype(np.int32)


class RawPieces(NamedTuple):
    """The pieces that raw bits are cut into, and where they stand in a unit's raw plane; int64.

    A piece is some bits of the raw bits of weights 4 j to 4 j + 3, a quad: those of weight 4 j + i stand in byte i of a
    word.
    """

    quad: NDArray[np.int64]
    """j, [P]."""
    shift: NDArray[np.int64]
    """Lowest bit, in the raw bits: [P]."""
    width: NDArray[np.int64]
    """Number of bits: [P]."""
    bit: NDArray[np.int64]
    """Lowest bit, in the byte: [P]."""
    word: NDArray[np.int64]
    """32-bit word of the plane's `raw_bits` * 32, by lane: [P, 32]."""


def raw_pieces(raw_bits: int) -> RawPieces:
    """How the raw bits of a unit fill its plane: whole where they fit, which costs a decoder least.

    A lane has R = `raw_bits` words. Each holds the raw bits of f = 8 // R quads whole, in ascending order from its
    lowest bits; the 8 - f R bits that are left at the top of every byte, word after word, are the 8 - f R last quads.
    In memory words stand lane by lane in groups of 4, 2 and 1 (those that add up to R), so that one load takes a group.
    """
    whole = 8 // raw_bits if raw_bits else 0
    left = 8 - whole * raw_bits
    pieces = [(j, 0, raw_bits, j % whole * raw_bits, j // whole) for j in range(whole * raw_bits)]
    for j in range(whole * raw_bits, 8 if raw_bits else 0):
        first = (j - whole * raw_bits) * raw_bits
        for word in range(raw_bits):
            begin, end = max(first, word * left), min(first + raw_bits, (word + 1) * left)
            if begin < end:
                pieces.append((j, begin - first, end - begin, whole * raw_bits + begin - word * left, word))
    quad, shift, width, bit, index = np.array(pieces, np.int64).reshape(-1, 5).T
    words = np.zeros((raw_bits, LANES), np.int64)
    for group in (4, 2, 1):
        if raw_bits & group:
            # the groups before this one are the larger ones
            before = raw_bits & ~(2 * group - 1)
            within = group * np.arange(LANES) + np.arange(group)[:, None]
            words[before : before + group] = LANES * before + within
    return RawPieces(quad, shift, width, bit, words[index])


def crc32(array: NDArray[Any]) -> int:
    """CRC-32 (zlib) of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
