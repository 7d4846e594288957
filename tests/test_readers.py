"""Reading local files: every format and compression, folders, archives, and each kind of bad input."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cli import UserError
from data.readers.archives import zip_members
from data.readers.inputs import input_files
from data.readers.json import JsonReader
from data.readers.recognize import read_documents, recognize
from data.readers.records import read_records, text_fields
from data.readers.text import MAX_DOCUMENT_BYTES, PLAIN_DOCUMENT_BYTES, raw_documents, read_text_documents

RECORDS = [{"text": "one\ntwo é", "n": 1}, {"text": '[{"}]', "n": 2}, {"text": "three", "n": 3}]


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, compressed as its name says."""
    content = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        import pyarrow

        content = pyarrow.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


def parquet_bytes(records: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


def fault_of(read, *arguments, **settings) -> str:
    """The sentence of the UserError that reading raises."""
    with pytest.raises(UserError) as raised:
        list(read(*arguments, **settings))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- text ---


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz", ".txt.zst"])
def test_lines_endoftext_divide_documents_and_mentions_do_not(tmp_path, suffix):
    path = write(
        tmp_path / f"a{suffix}", "\ufeffOne\nline\n<|endoftext|>\nIts end is `<|endoftext|>`.\n<|endoftext|> \r\nThree"
    )
    assert list(read_text_documents(path)) == ["One\nline", "Its end is `<|endoftext|>`.", "Three"]


def test_a_dump_is_divided_within_its_lines_when_that_is_asked_for(tmp_path):
    path = write(tmp_path / "a.txt", "One<|endoftext|>Two é\n<|endoftext|>Three<|endoftext|>")
    assert list(read_text_documents(path, divide_within_lines=True)) == ["One", "Two é", "Three"]
    assert len(list(read_text_documents(path))) == 1
    assert "--divide_within_lines" in str(recognize(path))
    asked = recognize(path, divide_within_lines=True)
    assert "divided by" in str(asked) and len(list(read_documents(asked))) == 3


def test_the_last_document_needs_no_separator(tmp_path):
    path = write(tmp_path / "a.txt", "One\n<|endoftext|>\nTwo")
    assert list(read_text_documents(path)) == ["One", "Two"]


PIECES = st.sampled_from(["a", "é", "\n", "<|endoftext|>", "\n<|endoftext|>\n", "<|endof", "text|>", " ", "\r\n"])


@given(st.lists(PIECES, max_size=30).map("".join), st.integers(1, 20), st.booleans())
def test_documents_do_not_depend_on_where_blocks_end(text, block_bytes, divide_within_lines):
    raw = text.encode()
    blocks = [raw[start : start + block_bytes] for start in range(0, len(raw), block_bytes)]
    expected = text.split("<|endoftext|>")
    if not divide_within_lines:
        expected = [""]
        for line in text.split("\n"):
            if line.rstrip(" \t\r") == "<|endoftext|>":
                expected.append("")
            else:
                expected[-1] += f"{line}\n"
        expected[-1] = expected[-1].removesuffix("\n")
    if not expected[-1].strip():
        expected.pop()
    found = list(raw_documents(blocks, divide_within_lines))
    assert [document for _, document in found] == [document.encode() for document in expected]
    assert all(raw[offset : offset + len(document)] == document for offset, document in found)


def test_a_short_plain_text_is_one_document(tmp_path):
    path = write(tmp_path / "a.md", "# Title\n\nText.\n\nMore.\n")
    assert list(read_text_documents(path)) == ["# Title\n\nText.\n\nMore."]


@pytest.mark.parametrize("gap", ["\n\n", "\r\n\r\n", "\n", " ", ""])
def test_a_long_plain_text_is_cut_where_it_shows_least_and_nothing_is_lost(tmp_path, gap):
    text = gap.join(f"Sentence {number} über 漢字." for number in range(8000))
    documents = list(read_text_documents(write(tmp_path / "a.txt", text)))
    assert 4 <= len(documents) <= 8
    assert max(len(document.encode()) for document in documents) <= PLAIN_DOCUMENT_BYTES
    assert "".join(documents).replace(" ", "").replace("\n", "").replace("\r", "") == "".join(text.split())
    if "\n" in gap:
        assert all(document.startswith("Sentence") for document in documents)


def test_memory_does_not_grow_with_a_text(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for number in range(60):
            file.write(f"{number} {'word ' * 200_000}\n")  # 1 MB lines, 60 MB, no separator
    tracemalloc.start()
    total = sum(len(document) for document in read_text_documents(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 59e6
    assert peak_bytes < 4 * MAX_DOCUMENT_BYTES + (8 << 20)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_invalid_utf8_is_reported_with_its_byte_offset(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", b"One\n<|endoftext|>\nTw\xffo")
    assert f"{path} is not UTF-8 at byte 20;" in fault_of(read_text_documents, path)


def test_a_text_that_ends_within_a_character_is_not_utf8(tmp_path):
    assert "not UTF-8 at byte 3" in fault_of(read_text_documents, write(tmp_path / "a.txt", "aé".encode() + b"\xc3"))


# --- records ---


def encoded_records() -> dict[str, str | bytes]:
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    return {
        "lines.jsonl": lines + "\n",
        "blank-lines.ndjson": lines.replace("\n", "\r\n\r\n"),
        "lines.json": lines,
        "list.json": json.dumps(RECORDS),
        "indented-list.json": json.dumps(RECORDS, indent=2),
        "bom.json": b"\xef\xbb\xbf" + json.dumps(RECORDS).encode(),
        "within.json": json.dumps({"version": 1, "data": RECORDS}),
        "indented-within.json": json.dumps({"data": RECORDS}, indent=2),
        "table.parquet": parquet_bytes(RECORDS),
    }


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", sorted(encoded_records()))
def test_records_are_the_same_in_every_format(tmp_path, name, compression):
    path = write(tmp_path / f"{name}{compression}", encoded_records()[name])
    assert list(read_records(path)) == RECORDS


@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.none(), max_size=3), max_size=6
    ),
    st.integers(1, 12),
    st.sampled_from([None, 2]),
)
def test_a_json_list_is_read_alike_wherever_blocks_end(records, block_characters, indent):
    text = json.dumps(records, indent=indent, ensure_ascii=False).replace("\ud800", "")
    blocks = [text[start : start + block_characters] for start in range(0, len(text), block_characters)]
    assert [value for _, value in JsonReader(iter(blocks), "a.json").list_elements()] == records


def test_memory_does_not_grow_with_a_json_list(tmp_path):
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[" + ", ".join(json.dumps({"text": "word " * 20_000}) for _ in range(300)) + "]")  # 30 MB, a line
    tracemalloc.start()
    total = sum(len(record["text"]) for record in read_records(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 30_000_000
    assert peak_bytes < 10 << 20


def test_one_record_in_a_json_file_is_that_record(tmp_path):
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    for indent in (None, 2):
        path = write(tmp_path / "a.json", json.dumps(record, indent=indent))
        assert list(read_records(path)) == [record]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', 3),
        ("a.jsonl", '{"a": 1}\n{"a": 1} {"a": 2}\n', 2),
        ("a.jsonl", '{"a": 1}\n' + '{"a":' * 100_000, 2),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", 2),
        ("a.json", '[\n{"a": 1},\n{"a": }\n]', 3),
        ("a.json", '[\n{"a": 1}\n{"a": 2}\n]', 3),
        ("a.json", '[{"a": 1},\n{"a": "never closed\n}]', 2),
        ("a.json", '[{"a": 1},\n', 2),
        ("a.json", '[{"a": 1}]\n\nmore', 3),
        ("a.json", '{"a": 1,\n\n}', 3),
        ("a.json", "[" * 100_000, 1),
    ],
)
def test_broken_json_is_reported_with_its_line(tmp_path, name, content, line):
    path = write(tmp_path / name, content)
    assert fault_of(read_records, path).startswith(f"{path} line {line}: ")


def test_lists_strings_and_nulls_are_records_too(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    expected = [{"messages": turns}, {"text": "One"}, {}, {}, {"a": 1}]
    values = [turns, "One", None, 5, {"a": 1}]
    assert list(read_records(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, values))))) == expected
    assert list(read_records(write(tmp_path / "a.json", json.dumps(values)))) == expected
    assert list(read_records(write(tmp_path / "b.json", json.dumps([None, *values])))) == [{}, *expected]
    assert list(read_records(write(tmp_path / "c.json", json.dumps(turns)))) == [{"messages": turns}]


