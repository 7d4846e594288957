"""The options about what a run learns."""

from __future__ import annotations

import dataclasses

from common.cli import option

# DPO's and KTO's share of the learning rates of a new model, a tenth of fine-tuning's: an answer's log probability is a
# sum over its tokens, and a few large steps make all answers improbable (docs/teaching.md has measurements).
PREFERENCE_RATE = 1 / 30


@dataclasses.dataclass(frozen=True)
class ObjectiveOptions:
    """The part of train.py's command line that is about the loss."""

    objective: str = option(
        "next_token",
        "what to learn: next_token (from text or chat data); dpo, which makes the chosen answer of a preference data "
        "set more likely than the rejected one; or kto, which makes answers labelled good more likely and bad ones "
        "less likely. dpo and kto need --init_from",
        choices=("next_token", "dpo", "kto"),
        group="objective",
    )
    beta: float = option(
        0.1,
        "dpo, kto: how closely the model is kept to the one that it started from; smaller numbers let it move further",
        above=0,
        group="objective",
        metavar="X",
    )
    label_smoothing: float = option(
        0.0,
        "dpo: the fraction of the pairs whose chosen and rejected answers are assumed to be swapped",
        at_least=0,
        below=0.5,
        group="objective",
        metavar="X",
    )
    sft_weight: float = option(
        0.0,
        "dpo: weight of the chosen answer's negative log likelihood per token, added to the loss",
        at_least=0,
        group="objective",
        metavar="X",
    )
