"""Manual pages in German, French, Japanese and Chinese: our ids are those of Hugging Face's tokenizers.

.ci/run unpacks the pages and sets JOJO_MAN to their folder.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
from pathlib import Path

import pytest
import tokenizers

from common.token_patterns import PATTERNS
from common.tokenizer_json import tokenizer_json
from data.tokenizer_training import learn
from exchange import tokenizer_files
from setup_tokenizer import GPT2, N_VOCAB, Tokenizer

MAN = Path(os.environ.get("JOJO_MAN", "/usr/share/man"))
LANGUAGES = ("de", "fr", "ja", "zh_CN")
N_BYTES = 300_000  # of each language, so that the tests take seconds


def paths(language: str) -> list[Path]:
    return [path for path in sorted((MAN / language).glob("man*/*.gz")) if path.is_file()]


pytestmark = pytest.mark.skipif(
    any(len(paths(language)) < 20 for language in LANGUAGES),
    reason=f"no pages in {MAN}; install manpages-de, -fr, -ja and -zh, or unpack them and set JOJO_MAN (see .ci/run)",
)


@functools.cache
def pages(language: str) -> list[str]:
    """Manual pages of one language as troff source, N_BYTES in all or as many as there are."""
    found, n_left = [], N_BYTES
    for path in paths(language):
        content = gzip.decompress(path.read_bytes())[:n_left]
        found.append(content.decode("utf-8", "replace"))
        n_left -= len(content)
        if not n_left:
            break
    return found


@pytest.fixture(scope="module", params=[*PATTERNS, "the vocabulary of GPT-2"])
def both(request) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Our tokenizer and theirs, of a vocabulary learned from every second page, or of GPT-2's."""
    if request.param in PATTERNS:
        half = [page for language in LANGUAGES for page in pages(language)[::2]]
        vocabulary = learn(half, PATTERNS[request.param], 4000)
        ours, content = Tokenizer.from_vocabulary("man", vocabulary), tokenizer_json(vocabulary, {})
    else:
        ours, content = GPT2, tokenizer_files.tokenizer_json(N_VOCAB)
    return ours, tokenizers.Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("language", LANGUAGES)
def test_ids_of_manual_pages_are_those_of_tokenizers(both, language):
    ours, theirs = both
    texts = pages(language)
    assert sum(len(text.encode()) for text in texts) > N_BYTES / 3 and not all(text.isascii() for text in texts)
    for text, expected in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = ours.encode_text(text)
        assert ids == expected.ids
        assert ours.enc.decode(ids) == text
    if ours != GPT2:  # something was learned
        n_own, n_gpt2 = (sum(len(each.encode_text(text)) for text in texts) for each in (ours, GPT2))
        assert n_own < n_gpt2
