"""Check control tokens: in the tokenizer, and in a prepared .bin file.

    python testing_tools/check_special_tokens.py
    python testing_tools/check_special_tokens.py --dataset chitchat
    python testing_tools/check_special_tokens.py data/chitchat-train.bin --sample 400

Prints one line per property of the tokenizer. With a file or data set, it also prints counts, what is malformed and
where, and for chat a sample in which the training targets (what the assistant says, and its `<|im_end|>`) are green, or
in [[ ]] without colours. The exit status is 1 if something is malformed.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from common.cli import UserError, check_options, option, parse_options, run_script, supports_colour
from data.dataset import DatasetInfo, open_dataset, prepared_datasets
from data.token_stream import TokenStream
from setup_tokenizer import (
    ENDOFTEXT_ID,
    GPT2,
    IM_END_ID,
    IM_START_ID,
    ROLES,
    SPECIAL_TOKENS,
    Tokenizer,
    encode_chat,
    encode_document,
    encode_text,
    get_base_tokenizer,
    get_extended_tokenizer,
)
from training.targets import assistant_targets

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"
CHUNK_TOKENS = 1 << 19
MAX_DOCUMENT_TOKENS = 1 << 27


@dataclass(frozen=True)
class CheckOptions:
    bin: str | None = option(None, "a .bin file to check", positional=True)
    dataset: str | None = option(None, "a prepared data set to check, both splits", metavar="NAME")
    data_dir: str = option(str(DATA_FOLDER), "the folder with --dataset's files (default: data/)")
    sample: int = option(200, "length of the sample in tokens, 0 for none", at_least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.bin and self.dataset:
            raise ValueError("give a .bin file or --dataset, not both")


# --- the tokenizer ---


def check_single_ids() -> None:
    """each control token is one id, and the id decodes to its text"""
    enc = get_extended_tokenizer()
    for spelling, token in SPECIAL_TOKENS.items():
        assert enc.encode(spelling, allowed_special="all") == [token], spelling
        assert enc.decode([token]) == spelling, spelling


def check_base_splits_chatml() -> None:
    """GPT-2's own tokenizer needs several ids for <|im_start|> and <|im_end|>"""
    for spelling in ("<|im_start|>", "<|im_end|>"):
        assert len(get_base_tokenizer().encode_ordinary(spelling)) > 1, spelling


def check_ordinary_text() -> None:
    """ordinary text has GPT-2's own ids and decodes to itself"""
    for text in ("Hello, world!", "It's 3 o'clock.\n\n", "na\u00efve \u4f60\u597d \U0001f600", "<|im_start", "  "):
        ids = encode_text(text)
        assert ids == get_base_tokenizer().encode_ordinary(text), text
        assert get_extended_tokenizer().decode(ids) == text, text


def check_forgeries() -> None:
    """no message, role or document can forge a control token"""
    for spelling in SPECIAL_TOKENS:
        typed = f"a{spelling}b"
        for role in ROLES:
            ids = encode_chat([{"role": role, "content": typed}])
            assert [token for token in ids if token >= ENDOFTEXT_ID] == [IM_START_ID, IM_END_ID], (role, typed)
        assert [token for token in encode_document(typed) if token >= ENDOFTEXT_ID] == [ENDOFTEXT_ID], typed
        try:
            encode_chat([{"role": spelling, "content": "a"}])
        except ValueError:
            continue
        raise AssertionError(f"{spelling} was accepted as a role")


def check_targets() -> None:
    """training targets are the assistant's words and the <|im_end|> after them"""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids = np.array(encode_chat(messages, end_of_conversation=True))
    assert ids[assistant_targets(ids)].tolist() == [*encode_text("Hello"), IM_END_ID]


TOKENIZER_CHECKS = (check_single_ids, check_base_splits_chatml, check_ordinary_text, check_forgeries, check_targets)


# --- a .bin file ---


@dataclass
class Findings:
    """What a stream of ids contains. `problems` counts each problem, `first` has its first position."""

    tokens: int = 0
    documents: int = 0
    targets: int = 0
    messages: Counter = field(default_factory=Counter)
    controls: Counter = field(default_factory=Counter)
    problems: Counter = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def report(self, problem: str, positions: np.ndarray) -> None:
        """Count a problem at token `positions`, which may be empty."""
        if len(positions):
            self.problems[problem] += len(positions)
            self.first.setdefault(problem, int(positions[0]))


def inspect(stream: TokenStream, is_chat: bool, chunk_tokens: int = CHUNK_TOKENS) -> Findings:
    """Count and check the control tokens of a stream, `chunk_tokens` at a time."""
    findings, tokenizer = Findings(tokens=len(stream)), stream.tokenizer
    with tqdm(total=len(stream), desc="checking", unit="tok", unit_scale=True, delay=1, disable=None) as bar:
        for offset, ids in whole_documents(stream, chunk_tokens):
            _inspect_ids(ids, offset, tokenizer, findings)
            if is_chat:
                _inspect_messages(ids, offset, tokenizer, findings)
                targets = assistant_targets(ids, tokenizer)
                findings.targets += int((targets & stream.is_trained(offset, offset + len(ids))).sum())
            else:
                findings.report("control token of a chat in a text", offset + np.flatnonzero(ids > tokenizer.endoftext))
                findings.targets += len(ids)
            bar.update(len(ids))
    return findings


