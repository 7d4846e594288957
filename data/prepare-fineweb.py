"""Prepare FineWeb: filtered English web pages, published as shards of GPT-2's tokens (Penedo et al., 2024).

    python data/prepare-fineweb.py --shards 9

prints:

    fineweb: kjj0/fineweb10B-gpt2, 9 of 103 shards
    licence: ODC-By 1.0, and Common Crawl's terms of use
    train: about 1 million documents, 900,000,000 tokens in fineweb_train_000001.bin to fineweb_train_000009.bin
    val: 10,485,761 tokens in fineweb_val_000000.bin

Downloads 200 MB per shard of 100 million tokens, and resumes an interrupted download. The shards stay where they are
downloaded (HF_HOME); data/fineweb.json says where that is. With --edu, the pages are those of FineWeb-Edu, which a
classifier rated as educational, and the data set is called fineweb-edu. Give shards that you have with --input; the one
with "val" in its name is for validation:

    python data/prepare-fineweb.py --input fineweb10B/*.bin

Validation is on the first 10,485,760 tokens of the validation shard, as in llm.c and modded-nanogpt. Then train as
docs/reproduce-gpt2.md says, for example: python train.py --dataset fineweb --preset gpt2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the project's modules are found anywhere

from common.cli import check_options, option, parse_options, run_script
from common.files import make_folder, require_free_space
from data.advice import print_advice
from data.pipeline import DATA_FOLDER, Dataset
from data.published import divide_shards, prepare_shards
from data.readers.files import SHARD_SUFFIXES
from data.readers.hub import cache_folder, fetch_data_file, is_cached
from data.readers.inputs import input_files
from data.sources import SOURCES

LICENCE = "ODC-By 1.0, and Common Crawl's terms of use"
SHARD_BYTES = 200_001_024  # 100 million tokens and the header
N_SHARDS = {"fineweb": 103, "fineweb-edu": 1001}  # that are published for training
N_EDU_DEFAULT = 100  # 10 billion tokens, as many as FineWeb's 103 shards
YARDSTICK = (
    "the first {tokens:,} tokens of the validation shard in windows that do not overlap, as llm.c and modded-nanogpt "
    "measure with a block size of 1,024"
)
TARGET = " (GPT-2 of 124M: 3.28)"  # on FineWeb, not on FineWeb-Edu


@dataclass(frozen=True)
class FineWebOptions:
    edu: bool = option(False, "prepare FineWeb-Edu instead, as data set fineweb-edu", group="data")
    shards: int | None = option(
        None,
        "use only the first N train shards of 100 million tokens (default: 103; with --edu: 100 of 1001)",
        at_least=1,
        metavar="N",
        group="data",
    )
    input: tuple[str, ...] = option(
        (), "local shards, or folders of them, instead of downloading them", nargs="+", metavar="PATH", group="data"
    )
    output_dir: str | None = option(
        None, "folder for the description of the data set (default: the data folder)", metavar="DIR", group="output"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.shards and self.shards > N_SHARDS[self.name]:
            raise ValueError(f"--shards must be at most {N_SHARDS[self.name]}, the number of published shards")

    @property
    def name(self) -> str:
        """The name of the data set."""
        return "fineweb-edu" if self.edu else "fineweb"


def main() -> None:
    options = parse_options(FineWebOptions, __doc__)
    folder = make_folder(Path(options.output_dir) if options.output_dir else DATA_FOLDER)
    (source,) = SOURCES[options.name]
    yardstick = YARDSTICK + ("" if options.edu else TARGET)
    if options.input:
        train, val = divide_shards(input_files(options.input, SHARD_SUFFIXES))
        train = sorted(train)[: options.shards]
        origin = f"{source.repository}: {len(train)} local shard{'' if len(train) == 1 else 's'}"
    else:
        n_shards = options.shards or (N_EDU_DEFAULT if options.edu else N_SHARDS["fineweb"])
        val, *train = download(options.name, n_shards)
        origin = f"{source.repository}, {n_shards} of {N_SHARDS[options.name]} shards"
    dataset = Dataset(options.name, "text", origin, LICENCE)
    info = prepare_shards(dataset, folder, train, val, yardstick=yardstick if val else None)
    print("docs/reproduce-gpt2.md: how to train GPT-2 on it, and which loss to expect")
    print_advice(info, options.output_dir)


def download(name: str, n_shards: int) -> list[Path]:
    """The validation shard and the first train shards in the local cache. Raises UserError, also for a full disk."""
    (source,) = SOURCES[name]
    val_pattern, train_pattern = source.files
    names = [val_pattern, *(train_pattern.replace("*", f"{number:06d}") for number in range(1, n_shards + 1))]
    missing = [file for file in names if not is_cached(source, file)]
    if missing:
        require_free_space(cache_folder(), len(missing) * SHARD_BYTES, f"downloading {len(missing)} shards")
    remedy = "by hand and pass all shards with --input, or run the command again, which continues where it stopped"
    return [fetch_data_file(source, file, remedy) for file in names]


if __name__ == "__main__":
    run_script(main)
