"""What the integers of a weight cost, and how well they use their range.

Two prices of a weight of w / s = u steps, in bits, differentiable in w and s. Both come from a histogram p of the
tensor's integers that has no gradient itself: H(p) is the least cross-entropy of p under any code, so at the current
histogram the gradient of the price is the one of the entropy (envelope theorem).

    table   (1 - f) t[k] + f t[k + 1], k = floor(u), f = u - k,  t[k] = -log2 max(p[k], 2^-12)
    prior   -log2(F((v + 1/2) / b) - F((v - 1/2) / b)),  v = u + noise in [-1/2, 1/2),  F logistic with the variance
            of p (noise for rounding: arXiv 1611.01704; for weights: 1906.06624)

The codec's tables give every integer that occurs at least one slot of 2^12, so none costs more than 12 bits. Beyond
the clip a weight is charged what the clip costs, and gets no gradient.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from rans_kernels.coder.plan import choose_split, split_bits
from rans_kernels.dense import expand_scale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qat.config import Profile, RateConfig, RatePrice
from qat.errors import UserError
from qat.quant.control import rate_groups
from qat.quant.convert import end_modules, quantize_weight, quantized_modules
from qat.quant.fake_quant import quantize
from qat.quant.fit import fit_integers, fit_weight, integer_counts, stacked_counts
from qat.quant.modules import QATModule
from qat.quant.scales import grid, weight_scale
from qat.quant.shards import held, summed, whole

SAMPLE = 1 << 18
"""Weights of a tensor that a histogram is taken of, at least, by evenly spread rows: its entropy is uncertain by 0.003
bits, that of a model by much less, and the large matrices of a large model cost a step no more than that. Not for a
profile whose code has ranges, which a few weights that a sample misses decide."""
STACK = 1 << 24
"""Weights of tensors alike that histograms are taken of together. A large model has hundreds, and one by one the host
takes longer to ask than the GPU to count."""
DEAREST = 12.0
"""Bits of an integer that has one slot of the largest table, 2^12."""

M = TypeVar("M", bound=nn.Module)

# of the logistic distribution, below which its bins would leave the range of exp
MIN_SPREAD = 0.05


def entropy(q: Tensor) -> float:
    """Empirical entropy of the integers, -sum p log2 p, in bits a weight; q: int8 of any shape."""
    return float(share_entropy(integer_shares(q)))


def clipped_fraction(q: Tensor, qmax: int) -> float:
    """Share of the weights at an end of the range, |q| == qmax; q: int8 of any shape."""
    return float((q.abs() == qmax).double().mean())


def weight_statistics(module: QATModule) -> dict[str, Any]:
    """Figures to log of a fake-quantising layer.

    Returns:
        `entropy` (bits a weight), `clipped_fraction`, `scale_p05`, `scale_p50`, `scale_p95` (percentiles of its
        scales, nearest rank), and `counts`, how often each integer from -qmax to qmax occurs, a list.

    Raises:
        UserError: the weight is not finite.
    """
    log2_scale = None if module.log2_scale is None else whole(module.log2_scale)
    q, scale = quantize_weight(whole(module.weight), module.quant_config, log2_scale)
    qmax, _ = grid(module.quant_config)
    ranked = scale.flatten().sort().values
    percentiles = {f"scale_p{p:02d}": float(ranked[round(p / 100 * (len(ranked) - 1))]) for p in (5, 50, 95)}
    counts = integer_counts(q)
    return {
        "entropy": float(share_entropy(counts.double() / q.numel())),
        "clipped_fraction": clipped_fraction(q, qmax),
        **percentiles,
        "counts": counts[128 - qmax : 129 + qmax].tolist(),
    }


def integer_shares(q: Tensor) -> Tensor:
    """Share of every integer from -128 to 127 among q, int8 of any shape: float64 [256] on its device."""
    return integer_counts(q).double() / q.numel()


def weight_shares(weights: Tensor, scales: Tensor, qmax: int, group_size: int | None = None) -> Tensor:
    """`integer_shares` of several weights that are rounded: float64 [T, 256].

    Args:
        weights: [T, N, K].
        scales: [T, 1, 1], [T, N, 1] or [T, N, G].
        qmax: largest integer.
        group_size: columns that share a scale, or None.
    """
    tensors, n, k = weights.shape
    scale = scales.expand(tensors, n, -1).reshape(tensors * n, -1)
    q = quantize(weights.reshape(-1, k), scale, qmax, group_size)
    return stacked_counts(q.reshape(weights.shape)).double() / (n * k)


def sampled_rows(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Every n-th row of a weight [N, K] and of its scale [R, G], n the most that leaves `SAMPLE` weights; views."""
    every = max(1, weight.numel() // SAMPLE)
    return weight[::every], scale[::every] if len(scale) > 1 else scale


def share_entropy(shares: Tensor) -> Tensor:
    """Entropy of distributions [..., 256], in bits: [...]."""
    return torch.special.entr(shares).sum(-1) / math.log(2)


def table_prices(shares: Tensor) -> Tensor:
    """Bits of every integer from -128 to 127, float32 [..., 256], from their shares [..., 256]."""
    return -shares.clamp_min(2.0**-DEAREST).log2().float()


def logistic_spread(shares: Tensor) -> Tensor:
    """Spread b, float32, in steps: of the logistic distribution around 0 with the second moment of `shares` [256]."""
    integers = torch.arange(-128, 128, device=shares.device)
    return ((shares * integers.square()).sum() * 3).sqrt().div(math.pi).clamp_min(MIN_SPREAD).float()


def table_bits(weight: Tensor, scale: Tensor, prices: Tensor, qmax: int, group_size: int | None = None) -> Tensor:
    """Sum over the weights of the interpolated table price, in bits.

    Args:
        weight: float [N, K], with gradient.
        scale: [1, 1], [N, 1] or [N, G], see `rans_kernels.dense.expand_scale`; with gradient if it is trained.
        prices: of every integer from -128 to 127, [256].
        qmax: largest integer.
        group_size: columns that share a scale, or None.

    Returns:
        A scalar; float32, or wider if the weight is.
    """
    steps = _steps(weight, scale, group_size).clamp(-qmax, qmax) + 128
    place, prices = steps.long(), prices.to(steps.dtype)
    return (prices.take(place) + table_slopes(prices, qmax).take(place) * (steps - place)).sum()


def table_slopes(prices: Tensor, qmax: int | Tensor) -> Tensor:
    """What every integer from -128 to 127 costs less than the next; from the largest integer on 0.

    Args:
        prices: of the integers, [..., 256].
        qmax: the largest integer, [..., 1] where tensors differ.
    """
    slopes = F.pad(prices.diff(), (0, 1))
    return slopes.masked_fill(torch.arange(-128, 128, device=prices.device) >= qmax, 0)


def prior_bits(
    weight: Tensor,
    scale: Tensor,
    spread: Tensor,
    qmax: int,
    group_size: int | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Sum over the weights of the price under a logistic distribution, in bits.

    Args:
        weight: float [N, K], with gradient.
        scale: as for `table_bits`.
        spread: of the distribution, in steps.
        qmax: largest integer.
        group_size: columns that share a scale, or None.
        noise: in [-1/2, 1/2), [N, K]; None draws it.

    Returns:
        A scalar; float32, or wider if the weight is.
    """
    steps = _steps(weight, scale, group_size).clamp(-qmax, qmax)
    steps = steps + (torch.rand_like(steps) - 0.5 if noise is None else noise)
    # F(x) - F(y) = (1 - e^(y - x)) / ((1 + e^y) (1 + e^-x)): no difference of nearly equal numbers in the tails
    below, above = (steps - 0.5) / spread, (steps + 0.5) / spread
    nats = F.softplus(below) + F.softplus(-above) - torch.log(-torch.expm1(-1 / spread))
    return nats.sum() / math.log(2)


def distinct_weights(modules: Mapping[str, M]) -> dict[str, M]:
    """Of layers by name that share a weight, the first."""
    owners: dict[int, str] = {}
    for name, module in modules.items():
        owners.setdefault(id(module.weight), name)
    return {name: modules[name] for name in owners.values()}


class Content(NamedTuple):
    """What integers hold, in bits a weight over all tensors of a group."""

    entropy: float
    coded: float
    """In the code of the profile, of which `compact` is taken for an ideal one."""


class RateTerm:
    """The mean price of some quantised weights of a model, and the histograms it rests on.

    Weights that layers share count once. Every tensor has a histogram of its own, an exponential mean over refreshes.
    """

    def __init__(self, modules: Mapping[str, QATModule], config: RateConfig, compile: bool = False):
        """Watch layers.

        Args:
            modules: fake-quantising layers by name; in use they must be on one device.
            config: which price, how long histograms remember, and the target of these layers.
            compile: fuse the price of a tensor into one pass, and histograms of tensors alike into another.
        """
        self.modules = distinct_weights(modules)
        self.weights = sum(module.weight.numel() for module in self.modules.values())
        self.shares: dict[str, Tensor] = {}
        # what the container adds to a weight's entropy, in bits, where somebody has measured it
        self.overheads: dict[str, float] = {}
        # what prices rest on, from the histograms as they are; made when first asked for
        self._about: dict[str, Tensor] = {}
        self._pulling: float | None = None
        self.config = config
        bits: Callable[..., Tensor] = table_bits if config.price is RatePrice.table else prior_bits
        self._bits = torch.compile(bits, dynamic=False) if compile else bits
        self._shares = torch.compile(weight_shares, dynamic=False) if compile else weight_shares

    @torch.no_grad()
    def content(self) -> Content:
        """Of the integers as they are stored."""
        return self._content(torch.stack([integer_shares(q) for q in self.integers().values()]))

    @torch.no_grad()
    def integers(self) -> dict[str, Tensor]:
        """What would be stored now: int8 [N, K] by layer; with rate.fit in each one's range."""
        found = {name: module.integers() for name, module in self.modules.items()}
        return {name: fit_integers(q) for name, q in found.items()} if self.config.fit else found

    def fit(self) -> None:
        """Put weights where `integers` says, in place."""
        for module in self.modules.values():
            fit_weight(module)

    @torch.no_grad()
    def land(self, measure: Callable[[], float], target: float, octaves: float) -> None:
        """Multiply all learned steps by one factor, up to so many octaves, that brings `measure()` to `target` bits.

        What a controller leaves is a few hundredths of a bit; an octave is about a bit.
        """
        low, high, shift = -octaves, octaves, 0.0
        for _ in range(12):
            # bits fall as steps grow
            low, high = (shift, high) if measure() > target else (low, shift)
            self.shift((low + high) / 2 - shift)
            shift = (low + high) / 2

    @torch.no_grad()
    def shift(self, octaves: float) -> None:
        """Multiply all learned steps by 2 ** octaves."""
        for module in self.modules.values():
            assert module.log2_scale is not None
            module.log2_scale.add_(octaves)

    @torch.no_grad()
    def refresh(self) -> Content:
        """Take new histograms into account; gives what the integers hold, of large tensors a sample of them."""
        if self.config.fit:
            found = {name: integer_shares(q) for name, q in self.integers().items()}
        else:
            found = self._rounded_shares()
        now = torch.stack(list(found.values()))
        past = torch.stack([self.shares.get(name, shares).to(shares.device) for name, shares in found.items()])
        self.shares.update(zip(found, now.lerp(past, self.config.ema), strict=True))
        self._about.clear()
        self._pulling = None
        return self._content(now)

    @torch.no_grad()
    def pull(self, weight: float) -> None:
        """Have every backward of the layers add the gradient of weight * bits(), until told otherwise; 0 for none.

        For the price by table alone. Cheap if neither weight nor histograms have changed, and a few launches if so: of
        a large model's many small tables the host would else make a step of its own.
        """
        if weight == self._pulling:
            return
        self._pulling = weight
        modules = list(self.modules.values())
        if not weight:
            for module in modules:
                module.price_slopes = None
            return
        shares = torch.stack([self.shares[name].to(m.weight.device) for name, m in self.modules.items()])
        largest = torch.tensor([[grid(module.quant_config)[0]] for module in modules], device=shares.device)
        slopes = (table_slopes(table_prices(shares), largest) * (weight / self.weights)).unbind()
        kept = [module.price_slopes for module in modules if module.price_slopes is not None]
        if len(kept) == len(modules):
            # in place: a compiled layer knows the tensor
            torch._foreach_copy_(kept, slopes)
        else:
            for module, own in zip(modules, slopes, strict=True):
                module.price_slopes = own

    def bits(self) -> Tensor:
        """Mean price in bits a weight, a scalar with gradient; the backward keeps nothing but weights and scales.

        Of a sharded model every process prices the rows that it holds: the mean is that of all, the gradient its own.
        """
        total = []
        for name, module in self.modules.items():
            qmax, group_size = grid(module.quant_config)
            weight = held(module.weight)
            log2_scale = None if module.log2_scale is None else held(module.log2_scale)
            scale = weight_scale(weight, module.quant_config, log2_scale)
            # computed again in the backward: a weight matrix is large, and its price a few passes
            bits = checkpoint(self._bits, weight, scale, self._prices(name), qmax, group_size, use_reentrant=False)
            total.append(summed(bits, module.weight))
        return torch.stack(total).sum() / self.weights

    def _rounded_shares(self) -> dict[str, Tensor]:
        """`integer_shares` of the weights as they are, float64 [256] by layer; tensors that are alike go together."""
        stacks: dict[Any, list[tuple[str, Tensor, Tensor]]] = defaultdict(list)
        found: dict[str, Tensor] = {}

        def count(alike: Any) -> None:
            names, weights, scales = zip(*stacks.pop(alike), strict=True)
            shares = self._shares(torch.stack(weights), torch.stack(scales), *alike[-1])
            found.update(zip(names, shares, strict=True))

        for name, module in self.modules.items():
            weight, scale = full, _ = whole(module.weight), module.scale()
            if self.config.profile is Profile.compact:
                weight, scale = sampled_rows(weight, scale)
            alike = weight.shape, scale.shape, grid(module.quant_config)
            # rows of what was gathered are copied, or all of it would wait here
            stacks[alike].append((name, weight if full is module.weight else weight.clone(), scale))
            if (len(stacks[alike]) + 1) * weight.numel() > STACK:
                count(alike)
        for alike in list(stacks):
            count(alike)
        return {name: found[name] for name in self.modules}

    def _prices(self, name: str) -> Tensor:
        """What the price of a tensor rests on: a table [256], or the spread of a distribution."""
        if name not in self._about:
            shares = self.shares[name].to(self.modules[name].weight.device)
            noisy = self.config.price is RatePrice.prior
            self._about[name] = logistic_spread(shares) if noisy else table_prices(shares)
        return self._about[name]

    def _content(self, shares: Tensor) -> Content:
        sizes = [module.weight.numel() for module in self.modules.values()]
        bits = share_entropy(shares)
        entropy = float((bits * torch.tensor(sizes, device=bits.device)).sum()) / self.weights
        if self.config.profile is Profile.compact:
            # within hundredths of the entropy, for which the host need not read every histogram
            return Content(entropy, entropy)
        counts = [(s * n).round().long().cpu().numpy() for s, n in zip(shares, sizes, strict=True)]
        splits = [choose_split(c, self.config.profile.value) for c in counts]
        coded = (split_bits(c, split) * n for c, split, n in zip(counts, splits, sizes, strict=True))
        return Content(entropy, sum(coded) / self.weights)


def rate_terms(model: nn.Module, config: RateConfig, compile: bool = False) -> dict[str, RateTerm]:
    """The terms of a prepared model's quantised weights, by group; see `rate_groups`.

    Raises:
        UserError: embedding and head have a target of their own, but there are no other layers, or they are stock.
    """
    configs, modules = rate_groups(config), quantized_modules(model)
    ends = end_modules(model)
    members = [modules] if len(configs) == 1 else [{n: m for n, m in modules.items() if n not in ends}, ends]
    if not all(members):
        raise UserError("rate.embedding_bits: needs embedding or head quantised, and other layers; set it to null")
    return {group: RateTerm(m, configs[group], compile) for group, m in zip(configs, members, strict=True)}


def rate_loss(terms: Mapping[str, RateTerm], weights: Mapping[str, float]) -> Tensor:
    """What is added to the loss, in nats: a scalar with gradient.

    Bits of every group are averaged over the weights of all groups: under equal weights a bit costs the same wherever
    it is, as if there were one group.

    Args:
        terms: by group.
        weights: nats a bit, by group.
    """
    parts = [weight * terms[group].bits() for group, weight in _over_all(terms, weights).items()]
    return torch.stack(parts).sum()


def pull_rate(terms: Mapping[str, RateTerm], weights: Mapping[str, float], factor: float = 1.0) -> None:
    """Have every backward of the layers add the gradient of factor * `rate_loss`, see `RateTerm.pull`.

    Args:
        terms: by group.
        weights: nats a bit, by group; a group that is not there adds nothing.
        factor: of all weights.
    """
    for group, weight in _over_all(terms, weights).items():
        terms[group].pull(factor * weight)


def _over_all(terms: Mapping[str, RateTerm], weights: Mapping[str, float]) -> dict[str, float]:
    """Nats for a bit of a group's own mean, by group, 0 without a weight."""
    total = sum(term.weights for term in terms.values())
    return {group: weights.get(group, 0.0) * term.weights / total for group, term in terms.items()}


def _steps(weight: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide / expand_scale(scale, weight.shape[1], group_size)
