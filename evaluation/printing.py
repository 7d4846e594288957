"""What evaluate.py prints: a table per data set and scope, differences with their intervals, stories, the verdict."""

from __future__ import annotations

import math

from common.numbers import significant
from evaluation.bootstrap import NATS_PER_TOKEN
from evaluation.stories import N_COPIED, STORY_TOKENS
from generation.sampling import TEXT_SAMPLING

SCOPE_NAMES = {"assistant": "what the assistant says", "all": "all tokens"}


def print_report(report: dict) -> None:
    """Print all that `measure` found; the verdict comes last."""
    limit = f", about the first {report['limit']:,} tokens" if report["limit"] else ""
    weights = ", 8-bit weights" if report["quantize"] else ""
    for name, measured in report["datasets"].items():
        print(f"\n{name}: validation split{limit}; {report['dtype']}{weights} on {report['device']}")
        if measured.get("yardstick"):
            print(f"to compare: {measured['yardstick']}")
        for scope in measured["scopes"]:
            print_table(scope, measured["results"])
            for comparison in measured["comparisons"]:
                if comparison["scope"] == scope:
                    print(comparison_line(comparison))
    for sample in report["samples"]:
        print_stories(sample)
    verdicts = {name: measured["verdict"] for name, measured in report["datasets"].items() if measured["verdict"]}
    if verdicts:
        print()
    for name, verdict in verdicts.items():
        print(verdict_line(name, verdict))


def print_table(scope: str, results: list[dict]) -> None:
    """Print the numbers of one scope, one line per checkpoint."""
    counts = sorted({result[scope]["tokens"] for result in results})  # they differ where the tokenizers do
    tokens, text_bytes = " to ".join(f"{count:,}" for count in counts), results[0][scope]["text_bytes"]
    print(f"\n{SCOPE_NAMES[scope]}: {tokens} tokens, {text_bytes:,} bytes of text; loss in nats per token")
    width = max(10, *(len(result["checkpoint"]) for result in results))
    titles = f"{'window/stride':>13} {'loss':>8} {'perplexity':>10} {'bits/byte':>9} {'accuracy':>8} {'tokens/s':>9}"
    print(f"{'checkpoint':<{width}} {titles}")
    loss, bits, digits = map(max, zip(*(digits_of(result[scope]) for result in results), strict=True))
    for result in results:
        numbers = result[scope]
        window = f"{result['block_size']}/{result['stride']}"
        print(
            f"{result['checkpoint']:<{width}} {window:>13} {numbers['loss']:>8.{loss}f} "
            f"{significant(numbers['perplexity'], digits):>10} {numbers['bits_per_byte']:>9.{bits}f} "
            f"{numbers['accuracy']:>8.1%} {significant(result['tokens_per_s'], 3):>9}"
        )


def digits_of(numbers: dict) -> tuple[int, int, int]:
    """How many decimals of the loss and of the bits per byte are meaningful, and how many digits of the perplexity.

    Two digits of the uncertainty of each, which depends on the number of documents, and at most three.

    >>> digits_of({"loss": 0.3191, "bits_per_byte": 0.148, "loss_margin": 0.006})
    (3, 3, 3)
    >>> digits_of({"loss": 2.187, "bits_per_byte": 1.0108, "loss_margin": 0.12})
    (2, 3, 2)
    """
    error = numbers["loss_margin"]
    if not error:
        return 2, 2, 2
    ratio = numbers["bits_per_byte"] / numbers["loss"] if numbers["loss"] else 1.0
    loss, bits = (min(3, decimals([-margin, margin])) for margin in (error, error * ratio))
    return loss, bits, min(3, max(2, decimals([-error, error])))  # perplexity's relative error is that of the loss


def decimals(interval: list[float]) -> int:
    """The number of decimals of a difference: enough for two digits of its uncertainty, which is half the interval.

    >>> decimals([-1.06, -0.82]), decimals([0.001, 0.002])
    (2, 5)
    """
    half = (interval[1] - interval[0]) / 2
    return min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 4


def comparison_line(comparison: dict) -> str:
    """The difference in loss between a checkpoint and the baseline, with its interval."""
    names = f"{comparison['checkpoint']} - {comparison['baseline']}"
    bootstrap = comparison["bootstrap"]
    if bootstrap is None:
        return f"{names}: the split is too short for an interval"
    digits, (low, high) = decimals(bootstrap["interval"]), bootstrap["interval"]
    return (
        f"{names}: {bootstrap['difference']:+.{digits}f} {bootstrap['measure']}, 95 % interval {low:+.{digits}f} to "
        f"{high:+.{digits}f} (paired bootstrap over {bootstrap['units']})"
    )


def verdict_line(name: str, verdict: dict) -> str:
    """Which checkpoint is the best on a data set, and by how much; or that the data is not enough to tell."""
    best, second, bootstrap = verdict["best"], verdict["second"], verdict["bootstrap"]
    where = f"Verdict on {name} ({SCOPE_NAMES[verdict['scope']]})"
    if bootstrap is None:
        return f"{where}: {best} has the lowest loss, but the split is too short to tell whether it is better"
    digits, (low, high) = decimals(bootstrap["interval"]), bootstrap["interval"]
    amount = f"{bootstrap['difference']:.{digits}f} {bootstrap['measure']}"
    interval = f"95 % interval {low:.{digits}f} to {high:.{digits}f}"
    if not bootstrap["excludes_zero"]:
        return f"{where}: no clear difference between {best} and {second} ({amount}, {interval}, which includes 0)"
    if bootstrap["measure"] != NATS_PER_TOKEN:
        return f"{where}: {best} is better than {second} by {amount} ({interval})"
    ratio = math.exp(min(bootstrap["difference"], 700))  # exp(710) overflows a float
    lower = f"its perplexity is {significant(100 * (1 - 1 / ratio), 2)} % lower"
    if ratio > 10:
        lower = f"the other's perplexity is {significant(ratio, 2)} times as high"
    return f"{where}: {best} is better than {second} by {amount} ({interval}); {lower}"


def print_stories(sample: dict) -> None:
    """Print the stories of one checkpoint, how varied they are, and how much is copied."""
    settings = f"temperature {TEXT_SAMPLING.temperature}, top_k {TEXT_SAMPLING.top_k}"
    print(f"\nstories by {sample['checkpoint']} ({settings}, at most {STORY_TOKENS} tokens each)")
    for story in sample["stories"]:
        print(f"\n> {story['prompt']}\n{story['story'].strip()}")
    counts = ", ".join(f"distinct-{n} {sample[f'distinct_{n}']:.3f}" for n in (1, 2, 3))
    print(f"\n{sample['tokens']:,} tokens: {counts}; repeated 4-grams {sample['repetition_4']:.1%}")
    print(
        f"{N_COPIED}-grams that occur in the training split of {sample['dataset']}: "
        f"{sample[f'copied_{N_COPIED}']:.1%}; for real validation text: {sample[f'copied_{N_COPIED}_of_real_text']:.1%}"
    )
