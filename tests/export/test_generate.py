"""A compressed model does whatever Hugging Face does with a model, and with the results of the fake-quantised one."""

import json

import pytest
import rans_kernels
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from qat.config import QuantConfig
from qat.quant import prepare
from tests.export.helpers import logits, run

QUANT = QuantConfig(bits=4, embeddings=True)
WAYS = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "draft by look-up": {"prompt_lookup_num_tokens": 3},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module")
def source(tiny_llama):
    return tiny_llama(tie_word_embeddings=True, attention_bias=True)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return run(source, tmp_path_factory.mktemp("generate") / "model", quant=QUANT)


@pytest.fixture(scope="module")
def reference(source):
    return prepare(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), QUANT).eval()


@pytest.fixture(scope="module")
def compressed(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.replace(" ", "-"))
def test_generate_gives_the_tokens_of_the_fake_quantised_model(way, compressed, reference):
    ids = torch.arange(1 if "prompt_lookup_num_tokens" in WAYS[way] else 3)[:, None] + torch.arange(5, 12)
    options = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0} | WAYS[way]
    texts = []
    for model in (compressed, reference):
        torch.manual_seed(5)
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options))
    assert torch.equal(*texts)
    # a model that says one thing only would pass too
    assert len(texts[0][:, ids.shape[1] :].unique()) > 4


def test_a_padded_batch_gives_the_tokens_of_the_fake_quantised_model(folder, compressed, reference):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="<|endoftext|>")
    batch = tokenizer(["the 3 quick", "the lazy dogs rest, and then", "foxes"], padding=True, return_tensors="pt")
    assert not batch.attention_mask.all()
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    texts = [
        model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        for model in (compressed, reference)
    ]
    assert torch.equal(*texts)


def test_a_pipeline_writes_what_generate_does(folder, compressed):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, device="cpu")
    (found,) = write("the 3 quick foxes", max_new_tokens=8, do_sample=False)
    batch = tokenizer("the 3 quick foxes", return_tensors="pt")
    ids = compressed.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    assert found["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_and_device_map_gives_the_same_model(dtype, device_map, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=dtype)
    assert model.model.norm.weight.dtype is dtype and model.model.layers[0].mlp.up_proj.weight.dtype is torch.int32
    found = logits(model)
    assert found.dtype is dtype and found.isfinite().all()
    assert torch.equal(found, logits(rans_kernels.load(folder, dtype=dtype)))


def test_device_map_auto_takes_what_there_is(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        assert model(torch.arange(9, device=model.device)[None]).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_saved_in_shards_is_the_same_model(dtype, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["format_version"] == 3
    assert torch.equal(logits(rans_kernels.load(tmp_path / "again")), logits(model))


def test_generate_may_compile_a_model_and_the_compiled_one_computes_the_same(compressed):
    assert compressed.hf_quantizer.is_compileable
    expected = logits(compressed)
    # the first call has decoded: nothing is left that a graph could not hold
    compiled = torch.compile(compressed, backend="eager", fullgraph=True)
    found = logits(compiled)
    torch._dynamo.reset()
    assert torch.equal(found, expected)
