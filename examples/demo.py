"""The whole way on one machine, without a GPU, network or data: `make demo`, or `python examples/demo.py`.

Trains a small Llama on the source code of the running Python's standard library, then trains it again for the codec
with the first one as teacher, exports, reloads, compares tokens and logits, and runs two lm-eval tasks made from
held-out files. Every stage is the same function that train.py, export.py, eval/consistency.py and eval/harness.py
call. Results go to outputs/demo.
"""

import json
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# eval/ is a folder of entry points, not an installed package
sys.path.insert(0, str(ROOT))

OUTPUT = Path("outputs/demo")
SEPARATOR = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 256
SECONDS: dict[str, float] = {}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Announce a stage and keep its time."""
    print(f"\n== {name} ==", flush=True)
    begin = time.perf_counter()
    yield
    SECONDS[name] = time.perf_counter() - begin


def write_text(folder: Path, megabytes: float = 6.0) -> tuple[Path, Path]:
    """Standard library sources as training text, and every twentieth file as held-out text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
    files = [f for f in library.rglob("*.py") if not skipped & set(f.relative_to(library).parts)]
    train: list[str] = []
    valid: list[str] = []
    size = 0
    for i, file in enumerate(sorted(files)):
        text = file.read_text(encoding="utf-8", errors="ignore").strip()
        if text and size < megabytes * 1e6:
            (valid if i % 20 == 7 else train).append(text)
            size += len(text)
    folder.mkdir(parents=True)
    paths = folder / "train.txt", folder / "valid.txt"
    for path, texts in zip(paths, (train, valid), strict=True):
        path.write_text(f"\n{SEPARATOR}\n".join(texts), encoding="utf-8")
    print(f"{len(train)} files to train on, {len(valid)} held out, {size / 1e6:.1f} MB, from {library}")
    return paths


