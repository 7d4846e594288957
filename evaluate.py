"""Measure checkpoints on a whole validation split, side by side, and judge the stories that they write.

    python evaluate.py models/story5000.pt
    python evaluate.py models/story5000.pt models/story10000.pt --samples
    python evaluate.py models/fineweb19073.pt --tasks hellaswag,lambada_openai,arc_easy

Prints a table of loss (nats per token), perplexity, bits per byte, accuracy and speed. For a chat data set, the first
table counts only what the assistant says (message contents and the `<|im_end|>` after each), the second all tokens.
With several checkpoints, each one's difference from the first follows with a 95 % interval, and a verdict comes last.
The same command always prints the same numbers. With --tasks, EleutherAI's lm-eval asks the questions of public
benchmarks instead (pip install -r requirements-benchmarks.txt).

`evaluation/splits.py` defines which tokens are scored, `evaluation/scoring.py` in which context, and
`evaluation/bootstrap.py` how certain a difference is. A model trained with --document_mask does not see earlier
documents here either.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from common.cli import UserError, check_options, option, parse_options, run_script
from common.device import (
    allow_tf32,
    choose_device,
    choose_dtype,
    device_option,
    dtype_option,
    plain_option,
    quantize_option,
)
from common.files import atomic_write, require_target
from common.speedups import load_speedups
from common.threads import sleep_while_waiting_if_busy
from data.dataset import PREFERENCE_FORMATS, DatasetInfo, open_dataset, trained_on
from evaluation.benchmarks import BenchmarkModel, open_tasks, print_benchmarks, require_lm_eval, run_tasks
from evaluation.bootstrap import Scored, compare, verdict
from evaluation.printing import print_report
from evaluation.scoring import score, summarize
from evaluation.splits import Split, read_split
from evaluation.stories import STORY_PROMPTS, STORY_TOKENS, judge_stories, readable_stories, write_stories
from exchange.loading import load_model, read_info, tokenizer_of
from generation.decoding import DecodeStep, decode_step
from model import GPT
from setup_tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What to measure, and on what."""

    checkpoints: tuple[str, ...] = option(
        (), "the checkpoints; the others are compared with the first", positional=True, nargs="+"
    )
    dataset: tuple[str, ...] = option(
        (),
        "data sets to measure on (default: those that the models were trained on)",
        nargs="+",
        metavar="NAME",
        group="data",
    )
    data_dir: str = option("data", "folder of the prepared data", group="data")
    limit: int | None = option(
        None,
        "measure only about the first N tokens (of chat, whole conversations); with --tasks, N questions of each task",
        at_least=1,
        group="data",
    )
    tasks: str | None = option(
        None, "run these benchmarks of lm-eval instead, separated by commas", metavar="NAMES", group="evaluation"
    )
    tasks_path: str | None = option(
        None, "folder with .yaml files of your own tasks for --tasks", metavar="DIR", group="evaluation"
    )
    stride: int | None = option(
        None,
        "tokens from one window to the next (default: half of the block size; for fineweb the block size)",
        at_least=1,
        group="evaluation",
    )
    samples: bool = option(
        False, "also write stories, and measure how varied they are and how much is copied", group="evaluation"
    )
    seed: int = option(1337, "seed of the stories", at_least=0, below=2**63, group="evaluation")
    json: str | None = option(
        None, "also write all numbers and stories to this file", metavar="FILE", group="evaluation"
    )
    device: str | None = device_option()
    dtype: str | None = dtype_option()
    batch_size: int = option(16, "windows per forward pass", at_least=1, group="device")
    quantize: str | None = quantize_option()
    plain: bool = plain_option()

    def __post_init__(self) -> None:
        check_options(self)
        if self.plain and self.quantize:
            raise ValueError("--quantize needs fast/, which --plain leaves out; use one of them")
        if self.tasks_path and not self.tasks:
            raise ValueError("--tasks_path names a folder of tasks; name the tasks with --tasks")


def dataset_names(options: EvaluateOptions, infos: list[dict]) -> list[str]:
    """What to measure on: --dataset, or every data set that a model was trained on, including a mixture's parts."""
    if options.dataset:
        return list(dict.fromkeys(options.dataset))
    names = list(dict.fromkeys(name for info in infos for name in trained_on(info)))
    if "unknown" in names:
        path = options.checkpoints[[info["dataset"] for info in infos].index("unknown")]
        raise UserError(f"{path} does not record what it was trained on; name a data set with --dataset")
    return names


