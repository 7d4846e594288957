"""Measure checkpoints on a whole validation split, side by side, and look at the stories they write.

    python evaluate.py models/story5000.pt
    python evaluate.py models/story5000.pt models/story10000.pt --samples

Expect a table of loss (nats a token), perplexity, bits per byte, accuracy and speed; with several checkpoints also
each one's difference from the first, with a 95 % interval. The same command gives the same numbers.

What is scored. Text: every id of the split exactly once, `<|endoftext|>` included, the first one after an
`<|endoftext|>`. The split is one stream; windows of block_size ids pass over it, each `stride` ids further than the
one before. The first window scores all its ids and each later one only those that no earlier window held, so these
have at least block_size - stride ids of context ("Perplexity of fixed-length models", Hugging Face's documentation of
transformers). Chat: each conversation by itself, in such windows where it is longer than block_size. Its first id,
`<|im_start|>`, is given, as in gen.py's chat; all that follow are scored, to the final `<|endoftext|>`. A model
trained with --document_mask is scored in the same way: of a text it then also sees those before, as never in training.

Bits per byte is the sum of nats / ln 2 / bytes of UTF-8 text, so that models with other tokenizers compare ("The
Pile", Gao et al. 2020, section 3.1). The numerator holds every scored id, control tokens and ChatML's role lines too;
the bytes are those of the documents, for chat of the messages' contents. "assistant" counts only what
`targets.assistant_targets` marks, contents and the `<|im_end|>` behind each, over the bytes of these contents.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import load_model, read_info
from common.cli import UserError, option, parse_options, run_script
from common.device import autocast, choose_device, choose_dtype
from common.files import atomic_write, require_target
from data.dataset import DatasetInfo, open_dataset
from data.token_stream import TokenStream
from fast.allocator import keep_freed_memory
from generation.packed_linear import pack_linears
from generation.stories import N_COPIED, STORY_SETTINGS, STORY_TOKENS, judge_stories, readable_stories, write_stories
from model import GPT
from setup_tokenizer import ENDOFTEXT_ID, get_extended_tokenizer, message_spans
from training.mixture import trained_on
from training.targets import assistant_targets

HEAD_CHUNK = 1024  # rows whose logits exist at the same time
RESAMPLES = 2000  # of the bootstrap
FEWEST_DOCUMENTS = 50  # with fewer, the bootstrap resamples blocks of BLOCK ids instead
BLOCK = 256
FEWEST_UNITS = 10  # with fewer, an interval would claim more than it knows


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    checkpoints: tuple[str, ...] = option(
        (), "the checkpoints; the others are compared with the first", positional=True, nargs="+"
    )
    dataset: tuple[str, ...] = option(
        (), "data sets to measure on (default: those the models were trained on)", nargs="+", metavar="NAME"
    )
    data_dir: str = option("data", "folder of the prepared data")
    device: str | None = option(None, "cpu, mps, cuda, cuda:N (default: asks, or takes the best one)")
    dtype: str | None = option(
        None, "precision of the matrix work (default: the device's best)", choices=("float32", "bfloat16", "float16")
    )
    quantize: str | None = option(None, "measure the models with 8-bit weights, as gen.py uses them", choices=("int8",))
    stride: int | None = option(None, "ids from one window to the next (default: half of the model's block size)")
    batch_size: int = option(16, "windows at a time")
    limit: int | None = option(None, "measure on about the first N ids only, of chat on whole conversations")
    samples: bool = option(False, "also write stories and measure how varied and how new they are")
    seed: int = option(1337, "seed of the stories")
    json: str | None = option(None, "also write all numbers and stories to this file", metavar="FILE")

    def __post_init__(self):
        for name in ("stride", "batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, not {self.seed}")


@dataclasses.dataclass(frozen=True)
class Split:
    """A validation split: its ids behind one `<|endoftext|>` (N + 1,), which ids are scored, and what counts.

    `spans` are the ranges of places whose ids are scored in a common context. `counted` gives, under "all" and for
    chat under "assistant", which places count, (N + 1,), and how many bytes of text these are. `unit` (N + 1,) is
    what the bootstrap draws: the number of each place's document, or of its block.
    """

    name: str
    ids: np.ndarray
    spans: list[tuple[int, int]]
    counted: dict[str, tuple[np.ndarray, int]]
    unit: np.ndarray
    unit_name: str


def read_split(name: str, stream: TokenStream, is_chat: bool, limit: int | None = None) -> Split:
    """The first `limit` ids of a split (None: all), ready to be scored; of chat, whole conversations.

    Raises UserError where nothing is left to score.
    """
    ids = stream.read(-1, min(limit or len(stream), len(stream)))
    if is_chat:
        ends = np.flatnonzero(ids == ENDOFTEXT_ID)[1:] + 1
        if len(ids) == len(stream) + 1 and (not len(ends) or ends[-1] < len(ids)):
            ends = np.append(ends, len(ids))
        ids = ids[: ends[-1] if len(ends) else 1]
        starts = [1, *ends[:-1].tolist()]
        spans = [(start + 1, end) for start, end in zip(starts, ends.tolist(), strict=False) if end - start > 1]
    else:
        spans = [(1, len(ids))]
    is_scored = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        is_scored[start:end] = True
    if not is_scored.any():
        raise UserError(f"{name}: there is no whole conversation in --limit {limit}; use a larger one")
    byte_lengths = id_bytes()
    if is_chat:
        is_assistant = assistant_targets(ids) & is_scored
        counted = {
            "all": (is_scored, content_bytes(ids, byte_lengths)),
            "assistant": (is_assistant, int(byte_lengths[ids[is_assistant]].sum())),
        }
    else:
        counted = {"all": (is_scored, int(byte_lengths[ids[1:]].sum()))}
    document = np.cumsum(ids == ENDOFTEXT_ID) - (ids == ENDOFTEXT_ID)
    if document[-1] >= FEWEST_DOCUMENTS:
        unit, unit_name = document, "conversations" if is_chat else "documents"
    else:
        unit, unit_name = np.arange(len(ids)) // BLOCK, f"blocks of {BLOCK} ids"
    return Split(name, ids, spans, counted, unit, unit_name)


def id_bytes() -> np.ndarray:
    """How many bytes of text each id stands for, (n_vocab,); a control token for none."""
    enc = get_extended_tokenizer()
    control_ids = {enc.encode_single_token(token) for token in enc.special_tokens_set}
    sizes = [0 if i in control_ids else len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)]
    return np.array(sizes)


def content_bytes(ids: np.ndarray, byte_lengths: np.ndarray) -> int:
    """The bytes of all messages' contents in ChatML ids, without the roles and the line end after each role."""
    messages = message_spans(ids)
    steps = np.zeros(len(ids) + 1, dtype=int)  # +1 where a content begins, -1 after it; control tokens have no bytes
    steps[messages.content] += 1
    steps[messages.end] -= 1
    in_content = np.cumsum(steps[:-1]) > 0
    # The id with the role's line end may also hold white space with which the content begins.
    shared = byte_lengths[ids[messages.content - 1]] - 1
    return int(byte_lengths[ids[in_content]].sum() + shared.clip(min=0).sum())


