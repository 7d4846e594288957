"""What --resume takes from a checkpoint, what it may change, and what it rejects."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.checkpoint import find_checkpoints, readable_infos
from common.cli import UserError
from data.dataset import data_parts
from setup_tokenizer import Tokenizer
from training.mixture import mixture_name, parse_mixture
from training.options import TrainOptions
from training.parallel import broadcast, job_name, n_restarts, on_first

# What --resume may change. Everything else belongs to the run.
CHANGEABLE = {
    *("max_iters", "batch_size", "gradient_accumulation_steps", "data_dir", "out_dir"),
    *("learning_rate", "muon_learning_rate", "min_lr", "warmup_iters", "weight_decay", "muon_weight_decay"),
    "embedding_weight_decay",
    *("grad_clip", "eval_interval", "eval_iters", "log_interval", "keep", "tensorboard", "device", "dtype", "compile"),
    *("compile_scope", "residual_dtype", "deterministic", "activation_checkpointing", "parallel", "plain"),
}
# What runs did before these options existed, so that old checkpoints continue in the same way.
DEFAULTS_OF_OLDER_RUNS = {
    "document_mask": False,
    "schedule": "cosine",
    "muon_weight_decay": 0.01,
    "objective": "next_token",
}


def require_resumable(checkpoint: Mapping[str, Any], path: str) -> None:
    """Raise UserError for a checkpoint that holds only weights."""
    if checkpoint["training"] is None:
        raise UserError(f"{path} holds only weights and cannot be resumed; start from them with --init_from {path}")


def find_checkpoint(options: TrainOptions) -> str:
    """The checkpoint to resume: the one that --resume names, or that of --dataset and --max_iters.

    With neither, it is the newest unfinished run of --dataset, or else its newest run: how many iterations a run has by
    default depends on its data and its other options. If there is no run, it is the path of a run of 5,000 iterations.
    """
    if options.resume or options.max_iters is not None:
        return options.checkpoint_path
    return str(broadcast(on_first(lambda: _newest_run(options))))


def _newest_run(options: TrainOptions) -> Path:
    runs = _runs(options)
    unfinished = [path for path, info in runs if info["iter_num"] < info["config"].get("max_iters", 0)]
    return next(iter([*unfinished, *(path for path, _ in runs)]), Path(options.checkpoint_path))


def _runs(options: TrainOptions) -> list[tuple[Path, Mapping[str, Any]]]:
    """The checkpoints of --dataset's runs in --out_dir, newest first, and the info of each.

    Unreadable ones are skipped with a message on standard error. Raises UserError if none of them can be read.
    """
    name = mixture_name(options.dataset)
    paths = [path for path in find_checkpoints(options.out_dir) if re.fullmatch(re.escape(name) + r"\d+", path.stem)]
    infos = readable_infos(paths, required=True)
    return [(path, info) for path, info in infos.items() if info.get("dataset") == name]


def print_if_complete(info: Mapping[str, Any], max_iters: int | None, path: str) -> bool:
    """Whether a run has done all iterations and its last evaluation; if so, print how to continue it."""
    if max_iters is None or info["iter_num"] < max_iters or info["record"] is not None:
        return False
    print(f"{path} is complete: iteration {info['iter_num']} of {max_iters}; continue with a larger --max_iters")
    return True


def resumed_options(
    options: TrainOptions, given: Mapping[str, Any], path: str, info: Mapping[str, Any]
) -> TrainOptions:
    """The options of a resumed run: those that it was started with, except what the command line changes.

    `given` holds the options on the command line, `info` is that part of the checkpoint at `path`. Prints each change.
    Raises UserError for a change that CHANGEABLE does not list, or that alters the number of sequences per iteration.
    If min_lr was derived from learning_rate, or the embeddings' weight decay from weight_decay, it is derived again.
    """
    names = {field.name for field in dataclasses.fields(options)}
    before = {key: value for key, value in {**DEFAULTS_OF_OLDER_RUNS, **info["config"]}.items() if key in names}
    wanted = {key: value for key, value in given.items() if key not in ("resume", "plain", "minutes")}
    if "dataset" in wanted and parse_mixture(wanted["dataset"]) == parse_mixture(before["dataset"]):
        del wanted["dataset"]  # story=7,chat=3 is the same mixture as story=0.7,chat=0.3
    changes = {key: value for key, value in wanted.items() if value != before.get(key)}
    for key, value in changes.items():
        if key not in CHANGEABLE:
            raise UserError(
                f"--{key} {value} contradicts {path}, which was made with {before.get(key)}; leave the option out, or "
                "start a new run without --resume"
            )
    if "minutes" in given:
        print("resume: --minutes has no effect, because the run keeps its iterations; --max_iters changes them")
    resumed = dataclasses.replace(options, **{**before, **changes, "resume": path, "init_from": None})
    if "learning_rate" in changes and "min_lr" not in given and before["min_lr"] == before["learning_rate"] / 10:
        resumed = dataclasses.replace(resumed, min_lr=changes["learning_rate"] / 10)
    if "weight_decay" in changes and before.get("embedding_weight_decay") == before["weight_decay"]:
        resumed = dataclasses.replace(resumed, embedding_weight_decay=given.get("embedding_weight_decay"))
    _require_same_sequences(resumed, before, path)
    for key, value in changes.items():
        if value != "auto":  # the size that is found is printed later
            print(f"resume: {key} {before.get(key)} -> {value}")
    return resumed


def _require_same_sequences(resumed: TrainOptions, before: Mapping[str, Any], path: str) -> None:
    """Raise UserError if the sequences per iteration would change: the run's rows are counted in whole iterations."""
    sequences = before["batch_size"] * before["gradient_accumulation_steps"]
    batch_size = resumed.batch_size if isinstance(resumed.batch_size, int) else before["batch_size"]
    steps = resumed.gradient_accumulation_steps or before["gradient_accumulation_steps"]
    if batch_size * steps != sequences:
        raise UserError(
            f"--batch_size {batch_size} x --gradient_accumulation_steps {steps} contradict {path}, which was "
            f"made with {sequences} sequences per iteration; choose numbers with that product"
        )


