"""The table of goals: met, short and not measured are told apart."""

from benchmarks.suite import Goal, goals


def row(shape, batch, profile, ours, **others):
    return {"shape": shape, "batch": batch, "profile": profile, "us": {"ours": ours, "cublas_fp16": 17.0}, **others}


def test_a_goal_is_met_short_or_not_measured():
    assert [Goal("", 1.0, found).met for found in (1.0, 0.99, None)] == ["yes", "no", ""]
    assert [Goal("", 1.0, found, most=True).met for found in (1.0, 1.01)] == ["yes", "no"]


def test_without_results_nothing_is_met():
    assert {goal.met for goal in goals([], [], [], [])} == {""}


def test_goals_are_taken_from_the_rows_they_name():
    bits = {"bits": 4.3, "entropy": 4.0}
    linear = [
        row([8192, 28672], 1, "3 bits", 10.0, **bits), row([2048, 2048], 8, "4 bits", 20.0, **bits),
        row([8192, 28672], 1, "compact", 150.0), row([2048, 2048], 64, "4 bits", 34.0, **bits),
    ]  # fmt: skip
    decode = [{"shape": [8192, 28672], "profile": "5 bits", "Tweights_s": {"int8": 2.3}}]
    generate = [{"shape": "llama-3-8b", "over_fp16": 1.5, "of_fp16_bytes": 0.4}]
    us = {"ours": 20.0, "cublas_bf16": 30.0}
    lossless = [{"weights": "Gaussian", "bits": 10.7}, {"shape": [4096, 14336], "batch": 1, "bits": 11.2, "us": us}]
    found = {goal.what: goal for goal in goals(linear, decode, lossless, generate)}
    assert abs(found["batch 1 to 8, 3 to 5 bits: geometric mean"].found - (1.7 * 0.85) ** 0.5) < 1e-9
    assert found["batch 1 to 8, 3 to 5 bits: least"].met == "no"
    assert found["bits over the entropy: most"].met == "yes"
    assert found["4096 x 14336 and 8192 x 28672: least"].met == "yes"
    assert found["compact, 1e12 weights/s: most of a shape"].met == "yes"
    assert found["batch 64: least"].found == 0.5
    assert found["decoding to INT8, 5 bits, 8192 x 28672, 1e12 weights/s"].met == "yes"
    assert found["decoding to INT8, 3 bits, 8192 x 28672, 1e12 weights/s"].met == ""
    assert found["bfloat16 without loss, 11.3 bits at most, batch 1"].found == 1.5
    assert found["weights of FP16, llama-3-8b: most"].met == "no"