def test_a_json_file_of_spaces_holds_no_record(tmp_path):
    assert list(read_records(write(tmp_path / "a.json", "\n \n"))) == []
    assert list(read_records(write(tmp_path / "a.jsonl", "\n \n"))) == []


def test_invalid_utf8_in_json_is_reported_with_its_byte_offset(tmp_path):
    for name in ("a.jsonl", "a.json"):
        path = write(tmp_path / name, b'[{"a": "\xc3\x28"}]' if name == "a.json" else b'{"a": "\xc3\x28"}')
        assert f"not UTF-8 at byte {8 if name == 'a.json' else 7};" in fault_of(read_records, path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.json", "a.parquet", "a.parquet.gz"])
def test_missing_empty_and_foreign_files_are_one_sentence(tmp_path, name):
    read = read_text_documents if ".txt" in name else read_records
    assert "not found" in fault_of(read, tmp_path / name)
    (tmp_path / name).mkdir()
    fault_of(read, tmp_path / name)
    (tmp_path / name).rmdir()
    write(tmp_path / name, b"")
    assert "empty" in fault_of(read, tmp_path / name) or ".parquet" in name
    if name.endswith((".gz", ".zst", ".parquet")):
        (tmp_path / name).write_bytes(b"this is something else")
        assert str(tmp_path / name) in fault_of(read, tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.parquet", "a.parquet.zst"])
def test_a_file_cut_off_in_the_middle_is_damaged(tmp_path, name):
    many = [{"text": f"{number} {number * 7919 % 10007}", "n": number} for number in range(20_000)]
    lines = "\n".join(map(json.dumps, many))
    path = write(tmp_path / name, parquet_bytes(many) if ".parquet" in name else lines)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    read = read_text_documents if ".txt" in name else read_records
    assert str(path) in fault_of(read, path)


def test_text_fields_count_what_has_no_text_and_name_the_fields(tmp_path):
    skipped = Counter()
    records = [{"text": "a"}, {"text": ""}, {"text": None}, {"text": "b"}]
    assert list(text_fields(records, "text", skipped)) == ["a", "b"]
    assert skipped == {"record without text": 2}
    assert list(text_fields([{"text": "a"}, {"body": "b"}, {"text": 5}], "text", skipped)) == ["a"]
    assert skipped == {"record without text": 3, "record whose field is not text": 1}
    fault = fault_of(text_fields, [{"body": "b"}], "text", None, "mine.jsonl")
    assert fault.startswith("mine.jsonl: record 1 has no field 'text'") and "body" in fault
    assert "is not text" in fault_of(text_fields, [{"text": 5}])


# --- folders and what files hold ---


def test_a_folder_stands_for_its_known_files_in_order(tmp_path):
    for name in ("b.txt", "a.jsonl.gz", "inner/c.MD", ".hidden.txt", ".git/d.txt", "picture.png", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [str(path.relative_to(tmp_path)) for path in input_files([tmp_path])]
    assert found == ["a.jsonl.gz", "b.txt", "inner/c.MD"]
    assert "contains no file of a known kind" in fault_of(input_files, [tmp_path / ".git"], [".parquet"])
    assert "of unknown kind" in fault_of(input_files, [tmp_path / "picture.png"])
    assert "not found" in fault_of(input_files, [tmp_path / "nothing.txt"])


@pytest.mark.parametrize(
    ("name", "content", "described"),
    [
        ("a.txt", "One\n<|endoftext|>\nTwo", "text (documents divided by <|endoftext|>)"),
        ("a.md.zst", "# One", "text (plain text, long ones cut at blank lines, zstd)"),
        ("a.jsonl.gz", '{"text": "One"}', "text (records with the field 'text', gzip)"),
        ("a.jsonl", '{"instruction": "a", "response": "b"}', "chat (dolly)"),
        ("a.json", '[{"conversations": []}]', "chat (sharegpt)"),
    ],
)
def test_a_file_is_recognised_by_its_name_and_first_record(tmp_path, name, content, described):
    path = write(tmp_path / name, content)
    assert str(recognize(path)) == f"{path}: {described}"


def test_recognised_files_are_read_as_what_they_hold(tmp_path):
    text = write(tmp_path / "a.txt", "One\n<|endoftext|>\nTwo")
    field = write(tmp_path / "b.jsonl", '{"body": "Three"}')
    chat = write(tmp_path / "c.jsonl", '{"instruction": "a", "response": "b"}')
    assert list(read_documents(recognize(text))) == ["One", "Two"]
    assert list(read_documents(recognize(field, "body"))) == ["Three"]
    assert [len(messages) for messages in read_documents(recognize(chat))] == [2]
    with pytest.raises(UserError, match=r"--field.*body"):
        recognize(field)
    with pytest.raises(UserError, match="no record"):
        recognize(write(tmp_path / "d.json", "[]"))


# --- zip archives ---


def zip_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def test_zips_within_a_zip_are_read(tmp_path):
    inner = zip_bytes({"train/dialogues_train.txt": b"Hi . __eou__", "train/.hidden": b"x"})
    outer = write(
        tmp_path / "a.zip", zip_bytes({"outer/train.zip": inner, "outer/readme.txt": b"r", "__MACOSX/._a": b"m"})
    )
    assert dict(zip_members(outer)) == {
        "outer/train.zip/train/dialogues_train.txt": b"Hi . __eou__",
        "outer/readme.txt": b"r",
    }
    assert [name for name, _ in zip_members(outer, lambda name: "dialogues" in name)] == [
        "outer/train.zip/train/dialogues_train.txt"
    ]


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_a_member_that_leaves_its_folder_is_refused_before_any_is_read(tmp_path, name):
    archive = write(tmp_path / "a.zip", zip_bytes({"good.txt": b"good", name: b"evil"}))
    nested = write(tmp_path / "b.zip", zip_bytes({"inner.zip": zip_bytes({name: b"evil"})}))
    assert "leaves the folder" in fault_of(zip_members, archive)
    assert "leaves the folder" in fault_of(zip_members, nested)


def test_a_damaged_archive_is_one_sentence_wherever_it_is_damaged(tmp_path):
    whole = zip_bytes({"a.txt": bytes(range(256)) * 20, "b/c.txt": b"text " * 100})
    path, faults = tmp_path / "a.zip", 0
    for position in range(len(whole)):
        for damaged in (whole[:position], whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]):
            path.write_bytes(damaged)
            try:
                list(zip_members(path))
            except UserError:
                faults += 1
    assert faults > len(whole)
    assert "not found" in fault_of(zip_members, tmp_path / "none.zip")


def test_an_encrypted_member_is_refused(tmp_path):
    raw = bytearray(zip_bytes({"a.txt": b"secret"}))
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # the flag that says so, in the central directory
    assert "encrypted" in fault_of(zip_members, write(tmp_path / "a.zip", bytes(raw)))
