"""The options about low-rank adapters."""

from __future__ import annotations

import dataclasses

from common.cli import option
from common.lora import LAYERS


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """The part of train.py's command line that is about adapters."""

    lora_rank: int | None = option(
        None,
        "train only an adapter: two factors of this rank for each matrix of the --init_from model, whose own weights "
        "stay frozen (4 to 16 are usual)",
        at_least=1,
        group="adapter",
        metavar="R",
    )
    lora_alpha: float | None = option(
        None, "the adapter's changes are scaled by this / R (default: 16)", above=0, group="adapter"
    )
    lora_layers: str | None = option(
        None, "the matrices of a block that get factors (default: all)", choices=tuple(LAYERS), group="adapter"
    )
    lora_chat_rows: bool | None = option(
        None,
        "also train the embeddings of <|im_start|> and <|im_end|> (default: for chat data, if --init_from was not "
        "trained on chats)",
        group="adapter",
    )
