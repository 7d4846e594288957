"""Text in other encodings: refused with what it is and a command that works, read with --encoding."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from pathlib import Path

import pytest
import zstandard

from common.cli import UserError
from common.text_files import decode_text, unix_line_endings
from data.pipeline import PrepareOptions
from data.readers.files import read_blocks
from data.readers.inputs import check_encoding, input_files
from data.readers.records import read_records
from data.readers.text import read_text_documents

ENGLISH = "Once upon a time there was a small café.\n" * 40
RUSSIAN = "Привет, мир! Это русский текст.\n" * 40


def fault_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_text_documents(path) if path.suffix != ".jsonl" else read_records(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_advice(fault: str, folder: Path) -> str:
    """What the command at the end of the sentence writes, run in a UTF-8 locale."""
    command = re.search(r"with: (.*)", fault)[1]
    subprocess.run(["bash", "-c", command], cwd=folder, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=False)
    return (folder / command.split("> ")[-1].strip("'")).read_text("utf-8")


@pytest.mark.parametrize("text", [ENGLISH, RUSSIAN])
@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
def test_wide_encodings_are_recognized_and_the_advice_works(tmp_path, text, encoding, named):
    path = tmp_path / "my notes.txt"
    path.write_bytes(text.encode(encoding))
    fault = fault_of(path)
    assert f"is {named}, not UTF-8; read it with --encoding {named.lower()}, or convert" in fault
    assert run_advice(fault, tmp_path) == text
    (copy,) = input_files([path], encoding=named.lower())
    assert copy.name == path.name and "".join(read_text_documents(copy)) == text.strip("\n")


def test_windows_1252_is_guessed_for_western_text_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(ENGLISH.encode("cp1252"))
    fault = fault_of(path)
    assert "not UTF-8 at byte 38; if it is Western European text" in fault and run_advice(fault, tmp_path) == ENGLISH
    path.write_bytes(RUSSIAN.encode("koi8-r"))
    assert "give its encoding with --encoding, for example" in fault_of(path)
    compressed = tmp_path / "b.jsonl.gz"
    compressed.write_bytes(gzip.compress(b'{"text": "caf\xe9 in winter"}\n'))
    compressed = compressed.rename(tmp_path / "b.txt.gz")
    assert run_advice(fault_of(compressed), tmp_path) == '{"text": "café in winter"}\n'


def test_a_utf8_text_that_was_cut_is_not_called_windows_1252(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(ENGLISH.encode() + "é".encode()[:1])
    assert run_advice(fault_of(path), tmp_path) == ENGLISH


def test_nul_bytes_are_refused_wherever_they_are(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(ENGLISH.encode() + b"\0" * 5000)
    fault = fault_of(path)
    assert f"ends in NUL bytes, like a file that was not written completely, from byte {len(ENGLISH.encode())}" in fault
    assert run_advice(fault, tmp_path) == ENGLISH
    path.write_bytes(b"a" * (3 << 20) + b"\0b\0" + b"c" * 99)
    assert f"contains NUL bytes from byte {3 << 20} on" in fault_of(path)
    records = tmp_path / "a.jsonl"
    records.write_bytes('{"text": "Hello"}\n'.encode("utf-16-le"))
    assert "is UTF-16LE" in fault_of(records)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "a PDF document, not text; convert it with: pdftotext"),
        (b"PK\x03\x04\x14\0", "a zip archive or a document such as .docx"),
        (b"\x1f\x8b\x08\0", "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed with zstd"),
        (b"{\\rtf1\\ansi Hello}", "an RTF document"),
        (b"\x89PNG\r\n\x1a\n\0", "a PNG picture"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Office document"),
    ],
)
def test_a_file_that_is_called_text_but_is_not(tmp_path, head, what):
    path = tmp_path / "a.txt"
    path.write_bytes(head + b" and more")
    assert f"{path} is {what}" in fault_of(path)


def test_the_wrong_encoding_is_refused_and_unknown_names_are_usage_errors(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"odd")
    with pytest.raises(UserError, match=r"a\.txt is not in utf-16; give its real encoding with --encoding"):
        input_files([path], encoding="utf-16")
    for name in ("nope", "rot13", "hex", ""):
        with pytest.raises(ValueError, match="--encoding must be the name of a text encoding"):
            check_encoding(name)
    with pytest.raises(ValueError, match="--encoding must"):
        PrepareOptions(encoding="nope")


def test_marks_and_line_ends_are_removed():
    assert decode_text(b"\xef\xbb\xbfa\r\nb\rc\n", "a.txt") == "a\nb\nc\n"
    assert unix_line_endings("a\r\r\nb") == "a\n\nb"


def test_a_zstandard_file_with_a_long_window_is_read(tmp_path):
    path = tmp_path / "a.txt.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=31)
    frames = [zstandard.ZstdCompressor(compression_params=parameters).compressobj() for _ in range(2)]
    path.write_bytes(b"".join(frame.compress(ENGLISH.encode()) + frame.flush() for frame in frames))
    assert b"".join(read_blocks(path)).decode() == 2 * ENGLISH
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        UserError, match=r"a.txt.zst is damaged \(EOFError: it is truncated\); download or compress it again"
    ):
        list(read_blocks(path))
