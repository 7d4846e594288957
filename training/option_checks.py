"""Check that train.py's options fit each other and the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.cli import UserError
from data.dataset import PREFERENCE_FORMATS, prepare_command
from training.objective_options import ObjectiveOptions
from training.options import TrainOptions
from training.parallel import world_size

OBJECTIVES = {"preference": "dpo", "label": "kto"}  # for each format of preferences


def check_combinations(options: TrainOptions, given: Mapping[str, Any], formats: set[str], is_plain: bool) -> None:
    """Raise UserError for an option that would have no effect together with the others."""
    _check_objective(options, given, formats)
    if options.optimizer == "muon" and "weight_decay" in given:
        raise UserError("--weight_decay is for --optimizer adamw; with muon use --muon_weight_decay")
    if options.lora_rank is not None and "embedding_weight_decay" in given:
        raise UserError("--embedding_weight_decay has no effect with --lora_rank; leave it out")
    if options.loss_on == "assistant" and formats == {"text"}:
        raise UserError(f"--loss_on assistant: {options.dataset} is text, which has no assistant; leave it out")
    for name in ("compile", "activation_checkpointing"):
        if is_plain and given.get(name):
            raise UserError(f"--{name} needs the folder fast/ and no --plain; leave --{name} out")


def check_compile_scope(options: TrainOptions, is_compiled: bool, is_plain: bool) -> None:
    """Raise UserError if the blocks cannot be compiled as one piece, or if nothing is compiled."""
    if options.compile_scope == "block":
        return
    reason = None
    if not is_compiled:
        can_compile = not is_plain and options.compile is None
        reason = f"has no effect without torch.compile; {'add --compile, or ' if can_compile else ''}"
    elif options.activation_checkpointing:
        reason = "cannot be combined with --activation_checkpointing; "
    elif world_size() > 1:
        reason = "needs a single process, because several exchange gradients between the blocks; "
    if reason is not None:
        raise UserError(f"--compile_scope model {reason}use --compile_scope block")


def check_residual_dtype(residual_dtype: str, dtype: str, is_plain: bool) -> None:
    """Raise UserError for a residual stream in bfloat16 that would have no effect, or no use."""
    if residual_dtype == "float32":
        return
    if is_plain:
        raise UserError("a residual stream in bfloat16 needs fast/ and no --plain; give --residual_dtype float32")
    if dtype != "bfloat16":
        raise UserError(
            f"a residual stream in bfloat16 cannot be combined with {dtype}; use --dtype bfloat16 or --residual_dtype "
            "float32"
        )


def _check_objective(options: TrainOptions, given: Mapping[str, Any], formats: set[str]) -> None:
    """Raise UserError for an objective that does not fit the data, or that another option contradicts."""
    names = [field.name for field in dataclasses.fields(ObjectiveOptions) if field.name != "objective"]
    objective, is_new = options.objective, options.resume is None
    for name in names:
        users = ("dpo", "kto") if name == "beta" else ("dpo",)
        if name in given and is_new and objective not in users:
            raise UserError(f"--{name} is for --objective {' and '.join(users)}; leave it out")
    if objective == "next_token":
        found = next((name for name in PREFERENCE_FORMATS if name in formats), None)
        if found:
            alone = "" if formats == {found} else ", without a mixture"
            raise UserError(
                f"{options.dataset} contains {PREFERENCE_FORMATS[found]}, which have no next-token loss; train with "
                f"--objective {OBJECTIVES[found]} --init_from CHECKPOINT{alone}"
            )
        return
    wanted = next(name for name, needed in OBJECTIVES.items() if needed == objective)
    if formats != {wanted} or "," in options.dataset:
        raise UserError(
            f"--objective {objective} needs one data set of {PREFERENCE_FORMATS[wanted]}, and {options.dataset} is "
            f"something else; prepare one with: {prepare_command('preferences')}{' --labels' * (wanted == 'label')}"
        )
    if options.init_from is None and is_new:
        raise UserError(
            f"--objective {objective} improves a model that can chat already; name it with --init_from CHECKPOINT"
        )
    for name, only in (("loss_on", "assistant"), ("document_mask", False)):
        if given.get(name, only) != only and is_new:
            raise UserError(f"--{name} has no effect with --objective {objective}; leave it out")
    if options.batch_size == "auto":
        raise UserError(f"--batch_size auto cannot try the steps of --objective {objective}; give a number")


def require_whole_pairs(objective: str, size: int) -> None:
    """Raise UserError unless a micro-batch of `size` sequences per process holds both rows of each pair or label."""
    if size % 2:
        both = "both answers of a pair" if objective == "dpo" else "both rows of a labelled answer"
        raise UserError(
            f"--objective {objective} needs {both} in one micro-batch, and a process has {size} sequences in each; "
            "choose an even --batch_size and --gradient_accumulation_steps that the processes can share"
        )
