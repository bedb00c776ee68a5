"""Streaming: the bits of a resident model for any budget, order and place, and nothing read that is no longer there."""

import copy
import gc
import math
import time
from pathlib import Path

import numpy as np
import pytest
import rans_kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_kernels.coder import encode_tiles
from rans_kernels.format import Split, TileLayout
from rans_kernels.linear import CompressedLinear
from rans_kernels.placement import BudgetError, choose, openings, place
from rans_kernels.staging import DecodeAhead
from rans_kernels.streaming import Streamer, record, settle
from torch import nn
from transformers import DynamicCache, StaticCache

from eval.graph import graph_greedy
from qat.config import ExportConfig, Lossless, QuantConfig
from qat.export import export
from qat.inference import generate_greedy

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPE = torch.float16 if torch.cuda.is_available() else torch.float32
SHARES = (0, 0.4, 0.9)


def compressed(rows, columns, seed, group_size=None):
    """A layer of random weights with a bias."""
    split, rng = Split(1, 4), np.random.default_rng(seed)
    layout = TileLayout((rows, columns), split, 2, 10)
    q = np.clip(np.rint(rng.normal(0, 5, (rows, columns))), split.low, -split.low - 1).astype(np.int8)
    e = encode_tiles(q, layout)
    groups = 1 if group_size is None else -(-columns // group_size)
    scale = rng.uniform(0.5, 1, (rows, groups)).astype(np.float32) / columns
    arrays = {"": e.heads, "_words": e.words, "_offsets": e.offsets, "_freqs": e.freqs, "_scale": scale}
    layer = CompressedLinear(layout, len(e.words), (rows, groups), group_size, bias=True)
    layer.load_state_dict({f"weight{k}": torch.from_numpy(v) for k, v in arrays.items()} | {"bias": torch.rand(rows)})
    return layer


@pytest.fixture
def model():
    """Layers of several sizes and kinds, that make chunks of one and of several; one plain weight wants gradients."""
    torch.manual_seed(0)
    sizes = [(96, 160), (40, 96), (33, 40), (200, 33), (160, 200), (32, 160), (250, 32), (64, 250)]
    layers = [compressed(n, k, seed) for seed, (n, k) in enumerate(sizes)]
    layers[3:3] = [
        compressed(48, 33, 9, group_size=7),
        nn.LayerNorm(48, dtype=DTYPE),
        nn.Linear(48, 33, dtype=DTYPE).requires_grad_(False),
    ]
    return nn.Sequential(*layers, nn.Linear(64, 160, bias=False, dtype=DTYPE))


@pytest.fixture
def x():
    return torch.randn(2, 3, 160, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)


def full(model):
    """GB that all of a model takes."""
    return place(model, math.inf, DEVICE, 3).needed / 1e9


def between(model, share, slots=3):
    """A budget in GB that is more than the least that does by a share of what is between that and all."""
    with pytest.raises(BudgetError) as error:
        place(model, 1e-6, DEVICE, slots)
    return error.value.least / 1e9 * (1 - share) + full(model) * share


def resident(model):
    """A copy that stays on the device."""
    return copy.deepcopy(model).to(DEVICE)


def poisoned(monkeypatch):
    """Whenever a chunk is turned to, everything else on the device's slots becomes garbage."""
    fetch = Streamer.fetch

    def spoil(self, chunk):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        for slot in self.slots:
            settle(slot)
            if slot.holds is not None and slot.holds != chunk:
                del self.at[slot.holds]
            if slot.holds != chunk:
                slot.holds = None
                slot.memory.fill_(255)
        if DEVICE.type == "cuda":
            # or it would race with the copies, which wait for the slots' readers alone
            torch.cuda.synchronize()
        fetch(self, chunk)

    monkeypatch.setattr(Streamer, "fetch", spoil)


@given(
    st.lists(st.tuples(st.integers(1, 99), st.integers(0, 99)), min_size=1, max_size=30),
    st.integers(0, 4000),
    st.integers(2, 4),
)
@settings(max_examples=200, deadline=None)
def test_what_stays_fits_and_is_spread(layers, room, slots):
    sizes = [size for size, _ in layers]
    costs = [size + more for size, more in layers]
    stays = choose(sizes, costs, room, slots)
    if stays is None:
        assert all(need > room for _, need in openings(sizes, costs, slots))
        return
    slot = max((size for size, stay in zip(sizes, stays, strict=True) if not stay), default=0)
    assert sum(cost for cost, stay in zip(costs, stays, strict=True) if stay) + slots * slot <= room
    if sum(costs) <= room:
        assert all(stays)
    # with slots as large as the largest layer that passes, of the layers that fit one: the share that stays of any
    # beginning is the share of all, up to a layer
    opening, need = next((slot, need) for slot, need in openings(sizes, costs, slots) if need <= room)
    small = [(cost, stay) for size, cost, stay in zip(sizes, costs, stays, strict=True) if size <= opening]
    share, total, kept = (room - need) / max(1, sum(cost for cost, _ in small)), 0, 0
    for cost, stay in small:
        total, kept = total + cost, kept + cost * stay
        assert share * total - max(costs) <= kept <= share * total + 1e-6


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize("share", SHARES)
@torch.inference_mode()
def test_results_are_those_of_the_resident_model(model, x, offload, share, monkeypatch):
    expected, budget = resident(model)(x), between(model, share)
    poisoned(monkeypatch)
    streamer = Streamer(model, budget, DEVICE, offload).enable()
    assert len(streamer.chunks) > 1 and streamer.placement.needed <= 1e9 * budget
    kinds = {type(layer) for chunk in streamer.chunks for layer in chunk.layers}
    assert share > 0.5 or kinds == {CompressedLinear, nn.Linear}
    for _ in range(3):
        assert torch.equal(model(x), expected)
    # nothing decoded is kept
    assert all(getattr(layer, "_decoded", None) is None for chunk in streamer.chunks for layer in chunk.layers)
    streamer.disable()
    assert torch.equal(model.to(DEVICE)(x), expected)
    # and again
    streamer = Streamer(model, budget, DEVICE, offload, slots=2).enable()
    assert torch.equal(model(x), expected)


@torch.inference_mode()
def test_least_budget_of_the_message_does(model, x):
    expected = resident(model)(x)
    with pytest.raises(BudgetError, match="too small") as error:
        Streamer(model, 1e-6, DEVICE)
    assert "\n" not in str(error.value)
    told, least = float(str(error.value).split(" GB: give")[0].split()[-1]), error.value.least / 1e9
    assert least <= told < least + 1.1e-4
    with pytest.raises(BudgetError):
        Streamer(model, least - 1e-9, DEVICE)
    Streamer(model, least, DEVICE).enable()
    assert torch.equal(model(x), expected)


@torch.inference_mode()
def test_any_order_is_right_and_the_next_time_expected(model, x, monkeypatch):
    layers = list(model)
    inputs = {
        i: torch.randn(3, layers[i].in_features, device=DEVICE, dtype=DTYPE) for i in range(len(layers)) if i != 4
    }
    reference = resident(model)
    expected = {i: reference[i](inputs[i]) for i in inputs}
    streamer = Streamer(model, between(model, 0.2), DEVICE, slots=2).enable()
    assert len(streamer.chunks) > 3
    late, fetch = [], Streamer.fetch
    monkeypatch.setattr(Streamer, "fetch", lambda s, chunk: (late.append(chunk not in s.at), fetch(s, chunk)))
    backward = list(reversed(inputs))
    for _ in range(2):
        for i in backward:
            assert torch.equal(model[i](inputs[i]), expected[i])
    before = len(late)
    for i in backward:
        model[i](inputs[i])
    assert any(late[:before]) and len(late) > before and not any(late[before:])
    rng = np.random.default_rng(0)
    for i in rng.choice(list(inputs), 60):
        assert torch.equal(model[i](inputs[i]), expected[i])


@torch.inference_mode()
def test_slots_are_what_is_read(model, x):
    reference = resident(model)
    streamer = Streamer(model, between(model, 0.2), DEVICE).enable()
    model(x)
    for chunk, waiting in zip(streamer.chunks, streamer.memory, strict=True):
        for layer in chunk.layers:
            assert 0 <= layer.weight.data_ptr() - waiting.data_ptr() < chunk.size
            inputs = torch.randn(3, layer.in_features, device=DEVICE, dtype=DTYPE)
            layer(inputs)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            # the chunk is in its slot now, and where it waits may be anything
            kept = [memory.clone() for memory in streamer.memory]
            for memory in streamer.memory:
                memory.fill_(255)
            found = layer(inputs)
            for memory, copied in zip(streamer.memory, kept, strict=True):
                memory.copy_(copied)
            streamer.last = None
            streamer.at.clear()
            for slot in streamer.slots:
                slot.holds = None
            assert torch.equal(found, reference[list(model).index(layer)](inputs))


@torch.inference_mode()
def test_nobody_reads_before_the_reader_is_done(model, x, monkeypatch):
    expected, read = resident(model)(x), Streamer.read

    def slowly(*arguments):
        time.sleep(0.005)
        read(*arguments)

    monkeypatch.setattr(Streamer, "read", slowly)
    Streamer(model, between(model, 0.2), DEVICE, "disk").enable()
    assert all(torch.equal(model(x), expected) for _ in range(3))


def test_what_a_streamed_model_cannot_do_is_one_line(model, x):
    with pytest.raises(ValueError, match="host, disk"):
        Streamer(model, 1.0, DEVICE, "cloud")
    ahead = DecodeAhead(model.to(DEVICE).modules(), DTYPE).enable()
    with pytest.raises(ValueError, match="disable that first"):
        Streamer(model, between(model, 0.3), DEVICE).enable()
    ahead.disable()
    Streamer(model, between(model, 0.3), DEVICE).enable()
    first = model.streamer.chunks[0].layers[0]
    wrong = torch.zeros(1, first.in_features, device="meta")
    with pytest.raises(RuntimeError, match="x is on meta"):
        first(wrong)
    with pytest.raises(RuntimeError, match="no gradient passes"):
        first(torch.zeros(1, first.in_features, device=DEVICE, dtype=DTYPE, requires_grad=True)).sum().backward()
    # without no_grad it computes, and what it gives may be written over
    first(torch.zeros(1, first.in_features, device=DEVICE, dtype=DTYPE, requires_grad=True)).add_(1)
    assert "streamed to" in repr(first)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="is streamed"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="streamed already"):
        Streamer(model, between(model, 0.3), DEVICE).enable()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x)


