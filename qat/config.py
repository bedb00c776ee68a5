"""Typed schemas of every config group: a wrong key or type, in YAML or on the command line, is an error that names it.

The YAML files under configs/ hold the values, these classes the names, the types and the meaning. Code receives the
dataclasses (`to_config`), never a DictConfig, so that hyperparameters stay plain data and checkpoints load with
`weights_only=True`.
"""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, TypeVar

# omegaconf's marker for a mandatory value; spelled out so that `qat.quant` needs torch alone
MISSING: Any = "???"


class Granularity(Enum):
    """How many weights share one scale."""

    per_tensor = "per_tensor"
    per_channel = "per_channel"
    """One scale an output row."""
    per_group = "per_group"
    """One scale for `group_size` neighbours of an output row."""


class ScaleRule(Enum):
    """How the scale (the step of the integer grid) follows from the weights."""

    absmax = "absmax"
    """max|w| / qmax, recomputed at every forward."""
    std = "std"
    """k * standard deviation, recomputed at every forward."""
    learned = "learned"
    """2 ** s with s trained (LSQ gradient), starting from `init`."""


class Rounding(Enum):
    """What training starts from."""

    nearest = "nearest"
    """The weights as they are."""
    gptq = "gptq"
    """Weights that round to GPTQ's integers on the training text; needs scale=learned."""


class RatePrice(Enum):
    """What training takes the bits of a weight to be."""

    none = "none"
    """Nothing: no rate term."""
    table = "table"
    """-log2 of the share of its integer in the tensor, interpolated between integers."""
    prior = "prior"
    """-log2 of a logistic distribution fitted to the tensor, with uniform noise in place of rounding."""


class Hold(Enum):
    """What keeps stored bits at the target."""

    weight = "weight"
    """The price: a controller raises it while there are too many bits."""
    steps = "steps"
    """The steps: all are multiplied by one factor; the price then only says where bits go."""


class Profile(Enum):
    """What export optimises the coded / raw split of each layer for."""

    compact = "compact"
    fast = "fast"
    auto = "auto"


class Lossless(Enum):
    """Which 16-bit weights that are not quantised export codes without loss, instead of storing them plainly."""

    none = "none"
    embeddings = "embeddings"
    """Input embedding and output head."""
    all = "all"
    """These and every linear layer; with quant=none the whole model, which then computes what it always did."""


class LoggerMode(Enum):
    """Where W&B sends its data."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class ModelConfig:
    """The base checkpoint: student before training, teacher during it."""

    path: str = MISSING
    """Local Hugging Face folder, or a name on the hub."""
    revision: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile the decoder layers, one for all that are alike."""


@dataclass
class DataConfig:
    """Text for training and validation."""

    train: Any = MISSING
    """A source or a list of them: .txt, .txt.xz, .jsonl files, globs, or hf://dataset[:config][@split]."""
    valid: Any = MISSING
    """As `train`; a source that is in both is refused."""
    text_key: str = "text"
    """Field that holds the text in .jsonl and hub datasets."""
    separator: str = "<|endoftext|>"
    """Marks the end of a document in text files; becomes the tokenizer's end-of-text token."""
    seq_len: int = 512
    """Predicted tokens of a window; a window holds one token more."""
    batch_size: int = 64
    """Windows of one optimiser step over all devices."""
    micro_batch_size: int = 16
    """Windows a device holds at once; the rest is gradient accumulation."""
    valid_windows: int | None = None
    """Validate on the first so many windows; null takes all."""
    valid_prompts: int = 8
    """Prompts from all over the validation text that student and teacher go on from at validation; 0 for none."""
    prompt_tokens: int = 32
    new_tokens: int = 32
    """Generated from each prompt."""
    noise: float = 0.0
    """Share of the training tokens that student and teacher read replaced by samples of the teacher (qat/noise.py)."""
    num_workers: int = 0
    seed: int = 0
    """Of the order of the training windows."""


