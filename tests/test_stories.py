"""The stories that evaluate.py judges: copied runs, variety and repetition are what they are called."""

from __future__ import annotations

import numpy as np
from test_evaluate import DOCUMENTS, write_dataset

from data.dataset import open_dataset
from data.token_stream import TokenStream
from evaluation import stories
from setup_tokenizer import encode_text


def test_copied_runs_are_found_wherever_they_are(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, 1000).astype("<u2")
    for n, part in enumerate(np.split(ids, [333, 340])):  # the second shard is shorter than a run
        part.tofile(tmp_path / f"x-{n}.bin")
    stream = TokenStream([tmp_path / f"x-{n}.bin" for n in range(3)])
    present = {tuple(ids[start : start + 8].tolist()) for start in (0, 95, 99, 100, 330, 335, 992)}
    absent = {tuple((ids[start : start + 8] + 100).tolist()) for start in range(10)}
    absent.add((*ids[5:12].tolist(), 49 - int(ids[12])))
    everything = set(stories.ngrams(ids.tolist(), 8))
    assert present <= everything and not absent & everything
    assert stories.ngrams_found_in(stream, present | absent, 8, scan_tokens=100) == present
    assert stories.ngrams_found_in(stream, everything, 8, scan_tokens=100) == everything
    assert stories.ngrams_found_in(stream, set(), 8, scan_tokens=100) == set()


def test_variety_and_repetition_are_the_published_counts():
    assert stories.distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert stories.distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # (1, 2) three times, (2, 1)
    assert stories.repetition([[1] * 7, [1, 2, 3, 4, 5]], 4) == (0.75 + 0) / 2
    assert stories.repetition([[1]], 4) == 0 and stories.distinct([], 2) == 0


def test_a_model_that_recites_is_told_from_one_that_does_not(tmp_path):
    recited = encode_text("The fox went home and the bear went home and the cat stayed where it was all night.")
    folder = write_dataset(
        tmp_path,
        "story",
        [*DOCUMENTS, "The fox went home and the bear went home and the cat stayed where it was all night."],
    )
    streams, _ = open_dataset(folder, "story")
    judged = stories.judge_stories([recited, recited], streams)
    assert judged["copied_8"] == 1 and judged["copied_8_of_real_text"] == 1  # train and val are the same here
    assert judged["distinct_1"] < 0.5 and judged["tokens"] == 2 * len(recited)
    assert stories.judge_stories([recited[::-1]], streams)["copied_8"] == 0
    assert stories.judge_stories([[], []], streams)["copied_8"] == 0