@torch.no_grad()
def test_compiled_around_streamed_layers_is_right(model, x):
    model = model[:4]
    expected = resident(model)(x)
    streamer = Streamer(model, between(model, 0.1, slots=2), DEVICE, slots=2).enable()
    assert len(streamer.chunks) > 1
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(x), expected)


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory):
    """Compressed folders: with a plain head, and with a compressed embedding that a head is tied to."""
    made = {}
    for name, tied, options in (
        ("plain", False, {"quant": QuantConfig(bits=5)}),
        ("tied", True, {"quant": QuantConfig(bits=5, embeddings=True)}),
        ("lossless", True, {"quant": QuantConfig(enabled=False), "lossless": Lossless.all}),
    ):
        source = tiny_llama(
            num_hidden_layers=3, tie_word_embeddings=tied, dtype="bfloat16" if name == "lossless" else "float32"
        )
        output = tmp_path_factory.mktemp(name) / "model"
        made[name] = export(ExportConfig(str(source), str(output), progress_bar=False, shard_size="60KB", **options))
    return made


@pytest.fixture
def pair(folders):
    """A resident and a streamed model of a folder."""

    def make(name="plain", share=0.3, offload="host"):
        whole = rans_kernels.load(folders[name], DEVICE, DTYPE)
        streamed = rans_kernels.load(folders[name], DEVICE, DTYPE, between(whole, share), offload)
        assert len(streamed.streamer.chunks) > 3
        return whole, streamed

    return make


