"""check_special_tokens.py: what it counts and which faults it finds."""

from __future__ import annotations

import random

import numpy as np
import pytest

from data.token_stream import TokenStream
from setup_tokenizer import (
    ENDOFTEXT_ID,
    IM_END_ID,
    IM_START_ID,
    ROLES,
    encode_chat,
    encode_document,
    get_extended_tokenizer,
)
from tests.test_testing_tools import (
    CONVERSATIONS,
    TOOLS,
    chat_ids,
    check,
    inspect_ids,
    run_tool,
    write_bin,
    write_dataset,
)

# --- check_special_tokens.py ---


def test_the_tokenizer_checks_pass():
    for tokenizer_check in check.TOKENIZER_CHECKS:
        tokenizer_check()


def test_a_good_chat_file_is_counted(tmp_path):
    findings = inspect_ids(chat_ids(), tmp_path)
    assert not findings.problems
    assert findings.documents == 3 and findings.tokens == len(chat_ids())
    assert findings.messages == {"system": 1, "user": 3, "assistant": 4}
    assert list(findings.controls.values()) == [3, 8, 8]


def test_a_good_text_file_is_counted(tmp_path):
    ids = encode_document("Once upon a time.") + encode_document("It says <|im_start|>.")
    findings = inspect_ids(ids, tmp_path, is_chat=False)
    assert not findings.problems and findings.documents == 2 and not findings.messages


@pytest.mark.parametrize(
    ("ids", "problem", "position"),
    [
        ([IM_START_ID, 7220, 198, 17250, ENDOFTEXT_ID], "message not closed before <|endoftext|>", 4),
        ([IM_START_ID, 7220, 198, IM_START_ID, 7220, 198, IM_END_ID, 198, ENDOFTEXT_ID], "before the last message", 3),
        ([17250, IM_END_ID, 198, ENDOFTEXT_ID], "<|im_end|> without <|im_start|>", 1),
        ([IM_START_ID, 7220, 198, IM_END_ID, IM_END_ID, 198, ENDOFTEXT_ID], "<|im_end|> without <|im_start|>", 4),
        ([IM_START_ID, 7220, 198, IM_END_ID, ENDOFTEXT_ID], "no newline after <|im_end|>", 4),
        ([IM_START_ID, 7220, 198, IM_END_ID, 220, ENDOFTEXT_ID], "no newline after <|im_end|>", 5),
        ([17250, IM_START_ID, 7220, 198, IM_END_ID, 198, ENDOFTEXT_ID], "text outside messages", 1),
        ([17250, ENDOFTEXT_ID], "text outside messages", 1),
        ([IM_START_ID, 17250, 198, IM_END_ID, 198, ENDOFTEXT_ID], "without a known role", 0),
        ([IM_START_ID, 7220, 17250, IM_END_ID, 198, ENDOFTEXT_ID], "without a known role", 0),
        ([IM_START_ID, 562, 198, IM_END_ID, 198, ENDOFTEXT_ID], "without a known role", 0),
        ([IM_START_ID, 7220, IM_END_ID, 198, ENDOFTEXT_ID], "without a known role", 0),
        ([*encode_chat(CONVERSATIONS[0]), ENDOFTEXT_ID, ENDOFTEXT_ID], "empty document", -1),
        ([ENDOFTEXT_ID], "empty document", 0),
        (encode_chat(CONVERSATIONS[0]), "last document without <|endoftext|>", -1),
        ([IM_START_ID, 7220, 198], "message not closed at the end", 0),
        ([IM_START_ID], "without a known role", 0),
        ([IM_START_ID, 7220, 198, 50300, IM_END_ID, 198, ENDOFTEXT_ID], "outside the vocabulary", 3),
    ],
)
def test_each_fault_is_named_with_its_place(tmp_path, ids, problem, position):
    findings = inspect_ids(ids, tmp_path)
    named = [name for name in findings.problems if problem in name]
    assert len(named) == 1, findings.problems
    assert findings.first[named[0]] == position % len(ids)


def test_control_tokens_of_a_chat_are_a_fault_in_a_text(tmp_path):
    findings = inspect_ids([*encode_document("a"), IM_START_ID, ENDOFTEXT_ID], tmp_path, is_chat=False)
    assert findings.first == {"control token of a chat in a text": 2}


def is_well_formed(ids: list[int]) -> bool:
    """A chat stream read one id at a time: the slow reference."""
    enc = get_extended_tokenizer()
    if not ids or ids[-1] != ENDOFTEXT_ID or max(ids) >= enc.n_vocab:
        return False
    position = 0
    while position < len(ids):
        n_messages = 0
        while position < len(ids) and ids[position] == IM_START_ID:
            end = position + 1
            while end < len(ids) and ids[end] < ENDOFTEXT_ID:
                end += 1
            if end >= len(ids) - 1 or ids[end] != IM_END_ID or ids[end + 1] != 198:
                return False
            body = ids[position + 1 : end]
            if not any(
                body[: len(role)] == role
                and enc.decode_single_token_bytes(next(iter(body[len(role) :]), 0))[:1] == b"\n"
                for role in map(enc.encode_ordinary, ROLES)
            ):
                return False
            position, n_messages = end + 2, n_messages + 1
        if position >= len(ids) or ids[position] != ENDOFTEXT_ID or not n_messages:
            return False
        position += 1
    return True


