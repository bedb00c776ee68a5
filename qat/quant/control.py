"""The controller that holds training to a target of stored bits, and the phases of a run.

Lagrange's method: of the loss D + w R with R bits a weight, w grows while R is above the target and shrinks while it
is below (dual ascent). What w acts on integrates: at a constant w steps drift at about their learning rate, until
-dD/dR = w. Dual ascent alone would swing around the target, so a proportional part damps it, in logarithms because at
high rate D = c 2^(-2R), so that log w = log(2 ln2 D) at the optimum is linear in R:

    log w = a + proportional * e,   da/dstep = integral * e,   e = R - target

With rate.hold=steps the price is no controller: it stays at 2 ln2 D, what it would have to be at the optimum, and
all steps move together by half the error, and the less the lower the learning rate. An octave is a bit of weights that
lie anywhere between two thresholds, but training gathers them there, the closer the lower its rate: bits then answer
two to five times as strongly (bookllama-16m, 3 bits), and whole errors would swing for ever. By itself training moves
bits on, by about so much times the learning rate; a sum over the errors since the ramp (`drift`) comes to cancel that,
or bits would stay beside the target and be landed on it at the freeze, which does harm.

If bits fall by g a step and unit of log w too high, nothing swings as long as 4 integral < g (proportional + 1.39)^2.
"""

import math
from dataclasses import dataclass, replace

from qat.config import Hold, RateConfig

GAIN = 0.5
"""Octaves that steps move for an error of a bit, at the peak of the learning rate."""
DRIFT_GAIN = 0.06
"""Of the sum over errors: as large as bits that answer to an octave with one bit settle under without a swing."""
LOWEST, HIGHEST = 1e-5, 1.0
"""Limits of the weight, in nats a bit; the integral stops there too, so that it comes back at once."""


@dataclass
class BitsController:
    """Turns measured bits into the weight of the rate term; all of its state is in its fields.

    Attributes:
        config: target, gains, smoothing.
        steps: of the whole run.
        log_weight: the integral part, a; while nothing was measured and none is configured, that of LOWEST.
        bits: smoothed measurement; None before the first.
        start: the first measurement, where the ramp begins.
        error: bits above the target at the last measurement.
        drift: octaves that steps have to grow between measurements for bits to stay, at the peak of the learning rate.
    """

    config: RateConfig
    steps: int
    log_weight: float
    bits: float | None = None
    start: float | None = None
    error: float = 0.0
    drift: float = 0.0

    @classmethod
    def fresh(cls, config: RateConfig, steps: int) -> "BitsController":
        """At the beginning of a run of so many optimiser steps."""
        return cls(config, steps, math.log(config.weight or LOWEST))

    @property
    def weight(self) -> float:
        """Of the rate term, in nats a bit: the configured one without a target."""
        if self.config.target_bits is None and self.config.weight is not None:
            return self.config.weight
        steered = self.config.hold is Hold.weight
        return math.exp(_clamp(self.log_weight + self.config.proportional * self.error * steered))

    def octaves(self, share: float) -> float:
        """By which all steps shall grow; share: of the peak that the learning rate is at."""
        return share * (GAIN * self.error + self.drift) if self.config.hold is Hold.steps else 0.0

    def near(self, tolerance: float) -> bool:
        """Whether smoothed bits are within so many bits of `target_bits`; without a target, always."""
        target = self.config.target_bits
        return target is None or (self.bits is not None and abs(self.bits - target) <= tolerance)

    def target(self, step: int) -> float:
        """Bits to be at after optimiser step `step`: a line from the first measurement, then `target_bits`."""
        assert self.config.target_bits is not None and self.start is not None
        done = min(1.0, step / max(1, ramp_end(self.config, self.steps)))
        return self.start + (self.config.target_bits - self.start) * done

    def update(self, step: int, measured: float, kl: float | None = None, share: float = 1.0) -> None:
        """Take measurements after an optimiser step into account.

        Args:
            step: its number.
            measured: stored bits.
            kl: in nats; None if unknown.
            share: of the peak, that the learning rate is at.
        """
        past, held_by_steps = self.config.ema, self.config.hold is Hold.steps
        if self.config.weight is None and kl is not None and (self.bits is None or held_by_steps):
            self.log_weight = _clamp(math.log(max(2 * math.log(2) * kl, LOWEST)))
        self.bits = measured if self.bits is None else past * self.bits + (1 - past) * measured
        self.start = measured if self.start is None else self.start
        if self.config.target_bits is None:
            return
        # a step that moves answers at once: to look back would make it swing
        self.error = (measured if held_by_steps else self.bits) - self.target(step)
        if held_by_steps and step > ramp_end(self.config, self.steps):
            self.drift += DRIFT_GAIN * share * self.error
        if not held_by_steps:
            self.log_weight = _clamp(self.log_weight + self.config.integral * self.config.every * self.error)

    def state_dict(self) -> dict[str, float | None]:
        """Plain numbers."""
        return {name: getattr(self, name) for name in ("log_weight", "bits", "start", "error", "drift")}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """As saved."""
        assert state["log_weight"] is not None and state["error"] is not None and state["drift"] is not None
        self.log_weight, self.error, self.drift = state["log_weight"], state["error"], state["drift"]
        self.bits, self.start = state["bits"], state["start"]


def rate_groups(config: RateConfig) -> dict[str, RateConfig]:
    """What steers every group of weights that has a target of its own, by the prefix of its metrics.

    `rate` is all quantised weights, or with rate.embedding_bits all but embedding and head, which are `rate/embedding`.
    """
    if config.embedding_bits is None:
        return {"rate": config}
    return {"rate": config, "rate/embedding": replace(config, target_bits=config.embedding_bits)}


def ramp_end(config: RateConfig, steps: int) -> int:
    """Optimiser step at which the target is `target_bits`."""
    return round(config.ramp * steps)


def freeze_step(config: RateConfig, steps: int) -> int:
    """Optimiser step from which on integers stay; `steps` if never."""
    return round((1 - config.freeze) * steps)


def _clamp(log_weight: float) -> float:
    return min(max(log_weight, math.log(LOWEST)), math.log(HIGHEST))