@dataclass
class QuantConfig:
    """INT8 fake quantisation, in torchao's words."""

    enabled: bool = True
    bits: int = 8
    """Grid of the integers: [-(2^(bits-1) - 1), 2^(bits-1) - 1]; 2 to 8."""
    granularity: Granularity = Granularity.per_channel
    group_size: int = 128
    """Used by per_group; a multiple of 32."""
    scale: ScaleRule = ScaleRule.absmax
    init: ScaleRule = ScaleRule.absmax
    """Where `learned` starts: absmax or std."""
    k: float = 0.5
    """Step in standard deviations of the row, for std. Gaussian rows then need about 2.05 - log2(k) bits."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs over module names; a linear layer that matches is quantised."""
    exclude: list[str] = field(default_factory=list)
    embeddings: bool = False
    """Quantise the input embedding too."""
    lm_head: bool = False
    """Quantise the output head too; with tied weights it goes with the embedding."""
    start_step: int = 0
    """Optimiser step at which fake quantisation switches on."""
    columns: float = 0.0
    """Before training, columns are multiplied by rms(x) ** columns and what feeds them divided; 0 leaves them."""
    rounding: Rounding = Rounding.nearest
    calibration_windows: int = 32
    """Of the training text, for what is done before the first step."""


@dataclass
class LossConfig:
    """loss = kl * KL(teacher || student) + ce * cross-entropy, both means over tokens, in nats, + hidden * error."""

    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    """Weight of the mean relative squared error of hidden states, behind every layer (`qat.distill.hidden_error`)."""
    temperature: float = 1.0
    chunk_tokens: int = 2048
    """Tokens whose logits exist at once; full logits are never held."""


@dataclass
class RateConfig:
    """loss += weight * mean bits of the quantised weights, and what holds those bits to a target.

    With `embedding_bits` there are two groups of weights, each with a target, factor on steps and weight of its own.
    """

    price: RatePrice = RatePrice.none
    weight: float | None = 0.02
    """Nats a bit; where the controller starts if that holds the bits. Null is 2 ln2 KL, as measured."""
    target_bits: float | None = None
    """Bits a weight as stored, everything counted; null leaves `weight` as it is. Needs quant.scale=learned."""
    embedding_bits: float | None = None
    """As `target_bits`, of input embedding and output head together; null counts them together with all others."""
    hold: Hold = Hold.weight
    lead: float | None = None
    """Stored bits above the target to begin at, by one factor on all steps; null begins at quant.k."""
    ramp: float = 0.3
    """Share of max_steps over which the target goes from the bits at the start to `target_bits`."""
    freeze: float = 0.0
    """Last share of max_steps, in which integers stay and all else goes on. Needs quant.scale=learned."""
    land: float = 0.05
    """Octaves that all steps may move at the freeze to come near the target; many undo what rounding was trained to."""
    every: int = 10
    """Optimiser steps between histograms, from which prices and the controller follow."""
    ema: float = 0.5
    """Share of the past in histograms and measured bits."""
    proportional: float = 4.0
    """log(weight) for a bit above the target."""
    integral: float = 0.05
    """Growth of log(weight) an optimiser step, for a bit above the target."""
    profile: Profile = Profile.compact
    """Of the container whose bits are measured: that of the export to come."""
    fit: bool = False
    """For profile fast: with every histogram, put weights inside the range of bits that their layer best has."""
    panels: int = 4
    """Panels of 16 coded rows of every tensor that are coded to measure what the container adds to the entropy."""