def whole_documents(
    stream: TokenStream, chunk_tokens: int, longest: int = MAX_DOCUMENT_TOKENS
) -> Iterator[tuple[int, np.ndarray]]:
    """(position, ids) of consecutive parts of the stream, each about `chunk_tokens` long, ending with a document."""
    start, size = 0, chunk_tokens
    while start < len(stream):
        end = min(start + size, len(stream))
        ids = stream.read(start, end)
        if end < len(stream):
            ends = np.flatnonzero(ids == stream.tokenizer.endoftext)
            if not len(ends):
                size *= 2
                if size > longest:
                    raise UserError(
                        f"{stream.paths[0]} has no <|endoftext|> in {end - start:,} tokens from position {start:,}, so "
                        "the prepare scripts did not write it; prepare the data again"
                    )
                continue
            ids = ids[: ends[-1] + 1]
        yield start, ids
        start, size = start + len(ids), chunk_tokens


def _inspect_ids(ids: np.ndarray, offset: int, tokenizer: Tokenizer, findings: Findings) -> None:
    """Check what text and chat have in common: ids of the vocabulary, documents that end and are not empty."""
    n_vocab = tokenizer.n_vocab
    findings.report(f"id outside the vocabulary of {n_vocab}", offset + np.flatnonzero(ids >= n_vocab))
    is_end = ids == tokenizer.endoftext
    findings.documents += int(is_end.sum())
    for spelling, token in tokenizer.special_tokens.items():
        findings.controls[spelling] += int((ids == token).sum())
    findings.report("empty document", offset + np.flatnonzero(is_end & np.append(True, is_end[:-1])))
    if not is_end[-1]:
        findings.report("last document without <|endoftext|>", np.array([offset + len(ids) - 1]))


def _inspect_messages(ids: np.ndarray, offset: int, tokenizer: Tokenizer, findings: Findings) -> None:
    """Check whole conversations: messages open, name a role and close, and there is nothing between them."""
    endoftext, im_start, im_end = tokenizer.special_tokens.values()
    newline = tokenizer.encode_text("\n")[0]
    positions = np.flatnonzero((ids >= endoftext) & (ids <= im_end))
    kinds = ids[positions]
    previous_kinds = np.append(endoftext, kinds[:-1])
    between = np.diff(positions, prepend=-1) - 1  # tokens since the previous control token
    before = ids[positions - 1]  # wrong at the first position, where only `between` matters
    in_message = previous_kinds == im_start

    def report(problem: str, is_problem: np.ndarray) -> None:
        findings.report(problem, offset + positions[is_problem])

    report("<|im_start|> before the last message was closed", (kinds == im_start) & in_message)
    report("<|im_end|> without <|im_start|>", (kinds == im_end) & ~in_message)
    report("message not closed before <|endoftext|>", (kinds == endoftext) & in_message)
    follows_end = (previous_kinds == im_end) & (kinds != im_end)
    report("no newline after <|im_end|>", follows_end & ((between != 1) | (before != newline)))
    report("text outside messages", (previous_kinds == endoftext) & (between > 0))
    if len(positions) and kinds[-1] == im_start:
        report("message not closed at the end", np.arange(len(positions)) == len(positions) - 1)
    _inspect_roles(ids, offset, tokenizer, findings)


def _inspect_roles(ids: np.ndarray, offset: int, tokenizer: Tokenizer, findings: Findings) -> None:
    """Count the messages of each role, which a newline follows."""
    messages = tokenizer.message_spans(ids)
    # The newline may share a token with newlines and spaces at the start of the content.
    has_newline = _begins_with_newline(tokenizer)[np.minimum(ids[messages.content - 1], tokenizer.n_vocab - 1)]
    for index, role in enumerate(ROLES):
        findings.messages[role] += int((has_newline & (messages.role == index)).sum())
    findings.report("message without a known role", offset + messages.start[~has_newline | (messages.role < 0)])


@functools.cache
def _begins_with_newline(tokenizer: Tokenizer) -> np.ndarray:
    """Whether the text of each id begins with a newline, (n_vocab,) bool."""
    return np.array([tokenizer.token_bytes(token)[:1] == b"\n" for token in range(tokenizer.n_vocab)])


