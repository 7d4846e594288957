"""The layouts of people's own files: each becomes the same conversations, and every record is kept or counted."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from common.cli import UserError
from data.counts import Skipped, n_dropped, reasons_in_words
from data.dataset import open_dataset
from data.documents import read_prepared
from data.layouts.chat import conversations, layout_of
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from data.readers.recognize import read_documents, recognize
from data.readers.records import read_records
from setup_tokenizer import get_extended_tokenizer
from training.rows import ChatRows

ROOT = Path(__file__).resolve().parent.parent
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
FOUR = [*HELLO, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}]
SYSTEM = {"role": "system", "content": "Be brief."}


def made(*records: dict, **more) -> tuple[list, dict]:
    """(conversations, what was skipped)."""
    skipped = Skipped()
    return list(conversations(records, skipped=skipped, **more)), dict(skipped)


def renamed(role: str, content: str, *names: str, turns=FOUR) -> list[dict]:
    """Turns with other field names and other role names."""
    roles = dict(zip(("user", "assistant"), names, strict=True))
    return [{role: roles[turn["role"]], content: turn["content"]} for turn in turns]


def chatgpt(branch: list[dict], **fields) -> dict:
    """A conversation of ChatGPT's export, with a hidden message and an abandoned branch after the root."""
    mapping: dict = {"r": {"id": "r", "message": None, "parent": None, "children": ["s"]}}
    hidden = {"author": {"role": "system"}, "content": {"content_type": "text", "parts": [""]}, "weight": 0.0}
    mapping["s"] = {"id": "s", "message": hidden, "parent": "r", "children": ["x", "0"]}
    other = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["abandoned"]}}
    mapping["x"] = {"id": "x", "message": other, "parent": "s", "children": []}
    for index, turn in enumerate(branch):
        content = {"content_type": "text", "parts": [turn["content"]]}
        message = {"author": {"role": turn["role"]}, "content": content, "weight": 1.0}
        parent, child = str(index - 1) if index else "s", str(index + 1)
        children = [child] if index + 1 < len(branch) else []
        mapping[str(index)] = {"id": str(index), "message": message, "parent": parent, "children": children}
    return {"title": "T", "mapping": mapping, "current_node": str(len(branch) - 1), **fields}


LAYOUTS = {
    "conversation": {"conversation_id": "x", "conversation": FOUR, "turn": 2, "language": "English"},
    "messages as JSON text": {"messages": json.dumps(FOUR)},
    "structs of lists": {"messages": {key: [turn[key] for turn in FOUR] for key in ("role", "content")}},
    "strings": {"dialog": [turn["content"] for turn in FOUR]},
    "ultrachat": {"id": "1", "data": [turn["content"] for turn in FOUR]},
    "messages of strings": {"messages": [turn["content"] for turn in FOUR]},
    "pairs": {"conversations": [{"human": "Hi", "assistant": "Hello!"}, {"human": "Bye", "assistant": "See you."}]},
    "history": {"instruction": "Bye", "input": "", "output": "See you.", "history": [["Hi", "Hello!"]]},
    "history of question and answer": {"question": "Bye", "answer": "See you.", "history": [["Hi", "Hello!"]]},
    "trl": {"prompt": FOUR[:3], "completion": FOUR[3:]},
    "chatgpt": chatgpt(FOUR),
    "chatgpt without a current node": chatgpt(FOUR, current_node=None),
    "claude": {"uuid": "u", "chat_messages": renamed("sender", "text", "human", "assistant")},
    "null roles": {"conversations": [{**turn, "from": None, "value": None} for turn in FOUR]},
    "null values": {
        "messages": None,
        "conversations": [{**turn, "role": None, "content": None} for turn in renamed("from", "value", "human", "gpt")],
    },
    "null turns and parts": {
        "messages": [None, {**FOUR[0], "content": ["Hi", None, {"type": "text", "text": None}]}, *FOUR[1:], None]
    },
    "structs of lists with nulls": {
        "conversations": {
            "from": ["human", "gpt", "human", "gpt", None],
            "value": [*(turn["content"] for turn in FOUR), None],
            "weight": [None] * 5,
        }
    },
    "null conversations": {"conversations": None, "messages": FOUR, "tools": None},
    "parts": {
        "messages": [{**turn, "content": [{"type": "text", "value": turn["content"], "text": None}]} for turn in FOUR]
    },
    **{
        name: {"messages": renamed("role", "content", "Human", name)}
        for name in ("ai", "AI", "bing", "bard", "chatbot", "gpt-4", "gpt-3.5-turbo", "claude-2", "Assistant", "model")
    },
    "authors": {"conversation": renamed("author", "text", "user", "bot")},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_conversation(name):
    assert layout_of(LAYOUTS[name])
    assert made(LAYOUTS[name]) == ([FOUR], {})


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response")),
        *(("instruction", "output"), ("instruction", "response"), ("input", "output"), ("query", "response")),
        *(("Question", "Answer"), ("problem", "solution"), ("PROMPT", "Completion")),
    ],
)
def test_questions_with_an_answer(question, answer):
    assert made({"id": 1, question: "Hi", answer: "Hello!", "extra": None}) == ([HELLO], {})
    found = made({question: "Hi", answer: None}, {question: None, answer: "Hello!"})
    assert found[0] == [] and sum(found[1].values()) == 2


