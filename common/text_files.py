"""Files that are not UTF-8 text: what they are, and the command that converts them to UTF-8 text."""

from __future__ import annotations

import shlex
from pathlib import Path

from common.cli import UserError

HEAD_BYTES = 1 << 16

_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_SAVE_AS_TEXT = "save it as plain text in the program that made it"
_MAGIC = (
    (b"%PDF-", "a PDF document", "convert it with: pdftotext {source} {target}"),
    (b"PK\x03\x04", "a zip archive or a document such as .docx, .odt or .xlsx", f"unpack it, or {_SAVE_AS_TEXT}"),
    (b"\x1f\x8b", "compressed with gzip", "decompress it with: gzip -dc < {source} > {target}"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it with: zstd -dc < {source} > {target}"),
    (b"BZh", "compressed with bzip2", "decompress it with: bzip2 -dc < {source} > {target}"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it with: xz -dc < {source} > {target}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"PAR1", "a parquet file", "rename it with: cp {source} {stem}.parquet"),
    (b"{\\rtf", "an RTF document", _SAVE_AS_TEXT),
    (b"\xd0\xcf\x11\xe0", "an old Office document (.doc, .xls)", _SAVE_AS_TEXT),
    (b"SQLite format 3\0", "an SQLite database", "export its text first"),
    (b"\x89PNG", "a PNG picture", "leave it out"),
    (b"\xff\xd8\xff", "a JPEG picture", "leave it out"),
    (b"GIF8", "a GIF picture", "leave it out"),
    (b"\x7fELF", "a program", "leave it out"),
)


def decode_text(content: bytes, path: str | Path) -> str:
    """The text of a file's bytes, without a byte order mark and with line feeds as line endings.

    Raises UserError if they are not UTF-8 text, or are binary.
    """
    fault = binary_fault(path, content, option=False)
    if fault is None and b"\0" in content:
        fault = nul_fault(path, content, 0, option=False)
    if fault is not None:
        raise UserError(fault)
    try:
        return unix_line_endings(content.decode("utf-8-sig"))  # -sig: without a byte order mark
    except UnicodeDecodeError as error:
        sample = content[max(0, error.start - HEAD_BYTES // 2) :][:HEAD_BYTES]
        raise UserError(utf8_fault(path, sample, error.start, option=False)) from error


def unix_line_endings(text: str) -> str:
    """Text in which line feeds replace the line endings of Windows and old Macs, as the prepare scripts store it."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def binary_fault(path: str | Path, head: bytes, option: bool = True) -> str | None:
    """The error message for a file that begins like something other than UTF-8 text; None for other files.

    Here and below, `option` says whether the script has an option --encoding.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return _conversion(path, f"is {encoding}, not UTF-8;", encoding, option)
    for magic, what, remedy in _MAGIC:
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] == b"1AY&SY"):
            return f"{path} is {what}, not text; {remedy.format(**_names(path))}"
    return None


def nul_fault(path: str | Path, block: bytes, offset: int, option: bool = True) -> str:
    """The error message for text with a NUL byte in `block`, which begins at byte `offset` of the file."""
    if encoding := _wide_encoding(block, offset):
        return _conversion(path, f"is {encoding}, not UTF-8;", encoding, option)
    first = block.index(b"\0")
    is_tail = not block[first:].strip(b"\0")
    what = "ends in NUL bytes, like a file that was not written completely," if is_tail else "contains NUL bytes"
    remove = _command(path, "tr -d '\\000'")
    return f"{path} {what} from byte {offset + first} on; if the rest is text, remove them with: {remove}"


def utf8_fault(path: str | Path, sample: bytes, offset: int, option: bool = True) -> str:
    """The error message for text that is not UTF-8 at byte `offset`; `sample` is the part of the file around it."""
    if encoding := _wide_encoding(sample, 0):
        return _conversion(path, f"is {encoding}, not UTF-8;", encoding, option)
    text = sample.decode("utf-8", "replace")
    n_bad, n_other = text.count("\ufffd"), sum(character > "\x7f" for character in text)
    if n_other > 5 * n_bad:  # the rest is UTF-8: a file that was cut off, or damaged
        drop = _command(path, "iconv -c -f UTF-8 -t UTF-8")
        return (
            f"{path} is not UTF-8 at byte {offset}, although other characters are; drop the damaged ones with: {drop}"
        )
    is_western = sum(byte > 0x7F for byte in sample) <= max(4, len(sample) // 4)
    if is_western and _decodes(sample, "cp1252"):
        return _conversion(
            path, f"is not UTF-8 at byte {offset}; if it is Western European text,", "WINDOWS-1252", option
        )
    if not option:
        return f"{path} is not UTF-8 at byte {offset}; {_SAVE_AS_TEXT}, in UTF-8"
    return (
        f"{path} is not UTF-8 at byte {offset}; give its encoding with --encoding, for example "
        "--encoding gb18030, shift_jis, euc-kr, big5, windows-1251 or koi8-r"
    )


def _wide_encoding(block: bytes, offset: int) -> str | None:
    """UTF-16 or UTF-32 without a mark, by the positions of its NUL bytes; None if it is something else."""
    block = block[-offset % 4 :][:HEAD_BYTES]
    zeros = [block[start::4].count(0) for start in range(4)]
    if sum(zeros) < max(2, len(block) / 500) or (sum(zeros) < len(block) / 5 and _is_ascii_text(block)):
        return None
    quarter = len(block) / 4
    if all(zeros[position] > 0.9 * quarter for position in (2, 3)) and not zeros[0]:
        return "UTF-32LE"
    if all(zeros[position] > 0.9 * quarter for position in (0, 1)) and not zeros[3]:
        return "UTF-32BE"
    if not zeros[0] + zeros[2]:
        return "UTF-16LE"
    return None if zeros[1] + zeros[3] else "UTF-16BE"


def _is_ascii_text(block: bytes) -> bool:
    """Whether the bytes other than NUL are ASCII text; a few NUL bytes in such text do not make it UTF-16."""
    text = block.replace(b"\0", b"").decode("latin-1")
    return text.isascii() and all(character.isprintable() or character.isspace() for character in text)


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _conversion(path: str | Path, what: str, encoding: str, option: bool) -> str:
    command = _command(path, f"iconv -f {encoding} -t UTF-8")
    read = f"read it with --encoding {encoding.lower()}, or " if option else ""
    return f"{path} {what} {read}convert it with: {command}"


def _command(path: str | Path, program: str) -> str:
    """A shell command that sends a file through a program; it can be pasted unchanged and handles compressed files."""
    names = _names(path)
    decompress = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(Path(path).suffix.lower())
    if decompress:
        return f"{decompress} {names['source']} | {program} > {names['target']}"
    redirection = "" if program.startswith("iconv") else "< "
    return f"{program} {redirection}{names['source']} > {names['target']}"


def _names(path: str | Path) -> dict[str, str]:
    """The names in a shell command: of the file, and of the new one, which is written to the current folder."""
    if str(path) == "-":
        return {"source": "FILE", "target": "NEW", "stem": "NEW"}
    name = Path(Path(path).name)
    if name.suffix.lower() in (".gz", ".zst"):
        name = Path(name.stem)
    target = f"{name.stem}-utf8{name.suffix}"
    return {"source": shlex.quote(str(path)), "target": shlex.quote(target), "stem": shlex.quote(name.stem)}
