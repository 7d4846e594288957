"""make_preferences.py and measure_teaching.py: feedback made by rules, and what is measured of taught models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import save_checkpoint
from data.chitchat.talks import generate
from data.dataset import open_dataset
from data.layouts.chat import conversations
from data.layouts.preferences import preferences
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from evaluation.splits import read_split
from generation.sampling import GREEDY
from model import GPT, GPTConfig
from setup_tokenizer import GPT2, IM_END, N_VOCAB
from tests.test_testing_tools import TOOLS, load, run_tool

chat_scores = load("chat_scores")
make = load("corrections")
measure = load("measure_teaching")

CONFIG = GPTConfig(block_size=512, vocab_size=50_304, n_vocab=N_VOCAB, n_layer=1, n_head=1, n_embd=4)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """300 conversations of chitchat."""
    folder = tmp_path_factory.mktemp("data")
    options = PrepareOptions(output_dir=str(folder), workers=1)
    prepare(Dataset("chitchat", "chat", "made", "MIT"), options, Corpus(generate(300, 1)))
    return folder


def ids_of(text: str) -> list[int]:
    return [*GPT2.encode_text(text), GPT2.im_end]


def silent_gpt() -> GPT:
    """A model that always ends its reply at once."""
    torch.manual_seed(1)
    gpt = GPT(CONFIG)
    with torch.no_grad():
        gpt.ln_f.bias.fill_(1.0)
        gpt.wte.weight[GPT2.im_end].fill_(1.0)
    return gpt.eval()


def checkpoint(path: Path) -> Path:
    save_checkpoint(path, silent_gpt(), {"dataset": "chitchat", "format": "chat"})
    return path


@pytest.mark.parametrize(
    ("reply", "corrected"),
    [
        ("Hello! How are you, my friend?", "Arr, ahoy! How are ye, me matey?"),
        ("You're welcome! I'm happy to help.", "Arr, ye be welcome! I be happy to help."),
        ("I am fine. Is this yours?", "Arr, I be fine. Be this yours?"),
        ("Nice to meet you, Hilda!", "Arr, nice to meet ye, Hilda!"),
        ("Good night!", "Arr, good night!"),
    ],
)
def test_a_pirate_says_the_same_in_other_words(reply, corrected):
    assert make.as_pirate(reply) == corrected
    assert make.has_style(corrected) and not make.has_style(reply)


def test_words_that_only_contain_a_pirates_word_are_not_the_style():
    assert not make.has_style("Yesterday I saw an array of eyes.")


def test_prompts_are_distinct_and_none_is_measured(data_dir):
    measured = {text.casefold() for _, text, _ in chat_scores.openers(chat_scores.load_questions())}
    held_out = make.held_out_prompts(data_dir)
    measured |= {text.casefold() for text in held_out}
    assert len(held_out) == len(set(held_out)) > 0
    opening = make.opening_prompts(data_dir, 3, 200)
    training = make.training_prompts(data_dir, 3)
    for prompts in (opening, training):
        assert len(prompts) == len(set(prompts)) >= 100
        assert not measured & {text.casefold() for text in prompts}
    assert opening == make.opening_prompts(data_dir, 3, 200) != make.opening_prompts(data_dir, 4, 200)
    assert training == make.training_prompts(data_dir, 3) != make.training_prompts(data_dir, 4)
    assert sorted(training) == sorted(make.training_prompts(data_dir, 4))


def test_corrections_are_pairs_for_dpo_and_conversations_for_fine_tuning():
    said = {"Hi": ids_of("Hello!"), "Hm": GPT2.encode_text("No end"), "Bye": ids_of("Goodbye!")}
    found = list(make.pirate_corrections(lambda prompts: [said[prompt] for prompt in prompts], GPT2, list(said)))
    assert [[message["content"] for message in pair] for pair in preferences(found)] == [
        ["Hi", "Arr, ahoy!", "Hello!"],
        ["Bye", "Arr, fair winds!", "Goodbye!"],
    ]
    assert [[message["content"] for message in messages] for messages in conversations(found)] == [
        ["Hi", "Arr, ahoy!"],
        ["Bye", "Arr, fair winds!"],
    ]


def test_the_shortest_of_the_samples_corrects_the_longest():
    samples = {
        "Hi": ["Hello there, you!", "Hi! Ho.", "Hello there."],
        "Same": ["Yes. No.", "Yes. No."],
        "One": ["Yes."],
    }

    def drawn(prompts: list[str]) -> list[list[int]]:
        return [ids_of(text) for text in samples[prompts[0]]]

    def short(**settings) -> list[dict]:
        return list(make.short_corrections(drawn, GPT2, list(samples), 3, **settings))

    assert short() == [make.event(make.asked("Hi"), "Hello there, you!", "Hello there.")]
    assert short(first_sentence=True) == [
        make.event(make.asked("Hi"), "Hello there, you!", "Hello there."),
        make.event(make.asked("Same"), "Yes. No.", "Yes."),
    ]


def test_the_likeliest_replies_of_a_batch_are_those_of_single_prompts(data_dir):
    torch.manual_seed(2)
    gpt = GPT(CONFIG)
    prompts = make.held_out_prompts(data_dir)[:4]
    together = make.replies(gpt, GPT2, GREEDY, None, prompts)
    assert together == [make.replies(gpt, GPT2, GREEDY, None, [prompt])[0] for prompt in prompts]
    assert measure.likeliest_replies(gpt, GPT2)(prompts) == together
    assert measure.reply_lengths(together, GPT2) == (
        sum(len(reply) - reply.count(GPT2.im_end) for reply in together) / 4,
        len({tuple(reply) for reply in together}),
    )


def test_a_model_that_says_nothing_has_no_replies_to_correct(tmp_path, data_dir):
    arguments = (checkpoint(tmp_path / "model.pt"), "--count", 2, "--data_dir", data_dir, "--device", "cpu")
    result = run_tool(TOOLS / "make_preferences.py", *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert "only 0 of 2 replies could be corrected; use a smaller --count" in result.stderr
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_table_has_a_row_per_model(tmp_path, data_dir):
    path = checkpoint(tmp_path / "model.pt")
    arguments = (path, "--data_dir", data_dir, "--limit", 2000, "--json", tmp_path / "all.json", "--device", "cpu")
    result = run_tool(TOOLS / "measure_teaching.py", *arguments, "--dtype", "float32", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names, row = (line.split() for line in result.stdout.splitlines()[-2:])
    assert names == list(measure.COLUMNS) and row[0] == str(path)
    assert row[1:-1] == [*["0"] * 8, "1", "0"]  # every reply is one <|im_end|>
    written = json.loads((tmp_path / "all.json").read_text())[0]
    assert len(written["answers"]) == 195 and row[-1] == f"{written['loss']:.4f}"


def test_the_loss_is_that_of_what_the_assistant_says(data_dir):
    documents = [json.loads(line)["messages"] for line in (data_dir / "chitchat-val.jsonl").read_text().splitlines()]
    split = read_split("chitchat", open_dataset(data_dir, "chitchat")[0]["val"], True)
    gpt = silent_gpt()
    losses = []
    for messages in documents:
        ids = GPT2.encode_chat(messages)
        spans = GPT2.message_spans(np.array(ids))
        log_probs = gpt.logits(gpt.hidden(torch.tensor([ids]))).log_softmax(-1)[0].detach()
        for message, start, end in zip(messages, spans.content, spans.end, strict=True):
            if message["role"] == "assistant":
                losses += [-float(log_probs[at - 1, ids[at]]) for at in range(start, end)]  # up to and with <|im_end|>
    assert measure.chitchat_loss(gpt, split, "cpu", "float32") == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("system", [None, "Answer like a pirate."])
def test_the_style_is_counted_after_the_system_message_and_the_length_without(system):
    openers = [text for _, text, _ in chat_scores.openers(chat_scores.load_questions())]
    asked = []

    def respond(prompts, told=None):
        asked.append(told)
        return [ids_of("Arr, ahoy!" if told == system and number < 3 else "Hello!") for number in range(len(prompts))]

    styled, length = measure.measure_openers(respond, GPT2, system)
    assert styled == dict.fromkeys(openers[:3], f"Arr, ahoy!{IM_END}")
    lengths = [len(ids_of(text)) - 1 for text in ("Arr, ahoy!", "Hello!")]
    n_styled = 3 if system is None else 0
    assert length == pytest.approx((n_styled * lengths[0] + (len(openers) - n_styled) * lengths[1]) / len(openers))
    assert asked == ([None] if system is None else [None, system]), "each kind of reply is generated once"


def test_a_system_message_comes_before_the_prompt_and_stays_in_the_correction():
    gpt, system = GPT(CONFIG), "Answer like a pirate."
    found = list(make.pirate_corrections(lambda prompts: [ids_of("Hello!")], GPT2, ["Hi"], system))
    messages = [*make.asked("Hi", system), {"role": "assistant", "content": "Arr, ahoy!"}]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert list(conversations(found)) == [messages]
    row = GPT2.encode_chat(messages[:2], add_generation_prompt=True)
    with torch.no_grad():
        likeliest = int(gpt.logits(gpt.hidden(torch.tensor([row])))[0, -1].argmax())
    assert make.replies(gpt, GPT2, GREEDY, None, ["Hi"], system)[0][0] == likeliest