def windows(start: int, end: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over the places start to end, as (begin, end, first): a window holds begin to end and scores from first.

    Each place is scored exactly once, and every window but the first has block_size - stride places of context more.

    >>> list(windows(0, 10, block_size=6, stride=3))
    [(0, 6, 0), (3, 9, 6), (6, 10, 9)]
    """
    first = start
    for begin in range(start, end, stride):
        stop = min(begin + block_size, end)
        yield begin, stop, first
        if stop == end:
            return
        first = stop


@torch.inference_mode()
def score(
    model: GPT, split: Split, stride: int, batch_size: int = 16, device: str = "cpu", dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """The loss in nats at every place of a split, NaN where none is scored, and whether the likeliest id was right.

    Returns (N + 1,) in float32 and (N + 1,) in bool. Logits are those of the model's n_vocab ids, HEAD_CHUNK rows at a
    time. Raises UserError for ids that the model lacks and for losses that are not finite.
    """
    block_size, n_vocab = model.config.block_size, model.config.n_vocab
    if split.ids.max() >= n_vocab:
        raise UserError(
            f"{split.name} holds the id {split.ids.max()} and the model has {n_vocab} ids; evaluate it on a data set "
            "of its own tokenizer with --dataset"
        )
    losses = np.full(len(split.ids), np.nan, dtype=np.float32)
    is_right = np.zeros(len(split.ids), dtype=bool)
    todo = [window for start, end in split.spans for window in windows(start, end, block_size, stride)]
    todo.sort(key=lambda window: window[0] - window[1])  # longest first: hardly any padding
    for start in tqdm(range(0, len(todo), batch_size), desc=split.name, unit="batch", leave=False, disable=None):
        batch = todo[start : start + batch_size]
        longest = batch[0][1] - batch[0][0]
        inputs = np.full((len(batch), longest), ENDOFTEXT_ID)  # what pads on the right, no id before it sees
        is_scored = np.zeros((len(batch), longest), dtype=bool)
        for row, (begin, end, first) in enumerate(batch):
            inputs[row, : end - begin] = split.ids[begin - 1 : end - 1]
            is_scored[row, first - begin : end - begin] = True
        places = np.concatenate([np.arange(first, end) for _, end, first in batch])
        with autocast(device, dtype):
            hidden = model.hidden(torch.from_numpy(inputs).to(device))[torch.from_numpy(is_scored).to(device)]  # (N, C)
            targets = torch.from_numpy(split.ids[places]).to(device)
            losses[places], is_right[places] = score_rows(model, hidden, targets)
    if not np.isfinite(losses[split.counted["all"][0]]).all():
        raise UserError("the model's losses are not finite; use another checkpoint or --dtype float32")
    return losses, is_right


def score_rows(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Loss and whether the likeliest id is the target, (N,) each, for the last layer's output (N, C)."""
    losses, is_right = [], []
    for rows, chunk in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
        logits = model.next_logits(rows)  # (HEAD_CHUNK, n_vocab)
        is_right.append(logits.argmax(-1) == chunk)
        losses.append(logits.logsumexp(-1) - logits.gather(1, chunk[:, None])[:, 0])
    return torch.cat(losses).cpu().numpy(), torch.cat(is_right).cpu().numpy()


def summarise(split: Split, scope: str, losses: np.ndarray, is_right: np.ndarray) -> dict:
    """The numbers of one scope ("all", "assistant") of a scored split."""
    counts, text_bytes = split.counted[scope]
    tokens, nats = int(counts.sum()), float(losses[counts].sum(dtype=np.float64))
    loss = nats / tokens if tokens else math.nan
    return {
        "tokens": tokens,
        "text_bytes": text_bytes,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # above it a float overflows
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else math.nan,
        "accuracy": float(is_right[counts].mean()) if tokens else math.nan,
    }


def paired_bootstrap(split: Split, scope: str, first: np.ndarray, second: np.ndarray) -> dict | None:
    """The difference of two models' mean losses, second - first, with its 95 % interval; None for too few units.

    Documents are drawn with replacement, the same ones for both models, RESAMPLES times from a fixed seed; the
    interval runs from the 2.5th to the 97.5th percentile ("An Introduction to the Bootstrap", Efron and Tibshirani
    1993, chapter 13; paired as in "Statistical Significance Tests for Machine Translation Evaluation", Koehn 2004).
    """
    counts = split.counted[scope][0]
    difference = second[counts].astype(np.float64) - first[counts]
    _, unit = np.unique(split.unit[counts], return_inverse=True)
    n_units = int(unit.max(initial=-1)) + 1
    if n_units < FEWEST_UNITS:
        return None
    nats, tokens = np.bincount(unit, weights=difference), np.bincount(unit)
    rng = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        drawn = rng.integers(n_units, size=n_units)
        means[resample] = nats[drawn].sum() / tokens[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5]).tolist()
    return {
        "difference": float(difference.mean()),
        "interval": [low, high],
        "excludes_zero": low > 0 or high < 0,
        "units": f"{n_units:,} {split.unit_name}",
    }


