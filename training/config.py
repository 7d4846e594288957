"""The configuration of a run: TrainOptions is the command line, RunConfig is what `make_config` derives from it, once.

    options = parse_options(TrainOptions, ...)        # None: not given
    options = resumed_options(options, given, ...)    # only on --resume: what the checkpoint was made with
    config = make_config(options, given, device, data, checkpoint)

Every field of a RunConfig has its final value. A checkpoint stores them in info["config"].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.cli import UserError, check_options, option
from common.device import choose_dtype, device_option, dtype_option, has_cpp_compiler, plain_option
from data.epochs import DEFAULT_ITERS, FINE_TUNING_ROWS, default_iters, has_few_tokens
from model import PRESETS
from training import lora
from training.initialization import model_config
from training.memory import SpeedUp, StepMemory, find_micro_batch, number_or_auto
from training.mixture import mixture_name, parse_mixture, portions
from training.objective_options import DPO_RATE, ObjectiveOptions
from training.option_checks import check_combinations, require_whole_pairs
from training.parallel import micro_batch_size

DEFAULT_BATCH_SIZE = 16
MUON_LEARNING_RATE = 0.02
# With --init_from, a fraction of a new model's learning rates: steps as large as those that form new weights destroy
# what trained ones know, and with much smaller ones they hardly learn (docs/fine-tuning.md has measurements).
FINE_TUNING_RATE = 1 / 3


@dataclasses.dataclass(frozen=True)
class TrainOptions(ObjectiveOptions):
    """The command line of train.py. None means that `make_config` chooses, as the help says."""

    dataset: str = option(
        "story",
        "prepared data set (story, dailydialog, chat, chitchat, ...), or a mixture with each one's share of the rows: "
        "story=0.7,chat=0.3",
        group="data",
        metavar="NAME",
    )
    data_dir: str = option("data", "folder of the prepared data", group="data", metavar="DIR")
    loss_on: str | None = option(
        None,
        "tokens that are targets (default: assistant for chat data, else all)",
        choices=("assistant", "all"),
        group="data",
    )
    document_mask: bool | None = option(
        None,
        "keep attention inside each document of a row (default: for chat data, unless mixed with text)",
        group="data",
    )

    preset: str | None = option(
        None, "model size (default: gpt2 on CUDA, small elsewhere)", choices=tuple(PRESETS), group="model"
    )
    n_layer: int | None = option(None, "layers (default: the preset's)", at_least=1, group="model", metavar="N")
    n_head: int | None = option(None, "attention heads (default: the preset's)", at_least=1, group="model", metavar="N")
    n_embd: int | None = option(None, "width (default: the preset's)", at_least=1, group="model", metavar="N")
    block_size: int | None = option(
        None, "context length in tokens (default: the preset's)", at_least=1, group="model", metavar="N"
    )
    dropout: float = option(0.0, "dropout probability", at_least=0, below=1, group="model", metavar="P")
    init_from: str | None = option(
        None,
        "start from the weights of a checkpoint, of a folder in the Hugging Face layout, or of gpt2, gpt2-medium, "
        "gpt2-large or gpt2-xl from the hub",
        group="model",
        metavar="CHECKPOINT",
    )

    lora_rank: int | None = lora.rank_option()
    lora_alpha: float | None = lora.alpha_option()
    lora_layers: str | None = lora.layers_option()
    lora_chat_rows: bool | None = lora.chat_rows_option()

    batch_size: int | str | None = option(
        None,
        "sequences per micro-batch; auto: the largest number that fits, with the same number of tokens per iteration "
        "(default: 16, or 4 with --init_from and less than a million tokens; on CUDA up to 65,536 tokens, if they fit, "
        "for the same sequences per iteration)",
        type=number_or_auto,
        at_least=1,
        group="batch",
        metavar="N",
    )
    gradient_accumulation_steps: int | None = option(
        None, "micro-batches per iteration (default: 8 on CUDA, else 1)", at_least=1, group="batch", metavar="N"
    )
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, up to a third more work", group="batch"
    )

    max_iters: int | None = option(
        None,
        "total iterations; the schedule scales with them (default: 5000; 8 epochs, but at least 100 iterations, for a "
        "data set of less than a million tokens; with --init_from at least 300)",
        at_least=1,
        group="optimizer",
    )
    optimizer: str = option(
        "muon", "muon (hidden matrices; AdamW for the rest) or adamw", choices=("muon", "adamw"), group="optimizer"
    )
    learning_rate: float | None = option(
        None,
        "AdamW's peak learning rate (default: 3e-3 up to a width of 384, else 6e-4; a third of it with --init_from)",
        at_least=0,
        group="optimizer",
        metavar="LR",
    )
    muon_learning_rate: float | None = option(
        None,
        "Muon's peak learning rate (default: 0.02; a third of it with --init_from)",
        at_least=0,
        group="optimizer",
        metavar="LR",
    )
    min_lr: float | None = option(
        None,
        "learning rate at the end (default: learning_rate / 10); Muon's falls by the same factor",
        at_least=0,
        group="optimizer",
        metavar="LR",
    )
    schedule: str | None = option(
        None,
        "how the learning rates fall after the warm-up (default: cosine for chat data, else wsd)",
        choices=("wsd", "cosine"),
        group="optimizer",
    )
    warmup_iters: int | None = option(
        None,
        "iterations of linear warm-up (default: max_iters / 20; with --init_from max_iters / 10)",
        at_least=0,
        group="optimizer",
        metavar="N",
    )
    weight_decay: float = option(
        0.1,
        "weight decay of the matrices with --optimizer adamw; the AdamW part of muon has none",
        at_least=0,
        group="optimizer",
        metavar="X",
    )
    muon_weight_decay: float = option(
        0.01, "weight decay of the matrices with --optimizer muon", at_least=0, group="optimizer", metavar="X"
    )
    grad_clip: float = option(
        1.0, "largest gradient norm; 0 turns clipping off", at_least=0, group="optimizer", metavar="X"
    )

    eval_interval: int | None = option(
        None,
        "iterations between evaluations (default: max_iters / 4, at most 250)",
        at_least=1,
        group="evaluation",
        metavar="N",
    )
    eval_iters: int = option(
        20, "validation batches, the same at every evaluation", at_least=1, group="evaluation", metavar="N"
    )
    log_interval: int = option(10, "iterations between log lines", at_least=1, group="evaluation", metavar="N")
    tensorboard: bool = option(
        False, "also write the metrics for TensorBoard (pip install tensorboard)", group="evaluation"
    )

    device: str | None = device_option()
    dtype: str | None = dtype_option()
    compile: bool | None = option(
        None,
        "use torch.compile (default: on CUDA, and from 200 iterations on a CPU with a C++ compiler)",
        group="device",
    )
    plain: bool = plain_option()
    parallel: str = option(
        "ddp",
        "under torchrun: ddp (each process holds the whole model) or fsdp (a shard of it)",
        choices=("ddp", "fsdp"),
        group="device",
    )
    seed: int = option(
        1337, "seed of the weights and of the order of the data", at_least=0, below=2**63, group="device", metavar="N"
    )
    deterministic: bool = option(False, "make results on CUDA repeatable, at some cost in speed", group="device")

    out_dir: str = option("models", "folder of the checkpoints", group="files", metavar="DIR")
    keep: int = option(0, "also keep the checkpoints of the last N evaluations", at_least=0, group="files", metavar="N")
    resume: str | None = option(
        None,
        "continue a run from its checkpoint (default: the one that --dataset and --max_iters name)",
        nargs="?",
        const="",
        group="files",
        metavar="PATH",
    )

    def __post_init__(self) -> None:
        check_options(self)
        parse_mixture(self.dataset)  # raises ValueError
        if self.init_from == "":
            raise ValueError("--init_from is empty; name a checkpoint")
        if self.resume is not None and self.init_from is not None:
            raise ValueError("--resume continues a run and --init_from starts a new one; do not use both")
        lora.check_options(self)

    @property
    def checkpoint_path(self) -> str:
        """The checkpoint that --resume names, or the default one; see also `training.resume.find_checkpoint`."""
        return self.resume or f"{self.out_dir}/{mixture_name(self.dataset)}{self.max_iters or DEFAULT_ITERS}.pt"


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
    grad_clip: float
    eval_interval: int
    eval_iters: int
    log_interval: int
    keep: int
    tensorboard: bool
    device: str
    dtype: str
    compile: bool
    activation_checkpointing: bool
    parallel: str
    deterministic: bool
    data_dir: str
    out_dir: str
    resume: str | None  # the checkpoint that the run continues; None for a new run
    init_from: str | None  # the model whose weights a new run starts from; None: new weights
    lora_rank: int | None  # an adapter's settings, and the base beside which it trains; None: all weights train
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
    formats = {part["format"] for part in data.get("parts") or [data]}
    options = lora.with_adamw(options, given)
    check_combinations(options, given, formats, is_plain=speed_up is None)
    shape = _shape(options, device, info)
    shape["n_vocab"] = data["n_vocab"]
    saved = info["config"] if options.resume is not None else {}
    is_dpo = options.objective == "dpo"
    few_rows = options.init_from and has_few_tokens(portions(data)) and not is_dpo
    default_size = FINE_TUNING_ROWS if few_rows else DEFAULT_BATCH_SIZE
    wanted = options.batch_size if isinstance(options.batch_size, int) else saved.get("batch_size", default_size)
    steps = options.gradient_accumulation_steps or (8 if device.startswith("cuda") else 1)
    micro_batch_size(wanted, steps)  # raises UserError if the processes cannot share the rows
    is_fine_tuning = options.init_from is not None
    max_iters = options.max_iters or default_iters(portions(data), shape["block_size"], wanted * steps, is_fine_tuning)
    has_fast_parts = speed_up is not None
    chosen = {**shape, **_choices(options, device, formats, shape["n_embd"], max_iters, has_fast_parts)}
    chosen |= lora.choices(options, shape, checkpoint, formats)

    # The micro-batch: the default or the largest that fits, while the sequences per iteration stay the same.
    step = StepMemory(
        model=model_config(shape, checkpoint),
        device=device,
        dtype=chosen["dtype"],
        document_mask=chosen["document_mask"],
        activation_checkpointing=chosen["activation_checkpointing"],
        compile=chosen["compile"],
        is_sharded=options.parallel == "fsdp",
        logits_rows=None if is_dpo else logits_rows,  # DPO needs all logits
        adapter=lora.adapter_of(chosen),
    )
    may_grow, speed_up = options.gradient_accumulation_steps is None and not is_dpo, None if is_dpo else speed_up
    batch_size, steps = find_micro_batch(step, options.batch_size, wanted, steps, speed_up, may_grow)
    if is_dpo:
        require_whole_pairs(micro_batch_size(batch_size, steps))
    chosen |= {"batch_size": batch_size, "gradient_accumulation_steps": steps}

    # A resumed run keeps its validation rows, so that its losses stay comparable.
    is_same = saved.get("val_rows") and options.eval_iters == saved["eval_iters"]
    chosen["val_rows"] = saved["val_rows"] if is_same else options.eval_iters * wanted
    given_names = {field.name for field in dataclasses.fields(RunConfig)} - chosen.keys()
    return lora.require_other_file(RunConfig(**{name: getattr(options, name) for name in given_names}, **chosen))


def _choices(
    options: TrainOptions, device: str, formats: set[str], n_embd: int, max_iters: int, has_fast_parts: bool
) -> dict[str, Any]:
    """The value of every option that may be None, except the model's shape and the micro-batch."""
    on_cuda, is_chat = device.startswith("cuda"), bool(formats & {"chat", "preference"})
    # A narrow model tolerates, and needs, larger steps. An adapter's factors are new weights beside trained ones.
    fraction = FINE_TUNING_RATE if options.init_from and options.lora_rank is None else 1.0
    if options.objective == "dpo":
        fraction = DPO_RATE
    learning_rate = _or(options.learning_rate, fraction * (3e-3 if n_embd <= 384 else 6e-4))
    # On a CPU, compiling takes up to a minute, which does not pay off in a short run.
    pays_off = on_cuda or (device == "cpu" and max_iters >= 200 and has_cpp_compiler())
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
        "warmup_iters": _or(options.warmup_iters, max(1, max_iters // (10 if options.init_from else 20))),
        "eval_interval": options.eval_interval or max(1, min(250, max_iters // 4)),
        "device": device,
        "dtype": choose_dtype(options.dtype, device),
        "compile": has_fast_parts and _or(options.compile, pays_off),
        "activation_checkpointing": has_fast_parts and options.activation_checkpointing,
    }


def _default_preset(device: str) -> str:
    return "gpt2" if device.startswith("cuda") else "small"


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _shape(options: TrainOptions, device: str, info: Mapping[str, Any]) -> dict[str, Any]:
    """The model's SHAPE: with --init_from the checkpoint's, else the options, else the preset's."""
    preset = PRESETS[options.preset or _default_preset(device)]
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
    return {**shape, "dropout": options.dropout}
