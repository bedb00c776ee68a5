"""The controller on a simulated run: it lands on the target from both sides and does not swing."""

import math

import pytest

from qat.config import Hold, RateConfig, RatePrice
from qat.quant.control import HIGHEST, LOWEST, BitsController, freeze_step, ramp_end

STEPS = 1000


class Plant:
    """A run in which bits drift towards where the slope of KL = c 2^(-2R) is the weight, as Adam would move them."""

    def __init__(self, bits: float, rate: float = 0.01, c: float = 1.0):
        self.bits, self.rate, self.c = bits, rate, c

    def step(self, weight: float) -> None:
        slope = 2 * math.log(2) * self.c * 2 ** (-2 * self.bits)
        self.bits -= self.rate * max(-1.0, min(1.0, math.log(weight / slope)))


def simulate(plant: Plant, config: RateConfig) -> list[float]:
    controller = BitsController.fresh(config, STEPS)
    bits = []
    for step in range(STEPS):
        if step % config.every == 0:
            controller.update(step, plant.bits)
        plant.step(controller.weight)
        bits.append(plant.bits)
    return bits


@pytest.mark.parametrize("start", [2.0, 2.9, 3.0, 4.1, 5.0])
@pytest.mark.parametrize("c", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("rate", [0.005, 0.01, 0.02])
def test_it_lands_on_the_target_from_both_sides_and_stays(start: float, c: float, rate: float) -> None:
    config = RateConfig(price=RatePrice.table, target_bits=3.0, ramp=0.4)
    held = simulate(Plant(start, rate, c), config)[-STEPS // 5 :]
    assert max(abs(b - 3) for b in held) < 0.05
    # not a swing of that size that happens to be caught
    crossings = sum((a > 3) != (b > 3) for a, b in zip(held, held[1:], strict=False))
    assert crossings <= 2 or max(held) - min(held) < 0.01


def test_the_target_is_a_ramp_from_the_first_measurement() -> None:
    config = RateConfig(price=RatePrice.table, target_bits=3.0, ramp=0.25)
    controller = BitsController.fresh(config, 400)
    controller.update(0, 5.0)
    assert [controller.target(step) for step in (0, 50, 100, 400)] == [5, 4, 3, 3]


@pytest.mark.parametrize("answer", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("drift", [-0.01, 0.01, 0.02])
def test_steps_lead_to_the_target_against_a_drift_and_do_not_swing(answer: float, drift: float) -> None:
    # bits of weights that gather at thresholds as the learning rate falls answer more strongly to a common factor
    config = RateConfig(target_bits=3.0, hold=Hold.steps, ramp=0.2)
    controller, bits, errors = BitsController.fresh(config, STEPS), 3.6, []
    for step in range(0, STEPS, config.every):
        share = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        controller.update(step, bits, share=share)
        bits -= controller.octaves(share) * min(answer, 1 / share)
        # what training does to them by itself
        bits += drift * share
        errors.append(controller.error)
    later = errors[STEPS // 2 // config.every :]
    assert max(map(abs, errors)) < 0.15 and max(map(abs, later)) < 0.013
    # the last fifth, in which whole errors would have swung ever wider
    assert abs(errors[-1]) <= abs(errors[-STEPS // 5 // config.every]) + 1e-4
    crossings = sum((a > 0) != (b > 0) for a, b in zip(errors[40:], errors[41:], strict=False) if abs(a) > 1e-4)
    assert crossings <= 2


def test_without_a_target_the_weight_is_the_configured_one() -> None:
    controller = BitsController.fresh(RateConfig(price=RatePrice.table, weight=0.03), 100)
    for step in range(0, 100, 10):
        controller.update(step, 9.0)
        assert controller.weight == 0.03


def test_at_its_limits_it_does_not_wind_up() -> None:
    config = RateConfig(price=RatePrice.table, target_bits=3.0, ramp=0.0)
    controller = BitsController.fresh(config, 100)
    for measured, limit in ((9.0, HIGHEST), (0.0, LOWEST), (9.0, HIGHEST)):
        for step in range(1000):
            controller.update(step, measured)
        assert controller.weight == pytest.approx(limit)
        assert controller.log_weight == pytest.approx(math.log(limit))


def test_a_saved_controller_goes_on_as_it_would_have() -> None:
    config = RateConfig(price=RatePrice.table, target_bits=3.0)
    one, other = (BitsController.fresh(config, 100) for _ in range(2))
    for step in range(0, 100, 10):
        one.update(step, 5.0 - step / 50)
        other.load_state_dict(one.state_dict())
        assert one == other
        assert one.weight == other.weight


def test_phases_are_shares_of_the_run() -> None:
    config = RateConfig(ramp=0.3, freeze=0.2)
    assert (ramp_end(config, 600), freeze_step(config, 600)) == (180, 480)
    assert freeze_step(RateConfig(), 600) == 600