def dataset_names(options: EvaluateOptions, infos: list[dict]) -> list[str]:
    """What to measure on: --dataset, or each data set that one of the models was trained on, a mixture's parts too."""
    if options.dataset:
        return list(dict.fromkeys(options.dataset))
    names = list(dict.fromkeys(name for info in infos for name in trained_on(info)))
    if "unknown" in names:
        path = options.checkpoints[[info["dataset"] for info in infos].index("unknown")]
        raise UserError(f"{path} does not say what it was trained on; name a data set with --dataset")
    return names


def check_fit(path: str, info: dict, data: DatasetInfo) -> None:
    """Raise UserError where model and data have different tokenizers; say where a model saw another version of it."""
    tokenizer = info.get("tokenizer", {}).get("name", data.tokenizer)  # nanoGPT's checkpoints do not say
    if tokenizer != data.tokenizer:
        raise UserError(
            f"{path} uses the tokenizer {tokenizer} and {data.name} was prepared with {data.tokenizer}; name "
            "another data set with --dataset"
        )
    if trained := trained_on(info).get(data.name):
        digests = [file["sha256"] for file in trained["splits"]["train"]["files"]]
        if digests != [file.sha256 for file in data.splits["train"].files]:
            print(f"note: {data.name} has changed since {path} was made, which may have trained on what is now val")


