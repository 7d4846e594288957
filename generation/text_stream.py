"""Text from ids that arrive one by one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import tiktoken


class TextStream:
    """The text of ids fed one by one; holds back what may be the beginning of a character or of a stop text.

    Without stop texts, the joined pieces are `enc.decode(ids)`. `stopped` is set when a stop text is complete: the text
    before it is returned, the stop text and what follows it are not. `prefix` holds the ids before the first one fed: a
    character that they leave incomplete is returned when it is complete.
    """

    def __init__(self, enc: tiktoken.Encoding, stop_texts: Sequence[str] = (), prefix: Sequence[int] = ()):
        self.enc = enc
        self.stop_texts = [text for text in stop_texts if text]
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        for token in prefix:
            self._decoder.decode(enc.decode_single_token_bytes(token))

    def feed(self, token: int) -> str:
        """The text that is certain after one more id; often empty."""
        return self._release(self._decoder.decode(self.enc.decode_single_token_bytes(token)))

    def finish(self) -> str:
        """The text that was held back, after the last id; bytes of an incomplete character become U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._pending = self._pending, ""
        return text + ("" if self.stopped else rest)

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._pending += text
        found = [(start + len(stop), start) for stop in self.stop_texts if (start := self._pending.find(stop)) >= 0]
        if found:  # the first one to be complete counts, however the tokens divide the text
            self.stopped = True
            return self._pending[: min(found)[1]]
        certain = len(self._pending) - self._possible_stop()
        released, self._pending = self._pending[:certain], self._pending[certain:]
        return released

    def _possible_stop(self) -> int:
        """How many of the last pending characters may be the beginning of a stop text."""
        longest = 0
        for stop in self.stop_texts:
            for length in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:length]):
                    longest = length
                    break
        return longest