def test_system_prompts_of_every_name():
    for field in ("system", "system_prompt", "system_message"):
        assert made({field: "Be brief.", "question": "Hi", "response": "Hello!"}) == ([[SYSTEM, *HELLO]], {})
    assert made({"system": "Be long.", "messages": [SYSTEM, *HELLO]}) == ([[SYSTEM, *HELLO]], {})


def test_every_instance_of_an_instruction_is_a_conversation():
    record = {"id": "seed", "instruction": "Add.", "instances": [{"input": n, "output": n} for n in ("1", "2")]}
    assert [messages[0]["content"] for messages in made(record)[0]] == ["Add.\n\n1", "Add.\n\n2"]


def test_a_function_call_counts_like_tool_calls():
    call = {"name": "f", "arguments": "{}"}
    reason = {"conversation with a function or tool message": 2}
    with_call = [HELLO[0], {**HELLO[1], "function_call": call}]
    assert made({"messages": with_call}, {"messages": [*with_call, *HELLO]}) == ([], reason)
    assert made({"messages": [HELLO[0], {**HELLO[1], "function_call": None, "tool_calls": []}]}) == ([HELLO], {})


def test_preferences_are_never_trained_as_answers():
    chosen = {"from": "gpt", "value": "Hello!"}
    records = [
        {"conversations": FOUR, "chosen": chosen, "rejected": chosen},
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {"messages": HELLO, "label": False},
        {"prompt": "Hi", "completion": "No.", "label": False},
        {"messages": HELLO, "label": True, "chosen": None},
    ]
    found, skipped = made(*records)
    assert found == [HELLO]
    assert sorted(skipped.values()) == [2, 2] and all(reason.startswith("preference data") for reason in skipped)


def test_feedback_trains_the_corrected_or_well_rated_reply_and_nothing_else():
    again = {"role": "assistant", "content": "Farewell!"}
    found, skipped = made(
        {"messages": FOUR, "correction": "Farewell!"},
        {"messages": FOUR, "rating": "bad", "correction": "Farewell!"},
        {"messages": HELLO, "rating": "good"},
        {"messages": HELLO, "rating": "bad"},
        {"messages": HELLO, "rating": 5},  # of another data set: a conversation with a field more
    )
    context = [FOUR[0], {**FOUR[1], "weight": 0}, FOUR[2]]
    assert found == [[*context, again], [*context, again], HELLO, HELLO]
    assert skipped == {"answer of weight 0, no target": 2, "reply rated bad, without a correction": 1}


def test_an_image_is_not_text():
    turns = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Hi"}]}, HELLO[1]]
    assert made({"messages": turns}) == ([], {"conversation with content that is not text": 1})