def ids(rows, length, seed=0):
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(
    "name, offload", [("plain", "host"), ("plain", "disk"), ("tied", "host"), ("lossless", "disk")]
)
def test_tokens_are_those_of_the_resident_model(pair, name, offload, monkeypatch):
    poisoned(monkeypatch)
    whole, streamed = pair(name, 0.2, offload)
    for rows in (1, 5):
        prompts = ids(rows, 9)
        with torch.no_grad():
            assert torch.equal(streamed(prompts).logits, whole(prompts).logits)
        for one, other in zip(generate_greedy(streamed, prompts, 12), generate_greedy(whole, prompts, 12), strict=True):
            assert torch.equal(one, other)


def test_long_generations_are_equal(pair):
    whole, streamed = pair(share=0.7)
    found, expected = (generate_greedy(model, ids(1, 5), 80)[0] for model in (streamed, whole))
    assert torch.equal(found, expected) and len(found.unique()) > 8


@torch.no_grad()
def test_caches_are_those_of_any_model(pair):
    whole, streamed = pair()
    prefix, ends = ids(1, 12), [ids(1, 4, seed) for seed in range(2)]
    for model in (whole, streamed):
        cache = DynamicCache(config=model.config)
        model(prefix, past_key_values=cache)
        # the prefix's cache is used for every end, by the other model too
        model.found = [
            [
                reader.generate(
                    torch.cat([prefix, end], dim=1), past_key_values=copy.deepcopy(cache), max_new_tokens=6,
                    do_sample=False, eos_token_id=None,
                )
                for end in ends
            ]
            for reader in (whole, streamed)
        ]  # fmt: skip
    flat = [torch.cat(row) for model in (whole, streamed) for row in model.found]
    assert all(torch.equal(row, flat[0]) for row in flat)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
    static = [model.generate(prefix, disable_compile=model is whole, **options) for model in (whole, streamed)]
    assert torch.equal(*static)
    own = [StaticCache(config=m.config, max_cache_len=16) for m in (whole, streamed)]
    logits = [m(prefix, past_key_values=c).logits for m, c in zip((whole, streamed), own, strict=True)]
    assert torch.equal(*logits)


