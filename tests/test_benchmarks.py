"""Benchmarks: the adapter against a slow version, and against lm-eval's own class on the exported model."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.cli import UserError
from evaluation.benchmarks import BenchmarkModel, metrics_of
from export import ExportOptions, export
from setup_tokenizer import ENDOFTEXT_ID, GPT2, encode_text
from tests.test_export import random_model, save

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 64
PAIRS = [
    ("Once upon a time", " there was a cat"),
    ("A dog", " ran."),
    ("It ends with a space ", "and continues"),
    ("", "No context"),
    ("long " * 100, "ends here"),
    ("Ana's naïve 😀", " fox. <|endoftext|>"),
]
LONG_TEXT = "The cat sat on the mat, and the dog ran after it. " * 20


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def model():
    return random_model().eval().requires_grad_(False)


@pytest.fixture
def benchmarked(model) -> BenchmarkModel:
    return BenchmarkModel(model, GPT2, batch_size=4)


def logprobs(model, ids: list[int]) -> torch.Tensor:
    """The log probability of every id after the first, from one window without a batch, (len(ids) - 1,)."""
    logits = model.logits(model.hidden(torch.tensor([ids[:-1]])))[0].log_softmax(-1)
    return logits[range(len(ids) - 1), ids[1:]]


def test_continuations_are_scored_as_one_by_one(model, benchmarked):
    found = benchmarked.loglikelihood(requests(*PAIRS))
    for (context, continuation), (logprob, is_likeliest) in zip(PAIRS, found, strict=True):
        ids = encode_text(context + continuation)
        n_context = len(encode_text(context.rstrip()))
        if not context:
            ids, n_context = [ENDOFTEXT_ID, *ids], 1
        n_scored = len(ids) - n_context
        own = logprobs(model, ids[-(BLOCK_SIZE + 1) :])[-n_scored:]
        assert logprob == pytest.approx(float(own.sum()), abs=1e-3), context
        assert not is_likeliest


def test_the_likeliest_continuation_is_recognized(benchmarked):
    (text,) = benchmarked.generate_until(requests(("Once upon a time", {"until": [], "max_gen_toks": 1})))
    ((_, is_likeliest),) = benchmarked.loglikelihood(requests(("Once upon a time", text)))
    assert is_likeliest


def test_a_long_text_is_scored_in_windows_with_as_much_context_as_fits(model, benchmarked):
    ids = [ENDOFTEXT_ID, *encode_text(LONG_TEXT)]
    assert len(ids) > 3 * BLOCK_SIZE and len(ids) % BLOCK_SIZE != 1
    expected = 0.0
    for start in range(1, len(ids), BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, len(ids))
        expected += float(logprobs(model, ids[max(0, end - 1 - BLOCK_SIZE) : end])[-(end - start) :].sum())
    (found, empty) = benchmarked.loglikelihood_rolling(requests((LONG_TEXT,), ("",)))
    assert found == pytest.approx(expected, rel=1e-5)
    assert empty == 0.0


def test_answers_end_before_a_stop_text_and_do_not_depend_on_the_batch(model):
    contexts = ["Once upon a time", "A dog", "long " * 100]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    alone = [BenchmarkModel(model, GPT2, 1).generate_until(requests((context, settings)))[0] for context in contexts]
    together = BenchmarkModel(model, GPT2, 4).generate_until(requests(*((context, settings) for context in contexts)))
    assert together == alone
    stop = alone[0][3:6]
    (cut,) = BenchmarkModel(model, GPT2).generate_until(requests((contexts[0], {**settings, "until": [stop]})))
    assert cut == alone[0].split(stop)[0]


def test_what_does_not_fit_into_the_block_size_is_an_error(benchmarked):
    with pytest.raises(UserError, match="has 201 tokens and the model's block size is 64"):
        benchmarked.loglikelihood(requests(("a", " b" * 201)))
    with pytest.raises(UserError, match="256 tokens and the model's block size is 64"):
        benchmarked.generate_until(requests(("a", {"until": ["\n"]})))


# --- with lm-eval ---


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with three made tasks: a question with choices, the perplexity of texts, and written answers."""
    folder = tmp_path_factory.mktemp("tasks")
    animals = ("cat", "dog", "fox", "hen", "cow")
    records = [
        {
            "question": f"Story {n}. Which animal ran after the {animals[n % 5]}?",
            "choices": [f"The {animal}" for animal in animals],
            "answer": n % 5,
            "text": f"The {animals[n % 5]} ran. " * (5 * n + 1),
        }
        for n in range(12)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    common = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "records.jsonl"}
test_split: test
metadata:
  version: 1
"""
    choices = """task: made_choices
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
    perplexity = """task: made_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
    written = """task: made_answers
output_type: generate_until
doc_to_text: "{{text}} {{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
"""
    for name, content in {"choices": choices, "perplexity": perplexity, "answers": written}.items():
        (folder / f"{name}.yaml").write_text(content + common, "utf-8")
    return folder


NAMES = ("made_choices", "made_perplexity", "made_answers")


def test_the_numbers_are_those_of_lm_evals_class_on_the_exported_model(tmp_path, monkeypatch, tasks, capsys):
    lm_eval = pytest.importorskip("lm_eval", reason="pip install -r requirements-benchmarks.txt")
    pytest.importorskip("accelerate", reason="lm-eval's class for Hugging Face models needs it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    checkpoint = save(tmp_path, "text")
    command = ["evaluate.py", checkpoint, "--tasks", ",".join(NAMES), "--tasks_path", str(tasks)]
    options = ["--device", "cpu", "--dtype", "float32", "--batch_size", "5", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    runpy.run_path(str(ROOT / "evaluate.py"))["main"]()
    output = capsys.readouterr().out
    assert all(name in output for name in NAMES) and "acc_norm" in output
    ours = json.loads((tmp_path / "a.json").read_text("utf-8"))["tasks"][0]
    export(ExportOptions(checkpoint, str(tmp_path / "exported")))
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks))
    theirs = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path / "exported"), "dtype": "float32"},
        tasks=list(NAMES),
        device="cpu",
        batch_size=3,
        task_manager=manager,
    )
    expected, found = metrics_of(theirs), metrics_of(ours)
    assert len(found) >= 5 and [row[:2] for row in found] == [row[:2] for row in expected]
    for own, other in zip(found, expected, strict=True):
        assert own[2] == pytest.approx(other[2], rel=1e-5), own[:2]
    samples = theirs["samples"]["made_answers"]
    asked = [sample["arguments"][0] for sample in samples]
    written = BenchmarkModel(random_model(), GPT2, batch_size=5).generate_until(requests(*asked))
    assert written == [sample["resps"][0][0] for sample in samples] and len(set(written)) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "made_choice"], "lm-eval has no task made_choice"),
        (["--tasks", "made_choices", "--tasks_path", "nowhere"], "--tasks_path nowhere is not a folder"),
    ],
)
def test_an_unknown_task_is_one_sentence(tmp_path, monkeypatch, options, said):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-benchmarks.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "missing.pt", *options])
    with pytest.raises(UserError, match=said):
        runpy.run_path(str(ROOT / "evaluate.py"))["main"]()


def test_without_lm_eval_the_error_says_how_to_install_it(tmp_path):
    program = (
        "import runpy, sys\n"
        "sys.modules['lm_eval'] = None\n"  # as if it were not installed
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.argv = ['evaluate.py', 'a.pt', '--tasks', 'hellaswag']\n"
        f"runpy.run_path({str(ROOT / 'evaluate.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("run: pip install -r requirements-benchmarks.txt"), done.stderr