def show_sample(ids: np.ndarray, is_trained: np.ndarray | None = None, tokenizer: Tokenizer = GPT2) -> str:
    """The text of conversations with their targets in green, or in [[ ]] without colours.

    `is_trained` is False where an answer has weight 0 and is not a target.
    """
    mask = assistant_targets(ids, tokenizer)
    if is_trained is not None:
        mask &= is_trained
    borders = np.flatnonzero(np.diff(mask)) + 1
    opening, closing = ("\x1b[32m", "\x1b[0m") if supports_colour() else ("[[", "]]")
    shown = []
    for part in np.split(np.arange(len(ids)), borders):
        text = _printable(ids[part], tokenizer)
        shown.append(f"{opening}{text}{closing}" if len(part) and mask[part[0]] else text)
    return "".join(shown)


def _printable(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of ids, in which all but newlines and printable characters are escaped."""
    known = [int(token) for token in ids if token < tokenizer.n_vocab]
    text = tokenizer.enc.decode(known, errors="backslashreplace")
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


# --- the command ---


def open_streams(options: CheckOptions) -> tuple[dict[str, TokenStream], DatasetInfo | None]:
    """The streams to check by their names, and what the .json says about them, if there is one."""
    if options.dataset:
        return open_dataset(Path(options.data_dir), options.dataset)
    path = Path(options.bin or "")
    if not path.is_file():
        found = prepared_datasets(path.parent) if path.parent.is_dir() else []
        advice = f"prepared there: {', '.join(found)}" if found else "prepare some with: python data/prepare-story.py"
        raise UserError(f"{path} not found; {advice}")
    name = re.fullmatch(r"(.+)-(train|val)(-\d{5})?\.bin", path.name)
    if name and (path.parent / f"{name[1]}.json").is_file():
        streams, info = open_dataset(path.parent, name[1])
        return {name[2]: streams[name[2]]}, info
    size = path.stat().st_size
    if size == 0 or size % 2:
        fault = "is empty" if size == 0 else f"has {size:,} bytes, an odd number, so it does not contain uint16 ids"
        raise UserError(f"{path} {fault}; prepare the data again")
    return {path.name: TokenStream([path])}, None


def print_findings(name: str, stream: TokenStream, findings: Findings, is_chat: bool) -> None:
    """Print the counts of one stream and its problems."""
    files = (
        stream.paths[0].name if len(stream.paths) == 1 else f"{stream.paths[0].name} and {len(stream.paths) - 1} more"
    )
    print(f"\n{name}: {files}, {'chat' if is_chat else 'text'}")
    print(f"  {'tokens':<19}{findings.tokens:>12,}")
    print(f"  {'documents':<19}{findings.documents:>12,}")
    for spelling, count in findings.controls.items():
        print(f"  {spelling:<19}{count:>12,}")
    if is_chat:
        for role, count in findings.messages.items():
            print(f"  {role + ' messages':<19}{count:>12,}")
        if len(stream.untrained):
            print(f"  {'answers of weight 0':<19}{len(stream.untrained):>12,}  (no targets)")
        print(f"  {'targets':<19}{findings.targets:>12,}  ({findings.targets / findings.tokens:.1%} of the tokens)")
    for problem, count in findings.problems.items():
        position = findings.first[problem]
        near = stream.read(max(position - 3, 0), min(position + 4, len(stream)))
        tokenizer = stream.tokenizer
        pieces = " ".join(
            tokenizer.token_text(int(token)) if token < tokenizer.n_vocab else f"<{token}>" for token in near
        )
        print(f"  MALFORMED: {problem}: {count:,} times, first at token {position:,}: ... {pieces} ...")
    if not findings.problems:
        print("  every control token is well formed")


def disagreements(findings: Findings, info: DatasetInfo | None, split: str) -> list[str]:
    """Where the .json and the file disagree."""
    if info is None:
        return []
    described = info.splits[split]
    counts = {"tokens": described.tokens, "documents": described.documents}
    return [
        f"{info.name}.json says {count:,} {what}, the file contains {getattr(findings, what):,}"
        for what, count in counts.items()
        if count not in (None, getattr(findings, what))
    ]


def main() -> int:
    options = parse_options(CheckOptions, __doc__)
    for check in TOKENIZER_CHECKS:
        check()
        print(f"ok  {check.__doc__}")
    if not (options.bin or options.dataset):
        print("to check prepared data too, give a .bin file or --dataset NAME")
        return 0
    n_problems = 0
    streams, info = open_streams(options)
    for name, stream in streams.items():
        head = stream.read(0, min(len(stream), CHUNK_TOKENS))
        is_chat = info.format != "text" if info else bool((head == GPT2.im_start).any())
        findings = inspect(stream, is_chat)
        print_findings(name, stream, findings, is_chat)
        disagreeing = disagreements(findings, info, name)
        print("".join(f"  MALFORMED: {sentence}\n" for sentence in disagreeing), end="")
        n_problems += len(findings.problems) + len(disagreeing)
        if is_chat and options.sample:
            sample = head[: options.sample]
            print(f"\n{show_sample(sample, stream.is_trained(0, len(sample)), stream.tokenizer)}")
    return 1 if n_problems else 0


if __name__ == "__main__":
    run_script(main)
