"""The configuration of a run, which `make_config` derives once from the command line (TrainOptions).

    options = parse_options(TrainOptions, ...)        # None: not given
    options = resumed_options(options, given, ...)    # only on --resume: what the checkpoint was made with
    config = make_config(options, given, device, data, checkpoint)

Every field of a RunConfig has its final value. A checkpoint stores them in info["config"].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.cli import UserError
from common.device import choose_dtype, has_cpp_compiler
from common.flops import flops_per_token
from data.dataset import PREFERENCE_FORMATS
from data.epochs import FINE_TUNING_ROWS, default_iters, has_few_tokens
from model import PRESETS, padded_vocab_size
from training.adapter_config import adapter_choices, adapter_of, require_other_file, with_adamw
from training.initialization import model_config
from training.memory import SpeedUp, StepMemory, find_micro_batch
from training.mixture import mixture_name, portions
from training.objective_options import PREFERENCE_RATE
from training.option_checks import check_combinations, check_compile_scope, check_residual_dtype, require_whole_pairs
from training.options import TrainOptions
from training.parallel import micro_batch_size

DEFAULT_BATCH_SIZE = 16
MUON_LEARNING_RATE = 0.02
NARROW, FEW_IDS = 384, 8192  # the largest width and vocabulary with larger learning rates
# With --init_from, a fraction of a new model's learning rates. Steps as large as those for new weights destroy what the
# trained weights know; with much smaller steps they hardly learn (docs/fine-tuning.md has measurements).
FINE_TUNING_RATE = 1 / 3
COMPILED_FLOPS = 2e14  # of a run on a CPU: from this many on, compiling gains more time than it takes
KERNEL_WIDTH = 512  # up to this width, the blocks of a model run in kernels on a CPU with AMX (fast/block_kernel.py)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. Made by `make_config`; TrainOptions explains the fields."""

    dataset: str
    max_iters: int
    seed: int
    preset: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    n_vocab: int  # ids of the data's tokenizer
    dropout: float
    batch_size: int
    gradient_accumulation_steps: int
    objective: str
    beta: float
    label_smoothing: float
    sft_weight: float
    loss_on: str
    document_mask: bool
    optimizer: str
    learning_rate: float
    muon_learning_rate: float
    min_lr: float
    schedule: str
    warmup_iters: int
    weight_decay: float
    muon_weight_decay: float
    embedding_weight_decay: float
    grad_clip: float
    eval_interval: int
    eval_iters: int
    log_interval: int
    keep: int
    tensorboard: bool
    device: str
    dtype: str
    residual_dtype: str
    compile: bool
    compile_scope: str
    activation_checkpointing: bool
    parallel: str
    deterministic: bool
    data_dir: str
    out_dir: str
    resume: str | None  # the checkpoint that the run continues; None for a new run
    init_from: str | None  # the model whose weights a new run starts from; None: new weights
    lora_rank: int | None  # an adapter's settings, and the base that it is trained on; None: all weights train
    lora_alpha: float | None
    lora_layers: str | None
    lora_chat_rows: bool | None
    lora_base: str | None
    lora_base_digest: str | None
    val_rows: int  # rows per evaluation; the number stays the same if a resumed run changes its batch_size

    @property
    def name(self) -> str:
        """The name of the run's files, without suffix."""
        return f"{mixture_name(self.dataset)}{self.max_iters}"

    @property
    def tokens_per_iter(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps * self.block_size


# --- from options to a configuration ---


def make_config(
    options: TrainOptions,
    given: Mapping[str, Any],
    device: str,
    data: Mapping[str, Any],
    checkpoint: dict | None = None,
    speed_up: SpeedUp | None = None,
    logits_rows: int | None = None,
) -> RunConfig:
    """The configuration of a run on `device` with the data set that `data` describes (see `mixture_facts`).

    `checkpoint` is loaded from what --resume or --init_from names, and `given` holds the options on the command line.
    `speed_up` replaces parts of a model with faster ones (None with --plain); `logits_rows` is the number of rows whose
    logits then exist at once. Raises UserError for options that cannot be combined.
    """
    info = checkpoint["info"] if checkpoint else {}
    saved = info["config"] if options.resume is not None else {}
    formats = {part["format"] for part in data.get("parts") or [data]}
    options = with_adamw(options, given)
    check_combinations(options, given, formats, is_plain=speed_up is None)
    shape = {**_shape(options, device, info), "n_vocab": data["n_vocab"]}
    has_pairs, is_fine_tuning = options.objective != "next_token", options.init_from is not None
    few_rows = is_fine_tuning and not has_pairs and has_few_tokens(portions(data))
    default_size = FINE_TUNING_ROWS if few_rows else DEFAULT_BATCH_SIZE
    wanted = options.batch_size if isinstance(options.batch_size, int) else saved.get("batch_size", default_size)
    steps = options.gradient_accumulation_steps or (8 if device.startswith("cuda") else 1)
    micro_batch_size(wanted, steps)  # raises UserError if the processes cannot share the rows
    max_iters = options.max_iters or default_iters(portions(data), shape["block_size"], wanted * steps, is_fine_tuning)
    chosen = {**shape, **_choices(options, device, formats, shape, max_iters)}
    check_residual_dtype(options.residual_dtype, chosen["dtype"], is_plain=speed_up is None)
    flops = max_iters * wanted * steps * shape["block_size"] * _flops_per_token(shape)
    is_unsupported = options.lora_rank or options.residual_dtype == "bfloat16"
    has_kernels = shape["n_embd"] <= KERNEL_WIDTH and not is_unsupported
    pays_off = _compiling_pays_off(device, chosen["dtype"], flops, has_kernels)
    chosen["compile"] = speed_up is not None and _or(options.compile, pays_off)
    check_compile_scope(options, chosen["compile"], is_plain=speed_up is None)
    chosen["activation_checkpointing"] = speed_up is not None and options.activation_checkpointing
    chosen |= adapter_choices(options, shape, checkpoint, formats)

    # The micro-batch: the default or the largest that fits, while the sequences per iteration stay the same.
    step = StepMemory(
        model=model_config(shape, checkpoint),
        **{name: chosen[name] for name in ("device", "dtype", "document_mask", "activation_checkpointing", "compile")},
        residual_dtype=options.residual_dtype,
        is_sharded=options.parallel == "fsdp",
        logits_rows=None if has_pairs else logits_rows,  # the loss needs all logits
        adapter=adapter_of(chosen),
    )
    may_grow, speed_up = options.gradient_accumulation_steps is None and not has_pairs, None if has_pairs else speed_up
    batch_size, steps = find_micro_batch(step, options.batch_size, wanted, steps, speed_up, may_grow)
    if has_pairs:
        require_whole_pairs(options.objective, micro_batch_size(batch_size, steps))
    chosen |= {"batch_size": batch_size, "gradient_accumulation_steps": steps}

    chosen["val_rows"] = _val_rows(options, saved, wanted)
    given_names = {field.name for field in dataclasses.fields(RunConfig)} - chosen.keys()
    config = RunConfig(**{name: getattr(options, name) for name in given_names}, **chosen)
    require_other_file(f"{config.out_dir}/{config.name}.pt", config.lora_base)
    return config


def _val_rows(options: TrainOptions, saved: Mapping[str, Any], batch_size: int) -> int:
    """The rows per evaluation. A resumed run keeps their number, so that its losses stay comparable."""
    is_same = saved.get("val_rows") and options.eval_iters == saved["eval_iters"]
    return saved["val_rows"] if is_same else options.eval_iters * batch_size


def _choices(
    options: TrainOptions,
    device: str,
    formats: set[str],
    shape: Mapping[str, Any],
    max_iters: int,
) -> dict[str, Any]:
    """The value of options that may be None, except the model's shape, the micro-batch and what `fast` replaces."""
    is_chat = bool(formats & {"chat", *PREFERENCE_FORMATS})
    # An adapter's factors are new weights added to trained ones.
    fraction = FINE_TUNING_RATE if options.init_from and options.lora_rank is None else 1.0
    if options.objective != "next_token":
        fraction = PREFERENCE_RATE
    learning_rate = _or(options.learning_rate, fraction * default_learning_rate(options, formats, shape))
    return {
        "max_iters": max_iters,
        "preset": options.preset or _default_preset(device),
        "loss_on": options.loss_on or ("assistant" if is_chat else "all"),
        # The conversations in a row are unrelated, and in a chat a model never sees another conversation.
        "document_mask": _or(options.document_mask, formats == {"chat"}),
        "learning_rate": learning_rate,
        "muon_learning_rate": _or(options.muon_learning_rate, fraction * MUON_LEARNING_RATE),
        "min_lr": _or(options.min_lr, learning_rate / 10),
        "schedule": options.schedule or ("cosine" if is_chat else "wsd"),
        "muon_weight_decay": _or(options.muon_weight_decay, 0.01),
        "embedding_weight_decay": _or(
            options.embedding_weight_decay, 0.0 if options.optimizer == "muon" else options.weight_decay
        ),
        "warmup_iters": _or(options.warmup_iters, max(1, max_iters // (10 if options.init_from else 20))),
        "eval_interval": options.eval_interval or max(1, min(250, max_iters // 4)),
        "device": device,
        "dtype": choose_dtype(options.dtype, device),
    }


def _compiling_pays_off(device: str, dtype: str, flops: float, has_kernels: bool) -> bool:
    """Whether torch.compile gains more time than it takes in a run of `flops`.

    On a CPU it takes up to half a minute. It makes steps in low precision about 5 % faster, but hardly helps in float32
    (docs/experiments/training-speed.md). `has_kernels` says whether a CPU with AMX has kernels for the blocks, which
    are faster than compiled code.
    """
    if device != "cpu":
        return device.startswith("cuda")
    return dtype != "float32" and not has_kernels and flops >= COMPILED_FLOPS and has_cpp_compiler()


def _flops_per_token(shape: Mapping[str, Any]) -> float:
    rows = padded_vocab_size(shape["n_vocab"])
    return flops_per_token(shape["n_layer"], shape["n_embd"], rows, shape["block_size"])


def default_learning_rate(options: TrainOptions, formats: set[str], shape: Mapping[str, Any]) -> float:
    """AdamW's peak learning rate for a new model. A narrow model tolerates, and needs, larger steps.

    Next to Muon it is the rate of the embeddings and of the tied head. Text with few ids needs larger steps of these
    (docs/experiments/optimizer.md); fine-tuning and chats were only tried at the usual rate.
    """
    if shape["n_embd"] > NARROW:
        return 6e-4
    is_new_text = formats == {"text"} and options.init_from is None
    return 6e-3 if is_new_text and shape["n_vocab"] <= FEW_IDS and options.optimizer == "muon" else 3e-3


def _default_preset(device: str) -> str:
    return "gpt2" if device.startswith("cuda") else "small"


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _shape(options: TrainOptions, device: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """The model's SHAPE: with --init_from the checkpoint's, else the options, else the preset's."""
    preset = PRESETS.get(options.preset or _default_preset(device))  # None for auto, which has set all of `names`
    names = ("n_layer", "n_head", "n_embd", "block_size")
    shape = {name: getattr(options, name) or getattr(preset, name) for name in names}
    if options.init_from is not None:
        shape = {name: info["model"][name] for name in names}
        # Fewer positions than the checkpoint has are fine: the last ones are dropped.
        shape["block_size"] = min(options.block_size or shape["block_size"], shape["block_size"])
        for name, value in shape.items():
            by_preset = getattr(preset, name) if options.preset and name != "block_size" else value
            if (getattr(options, name) or by_preset) != value:
                option_name = name if getattr(options, name) else "preset"
                raise UserError(
                    f"--{option_name} {getattr(options, option_name)} contradicts {options.init_from}, whose {name} is "
                    f"{value}; leave it out"
                )
    return {**shape, "dropout": _or(options.dropout, 0.0)}