def test_generate_does_not_compile_a_streamed_model(pair):
    whole, streamed = pair()
    assert whole.hf_quantizer.is_compileable and not streamed.hf_quantizer.is_compileable
    streamed.streamer.disable()
    assert streamed.hf_quantizer.is_compileable


def test_a_streamed_model_is_saved_whole(pair, tmp_path):
    whole, streamed = pair()
    # nothing that is streamed moves
    places = [layer.weight.data_ptr() for chunk in streamed.streamer.chunks for layer in chunk.layers]
    streamed.to(DEVICE).to(DTYPE)
    assert places == [layer.weight.data_ptr() for chunk in streamed.streamer.chunks for layer in chunk.layers]
    streamed.save_pretrained(tmp_path / "again")
    again = rans_kernels.load(tmp_path / "again", DEVICE, DTYPE)
    expected, found = whole.state_dict(), again.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    layer = streamed.streamer.chunks[0].layers[0]
    assert layer.weight.device.type == "cpu" and torch.equal(layer.decode(), layer.decoded)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_weights_on_disk_stay_there(folders, pair):
    _, streamed = pair(offload="disk")
    layer = streamed.streamer.chunks[0].layers[0]
    for tensor in (layer.weight, layer.weight_words):
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = {tuple(int(end, 16) for end in line.split()[0].split("-")): line for line in lines}
        (mapped,) = (line for (low, high), line in ranges.items() if low <= tensor.data_ptr() < high)
        assert str(folders["plain"]) in mapped