@dataclass
class OptimConfig:
    """AdamW with linear warm-up and a decay to `min_lr_ratio`."""

    lr: float = 5e-4
    scale_lr: float = 1e-3
    """Rate of learned log2 scales; they have no weight decay."""
    norm_lr: float | None = None
    """Rate of the gains of norms, which with quant.columns are column factors; null is `lr`."""
    embedding_lr: float | None = None
    """Rate of the input embedding, and of a head tied to it; null is `lr`, 0 keeps them as they are."""
    weight_decay: float = 0.0
    anchor: float = 0.0
    """Pull of weight matrices to where they began, by so much times the learning rate a step (qat/lit/anchor.py)."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_steps: int = 50
    decay_power: float | None = None
    """The rate falls as (1 - progress)^decay_power; null is half a cosine."""
    min_lr_ratio: float = 0.0
    """Final rate over peak rate."""
    frozen_lr_ratio: float = 0.3
    """Peak rate over that of before, once integers are frozen."""


@dataclass
class TrainerConfig:
    """What Lightning's Trainer is told."""

    max_steps: int = 600
    """Optimiser steps."""
    accelerator: str = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    """auto is bf16-mixed where the GPU has bf16, else 32-true."""
    gradient_clip: float = 1.0
    valid_every: int = 100
    """Optimiser steps between validations."""
    checkpoint_every: int = 100
    log_every: int = 10
    seed: int = 0
    deterministic: bool = False
    progress_bar: bool = True
    resume: str | None = None
    """Checkpoint to go on from."""


@dataclass
class LoggerConfig:
    """W&B; the same metrics always go to metrics.jsonl in the output folder as well."""

    mode: LoggerMode = LoggerMode.offline
    project: str = "codecllm"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    layers: bool = True
    """Training: a table of the layers and histograms of their integers at validation, to layers.jsonl as well."""
    artifact: bool = False
    """The model as an artifact of W&B: after training its best checkpoint, after export the folder."""


@dataclass
class PathsConfig:
    """Where things are written."""

    output_root: str = "outputs"
    cache: str = "~/.cache/codecllm"
    """Tokenised text, by content hash."""


