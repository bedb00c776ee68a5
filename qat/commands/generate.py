"""Continue a prompt with a compressed model, or with a plain Hugging Face folder.

Prints what the model adds, as it comes. Greedy unless --temperature or --top-p is given; settings of the folder's own
generation_config.json are left out, but for its end-of-text tokens.

  codecllm generate compressed/model --prompt "Once upon a time" --tokens 100
  codecllm generate compressed/model --prompt "Once upon a time" --budget 3
  codecllm generate compressed/model --prompt - --temperature 0.8 --top-p 0.95 --seed 1 < prompt.txt
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.commands.values import count, gigabytes
from qat.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompt, and how to go on from it."""
    parser.add_argument("folder", metavar="FOLDER", help="a compressed or a plain Hugging Face folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to go on from; - reads standard input")
    parser.add_argument("--tokens", type=count, default=128, metavar="N", help="at most so many new ones (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto (float32 on the CPU), float32, bfloat16 or float16")
    parser.add_argument("--budget", type=gigabytes, metavar="GB", help="of weights on the device; others are streamed")
    parser.add_argument("--offload", default="host", choices=["host", "disk"], help="where those wait (%(default)s)")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample; 0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of so much together")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Stream the model's text to standard output.

    Raises:
        UserError: no such folder or device, an empty prompt, values out of range, more tokens than the model takes.
        rans_kernels.format.FormatError: a damaged folder.
        rans_kernels.placement.BudgetError: too little memory.
    """
    if not Path(arguments.folder).expanduser().is_dir():
        raise UserError(f"{arguments.folder} is no folder: give a compressed or a plain Hugging Face folder")
    sampling = sampling_settings(arguments.temperature, arguments.top_p)
    prompt = read_prompt(arguments.prompt)

    import torch
    from transformers import GenerationConfig, TextStreamer

    from qat.inference import pick_device, pick_dtype, repeatable_attention
    from qat.model import load_config, load_tokenizer

    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    compressed = getattr(load_config(arguments.folder), "quantization_config", None) is not None
    try:
        tokenizer: Any = load_tokenizer(arguments.folder)
    except UserError as error:
        raise UserError(
            f"{arguments.folder} has no tokenizer that loads: copy tokenizer.json and tokenizer_config.json of the "
            "model it was made from into it"
        ) from error
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    model: Any = load(arguments.folder, compressed, device, dtype, arguments.budget, arguments.offload)
    check_length(model, inputs["input_ids"].shape[1], arguments.tokens)
    own = model.generation_config
    stop = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    first = stop[0] if isinstance(stop, list) else stop
    # transformers fills what a call does not say from here
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=first)
    torch.manual_seed(arguments.seed)
    with repeatable_attention():
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=arguments.tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )


def read_prompt(text: str) -> str:
    """The prompt, of standard input if it is `-`, without the newline at its end.

    Raises:
        UserError: it is empty, or no text.
    """
    try:
        text = sys.stdin.buffer.read().decode().removesuffix("\n") if text == "-" else text
        # the command line keeps bytes that are no UTF-8 as surrogates
        text.encode()
    except UnicodeError as error:
        raise UserError(f"the prompt is no UTF-8 text ({error}): convert it first") from error
    if not text:
        raise UserError("the prompt is empty: give --prompt some text to go on from")
    return text


def sampling_settings(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """What `generate` is told of sampling.

    Raises:
        UserError: a value out of range.
    """
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: give 0 (greedy) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: give more than 0 and at most 1")
    if temperature == 0 or (temperature is None and top_p is None):
        return {"do_sample": False}
    # transformers' own default of top_k is 50
    return {"do_sample": True, "temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": 0}


def load(
    folder: str, compressed: bool, device: "torch.device", dtype: "torch.dtype", budget: float | None, offload: str
) -> "PreTrainedModel":
    """A compressed or plain model, in eval mode, streamed if there is a budget.

    Raises:
        UserError: a plain folder that does not load.
        rans_kernels.format.FormatError: a compressed folder that does not.
        rans_kernels.placement.BudgetError: too little memory.
    """
    import rans_kernels
    from rans_kernels.streaming import Streamer
    from transformers.utils import logging as hf_logging

    from qat.model import load_model

    path = Path(folder).expanduser()
    if compressed:
        hf_logging.disable_progress_bar()
        return rans_kernels.load(path, device, dtype, budget, offload)
    model: Any = load_model(path, dtype)
    Streamer(model, math.inf if budget is None else budget, device, offload).enable()
    return model


def check_length(model: "PreTrainedModel", prompt: int, new: int) -> None:
    """Compare the length of the text with what the model has positions for.

    Raises:
        UserError: it is longer.
    """
    if prompt == 0:
        raise UserError("the prompt has no tokens: give --prompt some text to go on from")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and prompt + new > most:
        raise UserError(
            f"a prompt of {prompt} tokens and --tokens {new} are more than the {most} positions of the model: "
            f"{f'give --tokens {most - prompt} or less' if prompt < most else 'give a shorter prompt'}"
        )
