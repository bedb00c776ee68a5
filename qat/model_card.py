"""The README.md of a compressed folder: what it is, how to load it, its figures."""

from typing import Any


def model_card(base: str, summary: dict[str, Any], config: dict[str, Any]) -> str:
    """Model card in Markdown with the YAML header that the Hugging Face hub reads.

    Args:
        base: name or path of the base model.
        summary: of the export report.
        config: config.json, `quantization_config` included.
    """
    quant = config["quantization_config"]["quant"]
    lossless = summary["lossless_weights"]
    kinds = [f"INT8 weights ({quant['granularity']}, {quant['scale']} scales)"] if quant["enabled"] else []
    kinds += [f"{lossless:,} weights in 16 bits, coded without loss"] if lossless else []
    # a path of somebody's machine is no model on the hub
    on_hub = base.count("/") == 1 and base[0] not in "./~"
    hub = f"base_model: {base}\nbase_model_relation: quantized\n" if on_hub else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{hub}tags: [codecllm, {"int8, rans, qat" if quant["enabled"] else "lossless, rans"}]
---
# {base.rstrip("/").rpartition("/")[2]}, compressed by codecllm

{"; ".join(kinds)}: rANS-coded in tiles. Import `rans_kernels` before
loading: without it transformers does not know the format.

```python
import rans_kernels
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

| | |
|---|---|
| compressed weights | {summary["compressed_weights"]:,} |
| bits a weight, everything stored | {summary["bits"]:.3f} |
| entropy of the {"integers; of floats, the high byte's and 8" if lossless else "integers"} | {summary["entropy"]:.3f} |
| whole model | {summary["model_bytes"] / 1e6:.1f} MB, {summary["model_bits"]:.2f} bits a parameter |
| the same in FP16 | {summary["fp16_bytes"] / 1e6:.1f} MB |

Per layer: export_report.json. Every tile was decoded and compared before this folder was written.
"""