def test_records_with_the_text_field_stay_texts(tmp_path):
    record = {"text": "One", "prompt": "Hi", "response": "Hello!"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert recognize(tmp_path / "a.jsonl").kind == "text"
    assert recognize(tmp_path / "a.jsonl", "body").kind == "chat"


def test_unknown_roles_are_named():
    skipped = Skipped()
    turns = [HELLO[0], {"role": "Narrator", "content": "x"}, HELLO[1]]
    assert list(conversations([{"messages": turns}] * 3, skipped=skipped)) == []
    assert reasons_in_words(skipped) == "conversation with an unknown role (Narrator): 3"


# --- exports of messengers ---


def telegram(*said: tuple[str, int, str]) -> dict:
    messages = [
        {"id": n, "type": "message", "date": f"2024-01-{1 + hour // 24:02}T{hour % 24:02}:00:00", "from": name}
        | {"from_id": name, "text": text if n % 2 else [text[:1], {"type": "bold", "text": text[1:]}]}
        for n, (name, hour, text) in enumerate(said)
    ]
    service = {"id": 99, "type": "service", "date": "2024-01-01T00:00:00", "actor": "Bo", "actor_id": "Bo", "text": ""}
    return {"name": "Bo", "type": "personal_chat", "id": 1, "messages": [service, *messages]}


SAID = [("Bo", 1, "Hi"), ("Al", 1, "Hello!"), ("Bo", 2, "Bye"), ("Al", 2, "See"), ("Al", 2, "you."), ("Bo", 30, "Hi")]
SAID += [("Al", 31, "Hello!")]


def test_telegram_and_discord_become_conversations_with_me_as_the_assistant():
    expected = [[*FOUR[:3], {"role": "assistant", "content": "See\nyou."}], HELLO]
    found, skipped = made(telegram(*SAID), me="Al")
    assert found == expected
    assert skipped == {"message without text or name, left out": 1}
    assert made({"chats": {"list": [telegram(*SAID)]}}, me="Al")[0] == expected
    discord = {"guild": {}, "channel": {"name": "c"}, "messages": []}
    for message in telegram(*SAID)["messages"][1:]:
        text = message["text"] if isinstance(message["text"], str) else message["text"][0] + message["text"][1]["text"]
        author = {"id": "1", "name": message["from"]}
        time = f"{message['date']}.123+00:00"
        discord["messages"].append({"type": "Default", "timestamp": time, "content": text, "author": author})
    assert made(discord, me="Al") == (expected, {})


def test_an_export_without_me_says_what_is_missing():
    for me, missing in ((None, "it is not known who the assistant is"), ("Cy", "nobody in it is called 'Cy'")):
        with pytest.raises(UserError, match=rf'{missing}.*--me "Bo" \(names in it: Al, Bo\)'):
            made(telegram(*SAID), me=me)


def test_others_of_a_group_are_named():
    found = made(telegram(("Bo", 1, "Hi"), ("Cy", 1, "Hey"), ("Al", 1, "Hello!")), me="Al")[0]
    assert found[0][0]["content"] == "Bo: Hi\nCy: Hey"


@pytest.mark.parametrize("line", ["[{d}/12/2023, {h}:05:00] {n}: {t}", "12/{d}/23, {h}:05 - {n}: {t}"])
def test_whatsapp_needs_me(tmp_path, line):
    rows = [line.format(d=20 + hour // 24, h=hour % 24, n=name, t=text) for name, hour, text in SAID]
    head = line.format(d=20, h=1, n="", t="x").split("{n}")[0].rstrip(": x") + " Messages are encrypted"
    path = tmp_path / "_chat.txt"
    path.write_text("\n".join([head, *rows[:-1], rows[-1].replace("Hello!", "Hello!\nsecond line")]))
    assert "--me NAME" in str(recognize(path)) and recognize(path).kind == "text"
    found = list(read_documents(recognize(path, me="Al")))
    assert [len(messages) for messages in found] == [4, 2]
    assert found[1][1]["content"] == "Hello!\nsecond line"
    assert found[0][3]["content"] == "See\nyou."


def test_midnight_on_a_12_hour_clock_does_not_end_a_conversation(tmp_path):
    path = tmp_path / "_chat.txt"
    path.write_text("[20/12/23, 11:59:00 PM] Bo: Hi\n[21/12/23, 12:01:00 AM] Al: Hello!\n")
    (messages,) = read_documents(recognize(path, me="Al"))
    assert [message["content"] for message in messages] == ["Hi", "Hello!"]


@pytest.mark.parametrize(
    ("last_of_january", "february", "later"),
    [("1/31/23", "2/{}/23", "2/13/23"), ("31/1/23", "{}/2/23", "13/2/23"), ("2023-01-31", "2023-02-0{}", "2023-02-13")],
    ids=["month first", "day first", "year first"],
)
def test_a_whatsapp_export_has_one_order_of_day_and_month(tmp_path, last_of_january, february, later):
    first, second = february.format(1), february.format(2)
    midnight = [f"{first}, 23:59", f"{second}, 00:01"]  # a silence of a month in the wrong order
    path = tmp_path / "_chat.txt"
    for times, lengths in (
        ([f"{last_of_january}, 10:00", f"{first}, 10:00"], [2, 2]),
        ([*midnight, f"{later}, 10:00"], [4, 2]),
    ):
        path.write_text("".join(f"{time} - {name}: Hi\n" for time in times for name in ("Bo", "Al")))
        assert [len(messages) for messages in read_documents(recognize(path, me="Al"))] == lengths


def test_a_whatsapp_line_in_the_other_order_does_not_change_the_order(tmp_path):
    path = tmp_path / "_chat.txt"
    times = ["2/1/23, 23:59", "2/2/23, 00:01", "2/13/23, 10:00", "2/14/23, 10:00"]
    pasted = "31/12/22, 10:00 - Cy: Happy new year\n"
    path.write_text(pasted + "".join(f"{time} - {name}: Hi\n" for time in times for name in ("Bo", "Al")))
    assert [len(messages) for messages in read_documents(recognize(path, me="Al"))] == [4, 2, 2]


# --- other kinds of files ---


def test_tables_are_records(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\n"Hi","Hello!"\n"1,2\n3","a ""b"""\n,\n')
    assert recognize(tmp_path / "a.csv").kind == "chat"
    assert list(read_records(tmp_path / "a.csv"))[1] == {"question": "1,2\n3", "answer": 'a "b"'}
    skipped = Skipped()
    assert len(list(read_documents(recognize(tmp_path / "a.csv"), skipped))) == 2 and n_dropped(skipped) == 1
    (tmp_path / "b.tsv").write_text("id\tbody\n1\tOne\n2\t\n3\tThree")
    assert list(read_documents(recognize(tmp_path / "b.tsv", "body"))) == ["One", "Three"]
    (tmp_path / "c.csv").write_text("id;body\n1;One\n")
    assert list(read_documents(recognize(tmp_path / "c.csv", "body"))) == ["One"]
    with pytest.raises(UserError, match=r"--field \(id, body\)"):
        recognize(tmp_path / "b.tsv")


def test_pages_books_and_subtitles_are_texts(tmp_path):
    page = "<html><head><title>T</title><style>p{}</style></head><body><h1>One</h1><p>Tom &amp; Ann\n <b>ran</b>.</p>"
    page += "<script>x()</script><pre>a\n  b</pre><ul><li>1</li><li>2</li></ul></body></html>"
    (tmp_path / "a.html").write_text(page)
    assert list(read_documents(recognize(tmp_path / "a.html"))) == ["One\n\nTom & Ann ran.\n\na\n  b\n\n1\n2"]
    (tmp_path / "a.srt").write_text(
        "1\r\n00:00:01,000 --> 00:00:02,000\r\n<i>Good</i>\r\nmorning.\r\n\r\n"
        "2\r\n00:00:03,000 --> 00:00:04,000\r\n5\r\n"
    )
    assert list(read_documents(recognize(tmp_path / "a.srt"))) == ["Good morning.\n5"]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("META-INF/container.xml", "<container/>")
        spine = "".join(f'<itemref idref="{n}"/>' for n in ("two", "one"))
        items = "".join(f'<item id="{n}" href="text/{n}.xhtml"/>' for n in ("one", "two"))
        package = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine>'
        archive.writestr("OEBPS/content.opf", f"{package}</package>")
        for name in ("one", "two"):
            archive.writestr(
                f"OEBPS/text/{name}.xhtml", f"<html><head><title/></head><body><p>{name}</p></body></html>"
            )
    (tmp_path / "a.epub").write_bytes(file.getvalue())
    assert list(read_documents(recognize(tmp_path / "a.epub"))) == ["two", "one"]
    (tmp_path / "b.epub").write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a complete zip archive"):
        list(read_documents(recognize(tmp_path / "b.epub")))


def test_nulls_and_structs_of_parquet(tmp_path):
    records = [
        {"messages": FOUR, "prompt": None},
        {"messages": None, "prompt": "x"},
        {"messages": HELLO, "prompt": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    skipped = Skipped()
    assert list(read_documents(recognize(tmp_path / "a.parquet"), skipped)) == [FOUR, HELLO]
    assert skipped == {"record that is not a conversation": 1}
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": None}) + "\n" + json.dumps({"messages": HELLO}))
    assert recognize(tmp_path / "b.jsonl").kind == "chat"


# --- answers of weight 0 ---


@pytest.mark.parametrize(("field", "zero"), [("weight", 0), ("loss_weight", 0.0), ("train", False)])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_answers_of_weight_0_are_no_targets(tmp_path, field, zero, loss_on):
    turns = [FOUR[0], {**FOUR[1], field: zero}, *FOUR[2:]]
    found, skipped = made(*({"messages": [{"role": "user", "content": f"n{n}"}, *turns[1:]]} for n in range(40)))
    assert skipped == {"answer of weight 0, no target": 40}
    options = PrepareOptions(output_dir=str(tmp_path), workers=1)
    info = prepare(Dataset("mine", "chat", "a test", "MIT"), options, Corpus(found))
    assert next(read_prepared(tmp_path, info, "train"))[1]["weight"] == 0
    streams, _ = open_dataset(tmp_path, "mine")
    rows = ChatRows(streams["train"], 100, 1, loss_on)
    text = ""
    for index in range(rows.start_epoch(0)):
        targets = rows.row(index)[1]
        text += get_extended_tokenizer().decode(targets[targets >= 0].tolist())
    n_train = info.splits["train"].documents
    assert text.count("See you.<|im_end|>") == n_train and "Hello!" not in text
    check = [sys.executable, str(ROOT / "testing_tools" / "check_special_tokens.py"), "--sample", "60"]
    done = subprocess.run([*check, str(tmp_path / "mine-train.bin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(rf"answers of weight 0 +{n_train} ", done.stdout)
    assert "[[See you.<|im_end|>]]" in done.stdout and "[[Hello" not in done.stdout


def test_weights_are_found_in_any_part_of_a_stream(tmp_path):
    found = [
        [
            {**turn, "content": f"{turn['content']} {n}", **({"weight": 0} if turn is FOUR[1] and n % 3 else {})}
            for turn in FOUR
        ]
        for n in range(60)
    ]
    prepare(
        Dataset("mine", "chat", "a test", "MIT"), PrepareOptions(output_dir=str(tmp_path), workers=1), Corpus(found)
    )
    stream = open_dataset(tmp_path, "mine")[0]["train"]
    whole = stream.is_trained(0, len(stream))
    assert 0 < (~whole).sum() < len(whole) / 2
    for start, end in np.random.default_rng(0).integers(0, len(stream), (200, 2)):
        assert (stream.is_trained(start, max(start, end)) == whole[start : max(start, end)]).all()


def test_a_conversation_without_a_trained_answer_is_counted():
    turns = [HELLO[0], {**HELLO[1], "weight": 0}]
    assert made({"messages": turns}) == ([], {"conversation whose answers all have weight 0": 1})
