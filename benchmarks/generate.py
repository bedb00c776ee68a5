"""Gate, then time generation: `python -m benchmarks.generate`. Writes benchmarks/results/generate-<gpu>.json.

A Llama of a named shape with random weights: linear layers hold Gaussian integers of 4.05 bits of entropy in 5 bits,
one coded bit and four raw ones; the head and the embedding stay in half precision. One decoder layer's integers are
drawn and coded; every decoder layer has a copy of its own in memory, with scales of its own. Three models with the
same weights, the same harness: dequantised in float16, dense INT8, and compressed. Greedy, static cache, the decoder
layers of transformers compiled one by one (`--compile layers`), on a GPU one CUDA graph a token. Gate: over 32 prompts
and 256 tokens the compressed model gives the dense INT8 model's tokens; the runs are those that are timed. Timed beside
it: a prompt of 8 x 256 tokens through the layers as they are, and with weights decoded ahead, which must change no bit.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rans_kernels.coder import encode_tiles
from rans_kernels.coder.plan import choose_probability_bits, choose_units
from rans_kernels.dense import Int8Linear, dequantize
from rans_kernels.format import Split, TileLayout
from rans_kernels.grouping import GroupLaunches
from rans_kernels.linear import CompressedLinear
from rans_kernels.staging import DecodeAhead
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, LlamaConfig, LlamaForCausalLM, StaticCache

from qat.errors import UserError
from qat.inference import pick_device
from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
KINDS = ("fp16", "int8", "compressed")
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that multiply the same x: coded in tiles of one size, so that they can share a launch."""
SPLIT, SIGMA = Split(1, 4), 4.0
PROMPT_TOKENS = 16


class Master(NamedTuple):
    """A linear layer's integers, int8 [N, K], and the state of a CompressedLinear that holds them, but for scales."""

    integers: Tensor
    layout: TileLayout
    coded: dict[str, Tensor]