def make_model(folder: Path, text: Path) -> None:
    """A byte-level BPE tokenizer trained on the text, and a small Llama with random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text.read_text(encoding="utf-8")[:2_000_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SEPARATOR).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_tasks(folder: Path, valid: Path, items: int = 200) -> None:
    """Two lm-eval tasks from held-out text: choose the true next lines out of four, and perplexity."""
    documents = valid.read_text(encoding="utf-8").split(SEPARATOR)
    chosen = random.Random(0)
    # 12 lines and the 3 that follow them
    texts = [document.strip().splitlines(keepends=True) for document in documents]
    places = [lines[i : i + 15] for lines in texts for i in range(0, len(lines), 15)]
    places = [p for p in places if len(p) == 15 and sum(map(len, p)) < 600 and all(line.strip() for line in p[-3:])]
    chosen.shuffle(places)
    endings = ["".join(p[-3:]) for p in places]
    folder.mkdir(parents=True)
    with (folder / "continuation.jsonl").open("w", encoding="utf-8") as file:
        for i, place in enumerate(places[:items]):
            gold = chosen.randrange(4)
            choices = chosen.sample([e for j, e in enumerate(endings) if j != i], 3)
            choices.insert(gold, endings[i])
            file.write(json.dumps({"query": "".join(place[:-3]), "choices": choices, "gold": gold}) + "\n")
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for document in documents[:12]:
            file.write(json.dumps({"text": document.strip()[:4000]}) + "\n")


def save_base(run: Path, folder: Path) -> None:
    """The trained model as a Hugging Face folder."""
    from qat.checkpoint import load_fake_quant
    from qat.model import load_tokenizer

    load_fake_quant(run / "checkpoints" / "last.ckpt").save_pretrained(folder)  # type: ignore[operator]
    load_tokenizer(run / "hf").save_pretrained(folder)


def draw_figures(folder: Path, compressed: Path, runs: dict[str, Path]) -> None:
    """Training curves, and the integers of one layer against what the codec charges for them."""
    import matplotlib
    import numpy as np
    from rans_kernels.checkpoint import iterate_weights
    from rans_kernels.coder import weight_histogram

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, (name, run) in zip(axes, runs.items(), strict=True):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        points = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
        axis.plot(*zip(*points, strict=True))
        axis.set(title=name, xlabel="step", ylabel="loss, nats a token")
    figure.savefig(folder / "training.png", dpi=120)
    name, _, weights, _ = next(item for item in iterate_weights(compressed) if item[0].endswith("up_proj"))
    counts = weight_histogram(weights)
    used = np.flatnonzero(counts)
    share = counts[used] / counts.sum()
    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axis.bar(used - 128, share, width=0.9, color="tab:blue", label="share of weights")
    axis.set(title=name, xlabel="integer", ylabel="share")
    bits = axis.twinx()
    bits.plot(used - 128, -np.log2(share), color="tab:orange", label="bits each costs")
    bits.set_ylabel("bits")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(folder / "integers.png", dpi=120)


def closing_table(
    export_report: dict[str, Any], consistency: dict[str, Any], harness: dict[str, Any]
) -> dict[str, Any]:
    """The figures of the run in one place."""
    summary = export_report["summary"]
    pair, base = consistency["fake_quant"], consistency["base"]["logits"]
    task = "continuation_local"
    accuracy = {name: scores[task]["acc"]["value"] for name, scores in harness["results"].items()}
    parameters = summary["parameters"]
    return {
        "parameters": parameters,
        "size FP16, MB": 2 * parameters / 1e6,
        "size INT8, MB": (summary["compressed_weights"] + 4 * (parameters - summary["compressed_weights"])) / 1e6,
        "size compressed, MB": summary["model_bytes"] / 1e6,
        "bits a weight, all stored": summary["bits"],
        "entropy of the integers": summary["entropy"],
        "perplexity base": base["perplexity"]["reference"],
        "perplexity compressed": base["perplexity"]["other"],
        "mean KL to base, nats": base["kl"]["mean"],
        "same top token as base": base["same_top"],
        "next lines right, base": accuracy["base"],
        "next lines right, compressed": accuracy["compressed"],
        "tokens compared, fake-quant": pair["generation"]["tokens"],
        "divergent tokens, fake-quant": pair["generation"]["divergent_tokens"],
        "logits equal to the bit, fake-quant": "yes" if pair["logits"]["bit_equal"] else "no",
    }


def main() -> None:
    """Run every stage and print the closing table."""
    begin = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with stage("text"):
        train_text, valid_text = write_text(OUTPUT / "text")
        write_tasks(OUTPUT / "tasks", valid_text)
    with stage("tokenizer"):
        make_model(OUTPUT / "random", train_text)

    from eval.consistency import consistency
    from eval.harness import harness
    from qat.cli import compose
    from qat.export import export
    from qat.lit.build import train
    from qat.report import print_table, write_json

    common = [
        f"data.train={train_text}", f"data.valid={valid_text}", f"paths.output_root={OUTPUT}",
        f"paths.cache={OUTPUT / 'cache'}",
    ]  # fmt: skip
    with stage("train base"):
        base_run = train(compose("train", "experiment=demo_base", f"model.path={OUTPUT / 'random'}", *common))
        save_base(base_run, OUTPUT / "base")
    with stage("train for the codec"):
        run = train(compose("train", "experiment=demo", f"model.path={OUTPUT / 'base'}", *common))
    checkpoint = run / "checkpoints" / "last.ckpt"
    compressed = OUTPUT / "compressed"
    with stage("export"):
        export(compose("export", f"source={checkpoint}", f"output={compressed}"))
    judged = [
        f"compressed={compressed}", f"base={OUTPUT / 'base'}", f"output={OUTPUT / 'report'}",
        f"paths.cache={OUTPUT / 'cache'}", "logger=offline",
    ]  # fmt: skip
    with stage("consistency"):
        tokens = consistency(
            compose(
                "eval",
                *judged,
                f"checkpoint={checkpoint}",
                f"text={valid_text}",
                "prompts=64",
                "prompt_tokens=32",
                "new_tokens=128",
                f"seq_len={CONTEXT}",
                "windows=64",
                "batch_size=64",
            )  # fmt: skip
        )
    with stage("lm-eval"):
        scores = harness(
            compose(
                "eval",
                *judged,
                f"data_dir={OUTPUT / 'tasks'}",
                "tasks=[continuation_local,text_perplexity]",
                "batch_size=16",
            )  # fmt: skip
        )
    report = json.loads((compressed / "export_report.json").read_text())
    draw_figures(OUTPUT / "figures", compressed, {"base": base_run, "for the codec": run})
    shutil.copyfile(OUTPUT / "report" / "survival.png", OUTPUT / "figures" / "survival.png")
    table = closing_table(report, tokens, scores)
    print_table("codecllm demo", ("", "value"), list(table.items()))
    print_table("seconds", ("stage", "seconds"), [*SECONDS.items(), ("in all", time.perf_counter() - begin)])
    write_json(OUTPUT / "demo.json", {"results": table, "seconds": SECONDS})
    print(f"figures: {OUTPUT / 'figures'}, report: {OUTPUT / 'report' / 'report.json'}")
    if not tokens["passed"]:
        sys.exit("error: the compressed model differs from the fake-quantised one")


if __name__ == "__main__":
    main()