def refuse_pairs(datasets: Sequence[DatasetInfo]) -> None:
    """Raise UserError for preferences: rejected answers are not what a model should predict."""
    for data in datasets:
        if data.format in PREFERENCE_FORMATS:
            raise UserError(
                f"{data.name} contains {PREFERENCE_FORMATS[data.format]}, which have no loss per token; train.py logs "
                "the accuracy on them; here, name chat data, such as --dataset chitchat"
            )


def sees_only_one_document(info: dict, data: DatasetInfo) -> bool:
    """Whether a model was trained on text with attention within each document, and the data is text."""
    has_mask = bool((info.get("config") or {}).get("document_mask"))
    formats = {info["format"], *(facts.get("format") for facts in trained_on(info).values())}
    return data.format == "text" and has_mask and "text" in formats


def print_notes(path: str, info: dict, data: DatasetInfo) -> None:
    """Point out how a model is scored: with other tokenizers, by document, or on data that has changed."""
    if sees_only_one_document(info, data):
        unlike = ", unlike in published results" if data.yardstick else ""
        print(
            f"note: {path} was trained with --document_mask, so each document of {data.name} is scored "
            f"separately{unlike}"
        )
    tokenizer = Tokenizer.from_info(info, path)
    if tokenizer.digest != data.tokenizer_digest:
        print(
            f"note: {path} has the tokenizer {tokenizer.name} and {data.name} was prepared with {data.tokenizer}; its "
            "text is encoded again, so compare bits per byte, not losses"
        )
        return
    if trained := trained_on(info).get(data.name):
        digests = [file["sha256"] for file in trained["splits"]["train"]["files"]]
        if digests != [file.sha256 for file in data.splits["train"].files]:
            print(
                f"note: {data.name} has changed since {path} was trained; the model may have been trained on what is "
                "now validation text"
            )


def stories_of(info: dict, fallback: str) -> str:
    """The data set that a model's stories are compared with: the first text data set that it was trained on."""
    parts = trained_on(info)
    texts = [name for name, facts in parts.items() if facts.get("format") == "text"]
    name = next(iter([*texts, *parts]))
    return fallback if name == "unknown" else name


