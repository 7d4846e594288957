"""Combinations of train.py's options and data that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.cli import UserError
from data.dataset import prepare_command
from training.objective_options import ObjectiveOptions
from training.options import TrainOptions


def check_combinations(options: TrainOptions, given: Mapping[str, Any], formats: set[str], is_plain: bool) -> None:
    """Raise UserError for an option that would have no effect together with the others."""
    _check_objective(options, given, formats)
    if options.optimizer == "muon" and "weight_decay" in given:
        raise UserError("--weight_decay is for --optimizer adamw; with muon use --muon_weight_decay")
    if options.loss_on == "assistant" and formats == {"text"}:
        raise UserError(f"--loss_on assistant: {options.dataset} is text, which has no assistant; leave it out")
    for name in ("compile", "activation_checkpointing"):
        if is_plain and given.get(name):
            raise UserError(f"--{name} needs the folder fast/ and no --plain; leave --{name} out")


def _check_objective(options: TrainOptions, given: Mapping[str, Any], formats: set[str]) -> None:
    """Raise UserError for an objective that does not fit the data, or that another option contradicts."""
    names = [field.name for field in dataclasses.fields(ObjectiveOptions) if field.name != "objective"]
    if options.objective == "next_token":
        for name in names:
            if name in given and options.resume is None:
                raise UserError(f"--{name} is for --objective dpo; leave it out")
        if "preference" in formats:
            alone = "" if formats == {"preference"} else ", without a mixture"
            raise UserError(
                f"{options.dataset} contains preference pairs, which have no next-token loss; train with --objective "
                f"dpo --init_from CHECKPOINT{alone}"
            )
        return
    if formats != {"preference"} or "," in options.dataset:
        command = prepare_command("preferences")
        raise UserError(
            f"--objective dpo needs one data set of preference pairs, and {options.dataset} is something else; prepare "
            f"one with: {command}"
        )
    if options.init_from is None and options.resume is None:
        raise UserError("--objective dpo improves a model that can chat already; name it with --init_from CHECKPOINT")
    for name, only in (("loss_on", "assistant"), ("document_mask", False)):
        if given.get(name, only) != only and options.resume is None:
            raise UserError(f"--{name} has no effect with --objective dpo; leave it out")
    if options.batch_size == "auto":
        raise UserError("--batch_size auto cannot try the steps of --objective dpo; give a number")


def require_whole_pairs(size: int) -> None:
    """Raise UserError unless a micro-batch of `size` sequences per process holds both answers of each pair."""
    if size % 2:
        raise UserError(
            f"--objective dpo needs both answers of a pair in one micro-batch, and a process has {size} sequences in "
            "each; choose an even --batch_size and --gradient_accumulation_steps that the processes can share"
        )
