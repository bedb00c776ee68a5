"""The one definition of the tile format, version 1; needs numpy alone. docs/format.md specifies it in prose.

A weight matrix [N, K] of integers is cut into 256x256 tiles. A tile is cut into *groups* of 32 lanes (a warp), a
group into *units* of 16 rows x 32 columns, so that a lane's 16 weights of a unit are the A operand of two m16n8k16
MMAs. Units that lie wholly outside the matrix are not stored. A weight has `coded_bits` (C) coded and `raw_bits` (R)
verbatim bits; a symbol, one byte, holds the coded bits of 8 / C weights. Each lane owns one rANS stream: 32-bit
state, 16-bit words.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
TILE = 256
GROUP_LANES = 32
UNIT_ROWS = 16
UNIT_COLUMNS = 32
UNIT_WEIGHTS = UNIT_ROWS * UNIT_COLUMNS // GROUP_LANES
"""Weights of a unit that one lane holds."""
STATE_LOW = 1 << 16
"""Lower bound of a state, and the state every stream ends in."""
ROW_INTS = 16
"""The stream is counted in rows of 16 int32, 64 bytes: 32 words of 16 bits, one a lane."""
STATE_ROWS = 2
CODED_BITS = (8, 4, 2, 1)
LANES = (32, 64, 128, 256, 512, 1024)
PROBABILITY_BITS = (10, 11, 12)


class FormatError(ValueError):
    """A file that is damaged, truncated, or of a version this code does not read."""


@dataclass(frozen=True, order=True)
class Split:
    """How a weight divides into coded and raw bits.

    C = 1 with T = 2^(R-1): the coded bit says that w lies outside [-T, T); raw = w + T inside, w mod 2T outside.
    Otherwise u = w + 2^(C+R-1), coded = u >> R, raw = u mod 2^R.
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
    """Everything a decoder must know before it reads a stream.

    Attributes:
        shape: (N, K) of the weight, out and in features.
        split: coded and raw bits.
        lanes: streams a tile: 32, 64, ... 1024.
        probability_bits: frequencies of the table add up to 2 ** probability_bits.
    """

    shape: tuple[int, int]
    split: Split
    lanes: int = 32
    probability_bits: int = 12

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 0:
            raise FormatError(f"shape {self.shape} is not that of a matrix")
        if self.lanes not in LANES:
            raise FormatError(f"lanes is {self.lanes}; it is one of {LANES}")
        if self.probability_bits not in PROBABILITY_BITS:
            raise FormatError(f"probability_bits is {self.probability_bits}; it is one of {PROBABILITY_BITS}")

    @property
    def groups(self) -> int:
        """Groups of 32 lanes a tile."""
        return self.lanes // GROUP_LANES

    @property
    def units(self) -> int:
        """Units a group."""
        return TILE * TILE // (UNIT_ROWS * UNIT_COLUMNS) // self.groups

    @property
    def row_blocks(self) -> int:
        """Blocks of 16 rows that a group spans; its units run down them first, then along the columns."""
        return max(1, self.units // 8)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Tiles along N and along K; tiles are numbered row by row."""
        return -(-self.shape[0] // TILE), -(-self.shape[1] // TILE)

    @property
    def tiles(self) -> int:
        """Tiles of the matrix."""
        return self.tile_grid[0] * self.tile_grid[1]

    @property
    def unit_symbols(self) -> int:
        """Symbols a lane decodes for one unit."""
        return UNIT_WEIGHTS // self.split.symbol_weights

    @cached_property
    def unit_origin(self) -> NDArray[np.int32]:
        """First row and column, within the tile, of every unit: [groups, units, 2]."""
        blocks, across = self.row_blocks, min(8, self.units)
        group, unit = np.arange(self.groups)[:, None], np.arange(self.units)[None]
        row = (group // (8 // across)) * blocks + unit % blocks
        column = (group % (8 // across)) * across + unit // blocks
        return np.stack([row * UNIT_ROWS, column * UNIT_COLUMNS], axis=-1).astype(np.int32)

    def live_units(self, tile: int) -> NDArray[np.bool_]:
        """Units of a tile that hold at least one weight of the matrix: [groups, units]."""
        tile_n, tile_k = divmod(tile, self.tile_grid[1])
        rows, columns = self.shape[0] - tile_n * TILE, self.shape[1] - tile_k * TILE
        return (self.unit_origin[..., 0] < rows) & (self.unit_origin[..., 1] < columns)

    @cached_property
    def head_rows(self) -> NDArray[np.int64]:
        """Rows of states and raw plane, before the words of a group: [tiles * groups]; 0 where nothing is stored."""
        grid_n, grid_k = self.tile_grid
        if not self.tiles:
            return np.zeros(0, np.int64)

        def rows(tile: int) -> NDArray[np.int64]:
            live = self.live_units(tile)
            pairs = (live[:, 0::2] | live[:, 1::2]).sum(1)
            return np.where(pairs > 0, STATE_ROWS + 2 * self.split.raw_bits * pairs, 0)

        # only the last tile row and the last tile column differ from the first tile
        out = np.empty((grid_n, grid_k, self.groups), np.int64)
        out[:] = rows(0)
        out[:, -1] = rows(grid_k - 1)
        out[-1] = rows((grid_n - 1) * grid_k)
        out[-1, -1] = rows(self.tiles - 1)
        return out.reshape(-1)

    def check(self, rows: int, offsets: NDArray[np.integer], freqs: NDArray[np.integer]) -> None:
        """Check everything a decoder relies on to stay inside the stream.

        Args:
            rows: rows of the stream, the guard row included.
            offsets: first row of every group, and the end: [tiles * groups + 1].
            freqs: frequency of every symbol: [256].

        Raises:
            FormatError: with what is wrong.
        """
        if offsets.shape != (self.tiles * self.groups + 1,):
            raise FormatError(f"{offsets.shape} offsets for {self.tiles} tiles of {self.groups} groups")
        if freqs.shape != (256,):
            raise FormatError(f"frequency table of shape {freqs.shape}, it has 256 entries")
        if freqs.min() < 0 or int(freqs.sum(dtype=np.int64)) != 1 << self.probability_bits:
            raise FormatError(f"frequencies do not add up to 2^{self.probability_bits}")
        if offsets[0] != 0 or offsets[-1] != rows - 1:
            raise FormatError(f"offsets run from {offsets[0]} to {offsets[-1]} in a stream of {rows} rows")
        sizes = np.diff(offsets.astype(np.int64))
        if np.any(sizes < self.head_rows) or np.any(sizes[self.head_rows == 0] != 0):
            raise FormatError("offsets do not fit the tiles: a group is shorter than its states and raw plane")
        most = self.head_rows + self.units * self.unit_symbols
        if np.any(sizes > most):
            raise FormatError("offsets do not fit the tiles: a group is longer than its symbols can make it")

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return {
            "shape": list(self.shape),
            "coded_bits": self.split.coded_bits,
            "raw_bits": self.split.raw_bits,
            "lanes": self.lanes,
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
            return cls((n, k), split, int(data["lanes"]), int(data["probability_bits"]))
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"a layer's entry in config.json is damaged: {error!r}") from error


def lane_positions() -> NDArray[np.int32]:
    """Row and column, within a unit, of each lane's weights in stream order: [32, 16, 2].

    Lane 4 g + t, weight 4 j + i: row g + 8 (i // 2), column 16 (j // 2) + 8 (j % 2) + 2 t + i % 2.
    """
    lane, weight = np.arange(GROUP_LANES)[:, None], np.arange(UNIT_WEIGHTS)[None]
    j, i = weight // 4, weight % 4
    row = lane // 4 + 8 * (i // 2)
    column = 16 * (j // 2) + 8 * (j % 2) + 2 * (lane % 4) + i % 2
    return np.stack([row, column], axis=-1).astype(np.int32)


class RawFields(NamedTuple):
    """The fields that raw bits are cut into, lowest first, and where they stand; int64."""

    shift: NDArray[np.int64]
    """In the raw bits: [F]."""
    width: NDArray[np.int64]
    """[F]."""
    word: NDArray[np.int64]
    """[F, 2, 16], by unit of the pair and weight."""
    bit: NDArray[np.int64]
    """[F, 2, 16], in the word."""


def raw_fields(raw_bits: int) -> RawFields:
    """Where the raw bits of a pair of units stand in a lane's `raw_bits` words of 32 bits.

    The raw bits are cut, lowest first, into fields of 4, 2 and 1 bits (those that add up to `raw_bits`). With h the
    unit of the pair and weight 4 j + i: 4-bit fields lie in word 2 h + j // 2 at bit 8 i + 4 (j % 2), 2-bit fields in
    the next two words, word h, at bit 8 i + 2 j, 1-bit fields in the last word at bit 8 i + 4 h + j.
    """
    h, weight = np.arange(2)[:, None], np.arange(UNIT_WEIGHTS)[None]
    j, i = weight // 4, weight % 4
    word = {4: 2 * h + j // 2, 2: h + 0 * j, 1: 0 * (h + j)}
    bit = {4: 8 * i + 4 * (j % 2) + 0 * h, 2: 8 * i + 2 * j + 0 * h, 1: 8 * i + 4 * h + j}
    widths = [width for width in (4, 2, 1) if raw_bits & width]
    width = np.array(widths, np.int64)
    shift = np.cumsum(width) - width
    shape = (len(widths), 2, UNIT_WEIGHTS)
    # the fields before one fill 32 weights of `shift` bits: `shift` words
    words = np.array([word[w] + s for w, s in zip(widths, shift, strict=True)], np.int64).reshape(shape)
    bits = np.array([bit[w] for w in widths], np.int64).reshape(shape)
    return RawFields(shift, width, words, bits)


def crc32(array: NDArray[Any]) -> int:
    """CRC-32 (zlib) of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