def choose_stride(requested: int | None, model: GPT, path: str, yardstick: str | None = None) -> int:
    """Tokens from one window to the next: --stride, or half of the block size.

    For data with published results to compare with (`yardstick`), it is the block size, as in those measurements.
    """
    block_size = model.config.block_size
    if requested is not None and requested > block_size:
        raise UserError(f"--stride {requested} exceeds the block size {block_size} of {path}; use a smaller --stride")
    return requested or (block_size if yardstick else max(1, block_size // 2))


def measure(options: EvaluateOptions, fast: ModuleType | None = None, story_tokens: int = STORY_TOKENS) -> dict:
    """Score every checkpoint on every data set; returns all numbers and stories, as --json writes them.

    `fast` is what `load_speedups` returned.
    """
    infos = [read_info(path) for path in options.checkpoints]
    names = dataset_names(options, infos)
    data_dir = Path(options.data_dir)
    datasets = {name: open_dataset(data_dir, name) for name in names}
    refuse_pairs([data for _, data in datasets.values()])
    tokenizers = [Tokenizer.from_info(info, path) for path, info in zip(options.checkpoints, infos, strict=True)]
    for path, info in zip(options.checkpoints, infos, strict=True):
        for _, data in datasets.values():
            print_notes(path, info, data)
    splits = {
        (name, tokenizer): read_split(name, streams["val"], data.format == "chat", options.limit, tokenizer)
        for name, (streams, data) in datasets.items()
        for tokenizer in dict.fromkeys(tokenizers)
    }
    story_data = [stories_of(info, names[0]) for info in infos]
    if options.samples:
        datasets |= {name: open_dataset(data_dir, name) for name in set(story_data) - set(names)}
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    allow_tf32()
    results: dict[str, list[dict]] = {name: [] for name in names}
    all_scored: dict[str, list[Scored]] = {name: [] for name in names}
    samples = []
    for path, info, tokenizer, dataset in zip(options.checkpoints, infos, tokenizers, story_data, strict=True):
        model, _ = load_model(path, device)
        decode = speed_up(model, options.quantize, fast)
        for name in names:
            split, data = splits[name, tokenizer], datasets[name][1]
            if sees_only_one_document(info, data):
                split = split.by_document()
            stride = choose_stride(options.stride, model, path, data.yardstick)
            losses, result = measure_one(model, split, stride, options.batch_size, device, dtype)
            results[name].append({"checkpoint": path, **result})
            all_scored[name].append(Scored(path, split, losses))
        if options.samples:
            stories = write_stories(model, options.seed, story_tokens, decode, tokenizer)
            judged = judge_stories(stories, datasets[dataset][0], tokenizer)
            readable = readable_stories(stories, tokenizer)
            samples.append({"checkpoint": path, "dataset": dataset, **judged, "stories": readable})
    summaries = {name: compare_models(datasets[name][1].yardstick, results[name], all_scored[name]) for name in names}
    settings = {"device": device, "dtype": dtype, "quantize": options.quantize, "limit": options.limit}
    return {**settings, "datasets": summaries, "samples": samples}


def compare_models(yardstick: str | None, results: list[dict], scored: list[Scored]) -> dict:
    """All numbers of one data set: each model's results, their comparisons with the first model, and the verdict."""
    return {
        "yardstick": yardstick,
        "scopes": list(scored[0].split.counted),
        "results": results,
        "comparisons": compare(scored),
        "verdict": verdict(scored),
    }


def speed_up(model: GPT, quantize: str | None, fast: ModuleType | None) -> DecodeStep:
    """Apply the fast parts to a model, if there are any; returns the decode step to generate with.

    On a CPU, only 8-bit weights have one: other kernels compute in the weights' precision, but scoring uses autocast.
    """
    if fast is not None and (quantize or model.wte.weight.device.type != "cpu"):
        return fast.speed_up_generation(model, quantize, len(STORY_PROMPTS)).decode
    if quantize:
        raise UserError("--quantize needs the folder fast/, which is missing; leave out --quantize")
    return decode_step


def measure_one(
    model: GPT, split: Split, stride: int, batch_size: int, device: str, dtype: str
) -> tuple[np.ndarray, dict]:
    """A model's losses at every position of a split, and the numbers of each scope with the settings."""
    start = time.perf_counter()
    try:
        losses, is_right = score(model, split, stride, batch_size, device, dtype)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory with --batch_size {batch_size}; use a smaller --batch_size") from error
    tokens_per_s = int(split.counted["all"][0].sum()) / (time.perf_counter() - start)
    scopes = {scope: summarize(split, scope, losses, is_right) for scope in split.counted}
    return losses, {"block_size": model.config.block_size, "stride": stride, "tokens_per_s": tokens_per_s, **scopes}


def measure_benchmarks(options: EvaluateOptions, fast: ModuleType | None = None) -> dict:
    """Run the benchmarks of --tasks on every checkpoint and print their scores; returns them, as --json writes them."""
    require_lm_eval()
    names = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    open_tasks(names, options.tasks_path)  # a wrong name is found before a model is loaded
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    found = []
    for path in options.checkpoints:
        model, info = load_model(path, device)
        speed_up(model, options.quantize, fast)
        benchmarked = BenchmarkModel(model, tokenizer_of(path, info, model), options.batch_size, device, dtype)
        found.append(run_tasks(benchmarked, names, options.tasks_path, options.limit))
    print(f"lm-eval, {dtype} on {device}")
    print_benchmarks(options.checkpoints, found)
    results = [
        {"checkpoint": path, **{key: result[key] for key in ("results", "versions", "n-samples") if key in result}}
        for path, result in zip(options.checkpoints, found, strict=True)
    ]
    return {"device": device, "dtype": dtype, "quantize": options.quantize, "limit": options.limit, "tasks": results}


def main() -> None:
    options = parse_options(EvaluateOptions, __doc__)
    if options.json:
        require_target("json", options.json)
    fast = load_speedups(options.plain)
    if fast is not None:
        fast.keep_freed_memory()
    if options.tasks:
        report = measure_benchmarks(options, fast)
    else:
        report = measure(options, fast)
        print_report(report)
    if options.json:
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    sleep_while_waiting_if_busy()
    run_script(main)