def measure(options: EvaluateOptions) -> dict:
    """Score every checkpoint on every data set; returns all numbers and stories, as --json writes them."""
    infos = [read_info(path) for path in options.checkpoints]
    names = dataset_names(options, infos)
    data_dir = Path(options.data_dir)
    datasets = {name: open_dataset(data_dir, name) for name in names}
    story_data = [stories_of(info, names[0]) for info in infos]
    for path, info in zip(options.checkpoints, infos, strict=True):
        for _, data in datasets.values():
            check_fit(path, info, data)
    if options.samples:
        datasets |= {name: open_dataset(data_dir, name) for name in set(story_data) - set(names)}
    splits = {
        name: read_split(name, datasets[name][0]["val"], datasets[name][1].format == "chat", options.limit)
        for name in names
    }
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    results: dict[str, list[dict]] = {name: [] for name in names}
    losses: dict[str, list[np.ndarray]] = {name: [] for name in names}
    samples = []
    for path, dataset in zip(options.checkpoints, story_data, strict=True):
        model, _ = load_model(path, device)
        if options.quantize:
            pack_linears(model, options.quantize)
        stride = choose_stride(options.stride, model, path)
        for name in names:
            scored, result = measure_one(model, splits[name], stride, options.batch_size, device, dtype)
            results[name].append({"checkpoint": path, **result})
            losses[name].append(scored)
        if options.samples:
            stories = write_stories(model, options.seed)
            judged = judge_stories(stories, datasets[dataset][0])
            samples.append({"checkpoint": path, "dataset": dataset, **judged, "stories": readable_stories(stories)})
    compared = {name: compare(splits[name], options.checkpoints, losses[name]) for name in names}
    return {
        "device": device,
        "dtype": dtype,
        "quantize": options.quantize,
        "limit": options.limit,
        "datasets": {name: {"results": results[name], "comparisons": compared[name]} for name in names},
        "samples": samples,
    }


def stories_of(info: dict, fallback: str) -> str:
    """The data set that a model's stories are compared with: what it was trained on, of a mixture the first text."""
    parts = trained_on(info)
    texts = [name for name, facts in parts.items() if facts.get("format") == "text"]
    name = next(iter([*texts, *parts]))
    return fallback if name == "unknown" else name


