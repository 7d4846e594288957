"""The data preparation that benchmark.py times: data/prepare-story.py, and one thread of tiktoken."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark_timing import PeakMemory, Work, process_peak_bytes

from common.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
PEER_CHARACTERS = 100_000_000  # how much of the documents one thread of tiktoken encodes


def prepare_ours(options: Any, config: None) -> Work:
    """data/prepare-story.py from start to end, including cleaning and deduplication."""
    from data.readers.text import read_text_documents

    # Reading the file once beforehand also puts it into the system's cache, for both sides.
    text_bytes = sum(len(document.encode()) for document in read_text_documents(options.input))
    peak = PeakMemory()

    def step() -> int:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("--input", options.input, "--output_dir", folder)
            command = [sys.executable, str(ROOT / "data" / "prepare-story.py"), *arguments]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            with process, peak.watch(process.pid):
                _, errors = process.communicate()
            if process.returncode:
                reason = errors.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
                raise UserError(f"data/prepare-story.py failed: {reason[0].removeprefix('error: ')}")
            splits = json.loads((Path(folder) / "story.json").read_text(encoding="utf-8"))["splits"].values()
        # Everything read counts, even what deduplication dropped; the end-of-document tokens do not.
        tokens = sum(split["tokens"] - split["documents"] for split in splits)
        return round(text_bytes * tokens / sum(split["text_bytes"] for split in splits))

    return Work(step, lambda: peak.bytes, repeats=False)


def prepare_tiktoken(options: Any, config: None) -> Work:
    """One thread of tiktoken over the first PEER_CHARACTERS of the same documents; reading is not timed."""
    from data.readers.text import read_text_documents
    from setup_tokenizer import get_base_tokenizer

    documents, characters = [], 0
    for document in read_text_documents(options.input):
        documents.append(document)
        characters += len(document)
        if characters >= PEER_CHARACTERS:
            break
    enc = get_base_tokenizer()
    enc.encode_ordinary("the first call builds its tables")
    return Work(lambda: sum(len(enc.encode_ordinary(text)) for text in documents), process_peak_bytes, repeats=False)
