"""The command line of train.py."""

from __future__ import annotations

import argparse
import dataclasses

from common.cli import check_options, option
from common.device import device_option, dtype_option, plain_option
from data.epochs import DEFAULT_ITERS
from model import PRESETS
from training.adapter_options import AdapterOptions
from training.mixture import mixture_name, parse_mixture
from training.objective_options import ObjectiveOptions


def number_or_auto(word: str) -> int | str:
    """A number on the command line, or the word "auto"."""
    try:
        return word if word == "auto" else int(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or auto, not {word!r}") from error


@dataclasses.dataclass(frozen=True)
class TrainOptions(ObjectiveOptions, AdapterOptions):
    """The command line of train.py. None means that `training.config.make_config` chooses, as the help says."""

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
        "keep attention within each document of a row (default: for chat data, and with --preset auto for text, but "
        "not for mixtures)",
        group="data",
    )

    preset: str | None = option(
        None,
        "model size; auto chooses one for --minutes (default: gpt2 on CUDA, small elsewhere)",
        choices=(*PRESETS, "auto"),
        group="model",
    )
    n_layer: int | None = option(None, "layers (default: the preset's)", at_least=1, group="model", metavar="N")
    n_head: int | None = option(None, "attention heads (default: the preset's)", at_least=1, group="model", metavar="N")
    n_embd: int | None = option(None, "width (default: the preset's)", at_least=1, group="model", metavar="N")
    block_size: int | None = option(
        None, "context length in tokens (default: the preset's)", at_least=1, group="model", metavar="N"
    )
    dropout: float | None = option(
        None,
        "dropout probability (default: 0; 0.07 with --preset auto for text that is read 6 times or more)",
        at_least=0,
        below=1,
        group="model",
        metavar="P",
    )
    init_from: str | None = option(
        None,
        "start from the weights of a checkpoint, of a folder in the Hugging Face layout, or of gpt2, gpt2-medium, "
        "gpt2-large or gpt2-xl from the hub",
        group="model",
        metavar="CHECKPOINT",
    )

    batch_size: int | str | None = option(
        None,
        "sequences per micro-batch; auto: the largest number that fits, with the same number of tokens per iteration "
        "(default: 16, or 4 with --init_from and less than a million tokens of text or chat data; on CUDA the "
        "largest one of up to 65,536 tokens that fits, with the same number of sequences per iteration)",
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
        "data set of less than a million tokens; with --init_from at least 300; 3 epochs, but at least 50 iterations, "
        "for dpo and kto)",
        at_least=1,
        group="optimizer",
    )
    minutes: float | None = option(
        None,
        "instead of --max_iters: about how long to train; a few steps are timed to choose the iterations, at most 8 "
        "epochs (with --preset auto, 24 for text with dropout)",
        above=0,
        group="optimizer",
        metavar="M",
    )
    optimizer: str = option(
        "muon", "muon (hidden matrices; AdamW for the rest) or adamw", choices=("muon", "adamw"), group="optimizer"
    )
    learning_rate: float | None = option(
        None,
        "AdamW's peak learning rate (default: 3e-3, or 6e-3 for text with at most 8,192 ids next to Muon, and 6e-4 "
        "above a width of 384; with --init_from but no --lora_rank a third of 3e-3 or 6e-4; for dpo and kto a "
        "thirtieth)",
        at_least=0,
        group="optimizer",
        metavar="LR",
    )
    muon_learning_rate: float | None = option(
        None,
        "Muon's peak learning rate (default: 0.02; a third of it with --init_from but no --lora_rank; for dpo and kto "
        "a thirtieth)",
        at_least=0,
        group="optimizer",
        metavar="LR",
    )
    min_lr: float | None = option(
        None,
        "learning rate at the end; Muon's falls by the same factor (default: learning_rate / 10; 0 if --preset auto "
        "reads text 2.5 times or more)",
        at_least=0,
        group="optimizer",
        metavar="LR",
    )
    schedule: str | None = option(
        None,
        "how the learning rates fall after the warm-up (default: wsd; cosine for chat data, and if --preset auto reads "
        "text 2.5 times or more)",
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
        "weight decay of the matrices with --optimizer adamw",
        at_least=0,
        group="optimizer",
        metavar="X",
    )
    muon_weight_decay: float | None = option(
        None,
        "weight decay of the matrices with --optimizer muon (default: 0.01; 0.1 if --preset auto reads text 2.5 times "
        "or more)",
        at_least=0,
        group="optimizer",
        metavar="X",
    )
    embedding_weight_decay: float | None = option(
        None,
        "weight decay of the embeddings (default: --weight_decay with --optimizer adamw, 0 with muon; 0.2 if --preset "
        "auto reads text 2.5 times or more)",
        at_least=0,
        group="optimizer",
        metavar="X",
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
        "use torch.compile (default: on CUDA, and on a CPU for long runs of wide models in low precision)",
        group="device",
    )
    compile_scope: str = option(
        "block",
        "compile each block, or all blocks of the model as one piece, which takes longer to compile and saves memory "
        "traffic on CUDA (only with one process and without --activation_checkpointing)",
        choices=("block", "model"),
        group="device",
    )
    residual_dtype: str = option(
        "float32",
        "precision of the residual stream, to which every block adds; bfloat16 takes less memory and rounds more (only "
        "with --dtype bfloat16)",
        choices=("float32", "bfloat16"),
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
        if self.objective != "next_token" and self.dataset == "story" and self.resume is None:
            raise ValueError(f"--objective {self.objective} needs preferences; name a data set of them with --dataset")
        if self.init_from == "":
            raise ValueError("--init_from is empty; name a checkpoint")
        if self.resume is not None and self.init_from is not None:
            raise ValueError("--resume continues a run and --init_from starts a new one; do not use both")
        if self.lora_rank is not None and self.init_from is None and self.resume is None:
            raise ValueError("--lora_rank needs a trained model; name it with --init_from")
        for name in ("lora_alpha", "lora_layers", "lora_chat_rows"):
            if self.lora_rank is None and self.resume is None and getattr(self, name) is not None:
                raise ValueError(f"--{name} belongs to an adapter; add --lora_rank, for example --lora_rank 8")

    @property
    def checkpoint_path(self) -> str:
        """The checkpoint that --resume names, or the default one; see also `training.resume.find_checkpoint`."""
        return self.resume or f"{self.out_dir}/{mixture_name(self.dataset)}{self.max_iters or DEFAULT_ITERS}.pt"
