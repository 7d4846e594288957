"""Where each data set of the hub comes from: the one table of repositories, revisions and files.

A revision is a commit, so that the same command gives the same data in ten years. There are two exceptions: the
conversion of DailyDialog to parquet, which the hub makes itself on a separate branch, and FineWeb, which is not pinned
yet. If a data set has several sources, they are tried one after another until one can be downloaded.
`python testing_tools/check_sources.py` asks the hub whether all of these files are still there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HubSource:
    """Files of a data set's repository at one revision: names, or patterns such as data/train-*.parquet."""

    repository: str
    revision: str
    files: tuple[str, ...]

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which cannot change, rather than a branch."""
        return bool(re.fullmatch(r"[0-9a-f]{40}", self.revision))

    def __str__(self) -> str:
        return f"{self.repository} at {self.revision[:7] if self.is_pinned else self.revision}"


@dataclass(frozen=True)
class StreamedSource:
    """A data set of the hub whose records are streamed: the splits and the configuration to use, and its licence."""

    hub: HubSource
    train: str
    val: str | None
    licence: str
    config: str | None = None


def origin_and_licence(
    source: StreamedSource | None, files: Sequence[Path], licence: str | None = None
) -> tuple[str, str]:
    """The source and the licence that are recorded with a data set made from a data set of the hub or local files.

    The source of local files is their names; with `source`, they come from that data set. `licence` replaces the
    licence of `source`; without either, the licence is "not stated".
    """
    origin = [source.hub.repository] if source else []
    names = [", ".join(file.name for file in files)] if files else []
    known = source.licence if source else "not stated (state it with --licence)"
    return ": ".join(origin + names), licence or known


SOURCES: dict[str, tuple[HubSource, ...]] = {
    "story": (
        HubSource(
            "roneneldan/TinyStories",
            "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
            ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"),
        ),
    ),
    "dailydialog": (
        # The official repository has a loading script that `datasets` no longer runs; this is the hub's conversion.
        HubSource(
            "li2017dailydialog/daily_dialog",
            "refs/convert/parquet",
            ("default/train/0000.parquet", "default/validation/0000.parquet"),
        ),
        HubSource(
            "OpenRL/daily_dialog",
            "1668faf0c0dc44664f108c489fd0666128db2c48",
            (
                "data/train-00000-of-00001-f151c79abb2c1fd5.parquet",
                "data/validation-00000-of-00001-2407eb323af19881.parquet",
            ),
        ),
    ),
    "smol-smoltalk": (
        HubSource(
            "HuggingFaceTB/smol-smoltalk",
            "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
            ("data/train-*.parquet", "data/test-*.parquet"),
        ),
    ),
    "everyday": (
        HubSource(
            "HuggingFaceTB/smoltalk",
            "5feaf2fd3ffca7c237fc38d1861bc30365d48ffa",
            ("data/everyday-conversations/train-*.parquet", "data/everyday-conversations/test-*.parquet"),
        ),
    ),
    "oasst1": (
        HubSource(
            "OpenAssistant/oasst1",
            "fdf72ae0827c1cda404aff25b6603abec9e3399b",
            ("data/train-*.parquet", "data/validation-*.parquet"),
        ),
    ),
    "dolly": (
        HubSource(
            "databricks/databricks-dolly-15k",
            "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
            ("databricks-dolly-15k.jsonl",),
        ),
    ),
    "ultrafeedback": (
        HubSource(
            "HuggingFaceH4/ultrafeedback_binarized",
            "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
            ("data/train_prefs-*.parquet", "data/test_prefs-*.parquet"),
        ),
    ),
    "hh": (
        HubSource(
            "Anthropic/hh-rlhf",
            "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
            ("*/train.jsonl.gz", "*/test.jsonl.gz"),
        ),
    ),
    "cosmopedia": (
        HubSource(
            "HuggingFaceTB/cosmopedia",
            "0ae6ec63f91742bd2d1eaef4f02232c55d719385",
            (
                "data/stories/train-*.parquet",
                "data/wikihow/train-*.parquet",
                "data/openstax/train-*.parquet",
                "data/khanacademy/train-*.parquet",
                "data/auto_math_text/train-*.parquet",
                "data/web_samples_v1/train-*.parquet",
                "data/web_samples_v2/train-*.parquet",
                "data/stanford/train-*.parquet",
            ),
        ),
    ),
    # Unpinned: their commits were not known when this was written. <name>.json records the sha256 of each shard.
    "fineweb": (HubSource("kjj0/fineweb10B-gpt2", "main", ("fineweb_val_000000.bin", "fineweb_train_*.bin")),),
    "fineweb-edu": (
        HubSource(
            "karpathy/fineweb-edu-100B-gpt2-token-shards",
            "main",
            ("edu_fineweb_val_000000.bin", "edu_fineweb_train_*.bin"),
        ),
    ),
    "fineweb-text": (HubSource("HuggingFaceFW/fineweb-edu", "main", ("sample/10BT/*.parquet",)),),
    "squad": (
        HubSource(
            "rajpurkar/squad",
            "7b6d24c440a36b6815f21b70d25016731768db1f",
            ("plain_text/train-00000-of-00001.parquet",),
        ),
    ),
}
