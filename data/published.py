"""Published shards of GPT-2's tokens as a data set: checked and described where they are, without a copy.

    prepare_shards(dataset, folder, train_paths, val_path)

writes one file, `<name>.json`, whose entries are the paths of the shards. Paths inside the output folder are recorded
relative to it, so that the folder can be moved; all others absolute.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError
from common.files import FileLock, atomic_write
from data.dataset import SPLITS, DatasetInfo, FileInfo, SplitInfo, info_bytes
from data.earlier import earlier_info, remove_leftovers
from data.pipeline import Dataset
from data.readers.shards import HEADER_BYTES, Shard, check_shard, document_start, shard_tokens

YARDSTICK_TOKENS = 10_485_760  # the first of the validation shard, on which llm.c and modded-nanogpt measure


def prepare_shards(
    dataset: Dataset,
    folder: Path,
    train: Sequence[Path],
    val: Path | None = None,
    val_fraction: float = 0.05,
    yardstick: str | None = None,
) -> DatasetInfo:
    """Check the shards, write the description of the data set into `folder` and return it.

    The validation split is the first YARDSTICK_TOKENS of the shard `val`, and one more token, which is only a target.
    Without `val`, it is the end of the last train shard, from the beginning of a document on: `val_fraction` of all
    tokens, but at most half of that shard. Raises UserError for a shard that is damaged or not GPT-2's.
    """
    print(f"{dataset.name}: {dataset.source}")
    print(f"licence: {dataset.licence}")
    paths = [*train, *([val] if val else [])]
    for path in paths:
        shard_tokens(path)  # checks the headers first, because checking the ids takes minutes
    with FileLock(folder / f".{dataset.name}.lock", f"data set {dataset.name} in {folder}"):
        # disable=None: a bar on a terminal only
        checked = [check_shard(path) for path in tqdm(paths, desc="checking", unit="shard", disable=None)]
        if val:
            splits = {"train": _split(folder, checked[:-1]), "val": _val_split(folder, checked[-1])}
        else:
            splits = _divided(folder, checked, val_fraction)
        info = DatasetInfo(
            name=dataset.name,
            format="text",
            source=dataset.source,
            licence=dataset.licence,
            dtype="uint16",
            options={},
            splits=splits,
            yardstick=yardstick and yardstick.format(tokens=splits["val"].tokens - 1),
        )
        earlier = earlier_info(folder, dataset.name)
        with atomic_write(folder / f"{dataset.name}.json") as file:
            file.write(info_bytes(info))
        remove_leftovers(folder, earlier, info)
    _print_totals(info)
    print(f"the shards are used where they are, in {paths[0].absolute().parent}; do not remove them")
    return info


def divide_shards(paths: Sequence[Path]) -> tuple[list[Path], Path | None]:
    """The shards for training, and the one for validation, which has "val" in its name.

    Raises UserError for several of these, and if no shard is left for training.
    """
    val = [path for path in paths if re.search(r"(?<![a-z])val(?![a-z])", path.name.lower())]
    train = [path for path in paths if path not in val]
    if len(val) > 1:
        raise UserError(
            f"{val[0].name} and {val[1].name} are both named like validation shards; pass only one of them with --input"
        )
    if not train:  # a single shard can be divided
        train, val = list(paths), []
    return train, val[0] if val else None


def _split(folder: Path, shards: Sequence[Shard]) -> SplitInfo:
    files = tuple(_file(folder, shard, shard.tokens) for shard in shards)
    documents, text_bytes = (sum(getattr(shard, key) for shard in shards) for key in ("documents", "text_bytes"))
    return SplitInfo(sum(shard.tokens for shard in shards), files, documents, text_bytes)


def _val_split(folder: Path, shard: Shard) -> SplitInfo:
    """The beginning of the validation shard. The number of its documents is known only for a whole shard."""
    tokens = min(shard.tokens, YARDSTICK_TOKENS + 1)
    if tokens == shard.tokens:
        return _split(folder, [shard])
    return SplitInfo(tokens, (_file(folder, shard, tokens),))


def _divided(folder: Path, shards: Sequence[Shard], val_fraction: float) -> dict[str, SplitInfo]:
    """The splits without a validation shard: the end of the last shard is for validation."""
    last = shards[-1]
    wanted = int(val_fraction * sum(shard.tokens for shard in shards))
    start = document_start(last.path, last.tokens - max(1, min(wanted, last.tokens // 2)))
    if not 0 < start < last.tokens:
        raise UserError(
            f"{last.path} cannot be divided into train and validation, because no document begins in the right range; "
            "also pass a shard for validation, with val in its name, or change --val_fraction"
        )
    before = _split(folder, shards[:-1])
    train_files = (*before.files, _file(folder, last, start))
    val_file = _file(folder, last, last.tokens - start, HEADER_BYTES + 2 * start)
    return {
        "train": SplitInfo(before.tokens + start, train_files),
        "val": SplitInfo(last.tokens - start, (val_file,)),
    }


def _file(folder: Path, shard: Shard, tokens: int, start_byte: int = HEADER_BYTES) -> FileInfo:
    path, folder = shard.path.absolute(), folder.absolute()
    name = path.relative_to(folder) if path.is_relative_to(folder) else path
    return FileInfo(str(name), shard.sha256, tokens, start_byte)


def _print_totals(info: DatasetInfo) -> None:
    for split in SPLITS:
        totals = info.splits[split]
        documents = f"{totals.documents:,} documents, " if totals.documents is not None else ""
        first, last = (Path(totals.files[index].file).name for index in (0, -1))
        names = first if first == last else f"{first} to {last}"
        print(f"{split}: {documents}{totals.tokens:,} tokens in {names}")
