"""Benchmarks of EleutherAI's lm-eval on a loaded model, without an export.

scores = run_tasks(BenchmarkModel(model, tokenizer, batch_size=16, device="cuda"), ["hellaswag"])
print(scores["results"]["hellaswag"])

lm-eval asks three kinds of questions; `BenchmarkModel` answers them as lm-eval's own class for Hugging Face models
does. Text never becomes a control token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.cli import UserError, alternatives
from common.device import autocast
from common.hub import not_downloaded
from evaluation.scoring import score_rows
from generation.decoding import ENDED, generate
from generation.sampling import Sampling
from generation.text_stream import TextStream
from model import GPT
from setup_tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256  # lm-eval's default for tasks that do not limit the length of an answer
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
INSTALL = "pip install -r requirements-benchmarks.txt"


class BenchmarkModel:
    """A model with the methods that lm-eval calls. A request is an object with `args`.

    Contexts longer than the block size are cut on the left. Answers are scored in batches of similar length.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, batch_size: int = 16, device: str = "cpu", dtype: str = "float32"
    ):
        self.gpt, self.vocabulary = model, tokenizer
        self.n_rows, self.torch_device, self.dtype = batch_size, device, dtype
        self.block_size = model.config.block_size

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log probability of the continuation, and whether it is the likeliest.

        Raises UserError for a continuation that is longer than the block size.
        """
        pairs = [self.encode_pair(*request.args) for request in requests]
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        if longest > self.block_size:
            raise UserError(
                f"an answer of this benchmark has {longest} tokens and the model's block size is {self.block_size}; "
                "choose other --tasks, or a model with a larger block size"
            )
        return self.score_pairs(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log probability after an `<|endoftext|>`; each window has as much context as fits."""
        pairs, counts = [], []
        for request in requests:
            ids = [self.vocabulary.endoftext, *self.vocabulary.encode_text(request.args[0])]
            windows = list(rolling_windows(ids, self.block_size))
            pairs += windows
            counts.append(len(windows))
        scores = iter([logprob for logprob, _ in self.score_pairs(pairs, disable_tqdm)])
        return [sum((next(scores) for _ in range(count)), 0.0) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the text that the model generates, up to one of the texts in `until`."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm or None) as bar:
            for indices in groups.values():
                settings = requests[indices[0]].args[1]
                prompts = {index: self.encode_context(requests[index].args[0]) for index in indices}
                for batch in batches(indices, prompts, self.n_rows):
                    texts = self.continue_prompts([prompts[index] for index in batch], settings)
                    for index, text in zip(batch, texts, strict=True):
                        answers[index] = text
                    bar.update(len(batch))
        return answers

    # --- ids ---

    def encode_context(self, context: str) -> list[int]:
        """The ids of a context; `<|endoftext|>` for an empty one."""
        return self.vocabulary.encode_text(context) or [self.vocabulary.endoftext]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of its continuation, encoded together, as training saw them.

        White space at the end of the context counts as part of the continuation, because GPT-2 encodes it that way.
        """
        if not context:
            return [self.vocabulary.endoftext], self.vocabulary.encode_text(continuation)
        stripped = context.rstrip()
        together = self.vocabulary.encode_text(context + continuation)
        n_context = len(self.vocabulary.encode_text(stripped))
        if not n_context:  # white space alone
            return [self.vocabulary.endoftext], together
        return together[:n_context], together[n_context:]

    # --- the network ---

    @torch.inference_mode()
    def score_pairs(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log probability of each continuation after its context, and whether each id was the likeliest."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        rows = {index: [*context, *continuation] for index, (context, continuation) in enumerate(pairs) if continuation}
        with tqdm(total=len(pairs), desc="answers", disable=disable_tqdm or None) as bar:
            for batch in batches(list(rows), rows, self.n_rows):
                cut = [rows[index][-(self.block_size + 1) :] for index in batch]
                n_scored = [len(pairs[index][1]) for index in batch]
                inputs = torch.zeros(len(cut), max(map(len, cut)) - 1, dtype=torch.long)
                is_scored = torch.zeros_like(inputs, dtype=torch.bool)
                for row, (ids, scored) in enumerate(zip(cut, n_scored, strict=True)):
                    inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                    is_scored[row, len(ids) - 1 - scored : len(ids) - 1] = True
                targets = torch.tensor([token for index in batch for token in pairs[index][1]])
                with autocast(self.torch_device, self.dtype):
                    hidden = self.gpt.hidden(inputs.to(self.torch_device))[is_scored.to(self.torch_device)]
                    losses, is_right = score_rows(self.gpt, hidden, targets.to(self.torch_device))
                position = 0
                for index, scored in zip(batch, n_scored, strict=True):
                    span = slice(position, position + scored)
                    results[index] = (-float(losses[span].sum(dtype="float64")), bool(is_right[span].all()))
                    position += scored
                bar.update(len(batch))
        return results

    def continue_prompts(self, prompts: Sequence[list[int]], settings: Mapping[str, Any]) -> list[str]:
        """The texts that the model writes after prompts, with one task's settings.

        Raises UserError if the answers may be longer than the block size allows.
        """
        most = next((int(settings[key]) for key in TOKEN_LIMITS if settings.get(key)), DEFAULT_NEW_TOKENS)
        if most >= self.block_size:
            raise UserError(
                f"this benchmark lets answers have {most} tokens and the model's block size is {self.block_size}; "
                "choose other --tasks, or a model with a larger block size"
            )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") is not False else 0.0
        sampling = Sampling(temperature, top_k=settings.get("top_k"), top_p=settings.get("top_p"))
        texts = [TextStream(self.vocabulary.enc, stops) for _ in prompts]
        answers, running = [""] * len(prompts), set(range(len(prompts)))
        ends = (self.vocabulary.endoftext, self.vocabulary.im_end)
        with autocast(self.torch_device, self.dtype):
            cut = [prompt[-(self.block_size - most) :] for prompt in prompts]
            for ids in generate(self.gpt, cut, most, sampling, stop_ids=self._known(ends)):
                for row, token in enumerate(ids.tolist()):
                    if row in running and token not in (*ends, ENDED):
                        answers[row] += texts[row].feed(token) if token != self.vocabulary.im_start else ""
                    if token in (*ends, ENDED) or texts[row].stopped:
                        running.discard(row)
                if not running:
                    break
        return [answer + text.finish() for answer, text in zip(answers, texts, strict=True)]

    def _known(self, ids: Sequence[int]) -> list[int]:
        """The ids without those that the model lacks: an imported model may lack ChatML's."""
        return [token for token in ids if token < self.gpt.config.n_vocab]


def batches(indices: Sequence[int], rows: Mapping[int, Sequence[int]], size: int) -> Iterator[list[int]]:
    """The indices of rows in batches, the longest rows first, so that a batch needs little padding."""
    ordered = sorted(indices, key=lambda index: -len(rows[index]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def rolling_windows(ids: Sequence[int], block_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that score every id but the first once; each continuation has at most block_size.

    The last pair has as much context as fits.

    >>> list(rolling_windows([0, 1, 2, 3, 4], 3))
    [([0], [1, 2, 3]), ([2, 3], [4])]
    """
    for start in range(1, len(ids), block_size):
        end = min(start + block_size, len(ids))
        yield list(ids[max(0, end - 1 - block_size) : start]), list(ids[start:end])


# --- lm-eval ---


def require_lm_eval() -> None:
    """Raise UserError, with the command that installs it, if lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks needs the package lm_eval, which is not installed; run: {INSTALL}")


def open_tasks(names: Sequence[str], tasks_path: str | None) -> Any:
    """lm-eval's task manager. Raises UserError for a task that it does not know."""
    from lm_eval.tasks import TaskManager

    if tasks_path is not None and not Path(tasks_path).is_dir():
        raise UserError(f"--tasks_path {tasks_path} is not a folder; name one with the .yaml files of tasks")
    manager = TaskManager(include_path=tasks_path)
    for name in names:
        if name not in manager.all_tasks:
            near = [task for task in manager.all_tasks if task.startswith(name[:4])][:5]
            advice = f"did you mean {alternatives(near)}? List" if near else "list"
            raise UserError(f"lm-eval has no task {name}; {advice} all tasks with: lm_eval ls tasks")
    return manager


def run_tasks(
    model: BenchmarkModel, names: Sequence[str], tasks_path: str | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Evaluate the tasks; returns lm-eval's `simple_evaluate` results. `limit` is the number of questions per task.

    Raises UserError for an unknown task, and if a task's data cannot be downloaded.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    class Adapter(BenchmarkModel, LM):
        """The model as a subclass of lm-eval's LM, as `simple_evaluate` requires."""

        def __init__(self) -> None:
            LM.__init__(self)
            self.__dict__.update(model.__dict__)

    manager = open_tasks(names, tasks_path)
    try:
        results = simple_evaluate(Adapter(), tasks=list(names), limit=limit, task_manager=manager, log_samples=False)
    except (OSError, HTTPError, DatasetsError) as error:
        remedy = "connect to the network once, so that the hub's cache has it, or use local tasks (--tasks_path)"
        raise not_downloaded(f"the data of {', '.join(names)}", error, remedy) from error
    return results or {}


def metrics_of(results: Mapping[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """The rows (task, metric, value, standard error) of the results of `run_tasks`, in the same order."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, float | int) or not filtered:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            rows.append((task, metric, float(value), float(error) if isinstance(error, float | int) else None))
    return rows


def print_benchmarks(paths: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each model: tasks, metrics, values, and their standard errors."""
    for path, result in zip(paths, found, strict=True):
        rows = metrics_of(result)
        width = max(10, *(len(task) for task, *_ in rows))
        print(f"\n{path}\n{'task':<{width}} {'metric':<16} {'value':>10} {'std. error':>10}")
        for task, metric, value, error in rows:
            shown = "" if error is None or error != error else f"{error:.4f}"
            print(f"{task:<{width}} {metric:<16} {value:>10.4f} {shown:>10}".rstrip())