def encode_layer(
    layer: nn.Module, device: torch.device, coding: tuple[Split, float, str] | None = None
) -> dict[str, Master]:
    """Random integers for every linear layer of a decoder layer, and the same coded, by name.

    Args:
        layer: of transformers, without weights.
        device: of the results.
        coding: their split, standard deviation, and the profile that chooses the tiles; SPLIT, SIGMA and fast if None.
    """
    split, sigma, profile = coding or (SPLIT, SIGMA, "fast")
    shapes = {name: (m.out_features, m.in_features) for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    masters = {}
    for name, shape in shapes.items():
        group = next((g for g in SIBLINGS if name.endswith(g)), (name,))
        rows = sum(other[0] for key, other in shapes.items() if key.endswith(group))
        layout = TileLayout(
            shape, split, choose_units((rows, shape[1]), profile), choose_probability_bits(split, (rows, shape[1]))
        )
        q = torch.empty(shape, device=device).normal_(0, sigma).round_().clamp_(split.low, -split.low - 1)
        integers = q.to(torch.int8)
        e = encode_tiles(integers.cpu().numpy(), layout)
        arrays = {"": e.heads, "_words": e.words, "_offsets": e.offsets, "_freqs": e.freqs}
        coded = {f"weight{part}": torch.from_numpy(array).to(device) for part, array in arrays.items()}
        masters[name] = Master(integers, layout, coded)
    return masters


def make_linear(kind: str, master: Master, scale: Tensor, dtype: torch.dtype) -> tuple[nn.Module, int]:
    """A linear layer with a copy of its own of a master's weights, and the bytes of them that it keeps on a GPU."""
    if kind == "fp16":
        dense = nn.Linear(1, 1, bias=False)
        dense.weight = nn.Parameter(dequantize(master.integers, scale, dtype), requires_grad=False)
        return dense, dense.weight.nbytes
    if kind == "int8":
        int8 = Int8Linear(master.integers.clone(), scale, units=master.layout.units)
        return int8, int8.weight_int8.nbytes + scale.nbytes
    with scale.device:
        coded = CompressedLinear(master.layout, len(master.coded["weight_words"]), (len(scale), 1))
    coded.load_state_dict({**master.coded, "weight_scale": scale})
    return coded, coded.stored_bytes + coded.prepare().table.nbytes


def build(
    shape: str, device: torch.device, coding: tuple[Split, float, str] | None = None
) -> tuple[LlamaForCausalLM, dict[str, Master]]:
    """The model, in float16 (float32 on a CPU), its decoder layers still without weights; and the weights for them.

    Args:
        shape: one of SHAPES.
        device: of both.
        coding: as `encode_layer`.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.float16 if device.type == "cuda" else torch.float32).eval()
    masters = encode_layer(model.model.layers[0], device, coding)
    for module in (model.model.embed_tokens, model.lm_head):
        module.to_empty(device=device).weight.data.normal_(0, 0.02)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.to_empty(device=device).weight.data.fill_(1)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False), masters


def fill(model: LlamaForCausalLM, masters: dict[str, Master], kind: str) -> int:
    """Give the decoder layers their linear layers; bytes of the weights."""
    total, scales = 0, torch.Generator(model.device).manual_seed(1)
    for layer in model.model.layers:
        for name, master in masters.items():
            n, k = master.layout.shape
            spread = torch.rand(n, 1, generator=scales, device=model.device) * 0.2 + 0.9
            linear, size = make_linear(kind, master, spread * (k**-0.5 / SIGMA), model.dtype)
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, linear)
            total += size
    return total


class Generator:
    """Greedy generation of a batch, a step a token; on a GPU a replay of one CUDA graph.

    The loop over the decoder layers is here, not in the model's forward, for each to have a cache of its own and number
    0 in it: so they are alike to the compiler, which compiles one and takes it for all.
    """

    def __init__(self, model: LlamaForCausalLM, batch: int, tokens: int, compiled: bool):
        """Make it.

        Args:
            model: with its linear layers.
            batch: rows.
            tokens: to generate after the prompt.
            compiled: whether steps are; the prompt never is.
        """
        self.model, self.tokens = model, tokens
        self.positions = torch.arange(PROMPT_TOKENS + tokens, device=model.device)
        # of every decoder layer, its keys, values and length
        self.static: list[Any] = StaticCache(model.config, max_cache_len=len(self.positions)).layers
        self.caches = [Cache(layers=[static]) for static in self.static]
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.open: Callable[..., Any] = self.before
        self.close: Callable[..., Any] = self.behind
        if compiled:
            self.open = torch.compile(self.before, dynamic=False, fullgraph=True)
            self.close = torch.compile(self.behind, dynamic=False, fullgraph=True)
        model.config._attn_implementation = "rows"
        for layer in model.model.layers:
            layer.self_attn.layer_idx = 0
            layer._compiled_call_impl = None
            if compiled:
                options = {"post_grad_custom_pre_pass": GroupLaunches()}
                layer.compile(dynamic=False, fullgraph=True, options=options)

    def before(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Embeddings of ids that follow `past` others, the attention mask, and the rotation of their positions."""
        x = self.model.model.embed_tokens(ids)
        position = past + torch.arange(ids.shape[1], device=ids.device)
        mask = torch.zeros((), dtype=x.dtype, device=ids.device).where(self.positions <= position[:, None], -torch.inf)
        return x, mask, self.model.model.rotary_emb(x, position[None])

    def behind(self, x: Tensor) -> Tensor:
        """The next tokens."""
        return self.model.lm_head(self.model.model.norm(x[:, -1:])).argmax(-1)

    def step(self, ids: Tensor) -> None:
        """`self.ids` becomes what follows `ids`."""
        # a layer's cache may still be on another device, before its first use
        past = self.static[0].cumulative_length.to(ids.device)
        x, mask, rotation = self.open(ids, past)
        for layer, cache in zip(self.model.model.layers, self.caches, strict=True):
            x = layer(x, attention_mask=mask[None, None], past_key_values=cache, position_embeddings=rotation)
        self.ids.copy_(self.close(x))

    def prefill(self, prompt: Tensor) -> None:
        """Begin anew, without the compiler: one shape of x less to compile."""
        for static in self.static:
            static.reset()
        with torch.compiler.set_stance("force_eager"):
            self.step(prompt)

    @torch.inference_mode()
    def generate(self, prompt: Tensor) -> tuple[Tensor, float]:
        """Generated tokens [batch, tokens], and seconds of all but the first."""
        if self.graph is None and self.model.device.type == "cuda":
            self.capture(prompt)
        self.prefill(prompt)
        found = [self.ids.clone()]
        synchronize(self.model.device)
        begin = time.perf_counter()
        for _ in range(self.tokens - 1):
            if self.graph is None:
                self.step(self.ids)
            else:
                self.graph.replay()
            found.append(self.ids.clone())
        synchronize(self.model.device)
        return torch.cat(found, dim=1), time.perf_counter() - begin

    def capture(self, prompt: Tensor) -> None:
        """Compile a step and record it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.prefill(prompt)
            for static in self.static:
                for tensor in (static.keys, static.values, static.cumulative_length):
                    # in some versions transformers' own mark makes the compiler compile anew for every layer
                    torch._dynamo.mark_static_address(tensor, guard=False)
            for _ in range(2):
                self.step(self.ids)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(self.ids)

    def split(self) -> dict[str, float]:
        """Milliseconds of a token by what they go to, from the profiler's record of one replay."""
        assert self.graph is not None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.graph.replay()
            torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for event in profile.events():
            name = event.name.lower()
            weights = ("rans_linear", "int8_linear", "gemm", "gemv", "cutlass", "splitk", "nvjet")
            kind = "products" if any(word in name for word in weights) else "other"
            kind = "attention" if any(word in name for word in ("fmha", "attention", "flash")) else kind
            spent[kind] += event.device_time / 1e3
        return {kind: round(time, 3) for kind, time in spent.items()}


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Attention for transformers. Heads that share keys are the rows of one head, so that no key is copied."""
    batch, heads, rows, width = query.shape
    if rows == 1:
        query = query.view(batch, key.shape[1], -1, width)
        y = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
    else:
        y = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return y.reshape(batch, heads, rows, width).transpose(1, 2).contiguous(), None


AttentionInterface.register("rows", attend)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(model: LlamaForCausalLM, prompts: Tensor, tokens: int, compiled: bool, profile: bool) -> dict[str, Any]:
    """Tokens of every prompt in batches of 8, and of the first two alone; tokens a second of both, the best run's."""
    torch._dynamo.reset()
    result: dict[str, Any] = {"tokens_s": {}, "tokens": []}
    for batch, chosen in ((1, prompts[:2]), (8, prompts)):
        generator = Generator(model, batch, tokens, compiled)
        parts = [generator.generate(part) for part in chosen.split(batch)]
        result["tokens"] += [part for part, _ in parts]
        result["tokens_s"][batch] = round(batch * (tokens - 1) / min(seconds for _, seconds in parts), 1)
        if profile and generator.graph is not None:
            print(f"batch {batch}, ms a token:", generator.split(), flush=True)
    result["tokens"] = torch.cat(result["tokens"])
    return result


@torch.inference_mode()
def prefill(model: LlamaForCausalLM, tokens: int) -> tuple[Tensor, float]:
    """What the decoder layers, not compiled, make of 8 rows of random embeddings; milliseconds, the best of three."""
    generator = torch.Generator(model.device).manual_seed(2)
    shape = (8, tokens, model.config.hidden_size)
    embeddings = torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
    position = torch.arange(tokens, device=model.device)
    rotation = model.model.rotary_emb(embeddings, position[None])
    mask = torch.where(position <= position[:, None], 0, -torch.inf).to(model.dtype)[None, None]
    times = []
    with torch.compiler.set_stance("force_eager"):
        for _ in range(4):
            synchronize(model.device)
            begin, x = time.perf_counter(), embeddings
            for layer in model.model.layers:
                x = layer(x, attention_mask=mask, position_embeddings=rotation)
            synchronize(model.device)
            times.append(1e3 * (time.perf_counter() - begin))
    return x, round(min(times[1:]), 2)


def bench_prefill(model: LlamaForCausalLM, tokens: int) -> dict[str, float]:
    """Milliseconds of a prompt, for compressed layers also with weights decoded ahead; raise unless it is the same."""
    x, ms = prefill(model, tokens)
    ahead = DecodeAhead(model.model.layers.modules(), model.dtype)
    if not ahead.layers:
        return {"plain": ms}
    ahead.enable()
    staged, staged_ms = prefill(model, tokens)
    ahead.disable()
    if not torch.equal(staged, x):
        raise SystemExit("error: weights decoded ahead give another result; no figures written")
    return {"plain": ms, "ahead": staged_ms}


def bench(shape: str, device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Gate and measure the three models of a shape."""
    begin = time.perf_counter()
    model, masters = build(shape, device)
    prompts = torch.randint(SHAPES[shape]["vocab_size"], (args.prompts, PROMPT_TOKENS), device=device)
    size, results = {}, {}
    for kind in KINDS:
        size[kind] = fill(model, masters, kind)
        results[kind] = measure(model, prompts, args.tokens, args.compile == "layers", args.profile)
        rates = ", ".join(f"{rate} tokens/s at batch {batch}" for batch, rate in results[kind]["tokens_s"].items())
        results[kind]["prefill_ms"] = bench_prefill(model, args.prefill)
        spent, prompt = time.perf_counter() - begin, results[kind]["prefill_ms"]
        print(f"{shape} {kind}: {rates}; prompt, ms: {prompt}; {spent:.0f} s so far", flush=True)
    found, expected = results["compressed"]["tokens"], results["int8"]["tokens"]
    if not torch.equal(found, expected):
        differing = (found != expected).sum().item()
        raise SystemExit(f"error: {differing} tokens of {shape} differ from dense INT8's; no figures written")
    rows = []
    for batch in (1, 8):
        rate = {kind: result["tokens_s"][batch] for kind, result in results.items()}
        rows.append(
            {
                "shape": shape, "batch": batch, "compile": args.compile, "prompts": args.prompts, "tokens": args.tokens,
                "tokens_s": rate, "over_fp16": round(rate["compressed"] / rate["fp16"], 3), "weight_bytes": size,
                "of_fp16_bytes": round(size["compressed"] / size["fp16"], 4), "divergent_tokens": 0,
                "distinct_tokens": len(found.unique()), "prefill_tokens": 8 * args.prefill,
                "prefill_ms": {kind: result["prefill_ms"] for kind, result in results.items()},
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Build, gate, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["tinyllama-1.1b", "llama-3-8b"], choices=list(SHAPES))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=256, help="tokens of a prompt whose time is taken, 8 at once")
    parser.add_argument("--compile", default="layers", choices=("none", "layers"), help="of the decoder layers")
    parser.add_argument("--profile", action="store_true", help="print where a token's time goes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.prompts < 8 or args.prompts % 8:
        parser.error(f"--prompts {args.prompts}: they run 8 at once, give a multiple of 8")
    try:
        device = pick_device(args.device)
    except UserError as error:
        parser.error(str(error))
    rows = [row for shape in args.shapes for row in bench(shape, device, args)]
    if device.type == "cuda":
        write_json(RESULTS / f"generate-{device_slug()}.json", {"environment": environment(), "rows": rows})
    lines = [
        [r["shape"], r["batch"], *(r["tokens_s"][k] for k in KINDS), r["over_fp16"], r["of_fp16_bytes"],
         r["distinct_tokens"]]
        for r in rows
    ]  # fmt: skip
    print_table("tokens a second", ["shape", "batch", *KINDS, "x FP16", "bytes of FP16", "distinct"], lines)


if __name__ == "__main__":
    main()
