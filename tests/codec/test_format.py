"""The layout covers a matrix exactly once, and the planner and the tables keep their promises."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_kernels.coder import encode_tiles, entropy, normalise_frequencies, weight_histogram
from rans_kernels.coder.plan import choose_fold, choose_layout, choose_split, choose_units, split_bits
from rans_kernels.format import (
    LANE_WEIGHTS,
    LANES,
    SPLITS,
    UNIT_COLUMNS,
    UNIT_ROWS,
    FormatError,
    Split,
    TileLayout,
    lane_positions,
    raw_pieces,
)

LAYOUTS = [
    TileLayout(shape, split, units)
    for shape in ((1, 1), (63, 257), (257, 63), (16, 64), (40, 1100), (0, 7), (7, 0))
    for split in (Split(8, 0), Split(2, 5))
    for units in (1, 3, 16)
] + [TileLayout(shape, Split(2, 5), 4, fold=fold) for shape, fold in (((64, 65), 2), ((48, 257), 8), ((33, 7), 33))]


def test_every_weight_of_a_unit_has_one_place():
    row, column = np.moveaxis(lane_positions(), -1, 0)
    assert row.shape == (LANES, LANE_WEIGHTS)
    assert np.array_equal(np.sort((row * UNIT_COLUMNS + column).reshape(-1)), np.arange(UNIT_ROWS * UNIT_COLUMNS))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiles_cover_the_matrix_and_no_unit_more(layout):
    panels, across = layout.grid
    n, k = layout.coded_shape
    assert n * k == layout.shape[0] * layout.shape[1]
    assert panels == -(-n // UNIT_ROWS)
    for panel in range(panels):
        units = [layout.tile_units(panel * across + a) for a in range(across)]
        assert sum(units) == -(-k // UNIT_COLUMNS)
        assert all(u == layout.units for u in units[:-1]) and all(1 <= u <= layout.units for u in units)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_heads_are_disjoint_and_cover_their_rows(layout):
    rows = []
    for tile in range(layout.tiles):
        first = layout.head_row(tile)
        rows += range(first, first + 1 + layout.tile_units(tile) * layout.split.raw_bits)
    assert rows == list(range(layout.head_rows))


@pytest.mark.parametrize("raw_bits", range(8))
def test_every_raw_bit_has_one_place(raw_bits):
    taken = set()
    bits_of_quad = np.zeros((8, raw_bits), int)
    for quad, shift, width, bit, word in zip(*raw_pieces(raw_bits), strict=True):
        bits_of_quad[quad, shift : shift + width] += 1
        places = {(int(w), int(bit) + i) for w in word for i in range(width)}
        assert not places & taken
        taken |= places
    # every bit of every byte of every word, and every raw bit of every weight, once
    assert taken == {(word, bit) for word in range(raw_bits * LANES) for bit in range(8)}
    assert (bits_of_quad == 1).all()


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_coded_and_raw_bits_tell_every_weight_apart(split):
    weights = np.arange(split.low, -split.low)
    coded, raw = split.parts(weights)
    assert coded.max() < 1 << split.coded_bits
    assert raw.max() < 1 << split.raw_bits if split.raw_bits else not raw.any()
    assert len({(int(c), int(r)) for c, r in zip(coded, raw, strict=True)}) == len(weights)


@pytest.mark.parametrize(("coded", "raw"), [(8, 1), (3, 2), (1, 0), (4, 5), (2, -1), (0, 4)])
def test_impossible_splits_are_refused(coded, raw):
    with pytest.raises(FormatError):
        Split(coded, raw)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=256, max_size=256), st.sampled_from((10, 11, 12)), st.integers(0, 254))
def test_frequencies_fill_the_table_and_keep_every_symbol(counts, probability_bits, zeros):
    counts = np.array(counts, np.int64)
    counts[:zeros] = 0
    freqs = normalise_frequencies(counts, probability_bits).astype(np.int64)
    assert freqs.sum() == 1 << probability_bits
    if counts.any():
        assert np.array_equal(freqs > 0, counts > 0)


def test_frequencies_are_a_local_optimum():
    rng = np.random.default_rng(0)
    counts = rng.zipf(1.3, 256).clip(0, 10**7)
    freqs = normalise_frequencies(counts, 10).astype(np.int64)

    def bits(f):
        return -(counts * np.log2(f / 1024)).sum()

    best = bits(freqs)
    for a in range(0, 256, 5):
        for b in range(0, 256, 7):
            if a != b and freqs[a] > 1:
                moved = freqs.copy()
                moved[a] -= 1
                moved[b] += 1
                assert bits(moved) >= best * (1 - 1e-12)


@pytest.mark.parametrize("bits", [3, 4, 5, 7])
def test_compact_profile_stays_near_the_entropy(bits):
    w = gaussian(bits, (1024, 4096))
    counts = weight_histogram(w)
    split = choose_split(counts, "compact")
    e = encode_tiles(w, TileLayout(w.shape, split, choose_units(w.shape, "compact")))
    scales = 4 * len(w)
    assert 8 * (e.nbytes + scales) / w.size < entropy(counts) + 0.12


@pytest.mark.parametrize("units", [1, 8, 16, 64])
def test_overhead_is_what_the_format_says(units):
    w = gaussian(4, (512, 4096))
    e = encode_tiles(w, TileLayout(w.shape, Split(8, 0), units))
    over = 8 * e.nbytes / w.size - entropy(weight_histogram(w))
    # states, padding and offsets; then the table and its rounding
    assert abs(over - (24 / 32 + 88 / 1024) / units) < 0.01


@pytest.mark.parametrize("profile", ["compact", "auto", "fast"])
@pytest.mark.parametrize("k", [0, 1, 63, 257, 384, 1024, 4096, 5632, 14336, 16384, 128256])
def test_tiles_have_weights_enough_for_their_states(k, profile):
    shape = (32, k)
    layout = TileLayout(shape, Split(8, 0), choose_units(shape, profile))
    assert layout.units >= (13 if profile == "compact" else 7) or layout.grid[1] <= 1
    if profile == "compact":
        assert layout.units <= 27
    else:
        assert layout.grid[1] <= 16


def test_a_small_matrix_is_cut_finer_than_a_large_one_of_as_many_columns():
    assert [choose_units((n, 2048), "fast") for n in (256, 2048, 5632)] == [7, 7, 8]


def test_a_narrow_matrix_that_would_not_fill_a_gpu_has_tiles_of_8_units():
    assert [choose_units((n, 5632), "fast") for n in (2048, 2064, 8192)] == [8, 11, 11]


def test_profiles_other_than_compact_cut_more_tiles():
    shape = (4096, 4096)
    tiles = {p: TileLayout(shape, Split(8, 0), choose_units(shape, p)).grid[1] for p in ("compact", "auto", "fast")}
    assert tiles == {"compact": 4, "auto": 8, "fast": 8}


@pytest.mark.parametrize(
    ("shape", "fold"),
    [
        ((384, 384), 8), ((128, 384), 8), ((1024, 384), 8), ((32000, 384), 8), ((384, 1024), 2), ((384, 1985), 1),
        ((384, 1984), 2), ((4096, 64), 32), ((4096, 65), 32), ((4096, 1), 256), ((64, 384), 4), ((48, 384), 1),
        ((320, 384), 4), ((1001, 384), 1), ((0, 384), 1), ((384, 0), 1),
    ],
)  # fmt: skip
def test_a_narrow_matrix_is_folded_to_a_panel_of_32_to_64_units_and_no_weight_is_added(shape, fold):
    layout = choose_layout(weight_histogram(np.zeros(shape, np.int8)), shape, "compact", foldable=True)
    plain = choose_layout(weight_histogram(np.zeros(shape, np.int8)), shape, "compact")
    assert choose_fold(shape) == layout.fold == fold and plain.fold == 1
    assert layout.panel_units <= 64 or fold == 1
    assert layout.grid[0] * layout.panel_units <= plain.grid[0] * plain.panel_units
    if fold == 1:
        assert layout == plain
    else:
        assert layout.grid == (shape[0] // fold // UNIT_ROWS, 1)


@pytest.mark.parametrize("profile", ["auto", "fast"])
def test_no_other_profile_folds(profile):
    counts = weight_histogram(gaussian(3, (384, 384)))
    assert choose_layout(counts, (384, 384), profile, foldable=True) == choose_layout(counts, (384, 384), profile)


def test_folding_saves_a_tenth_of_a_bit_in_a_narrow_matrix():
    w = gaussian(3, (384, 384))
    counts = weight_histogram(w)
    plain, folded = (
        8 * encode_tiles(w, choose_layout(counts, w.shape, "compact", foldable)).nbytes / w.size
        for foldable in (False, True)
    )
    assert plain - folded > 0.1
    assert folded < entropy(counts) + 0.06


@pytest.mark.parametrize("profile", ["compact", "auto", "fast"])
@pytest.mark.parametrize("values", [[0], [-128, 127], [-3, 4], []])
def test_planned_splits_hold_the_weights(profile, values):
    w = np.array(values, np.int8)
    split = choose_split(weight_histogram(w), profile)
    assert not values or split.holds(min(values), max(values))


def test_auto_spends_little_over_compact_and_looks_up_less_often():
    counts = weight_histogram(gaussian(4, (512, 512)))
    compact, auto = choose_split(counts, "compact"), choose_split(counts, "auto")
    assert auto.coded_bits < compact.coded_bits
    assert split_bits(counts, auto) <= split_bits(counts, compact) + 0.1


def test_layout_survives_json_and_damage_is_named():
    layout = TileLayout((63, 257), Split(2, 3), 5, 11)
    assert TileLayout.from_json(layout.to_json()) == layout
    for key in layout.to_json():
        for bad in ("x", None, -7):
            with pytest.raises(FormatError):
                TileLayout.from_json(layout.to_json() | {key: bad})


def test_fold_survives_json_and_damage_is_named():
    layout = TileLayout((64, 257), Split(2, 3), 5, 11, fold=8)
    data = layout.to_json()
    assert data["shape"] == [64, 257] and data["fold"] == 8
    assert TileLayout.from_json(data) == layout
    # absent where nothing is folded, as in version 2
    assert "fold" not in TileLayout((64, 257), Split(2, 3)).to_json()
    for bad in (0, -8, 3, 128, 10**30, "x", None, [8], float("nan"), float("inf")):
        with pytest.raises(FormatError):
            TileLayout.from_json(data | {"fold": bad})
    with pytest.raises(FormatError, match="not folded"):
        TileLayout((64, 257), Split(2, 3), dtype="bfloat16", windows=(60,), fold=2)
    with pytest.raises(FormatError, match="does not divide"):
        TileLayout((0, 257), Split(2, 3), fold=2)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("rans_kernels.format", ("torch", "numba", "triton", "transformers")),
        ("rans_kernels.coder", ("torch", "triton", "transformers")),
        ("rans_kernels", ("torch", "numba", "triton", "transformers")),
        ("qat", ("pytorch_lightning", "hydra", "transformers", "wandb")),
        ("qat.quant", ("pytorch_lightning", "hydra", "transformers", "wandb", "triton")),
    ],
)
def test_imports_stay_lean(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_imports_run_one_way():
    code = "import sys, rans_kernels.hf, rans_kernels.linear; print('qat' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def gaussian(bits: float, shape: tuple[int, int]) -> np.ndarray:
    """Gaussian integers of about so many bits of entropy."""
    sigma = 2 ** (bits - 2.05)
    w = np.random.default_rng(0).normal(0, sigma, shape)
    return np.clip(np.rint(w), -127, 127).astype(np.int8)
