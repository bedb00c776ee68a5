import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.data import RunSampler, spread_prompts, spread_windows, windows
from qat.errors import UserError


@pytest.mark.parametrize("count, expected", [(8, 1), (9, 1), (15, 1), (16, 2), (17, 2)])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_windows_are_neighbours_and_the_rest_is_left(count, expected, dtype):
    dataset = windows(np.arange(count, dtype=dtype) + 60_000, seq_len=7)
    assert len(dataset) == expected
    joined = torch.cat([dataset[i] for i in range(len(dataset))])
    assert joined.dtype == torch.int64
    assert joined.tolist() == list(range(60_000, 60_000 + 8 * expected))


def test_text_one_token_short_of_a_window_says_so():
    with pytest.raises(UserError, match="7 tokens and one window of data.seq_len=7 needs 8"):
        windows(np.zeros(7, np.uint16), seq_len=7)


def rank_batches(world_size: int, accumulate: int, micro: int, **run) -> list[list[list[int]]]:
    """[rank][batch] of windows."""
    run["batch_size"] = world_size * accumulate * micro
    samplers = [RunSampler(micro_batch_size=micro, rank=r, world_size=world_size, **run) for r in range(world_size)]
    return [list(sampler) for sampler in samplers]


sizes = st.sampled_from([1, 2, 3])


@given(st.integers(1, 40), st.integers(1, 6), sizes, sizes, sizes, st.integers(-1, 2**33), st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_and_micro_batches_only_partition_the_order(count, steps, ranks, accumulate, micro, seed, data):
    batch = ranks * accumulate * micro
    run = {"windows": count, "steps": steps, "seed": seed}
    (whole,) = rank_batches(1, 1, batch, **run)
    dealt = rank_batches(ranks, accumulate, micro, **run)
    for step in range(steps):
        at = slice(step * accumulate, (step + 1) * accumulate)
        # micro-batch m of rank r is number m * ranks + r of the step
        mixed = [
            window for micro_step in zip(*(b[at] for b in dealt), strict=True) for part in micro_step for window in part
        ]
        assert mixed == whole[step]
    # every epoch is a permutation
    order = sum(whole, [])
    for epoch in range(0, len(order) - count + 1, count):
        assert sorted(order[epoch : epoch + count]) == list(range(count))
    start = data.draw(st.integers(0, steps))
    resumed = rank_batches(ranks, accumulate, micro, **run, start_step=start)
    assert resumed == [batches[start * accumulate :] for batches in dealt]
    sampler = RunSampler(count, steps, batch, micro, world_size=ranks, start_step=start)
    assert len(sampler) == steps * accumulate


def test_order_is_pinned():
    # a checkpoint of an older version must resume in the same order
    assert list(RunSampler(5, steps=2, batch_size=4, micro_batch_size=4, seed=3)) == [[1, 2, 4, 3], [0, 3, 4, 0]]


def test_seeds_and_epochs_differ():
    a, b = (list(RunSampler(100, steps=2, batch_size=100, micro_batch_size=100, seed=s)) for s in (0, 1))
    assert len({tuple(order) for order in a + b}) == 4


@pytest.mark.parametrize("count, length", [(1, 5), (3, 5), (4, 63), (2, 1)])
def test_prompts_span_the_text(count, length):
    prompts = spread_prompts(np.arange(63, dtype=np.uint16), count, length)
    assert prompts.shape == (count, length) and prompts.dtype == torch.int64
    assert torch.equal(prompts, prompts[:, :1] + torch.arange(length))
    assert prompts[0, 0] == 0 and (count == 1 or prompts[-1, -1] == 62)


def test_spread_windows_reach_from_the_first_to_the_last():
    data = windows(np.arange(100), 9)
    assert spread_windows(data, 4)[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(spread_windows(data, 99), torch.arange(100).view(10, 10))
