"""Where a run starts from: a new model, the weights of another, or a checkpoint that it goes on with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from common.checkpoint import load_weights, read_info
from common.cli import UserError
from exchange.loading import load_checkpoint
from model import GPT, PRESETS, GPTConfig
from training.initialization import init_for_copying
from training.mixture import data_parts, mixture_name, parse_mixture
from training.parallel import World

# What --resume may change; everything else belongs to the run.
CHANGEABLE = {
    *("max_iters", "batch_size", "gradient_accumulation_steps", "data_dir", "out_dir"),
    *("learning_rate", "muon_learning_rate", "min_lr", "warmup_iters", "weight_decay", "muon_weight_decay"),
    *("grad_clip", "eval_interval", "eval_iters", "log_interval", "keep", "tensorboard", "device", "dtype", "compile"),
    *("deterministic", "activation_checkpointing", "parallel"),
}
# What runs did before there was the option.
DEFAULTS_OF_OLDER_RUNS = {"document_mask": False, "schedule": "cosine", "muon_weight_decay": 0.01}


def make_model(config, saved: dict | None) -> GPT:
    """A model on the CPU: with the weights of `saved`, of the checkpoint that --init_from names, or new ones."""
    source = config.resume or config.init_from
    if source:
        saved = saved or load_checkpoint(source, ("info", "model"))
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    try:
        vocab = GPTConfig()
        if saved:
            shape["bias"] = saved["info"]["model"]["bias"]
            shape["vocab_size"] = max(vocab.vocab_size, saved["info"]["model"]["vocab_size"])
        model = GPT(dataclasses.replace(vocab, **shape))
    except ValueError as error:
        raise UserError(f"{error}; change --n_embd or --n_head") from error
    if saved:
        load_weights(model, saved["model"], source)
    else:
        init_for_copying(model)
    return model


def shape_of_checkpoint(config, given: dict):
    """`config` with the shape of the model that --init_from names; refuses options that contradict it.

    A shorter block_size is none: the positions beyond it are left out.
    """
    saved = load_checkpoint(config.init_from, ("info",))["info"]["model"]
    shape = {name: saved[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
    if "block_size" in given:
        shape["block_size"] = min(given["block_size"], shape["block_size"])
    preset = PRESETS[given["preset"]] if "preset" in given else None
    for name, value in shape.items():
        wanted = given.get(name, getattr(preset, name) if preset and name != "block_size" else value)
        if wanted != value:
            option_name = name if name in given else "preset"
            raise UserError(
                f"--{option_name} {given[option_name]} contradicts {config.init_from}, whose {name} is {value}; leave "
                "it out"
            )
    return dataclasses.replace(config, **shape)


def after_restart(config, given: dict, world: World) -> tuple:
    """The options with which torchrun's restarted processes go on: with the checkpoint that the same job has written.

    Without such a checkpoint they are what they were. A run that was resumed may have gone on under another name.
    """
    if not world.restarts:
        return config, given
    options = {"dataset": config.dataset, "max_iters": config.max_iters, "out_dir": config.out_dir}
    if config.resume is not None:
        source = Path(config.resume or f"{config.out_dir}/{config.name}.pt")
        options |= {key: read_info(source)["config"][key] for key in options}
        options |= {key: given[key] for key in options if key in given}
    path = Path(options["out_dir"]) / f"{mixture_name(options['dataset'])}{options['max_iters']}.pt"
    if not path.is_file() or read_info(path).get("job") != world.job:
        return config, given
    print(f"restart {world.restarts} by torchrun: going on with {path}")
    given = {key: value for key, value in given.items() if key != "init_from"}
    return dataclasses.replace(config, resume=str(path), init_from=None), {**given, "resume": str(path)}


def load_resumable(path: Path) -> dict:
    """A checkpoint that training can go on from. Raises UserError for one with weights alone."""
    saved = load_checkpoint(path)
    if saved["training"] is None:
        raise UserError(f"{path} holds weights alone, which cannot be resumed; start from them with --init_from {path}")
    return saved


def is_complete(info: dict, max_iters: int) -> bool:
    """Whether a run has made its iterations, the last evaluation included."""
    return info["iter_num"] >= max_iters and info["record"] is None


def resume_config(config, given: dict, path: Path, saved: dict):
    """The saved run's options with those that the command line changes, each said; refuses those that contradict.

    `saved` is the checkpoint's info. An option that the command line leaves out stays as it was; min_lr follows
    learning_rate where it was derived from it, and `--batch_size auto` is found later.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    before = {key: value for key, value in {**DEFAULTS_OF_OLDER_RUNS, **saved["config"]}.items() if key in fields}
    wanted = {key: value for key, value in given.items() if key != "resume" and (key, value) != ("batch_size", "auto")}
    if "dataset" in wanted and parse_mixture(wanted["dataset"]) == parse_mixture(before["dataset"]):
        del wanted["dataset"]  # 7 to 3 is 0.7 to 0.3
    changes = {key: value for key, value in wanted.items() if value != before.get(key)}
    for key, value in changes.items():
        if key not in CHANGEABLE:
            raise UserError(
                f"--{key} {value} contradicts {path}, which was made with {before.get(key)}; leave the option out, or "
                "start a new run without --resume"
            )
    resumed = dataclasses.replace(config, **{**before, **changes, "resume": str(path), "init_from": None})
    if "learning_rate" in changes and "min_lr" not in given and before["min_lr"] == before["learning_rate"] / 10:
        resumed = dataclasses.replace(resumed, min_lr=None)
    if "eval_iters" in changes:
        resumed = dataclasses.replace(resumed, val_rows=None)
    sequences = before["batch_size"] * before["gradient_accumulation_steps"]
    if resumed.batch_size * resumed.gradient_accumulation_steps != sequences:
        raise UserError(
            f"batch_size x gradient_accumulation_steps is {resumed.batch_size} x {resumed.gradient_accumulation_steps} "
            f"and {path} was made with {sequences} sequences an iteration; choose numbers with that product"
        )
    for key, value in changes.items():
        print(f"resume: {key} {before.get(key)} -> {value}")
    return resumed


def check_same_data(facts: dict, saved: dict, path: Path) -> None:
    """Raise UserError where the data is not what the checkpoint was trained and validated on."""
    if facts["tokenizer"] != saved["tokenizer"]["name"]:
        raise UserError(
            f"{path} uses the tokenizer {saved['tokenizer']['name']} and the data {facts['tokenizer']}; give the data "
            "set that the run was started with"
        )
    for part, saved_part in zip(data_parts(facts), data_parts(saved["data"]), strict=True):
        for split in ("train", "val"):
            now, then = ([file["sha256"] for file in data["splits"][split]["files"]] for data in (part, saved_part))
            if now != then:
                raise UserError(
                    f"the data set {part['name']} has changed since {path} was made ({split}: sha256 "
                    f"{now[0][:12]} instead of {then[0][:12]}); prepare it again as it was, or start from the weights "
                    f"with --init_from {path}"
                )