def test_too_little_memory_is_one_line(folders, monkeypatch):
    with pytest.raises(BudgetError, match=r"give that or more") as error:
        rans_kernels.load(folders["plain"], DEVICE, budget=1e-5)
    assert "\n" not in str(error.value)

    def refuse(*args):
        raise torch.OutOfMemoryError("CUDA out of memory\nTried to allocate")

    monkeypatch.setattr(Streamer, "move", refuse)
    with pytest.raises(BudgetError, match="give a smaller budget") as error:
        rans_kernels.load(folders["plain"], DEVICE)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@torch.inference_mode()
def test_device_memory_is_within_the_budget(folders):
    whole = rans_kernels.load(folders["plain"], "cpu", DTYPE)
    budget = between(whole, 0.4)
    for offload in ("host", "disk"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = rans_kernels.load(folders["plain"], DEVICE, DTYPE, budget, offload)
        used = torch.cuda.memory_allocated() - before
        assert 0 < used <= budget * 1e9
        model(ids(1, 8))
        del model


@pytest.mark.gpu
@torch.inference_mode()
def test_streams_may_change_and_capture_is_refused(model, x):
    expected = resident(model)(x)
    Streamer(model, between(model, 0.3), DEVICE).enable()
    others = [torch.cuda.Stream() for _ in range(3)]
    for stream in others * 4:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = model(x)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="streaming.record alone"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(x)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("share", SHARES)
def test_a_recorded_pass_is_right_whenever_it_is_replayed(model, x, slots, share):
    inputs = [torch.randn_like(x) for _ in range(6)]
    reference = resident(model)
    expected = [reference(each) for each in inputs]
    streamer = Streamer(model, between(model, share, slots), DEVICE, slots=slots).enable()
    given, found = x.clone(), torch.empty_like(expected[0])
    for _ in range(2):
        model(x)
    replay = record(model, lambda: found.copy_(model(given)))
    found.fill_(math.nan)
    others = [torch.cuda.Stream() for _ in range(2)]
    for i, (each, result) in enumerate(zip(inputs * 4, expected * 4, strict=True)):
        stream = others[i % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            given.copy_(each)
            replay()
            if i % 3 == 1:
                # a pass between replays, and one that breaks off with copies under way
                assert torch.equal(model(each), result)
                model[0](each)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, result)
    # nothing of a recording is believed by an eager pass
    for slot in streamer.slots:
        slot.memory.fill_(255)
    torch.cuda.synchronize()
    assert torch.equal(model(inputs[0]), expected[0])
    streamer.disable()
    with pytest.raises(RuntimeError, match="record it again"):
        replay()


@pytest.mark.gpu
@torch.inference_mode()
def test_what_is_on_disk_is_not_recorded(model, x):
    Streamer(model, between(model, 0.3), DEVICE, "disk").enable()
    with pytest.raises(RuntimeError, match="offload='host'"):
        record(model, lambda: model(x))


@pytest.mark.gpu
def test_generation_by_a_recorded_step_gives_the_resident_tokens(pair):
    whole, streamed = pair(share=0.3)
    expected, found = (graph_greedy(m, ids(4, 9), 24, 2).tokens for m in (whole, streamed))
    assert torch.equal(found, expected)
    assert torch.equal(generate_greedy(streamed, ids(4, 9), 24)[0], generate_greedy(whole, ids(4, 9), 24)[0])


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_large_layers_race_with_their_copies(offload):
    """Copies and products that take long enough to meet."""
    torch.manual_seed(0)
    layers = [nn.Linear(2048, 2048, bias=False, dtype=DTYPE) for _ in range(24)]
    model = nn.Sequential(*layers).requires_grad_(False)
    x = torch.randn(2048, 2048, device=DEVICE, dtype=DTYPE)
    expected = resident(model)(x)
    Streamer(model, between(model, 0.3), DEVICE, offload, slots=2).enable()
    for _ in range(10):
        assert torch.equal(model(x), expected)