def options_after_restart(
    options: TrainOptions, given: dict[str, Any], read_info: Callable[[str], Mapping[str, Any]]
) -> tuple[TrainOptions, dict[str, Any]]:
    """The options of processes that torchrun has restarted: they resume the checkpoint that the same job has written.

    Without such a checkpoint they start as before. The name of the checkpoint differs from that of --resume if the run
    was resumed with another --max_iters or --out_dir.
    """
    job, restarts = broadcast((job_name(), n_restarts()))
    if not restarts:
        return options, given
    names: dict[str, Any] = {"dataset": options.dataset, "max_iters": options.max_iters, "out_dir": options.out_dir}
    if options.resume is not None:
        saved = read_info(find_checkpoint(options))["config"]
        names = {key: given.get(key, saved[key]) for key in names}
    written = [Path(names["out_dir"]) / f"{mixture_name(names['dataset'])}{names['max_iters']}.pt"]
    if names["max_iters"] is None:  # the job chose them
        written = [path for path, _ in broadcast(on_first(lambda: _runs(options))) or ()]
    path = next((path for path in written if path.is_file() and read_info(str(path)).get("job") == job), None)
    if path is None:
        return options, given
    print(f"restart {restarts} by torchrun: resuming {path}")
    given = {key: value for key, value in given.items() if key != "init_from"}
    return dataclasses.replace(options, resume=str(path), init_from=None), {**given, "resume": str(path)}


def require_same_data(facts: Mapping[str, Any], info: Mapping[str, Any], path: str) -> None:
    """Raise UserError if the data is not what the checkpoint was trained and validated on."""
    tokenizer = Tokenizer.from_info(info, path)
    if facts.get("tokenizer_digest") != tokenizer.digest:  # None for GPT-2's
        raise UserError(
            f"{path} has the tokenizer {tokenizer.name}, but its data was prepared again with another one, called "
            f"{facts['tokenizer']}; start a new run, or prepare the data as it was when this run was started"
        )
    for part, saved_part in zip(data_parts(facts), data_parts(info["data"]), strict=True):
        for split in ("train", "val"):
            now, then = ([file["sha256"] for file in data["splits"][split]["files"]] for data in (part, saved_part))
            if now != then:
                raise UserError(
                    f"the data set {part['name']} has changed since {path} was made ({split}: sha256 "
                    f"{now[0][:12]} instead of {then[0][:12]}); prepare it again as it was, or start from the weights "
                    f"with --init_from {path}"
                )
