"""gen.py in this process, with tiny random checkpoints: options, prompts, chats, files and errors."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

import gen
from common.checkpoint import save_checkpoint
from common.cli import UserError
from generation.sampling import CHAT_SAMPLING, TEXT_SAMPLING
from model import GPT, GPTConfig
from setup_tokenizer import IM_START_ID
from tests.tiny_gpt import text_gpt

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(models, monkeypatch, capsys):
    """Run gen.main in this process; returns (standard output, standard error)."""
    monkeypatch.chdir(models)
    monkeypatch.setattr("fast.keep_freed_memory", lambda: None)  # would change the C library's allocator for all tests
    terminate = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["gen.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        gen.main()
        return tuple(capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, terminate)


def test_a_seed_repeats_the_continuation_of_a_prompt(run):
    arguments = ("--prompt", "Once upon a time", "--max_tokens", "12", "--seed", "5")
    text, notices = run(*arguments)
    assert text.startswith("Once upon a time") and len(text) > 20 and text.endswith("\n")
    assert run(*arguments)[0] == text != run(*arguments[:-1], "6")[0]
    assert "device: cpu" in notices
    greedy = [run(*arguments[:-1], seed, "--temp", "0")[0] for seed in "12"]
    assert greedy[0] == greedy[1]


def test_text_ends_before_a_stop_text_that_spans_tokens(run):
    arguments = ("--prompt", "A", "--max_tokens", "30", "--temp", "0", "--dtype", "float32")
    whole = run(*arguments)[0].rstrip("\n")
    stop = whole[9:14]
    cut = whole[: whole.index(stop, 1)]
    assert run(*arguments, "--stop", stop, "--stop", "never generated")[0].rstrip("\n") == cut


@pytest.mark.parametrize(
    "arguments",
    [
        ("--temp", "1e-46"),
        ("--temp", "1e-46", "--top_k", "0"),
        ("--temp", "99.99", "--top_k", "0", "--top_p", "1e-300"),
        ("--top_k", str(10**30), "--min_p", "1e-300"),
        ("--min_p", "1", "--top_p", "1"),
        ("--repetition_penalty", "0.01"),
        ("--repetition_penalty", "100", "--num_samples", "64"),
        ("--seed", str(2**63 - 1)),
    ],
    ids=" ".join,
)
def test_the_extremes_of_every_number(run, arguments):
    text, _ = run("--prompt", "Once", "--max_tokens", "3", *arguments)
    assert "Once" in text
    if arguments[:2] == ("--temp", "1e-46"):
        assert text == run("--prompt", "Once", "--max_tokens", "3", "--temp", "0")[0]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfA\r\nB", b"A\rB", "\ufeffA\nB".encode()])
def test_a_prompt_file_has_no_mark_and_line_feeds(run, tmp_path, content):
    (tmp_path / "prompt.txt").write_bytes(content)
    assert run("--prompt_file", tmp_path / "prompt.txt", "--max_tokens", "1", "--seed", "1")[0].startswith("A\nB")


@pytest.mark.parametrize(
    ("encoding", "named"), [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("cp1252", "WINDOWS-1252")]
)
def test_a_prompt_file_in_another_encoding_is_refused(run, tmp_path, encoding, named):
    (tmp_path / "prompt.txt").write_bytes("Once upon a time, at the Café".encode(encoding))
    with pytest.raises(UserError, match=f"convert it with: iconv -f {named} -t UTF-8 ") as caught:
        run("--prompt_file", tmp_path / "prompt.txt")
    assert "--encoding" not in str(caught.value)


@pytest.mark.parametrize("line_end", ["\r\n", "\r", "\n"])
def test_a_session_from_a_pipe_reads_any_line_end(run, line_end):
    text, notices = run(
        "--interactive", "--max_tokens", "2", stdin=line_end.join(["\ufeff/temp 0.5", "Hi", "/quit", "No"])
    )
    assert "temperature 0.5" in notices and "unknown command" not in notices and text.count("\n") == 1


def test_the_prompt_can_be_a_file_or_standard_input(run, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Grüße", encoding="utf-8")
    arguments = ("--max_tokens", "4", "--temp", "0")
    from_file = run("--prompt_file", path, *arguments)[0]
    assert from_file == run("--prompt_file", "-", *arguments, stdin="Grüße")[0]
    assert from_file.startswith("Grüße")
    path.write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        run("--prompt_file", path)
    with pytest.raises(UserError, match=r"missing\.txt not read"):
        run("--prompt_file", tmp_path / "missing.txt")


def test_samples_and_their_logprobs_are_written_to_files(run, tmp_path):
    output, logprobs = tmp_path / "out.txt", tmp_path / "logprobs.jsonl"
    arguments = ("--num_samples", "3", "--max_tokens", "5", "--seed", "1", "--prompt", "Hi")
    text, _ = run(*arguments, "--output", output, "--logprobs", logprobs)
    assert text == output.read_text("utf-8")
    samples = re.split(r"--- \d of 3 ---\n", text)
    assert samples[0] == "" and len(set(samples[1:])) == 3 and all(sample.startswith("Hi") for sample in samples[1:])
    rows = [json.loads(line) for line in logprobs.open(encoding="utf-8")]
    assert [(row["sample"], row["step"]) for row in rows] == [
        (sample, step) for step in range(5) for sample in range(3)
    ]
    assert all(row["logprob"] <= row["likeliest"][0]["logprob"] <= 0 for row in rows)


def test_generation_continues_after_the_window_is_full(run):
    text, notices = run("--prompt", "word " * 80, "--max_tokens", "100", "--verbose")
    assert "the prompt has" in notices and "last: 100 tokens" in notices and "val 3.5" in notices
    assert len(text) > 5 * 80


def test_chat_from_a_pipe_uses_the_chat_model_and_replies_line_by_line(run):
    text, notices = run("--chat", "--max_tokens", "3", "--temp", "0", stdin="Hello!\n\n/stats\nMy name is Priya.\r\n")
    described = "the best-trained chat model: chitchat, 2 tokens, validation loss 3.50"
    assert f"chatting with models/chitchat600.pt, {described}" in notices.splitlines()
    assert "2 messages" in notices and "you>" not in text + notices
    once = run("--chat", "--max_tokens", "3", "--temp", "0", "--prompt", "Hello!")[0]
    assert text.startswith(once) and len(text) > len(once)
    # As Windows writes files: with a byte order mark and CR at the ends of lines.
    assert run("--chat", "--max_tokens", "3", "--temp", "0", stdin="\ufeffHello!\r\n")[0] == once


def test_a_chat_with_a_model_of_stories_prints_a_note(run):
    text, notices = run("models/story5000.pt", "--chat", "--max_tokens", "2", stdin="Hi\n/nonsense\n")
    assert "note: models/story5000.pt was trained on story, not on chat data, so do not expect replies" in notices
    assert "error: unknown command /nonsense" in notices and text


def test_a_mixture_of_stories_and_chat_needs_no_note(run, models):
    parts = [{"name": "story", "format": "text", "weight": 0.4}, {"name": "chat", "format": "chat", "weight": 0.6}]
    info = {"dataset": "story+chat", "format": "chat", "data": {"parts": parts}, "tokens_seen": 4}
    path = models / "models" / "story+chat500.pt"
    save_checkpoint(path, text_gpt(64), info)
    try:
        notices = run("--chat", "--max_tokens", "2", stdin="Hi\n")[1]
        assert "chatting with models/story+chat500.pt" in notices and "other chat models: chitchat600\n" in notices
        assert "note:" not in run("models/story+chat500.pt", "--prompt", "Once", "--max_tokens", "2")[1]
    finally:
        path.unlink()
    notices = run("models/chitchat600.pt", "--prompt", "Once", "--max_tokens", "2")[1]
    assert "note: models/chitchat600.pt was trained on chat data; talk to it with --chat" in notices


def test_a_chat_model_that_continues_text_shows_no_control_tokens(run, tmp_path):
    model = text_gpt(64)
    with torch.no_grad():  # it always predicts <|im_start|>
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1)
        model.wte.weight[IM_START_ID] = 1
    save_checkpoint(tmp_path / "eager.pt", model, {"format": "chat", "dataset": "chat"})
    arguments = (tmp_path / "eager.pt", "--prompt", "Once", "--temp", "0", "--max_tokens", "9", "--dtype", "float32")
    text, notices = run(*arguments, "--verbose")
    assert text == "Once\n" and "last: 9 tokens" in notices
    assert notices.index("was trained on chat data; talk to it with --chat") < notices.index("last: ")
    assert run(*arguments, "--stop", "<|im_start|>", "--verbose")[1].count("last: 1 tokens") == 1


def test_without_a_checkpoint_text_comes_from_the_newest_model_which_is_named(run):
    text, notices = run("--prompt", "Once", "--max_tokens", "4", "--temp", "0")
    assert "using models/story5000.pt, the newest model: story, 2 tokens, validation loss 3.50\n" in notices
    assert "other models: chitchat600\n" in notices
    assert run("models/story5000.pt", "--prompt", "Once", "--max_tokens", "4", "--temp", "0")[0] == text


def test_a_session_can_change_its_model(run):
    lines = ["/model", "/temp 0", "Once", "/model nothing", "/model chitchat600", "/temp", "Once", "/model"]
    text, notices = run("--interactive", "--max_tokens", "5", stdin="\n".join(lines))
    assert "* story5000    story, 2 tokens, validation loss 3.50\n  chitchat600  chitchat, 2 tokens" in notices
    assert "error: there is no model nothing; choose one of story5000, chitchat600\n" in notices
    assert "now models/chitchat600.pt: chitchat, 2 tokens, validation loss 3.50\n" in notices
    assert "was trained on chat data" in notices and notices.count("temperature 0\n") == 2
    assert "  story5000    story, 2 tokens, validation loss 3.50\n* chitchat600  chitchat" in notices
    alone = [
        run(f"models/{name}.pt", "--prompt", "Once", "--max_tokens", "5", "--temp", "0")[0].removeprefix("Once")
        for name in ("story5000", "chitchat600")
    ]
    assert text == "".join(alone)


def test_a_chat_keeps_its_messages_when_the_model_changes(run, tmp_path):
    path = tmp_path / "chat.jsonl"
    lines = ["Hello", "/model models/story5000.pt", "/model chitchat600", "Again", f"/save {path}", "/model"]
    _, notices = run("--chat", "--max_tokens", "3", stdin="\n".join(lines))
    assert "note: models/story5000.pt was trained on story, not on chat data" in notices
    assert [message["role"] for message in json.loads(path.read_text("utf-8"))["messages"]] == ["user", "assistant"] * 2
    assert notices.endswith("* chitchat600  chitchat, 2 tokens, validation loss 3.50\n")


def test_words_from_a_pipe_that_may_mean_a_command_are_messages(run):
    _, notices = run("--chat", "--max_tokens", "2", stdin="exit\n/stats\n")
    assert "note: exit is sent as a message; the command is /quit\n" in notices and "2 messages" in notices


def test_interactive_continues_prompts_without_chatml(run):
    arguments = ("--interactive", "--max_tokens", "4", "--temp", "0")
    text, _ = run(*arguments, stdin="One\nOne\n")
    half = len(text) // 2
    assert text[:half] == text[half:]
    alone = run("--prompt", "One", "--max_tokens", "4", "--temp", "0")[0]
    assert alone == "One" + text[:half]


def test_8_bit_weights_generate_and_count_as_parameters(run, tmp_path):
    model = GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=128))
    save_checkpoint(tmp_path / "wide.pt", model, {"format": "text"})
    arguments = (tmp_path / "wide.pt", "--prompt", "Hi", "--max_tokens", "4", "--quantize", "int8", "--verbose")
    try:
        text, notices = run(*arguments)
    except UserError as error:
        pytest.skip(str(error))
    assert text.startswith("Hi") and "8-bit weights" in notices
    assert f"window 64, {model.n_params() / 1e6:.1f} M parameters\n" in notices


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ["models/none.pt"],
            r"models/none.pt not found; there are .*story5000.pt.*; make another with: python train.py",
        ),
        (["models/foreign.pt"], "foreign.pt"),
        (
            ["--output", "no/such/folder/x.txt"],
            "x.txt: the folder no/such/folder does not exist",
        ),
        (["--output", "models"], "--output models is a folder; name a file"),
        (
            ["--output", "models/../models/story5000.pt"],
            "story5000.pt: this is the name of a checkpoint; name another file",
        ),
        (["models/model.bin", "--output", "./models/model.bin"], "model.bin: this is the model; name another file"),
        (["--output", "x.txt", "--logprobs", "./x.txt"], "--logprobs ./x.txt: this is --output; name another file"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--chat", "--prompt", "word " * 2000], r"has \d+ tokens and the window has room for"),
    ],
)
def test_mistakes_are_errors_of_one_sentence(run, models, arguments, sentence):
    foreign = models / "models" / "foreign.pt"
    foreign.write_bytes(b"not a checkpoint")
    os.utime(foreign, (0, 0))
    try:
        with pytest.raises(UserError, match=sentence):
            run(*arguments)
    finally:
        foreign.unlink()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--chat",), r"no checkpoint in models was trained on chat data; .*: make demo"),
        ((), r"no checkpoint in models; train one with: python train.py, or in minutes with: make demo"),
    ],
)
def test_without_a_model_the_error_tells_how_to_make_one(run, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        run(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "--chat --interactive",
        "--chat --nonstop",
        "--system x",
        "--prompt a --prompt_file b",
        "--temp -1",
        "--temp nan",
        "--top_p 0",
        "--num_samples 0",
        "--stop=",
        "--plain --quantize int8",
    ],
)
def test_options_that_contradict_each_other_are_usage_errors(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gen.py", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        gen.main()
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_every_option_is_read_somewhere():
    source = (ROOT / "gen.py").read_text("utf-8")
    for field in gen.dataclasses.fields(gen.GenOptions):
        assert re.search(rf"options\.{field.name}\b", source), field.name


def test_the_help_states_the_defaults_of_sampling():
    help_of = {field.name: field.metadata["option"].help for field in gen.dataclasses.fields(gen.GenOptions)}
    for option, name in (("temp", "temperature"), ("top_k", "top_k")):
        text, chat = (getattr(sampling, name) for sampling in (TEXT_SAMPLING, CHAT_SAMPLING))
        assert f"(default: {text}, in a chat {chat})" in help_of[option]