def test_damage_is_found_exactly_where_the_slow_reference_finds_it(tmp_path):
    rng = random.Random(1337)
    tokens = [IM_START_ID, IM_END_ID, ENDOFTEXT_ID, 198, 628, 7220, 562, 10167, 10057, 17250, 50259, 65535]
    n_damaged = 0
    for _ in range(400):
        ids = chat_ids(rng.sample(CONVERSATIONS, rng.randint(1, 3)))
        for _ in range(rng.randint(0, 2)):
            position = rng.randrange(len(ids))
            change = rng.choice(["replace", "insert", "delete"])
            ids[position : position + (change != "insert")] = [] if change == "delete" else [rng.choice(tokens)]
        if not ids:
            continue
        expected = is_well_formed(ids)
        n_damaged += not expected
        findings = inspect_ids(ids, tmp_path, chunk_tokens=rng.choice([1, 7, 1 << 20]))
        assert bool(findings.problems) == (not expected), (ids, findings.problems)
    assert 50 < n_damaged < 350


def test_the_size_of_the_chunks_changes_nothing(tmp_path):
    rng = random.Random(7)
    ids = chat_ids(CONVERSATIONS * 3)
    for position in rng.sample(range(len(ids)), 5):
        ids[position] = rng.choice([IM_START_ID, IM_END_ID, 17250])
    whole = inspect_ids(ids, tmp_path)
    assert whole.problems
    for chunk_tokens in (1, 5, 33):
        assert inspect_ids(ids, tmp_path, chunk_tokens=chunk_tokens) == whole


def test_targets_are_marked_in_the_sample(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    ids = np.array(chat_ids(CONVERSATIONS[:1]))
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello, Ana!<|im_end|>]]\n<|endoftext|>"
    assert check.show_sample(ids) == expected
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32mHello, Ana!<|im_end|>\x1b[0m\n<|endoftext|>" in check.show_sample(ids)
    assert check.show_sample(ids[:0]) == ""


def test_text_cannot_send_commands_to_the_terminal():
    ids = np.array(encode_chat([{"role": "user", "content": "\x1b[31m red \x07"}]))
    assert "\x1b" not in check.show_sample(ids) and "\\x1b[31m red \\x07" in check.show_sample(ids)


def test_a_data_set_is_checked_from_any_folder(tmp_path):
    write_dataset(tmp_path, "mine")
    done = run_tool(TOOLS / "check_special_tokens.py", "--dataset", "mine", "--data_dir", tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mine-train-00000.bin and 1 more, chat" in done.stdout and "mine-val.bin, chat" in done.stdout
    assert done.stdout.count("every control token is well formed") == 2
    assert "[[Hello, Ana!<|im_end|>]]" in done.stdout and "\x1b" not in done.stdout


def test_one_file_of_a_data_set_is_checked_against_the_json(tmp_path):
    write_dataset(tmp_path, "mine", documents=5)
    done = run_tool(TOOLS / "check_special_tokens.py", tmp_path / "mine-train-00001.bin", "--sample", 0)
    assert done.returncode == 1
    assert "mine.json says 5 documents, the file contains 3" in done.stdout
    assert "mine-val.bin" not in done.stdout and "[[" not in done.stdout


def test_a_malformed_file_without_a_json_is_reported(tmp_path):
    path = write_bin(tmp_path / "a.bin", [IM_START_ID, 7220, 198, 17250, 65535, ENDOFTEXT_ID])
    done = run_tool(TOOLS / "check_special_tokens.py", path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "MALFORMED: message not closed before <|endoftext|>: 1 times, first at token 5" in done.stdout
    assert "<65535>" in done.stdout


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "not found"), (b"", "is empty"), (b"abc", "3 bytes, an odd number")],
)
def test_a_file_that_is_no_bin_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "a-train.bin"
    if content is not None:
        path.write_bytes(content)
    done = run_tool(TOOLS / "check_special_tokens.py", path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_changed_bin_or_a_missing_data_set_is_one_sentence(tmp_path):
    write_dataset(tmp_path, "mine")
    write_bin(tmp_path / "mine-val.bin", [1, 2, 3])
    for name, sentence in (("mine", "sha256"), ("yours", "not found")):
        done = run_tool(TOOLS / "check_special_tokens.py", "--dataset", name, "--data_dir", tmp_path)
        assert done.returncode == 1
        assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_file_without_documents_is_refused_before_all_of_it_is_in_memory(tmp_path):
    stream = TokenStream([write_bin(tmp_path / "a.bin", [17250] * 1000)])
    with pytest.raises(check.UserError, match=r"no <\|endoftext\|> in"):
        list(check.whole_documents(stream, chunk_tokens=8, longest=64))
