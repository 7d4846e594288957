"""Preference layouts made into pairs, and prepare-preferences.py on local files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.dataset import open_dataset, read_info
from data.documents import document_line, read_document_line, read_prepared
from data.layouts.chat import conversations
from data.layouts.preferences import differing_answers, labelled_answers, nonempty_answer, preferences
from setup_tokenizer import encode_chat

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT.parent / "shared" / "data" / "chat"

HI = {"role": "user", "content": "Hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello!", "What?"))
PAIR = [HI, {**GOOD, "preferred": True}, {**BAD, "preferred": False}]


def made(*records: dict, language: str | None = None) -> tuple[list, dict]:
    """(pairs, what was skipped)."""
    skipped = Counter()
    return list(preferences(records, skipped, language)), dict(skipped)


def row(message_id: str, parent_id: str | None, role: str, text: str, rank: int | None = None, **more) -> dict:
    fields = {"message_id": message_id, "parent_id": parent_id, "role": role, "text": text, "rank": rank}
    return {**fields, "lang": "en", "deleted": False, **more}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"Prompt": [HI], "Chosen": [GOOD], "Rejected": [BAD]},
        {"chosen": [HI, GOOD], "rejected": [HI, BAD]},
        {"prompt": "Hi", "prompt_id": "x", "chosen": [HI, GOOD], "rejected": [HI, BAD], "score_chosen": 8.0},
        {"prompt": [HI], "chosen": GOOD, "rejected": BAD},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " What?"},
        {"question": "Hi", "response_j": "Hello!", "response_k": "What?"},
        {"input": {"messages": [HI]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {
            "instruction": "Hi",
            "completions": [{"response": "What?", "overall_score": 3.0}, {"response": "Hello!", "overall_score": 9}],
        },
        {"messages": [HI, BAD], "correction": "Hello!"},
        {"id": "1", "messages": [HI, BAD], "correction": "Hello!", "rating": "good", "preferred_over": None},
        {"id": "1", "messages": [HI, GOOD], "preferred_over": {"content": "What?"}, "rating": None},
    ],
)
def test_every_layout_gives_the_same_pair(record):
    pairs, skipped = made(record)
    assert [[{**message, "content": message["content"].strip()} for message in pair] for pair in pairs] == [PAIR]
    assert skipped == {}


def test_a_prompt_keeps_its_system_message_its_input_and_its_earlier_turns():
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "Add.\n\n1 and 2"}
    pair = {"chosen": "3", "rejected": "4"}
    answers = [{"role": "assistant", "content": text, "preferred": text == "3"} for text in "34"]
    found, _ = made(
        {"system": "Be brief.", "instruction": "Add.", "input": "1 and 2", **pair},
        {"prompt": [system, question], **pair},
        {"prompt": [HI, GOOD, question], **pair},
    )
    assert found == [[system, question, *answers], [system, question, *answers], [HI, GOOD, question, *answers]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": " Hello! "}, "pair of equal answers"),
        ({"prompt": "Hi", "chosen": "", "rejected": "What?"}, "conversation with an empty message"),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": None}, "conversation with an empty message"),
        ({"prompt": " ", "chosen": "Hello!", "rejected": "What?"}, "conversation with an empty message"),
        (
            {"chosen": [HI, GOOD], "rejected": [{**HI, "content": "Ho"}, BAD]},
            "pair whose answers do not share a prompt",
        ),
        ({"chosen": [HI, GOOD, HI, GOOD], "rejected": [HI, BAD]}, "pair whose answers do not share a prompt"),
        ({"chosen": "Hello!", "rejected": "What?"}, "conversation without a question and an answer"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 5},
            "pair of answers with equal scores",
        ),
        ({"prompt": "Hi", "completion": "Hello!", "label": True}, "label without an opposite one on the same prompt"),
        ({"prompt": "Hi", "completions": [{"response": "a", "score": 1}]}, "record with a single scored answer"),
        ({"prompt": "Hi", "completion": "Hello!"}, "record that is not a conversation"),
        ({"messages": [HI, GOOD], "rating": "fine"}, "record that is not a conversation"),
    ],
)
def test_what_gives_no_pair_is_counted_once_by_reason(record, reason):
    assert made(record) == ([], {reason: 1})


def test_labels_on_one_prompt_pair_up_whatever_their_layout():
    found, skipped = made(
        {"prompt": "Hi", "completion": "Hello!", "label": True},
        {"messages": [HI, BAD], "rating": "bad"},
        {"prompt": "Hi", "completion": "Go.", "label": False},
        {"messages": [{**HI, "content": "Ho"}, GOOD], "rating": "good"},
    )
    assert [[message["content"] for message in pair] for pair in found] == [
        ["Hi", "Hello!", "What?"],
        ["Hi", "Hello!", "Go."],
    ]
    assert skipped == {"label without an opposite one on the same prompt": 1}


def test_of_the_events_about_one_reply_the_last_one_counts():
    """Also where other records, and events about other replies, are in between; withdrawn feedback gives nothing."""
    reply, other = {"id": "1", "messages": [HI, BAD]}, {"id": "2", "messages": [HI, GOOD]}
    trl = {"id": "1", "prompt": "Ho", "chosen": "Hello!", "rejected": "What?"}
    found, skipped = made(
        {**reply, "correction": "Hello?"},
        {**other, "rating": "good"},
        {**reply, "rating": "good"},
        trl,
        {**reply, "rating": "good", "correction": "Hi!"},
        {**other, "rating": "none"},
        {**reply, "rating": "bad", "correction": "Good day!"},
        {"id": "3", "messages": [HI, BAD], "rating": "bad"},
        {"id": "4", "messages": [HI, GOOD], "preferred_over": {"content": "What?"}},
        {"id": "4", "messages": [HI, BAD], "preferred_over": {"content": "Hello!"}},
        trl,
    )
    assert [[message["content"] for message in pair] for pair in found] == [
        ["Ho", "Hello!", "What?"],
        ["Ho", "Hello!", "What?"],
        ["Hi", "Good day!", "What?"],
        ["Hi", "What?", "Hello!"],
    ]
    assert skipped == {
        "feedback that a later event replaces": 5,
        "feedback that was withdrawn": 1,
        "label without an opposite one on the same prompt": 1,
    }


def test_chat_data_is_made_of_the_last_events_too():
    events = [
        {"id": "1", "messages": [HI, BAD], "rating": "good"},
        {"id": "2", "messages": [HI, GOOD], "rating": "good"},
        {"id": "1", "messages": [HI, BAD], "rating": "none"},
    ]
    skipped = Counter()
    assert list(conversations(events, skipped=skipped)) == [[HI, GOOD]]
    assert skipped == {"feedback that a later event replaces": 1, "feedback that was withdrawn": 1}


def test_labelled_answers_are_those_of_pairs_and_all_labels():
    skipped = Counter()
    records = [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"prompt": "Ho", "completion": "Hey!", "label": True},
        {"messages": [{**HI, "content": "Ha"}, BAD], "rating": "bad"},
        {"messages": [{**HI, "content": "Hm"}, BAD], "correction": "Hello!"},
        {"prompt": "He", "completion": " ", "label": True},
    ]
    found = list(labelled_answers(records, skipped))
    assert [[message["content"] for message in each] for each in found] == [
        ["Hi", "Hello!", ""],
        ["Hi", "", "What?"],
        ["Hm", "Hello!", ""],
        ["Hm", "", "What?"],
        ["Ho", "Hey!", ""],
        ["Ha", "", "What?"],
    ]
    assert all([message["preferred"] for message in each[-2:]] == [True, False] for each in found)
    assert skipped == {"conversation with an empty message": 1}


def test_oasst_compares_the_best_reply_with_each_worse_one():
    tree = [
        row("q", None, "prompter", "Hi"),
        row("a1", "q", "assistant", "good", 0),
        row("a2", "q", "assistant", "fair", 1),
        row("a3", "q", "assistant", "also good", 0),
        row("a4", "q", "assistant", "unranked"),
        row("a5", "q", "assistant", "deleted", 2, deleted=True),
        row("p", "a2", "prompter", "And?"),
        row("b1", "p", "assistant", "second", 1),
        row("b2", "p", "assistant", "first", 0),
        row("p2", "a1", "prompter", "Why?"),
        row("c1", "p2", "assistant", "So.", 0),
    ]
    found, skipped = made(*tree, language="en")
    assert [[message["content"] for message in pair] for pair in found] == [
        ["Hi", "good", "fair"],
        ["Hi", "fair", "And?", "first", "second"],
    ]
    assert skipped["OASST prompt without replies of different rank"] == 1
    assert made(*tree, language="de")[0] == []


def test_a_pair_is_stored_in_trls_layout_and_read_back():
    line = document_line(PAIR)
    assert json.loads(line) == {"prompt": [HI], "chosen": [GOOD], "rejected": [BAD]}
    assert read_document_line(line, "preference") == PAIR
    assert made(json.loads(line)) == ([PAIR], {})


@pytest.mark.parametrize("is_good", [True, False])
def test_a_labelled_answer_is_stored_in_trls_layout_and_read_back(is_good):
    record = {"prompt": [HI], "completion": [GOOD if is_good else BAD], "label": is_good}
    (labelled,) = labelled_answers([record])
    line = document_line(labelled)
    assert json.loads(line) == record
    assert read_document_line(line, "label") == labelled
    assert nonempty_answer(labelled) == labelled
    assert nonempty_answer([{**message, "content": ""} for message in labelled]) is None


def test_answers_that_cleaning_makes_equal_are_dropped():
    assert differing_answers(PAIR) == PAIR
    assert differing_answers([HI, {**GOOD, "preferred": True}, {**GOOD, "preferred": False}]) is None
    assert differing_answers([HI, {**GOOD, "content": "", "preferred": True}, PAIR[-1]]) is None


def prepare(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(ROOT / "data" / "prepare-preferences.py"),
        "--output_dir",
        "out",
        *map(str, arguments),
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_script_writes_pairs_and_keeps_questions_out_of_both_splits(tmp_path):
    records = [
        {"prompt": f"question {index // 2}", "chosen": f"good {index}", "rejected": f"bad {index}"}
        for index in range(40)
    ]
    lines = [json.dumps(record) for record in [*records, records[0], {"prompt": "x", "chosen": "y", "rejected": "y"}]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    done = prepare("--input", "pairs.jsonl", "--name", "mine", "--val_fraction", "0.2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "read: 42, kept: 40" in done.stdout and "pair of equal answers: 1" in done.stdout
    assert "python train.py --dataset mine --objective dpo --init_from CHECKPOINT --data_dir out" in done.stdout
    info = read_info(tmp_path / "out", "mine")
    assert (info.format, info.report["duplicates"]) == ("preference", 1)
    train, val = (list(read_prepared(tmp_path / "out", info, split)) for split in ("train", "val"))
    assert len(train) + len(val) == 40 and val
    assert not {pair[0]["content"] for pair in train} & {pair[0]["content"] for pair in val}
    streams, _ = open_dataset(tmp_path / "out", "mine")
    expected = np.concatenate([encode_chat(pair, end_of_conversation=True) for pair in train])
    assert streams["train"].read(0, len(expected)).tolist() == expected.tolist()
    assert len(streams["train"]) == len(expected)


def test_the_script_writes_labelled_answers(tmp_path):
    records = [{"prompt": f"question {number}", "completion": "yes", "label": number % 2 == 0} for number in range(38)]
    records += [{"prompt": f"which {number}?", "chosen": "this", "rejected": "that"} for number in range(6)]
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    without = prepare("--input", "labels.jsonl", "--name", "mine", "--val_fraction", "0.2", cwd=tmp_path)
    assert without.returncode == 0 and "label without an opposite one on the same prompt: 38" in without.stdout
    done = prepare("--input", "labels.jsonl", "--name", "mine", "--labels", "--val_fraction", "0.2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "read: 50, kept: 50" in done.stdout
    assert "python train.py --dataset mine --objective kto --init_from CHECKPOINT --data_dir out" in done.stdout
    info = read_info(tmp_path / "out", "mine")
    assert info.format == "label"
    train, val = (list(read_prepared(tmp_path / "out", info, split)) for split in ("train", "val"))
    assert len(train) + len(val) == 50 and val
    assert sum(bool(each[-2]["content"]) for each in train + val) == 19 + 6
    streams, _ = open_dataset(tmp_path / "out", "mine")
    expected = np.concatenate([encode_chat(each, end_of_conversation=True) for each in train])
    assert streams["train"].read(0, len(expected)).tolist() == expected.tolist()


def test_ratings_without_pairs_are_a_sentence_that_names_the_option(tmp_path):
    (tmp_path / "rated.jsonl").write_text(json.dumps({"messages": [HI, GOOD], "rating": "good"}))
    done = prepare("--input", "rated.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("); add --labels, for --objective kto")


def test_a_file_without_pairs_is_a_sentence(tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [HI, GOOD]}))
    done = prepare("--input", "chat.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no usable preference pair in chat.jsonl (")
    assert "its fields: messages" in done.stderr


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the sample of OASST is not here")
def test_real_rankings_give_pairs(tmp_path):
    done = prepare("--input", SAMPLES / "oasst1_en_validation.jsonl", "--source", "oasst1", cwd=tmp_path)
    assert done.returncode == 0 and "licence: Apache-2.0" in done.stdout
    info = read_info(tmp_path / "out", "preferences")
    assert sum(split.documents for split in info.splits.values()) == 710