def choose_stride(requested: int | None, model: GPT, path: str) -> int:
    """The ids from one window to the next: as asked, or half of what the model sees."""
    block_size = model.config.block_size
    if requested is not None and requested > block_size:
        raise UserError(f"--stride {requested} is more than the block size {block_size} of {path}; use a smaller one")
    return requested or max(1, block_size // 2)


def measure_one(
    model: GPT, split: Split, stride: int, batch_size: int, device: str, dtype: str
) -> tuple[np.ndarray, dict]:
    """A model's losses at every place of a split, and the numbers of each scope with how they were made."""
    start = time.perf_counter()
    try:
        losses, is_right = score(model, split, stride, batch_size, device, dtype)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory with --batch_size {batch_size}; use a smaller one") from error
    tokens_per_s = int(split.counted["all"][0].sum()) / (time.perf_counter() - start)
    scopes = {scope: summarise(split, scope, losses, is_right) for scope in split.counted}
    return losses, {"block_size": model.config.block_size, "stride": stride, "tokens_per_s": tokens_per_s, **scopes}


def compare(split: Split, checkpoints: Sequence[str], losses: Sequence[np.ndarray]) -> list[dict]:
    """Every checkpoint but the first against the first, in each scope."""
    return [
        {"checkpoint": path, "baseline": checkpoints[0], "scope": scope, "bootstrap": bootstrap}
        for scope in split.counted
        for path, own in zip(checkpoints[1:], losses[1:], strict=True)
        for bootstrap in [paired_bootstrap(split, scope, losses[0], own)]
    ]


def print_report(report: dict) -> None:
    """Print a table for each data set and scope, the comparisons, and what is to be said of the stories."""
    limit = f", about the first {report['limit']:,} ids" if report["limit"] else ""
    weights = ", 8-bit weights" if report["quantize"] else ""
    for name, measured in report["datasets"].items():
        print(f"\n{name}: validation split{limit}; {report['dtype']}{weights} on {report['device']}")
        for scope in [scope for scope in ("all", "assistant") if scope in measured["results"][0]]:
            print_table(scope, measured["results"])
            for comparison in measured["comparisons"]:
                if comparison["scope"] == scope:
                    print_comparison(comparison)
    for sample in report["samples"]:
        print_stories(sample)


def print_table(scope: str, results: list[dict]) -> None:
    """Print the numbers of one scope, a line for each checkpoint."""
    tokens, text_bytes = results[0][scope]["tokens"], results[0][scope]["text_bytes"]
    print(f"\n{scope} ids: {tokens:,}, of {text_bytes:,} bytes of text; loss in nats a token, speed in tokens a second")
    width = max(10, *(len(result["checkpoint"]) for result in results))
    titles = f"{'window':>9} {'loss':>8} {'perplexity':>10} {'bits/byte':>9} {'accuracy':>8} {'speed':>9}"
    print(f"{'checkpoint':<{width}} {titles}")
    for result in results:
        numbers = result[scope]
        window = f"{result['block_size']}/{result['stride']}"
        print(
            f"{result['checkpoint']:<{width}} {window:>9} {numbers['loss']:>8.4f} {numbers['perplexity']:>10.3f} "
            f"{numbers['bits_per_byte']:>9.4f} {numbers['accuracy']:>8.2%} {result['tokens_per_s']:>9,.0f}"
        )


def print_comparison(comparison: dict) -> None:
    """Print a difference in loss, its interval, and whether that leaves the better one open."""
    bootstrap = comparison["bootstrap"]
    names = f"{comparison['checkpoint']} - {comparison['baseline']}"
    if bootstrap is None:
        print(f"{names}: the split is too short for an interval")
        return
    low, high = bootstrap["interval"]
    if bootstrap["excludes_zero"]:
        better = comparison["checkpoint"] if high < 0 else comparison["baseline"]
        verdict = f"the interval excludes 0: {better} is better"
    else:
        verdict = "the interval includes 0: either may be better"
    print(
        f"{names}: loss {bootstrap['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} "
        f"(paired bootstrap over {bootstrap['units']}); {verdict}"
    )


def print_stories(sample: dict) -> None:
    """Print the stories of one checkpoint and how varied and how new they are."""
    print(f"\nstories by {sample['checkpoint']}, {STORY_SETTINGS}, at most {STORY_TOKENS} ids each")
    for story in sample["stories"]:
        print(f"\n> {story['prompt']}\n{story['story'].strip()}")
    counts = ", ".join(f"distinct-{n} {sample[f'distinct_{n}']:.3f}" for n in (1, 2, 3))
    print(f"\n{sample['tokens']:,} ids: {counts}; repeated 4-grams {sample['repetition_4']:.1%}")
    print(
        f"{N_COPIED}-grams that stand in the training split of {sample['dataset']}: "
        f"{sample[f'copied_{N_COPIED}']:.1%}, of real validation text {sample[f'copied_{N_COPIED}_of_real_text']:.1%}"
    )


def main() -> None:
    options = parse_options(EvaluateOptions, __doc__)
    if options.json:
        require_target("json", options.json)
    keep_freed_memory()
    report = measure(options)
    print_report(report)
    if options.json:
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    run_script(main)
