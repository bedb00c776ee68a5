"""Gate, then time generation: `python -m benchmarks.generate`. Writes benchmarks/results/generate-<gpu>.json.

A Llama of a named shape with random weights: linear layers hold Gaussian integers of 4.05 bits of entropy in 5 bits,
one coded bit and four raw ones; the head and the embedding stay in half precision. Three models with the same
weights, the same harness: dequantised in float16, dense INT8, and compressed. Greedy, static cache, on a GPU one CUDA
graph a token. Gate: over 32 prompts and 256 tokens the compressed model gives the dense INT8 model's tokens.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rans_kernels.coder import encode_tiles
from rans_kernels.coder.plan import choose_probability_bits, choose_units
from rans_kernels.dense import dequantize
from rans_kernels.format import Split, TileLayout
from rans_kernels.linear import CompressedLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from qat.errors import UserError
from qat.inference import pick_device
from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "tinyllama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
SPLIT, SIGMA = Split(1, 4), 4.0
PROMPT_TOKENS = 16


def build(shape: str, device: torch.device) -> LlamaForCausalLM:
    """The float16 model (float32 on a CPU), its linear layers' weights integers times a scale, kept beside them."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False)
    half = torch.float16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    model = model.to(half).eval()
    for layer in linears(model).values():
        shape_of = layer.weight.shape
        q = torch.empty(shape_of, device=device).normal_(0, SIGMA).round_().clamp_(SPLIT.low, -SPLIT.low - 1)
        scale = torch.full((shape_of[0], 1), shape_of[1] ** -0.5 / SIGMA, device=device)
        layer.register_buffer("integers", q.to(torch.int8), persistent=False)
        layer.register_buffer("scale", scale, persistent=False)
        layer.weight.data = dequantize(q, scale, half)
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers but for the head, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def compress(layer: Any) -> CompressedLinear:
    """The layer, its integers coded."""
    q, shape = layer.integers.cpu().numpy(), (layer.out_features, layer.in_features)
    layout = TileLayout(shape, SPLIT, choose_units(shape, "fast"), choose_probability_bits(SPLIT))
    encoded = encode_tiles(q, layout)
    new = CompressedLinear(layout, len(encoded.words), (shape[0], 1))
    arrays = {"": encoded.heads, "_words": encoded.words, "_offsets": encoded.offsets, "_freqs": encoded.freqs}
    state = {f"weight{name}": torch.from_numpy(array) for name, array in arrays.items()}
    new.load_state_dict({**state, "weight_scale": layer.scale.cpu()})
    new.to(layer.weight.device).prepare()
    return new


def replace_linears(model: LlamaForCausalLM, kind: str) -> int:
    """Turn the layers into `compressed` ones, or compressed ones into dense `int8`; bytes of their weights then."""
    total, plain = 0, linears(model)
    for name, layer in list(model.named_modules()):
        if kind == "compressed" and name in plain:
            new: Any = compress(layer)
            total += new.stored_bytes
        elif kind == "int8" and isinstance(layer, CompressedLinear):
            new = layer.to_int8()
            total += new.weight_int8.nbytes + new.weight_scale.nbytes
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return total


class Generator:
    """Greedy generation of a batch, a step a token; on a GPU a replay of one CUDA graph."""

    def __init__(self, model: LlamaForCausalLM, batch: int, tokens: int):
        """Args: model: in eval mode. batch: rows. tokens: to generate after a prompt of PROMPT_TOKENS."""
        self.model, self.tokens = model, tokens
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + tokens)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        """One token more: `ids` becomes the next."""
        logits = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True).logits
        self.ids.copy_(logits[:, -1:].argmax(-1))

    @torch.inference_mode()
    def generate(self, prompt: Tensor) -> tuple[Tensor, float]:
        """Generated tokens [batch, tokens], and seconds of all but the first."""
        self.cache.reset()
        logits = self.model(input_ids=prompt, past_key_values=self.cache, use_cache=True).logits
        self.ids.copy_(logits[:, -1:].argmax(-1))
        found = [self.ids.clone()]
        if self.model.device.type == "cuda" and self.graph is None:
            self.capture(prompt)
            return self.generate(prompt)
        synchronize(self.model.device)
        begin = time.perf_counter()
        for _ in range(self.tokens - 1):
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()
            found.append(self.ids.clone())
        synchronize(self.model.device)
        return torch.cat(found, dim=1), time.perf_counter() - begin

    def capture(self, prompt: Tensor) -> None:
        """Record a step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(model: LlamaForCausalLM, batches: list[int], prompts: Tensor, tokens: int) -> dict[str, Any]:
    """Tokens of every prompt, and tokens a second of each batch, best of three."""
    rates = {}
    for batch in batches:
        generator = Generator(model, batch, tokens)
        seconds = min(generator.generate(prompts[:batch])[1] for _ in range(3))
        rates[batch] = round(batch * (tokens - 1) / seconds, 1)
    generator = Generator(model, 8, tokens)
    parts = [generator.generate(prompts[i : i + 8])[0] for i in range(0, len(prompts), 8)]
    return {"tokens_s": rates, "tokens": torch.cat(parts)}


def main() -> None:
    """Build, gate, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["tinyllama-1.1b", "llama-3-8b"], choices=list(SHAPES))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    try:
        device, rows = pick_device(args.device), []
    except UserError as error:
        parser.error(str(error))
    for shape in args.shapes:
        model = build(shape, device)
        prompts = torch.randint(SHAPES[shape]["vocab_size"], (args.prompts, PROMPT_TOKENS), device=device)
        weights = {"fp16": sum(2 * layer.weight.numel() for layer in linears(model).values())}
        results = {"fp16": measure(model, [1, 8], prompts, args.tokens)}
        for kind in ("compressed", "int8"):
            weights[kind] = replace_linears(model, kind)
            results[kind] = measure(model, [1, 8], prompts, args.tokens)
        same = torch.equal(results["compressed"]["tokens"], results["int8"]["tokens"])
        if not same:
            differing = (results["compressed"]["tokens"] != results["int8"]["tokens"]).sum().item()
            raise SystemExit(f"error: {differing} tokens of {shape} differ from dense INT8's; no figures written")
        for batch in (1, 8):
            rate = {kind: result["tokens_s"][batch] for kind, result in results.items()}
            rows.append(
                {
                    "shape": shape, "batch": batch, "prompts": args.prompts, "tokens": args.tokens, "tokens_s": rate,
                    "over_fp16": round(rate["compressed"] / rate["fp16"], 3), "weight_bytes": weights,
                    "of_fp16_bytes": round(weights["compressed"] / weights["fp16"], 4), "divergent_tokens": 0,
                }
            )  # fmt: skip
    if device.type == "cuda":
        write_json(RESULTS / f"generate-{device_slug()}.json", {"environment": environment(), "rows": rows})
    kinds = ("fp16", "int8", "compressed")
    lines = [
        [r["shape"], r["batch"], *(r["tokens_s"][k] for k in kinds), r["over_fp16"], r["of_fp16_bytes"]] for r in rows
    ]
    print_table("tokens a second", ["shape", "batch", *kinds, "x FP16", "bytes of FP16"], lines)


if __name__ == "__main__":
    main()