@dataclass
class TrainConfig:
    """Everything train.py takes."""

    name: str = MISSING
    """Names the run: outputs/<name>/<time>, and the run in W&B."""
    experiment: Any = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    rate: RateConfig = field(default_factory=RateConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class ExportConfig:
    """Everything export.py takes."""

    source: str = MISSING
    """A Lightning checkpoint (.ckpt) or a Hugging Face folder, which is then rounded to nearest."""
    output: str = MISSING
    """Folder to write; must not exist unless `overwrite`."""
    overwrite: bool = False
    quant: QuantConfig = field(default_factory=QuantConfig)
    """For a Hugging Face folder; a checkpoint brings its own."""
    lossless: Lossless = Lossless.none
    """Weights to code without loss, bfloat16 at about 11 bits."""
    profile: Profile = Profile.compact
    units: int | None = None
    """Columns of a tile over 64: few for more tiles at once, many for fewer bits; null leaves it to the profile."""
    probability_bits: int | None = None
    """Precision of the frequency tables, 10 to 12; null takes what the kernels' shared memory favours."""
    dtype: str = "auto"
    """Of the tensors that are not quantised: auto keeps them as trained; bfloat16 or float16 round them."""
    shard_size: str = "5GB"
    workers: int | None = None
    """Threads; null takes every core."""
    progress_bar: bool = True
    logger: LoggerConfig = field(default_factory=lambda: LoggerConfig(mode=LoggerMode.disabled))


@dataclass
class HarnessConfig:
    """What lm-eval's simple_evaluate takes beside tasks, limit and num_fewshot, by its names; it explains them."""

    fake_quant: bool = False
    """Run the fake-quant model too and compare log-likelihoods; it always is with a checkpoint."""
    batch_size: Any = None
    """A number, auto or auto:N; null takes eval's batch_size."""
    max_batch_size: int | None = None
    samples: Any = None
    """Items to run, by task: {task: [0, 3]}; without `limit`."""
    use_cache: str | None = None
    """Folder of the responses so far: a run that was stopped goes on from them."""
    cache_requests: bool = False
    rewrite_requests_cache: bool = False
    delete_requests_cache: bool = False
    bootstrap_iters: int = 100000
    """For standard errors; 0 computes none."""
    check_integrity: bool = False
    write_out: bool = False
    system_instruction: str | None = None
    apply_chat_template: Any = False
    """Whether, or the name of the template."""
    fewshot_as_multiturn: bool = True
    gen_kwargs: Any = None
    """For tasks that generate: {temperature: 0.7, do_sample: true}."""
    predict_only: bool = False
    """Keep what models answer and score nothing; with log_samples."""
    random_seed: int = 0
    numpy_random_seed: int = 1234
    torch_random_seed: int = 1234
    fewshot_random_seed: int = 1234
    confirm_run_unsafe_code: bool = False
    metadata: Any = None
    model_args: Any = None
    """More for lm-eval's HFLM: {max_length: 2048, add_bos_token: true}."""


@dataclass
class EvalConfig:
    """Everything eval/consistency.py and eval/harness.py take."""

    compressed: str = MISSING
    """Folder written by export.py."""
    base: str | None = None
    """The unquantised model to compare with."""
    checkpoint: str | None = None
    """The Lightning checkpoint it was exported from; null rounds `base` again the way the folder says."""
    output: str = MISSING
    """Folder for report.json."""
    device: str = "auto"
    dtype: str = "auto"
    """auto: float32 on CPU; on a GPU bfloat16 where it has it."""
    text: Any = None
    """Held-out text for prompts and perplexity, as data.valid; the file that the task text_perplexity reads."""
    text_key: str = "text"
    separator: str = "<|endoftext|>"
    prompts: int = 100
    prompt_tokens: int = 64
    new_tokens: int = 256
    seq_len: int = 512
    windows: int | None = 128
    """Windows of text for logits and perplexity."""
    batch_size: int = 16
    modes: Any = None
    """Ways of running to compare: all, or some of those of eval/modes.py; null compares the eager run alone."""
    floor: bool = True
    """Compare the base with itself in other batches, which tells how far rounding alone takes it."""
    tasks: Any = None
    """lm-eval tasks: names of eval/tasks/*.yaml, of lm-eval's own, or paths of YAML files."""
    data_dir: str | None = None
    """Folder of the jsonl files that the local tasks read; of a single task, its file."""
    limit: float | None = None
    """Items a task; below 1 a share of them."""
    num_fewshot: int | None = None
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    log_samples: bool = False
    """Keep every item of the lm-eval tasks with the model's answer, as samples_*.jsonl in `output`."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


T = TypeVar("T", TrainConfig, ExportConfig, EvalConfig)


def register_schemas() -> None:
    """Put every schema into Hydra's ConfigStore: `<group>/schema`, and one root for each entry point."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    groups = {
        "model": ModelConfig,
        "data": DataConfig,
        "quant": QuantConfig,
        "loss": LossConfig,
        "rate": RateConfig,
        "optim": OptimConfig,
        "trainer": TrainerConfig,
        "logger": LoggerConfig,
        "paths": PathsConfig,
    }
    for group, schema in groups.items():
        store.store(group=group, name="schema", node=schema)
    for name, root in {"train": TrainConfig, "export": ExportConfig, "eval": EvalConfig}.items():
        store.store(name=f"{name}_schema", node=root)


def to_config(config: Any) -> Any:
    """The dataclass behind a composed DictConfig.

    Raises:
        UserError: a value that has no default was not given; the message names it.
        omegaconf.ConfigKeyError: a key was added with `+` that the schema does not have.
    """
    from omegaconf import OmegaConf

    OmegaConf.resolve(config)
    config = OmegaConf.merge(OmegaConf.structured(OmegaConf.get_type(config)), OmegaConf.to_container(config))
    if missing := sorted(OmegaConf.missing_keys(config)):
        from qat.errors import UserError

        raise UserError(f"no value given for: {', '.join(missing)} (give it as {missing[0]}=...)")
    return OmegaConf.to_object(config)


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested dicts of plain scalars (enums by name), fit for a checkpoint or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(asdict(config))


def from_plain(schema: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_plain`: an instance of `schema`; unknown keys and wrong types raise."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
