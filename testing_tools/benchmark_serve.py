"""Measure serve.py: tokens per second and times to the first token, next to gen.py and to another server.

    python testing_tools/benchmark.py serve --preset gpt2 --dtype bfloat16
    python testing_tools/benchmark.py serve --preset gpt2 --dtype bfloat16 --quantize int8 --json serve.json
    python testing_tools/benchmark.py serve --preset small --peer_url http://127.0.0.1:9000 --peer_model models/hf-small

The server runs in a process of its own with random weights, which does not change the speed; the clients run in this
one and take part of the cores. With --keep DIR the checkpoint stays, so that a peer can be started with the same
weights (python export.py DIR/random.pt DIR/hf); its address is given with --peer_url, and the rounds alternate.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent

from common.cli import UserError, check_options, option, parse_options  # noqa: E402
from common.device import dtype_option, plain_option, quantize_option  # noqa: E402
from common.files import atomic_write, require_target  # noqa: E402

TIMEOUT_S = 600


@dataclasses.dataclass(frozen=True)
class ServeBenchmarkOptions:
    """What to serve, and to how many clients."""

    task: str = option("serve", "what to measure", positional=True, choices=("serve",))
    clients: tuple[int, ...] = option(
        (1, 16, 64), "numbers of simultaneous clients", nargs="+", at_least=1, at_most=512
    )
    max_tokens: int = option(48, "tokens per reply", at_least=2)
    prompt_words: int = option(100, "words per message, each about one token", at_least=1)
    rounds: int = option(3, "measured rounds", at_least=1)
    preset: str = option("small", "model size, as for train.py", group="model")
    max_rows: int = option(16, "serve.py's --max_rows", at_least=2, group="server")
    dtype: str | None = dtype_option("server")
    quantize: str | None = quantize_option("server")
    plain: bool = plain_option("server")
    peer_url: str | None = option(
        None, "another OpenAI-compatible server that runs already", group="peer", metavar="URL"
    )
    peer_model: str | None = option(None, "what the other server calls the model", group="peer", metavar="NAME")
    keep: str | None = option(None, "write the checkpoint to this folder and keep it", group="files", metavar="DIR")
    json: str | None = option(None, "also write the figures to this file", group="files", metavar="FILE")

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True)
class Target:
    """A server under test."""

    name: str
    url: str
    model: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """The times at which a request began and each piece of its reply arrived."""

    started: float
    pieces: list[float]

    @property
    def first_s(self) -> float:
        return self.pieces[0] - self.started

    @property
    def step_s(self) -> float:
        """The mean time between pieces. A median would mislead, because several pieces may arrive together."""
        return (self.pieces[-1] - self.pieces[0]) / (len(self.pieces) - 1)


def message(number: int, n_words: int) -> str:
    """A message that shares no prefix with others, so that no cache helps."""
    return f"{number} " + "word " * (n_words - 1)


def ask(target: Target, text: str, max_tokens: int) -> Reply:
    """Stream one reply. Raises UserError if the server cannot be reached or does not answer with a stream."""
    address = urlsplit(target.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S)
    body = {"model": target.model, "messages": [{"role": "user", "content": text}], "stream": True}
    started = time.perf_counter()
    with contextlib.closing(connection):
        content = json.dumps({**body, "max_tokens": max_tokens, "temperature": 0})
        try:
            connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{target.name} at {target.url}: {reason}; start it or check --peer_url") from error
        answer = connection.getresponse()
        if answer.status != 200:
            raise UserError(f"{target.name} answered {answer.status}: {answer.read(300)!r}; check --peer_url")
        pieces = []
        for line in answer:
            choices = json.loads(line[6:]).get("choices") if line.startswith(b"data: {") else None
            if choices and choices[0].get("delta", {}).get("content"):
                pieces.append(time.perf_counter())
    if len(pieces) < 2:
        raise UserError(f"{target.name} ended a reply after {len(pieces)} tokens; use another --preset or seed")
    return Reply(started, pieces)


def ask_together(target: Target, n: int, options: ServeBenchmarkOptions, seed: int) -> list[Reply]:
    """The replies to `n` clients that ask at the same time."""
    texts = [message(1000 * seed + number, options.prompt_words) for number in range(n)]
    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda text: ask(target, text, options.max_tokens), texts))


def speed(replies: Sequence[Reply]) -> float:
    """Tokens per second of all replies together, from the first request to the last token."""
    begin, end = min(reply.started for reply in replies), max(reply.pieces[-1] for reply in replies)
    return sum(len(reply.pieces) for reply in replies) / (end - begin)


def steady_speed(replies: Sequence[Reply]) -> float | None:
    """Tokens per second while all replies stream, without the time for prompts; None if they never overlap."""
    begin, end = max(reply.pieces[0] for reply in replies), min(reply.pieces[-1] for reply in replies)
    n_tokens = sum(begin < piece <= end for reply in replies for piece in reply.pieces)
    return n_tokens / (end - begin) if end > begin else None


def median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def measure_clients(targets: Sequence[Target], n: int, options: ServeBenchmarkOptions) -> dict[str, dict]:
    """Speeds and waiting times with `n` clients, in rounds that alternate between the servers."""
    found: dict[str, list[list[Reply]]] = {target.name: [] for target in targets}
    for number in range(options.rounds):
        for target in targets:
            found[target.name].append(ask_together(target, n, options, 10 * n + number))
    return {
        name: {
            "tokens_per_s": statistics.median(map(speed, rounds)),
            "steady_tokens_per_s": median_or_none([steady_speed(replies) for replies in rounds]),
            "first_token_s": statistics.median(reply.first_s for replies in rounds for reply in replies),
            "last_first_token_s": max(reply.first_s for replies in rounds for reply in replies),
            "step_s": statistics.median(reply.step_s for replies in rounds for reply in replies),
        }
        for name, rounds in found.items()
    }


def measure_newcomer(target: Target, options: ServeBenchmarkOptions) -> dict[str, float]:
    """The time to the first token of one more client while all other rows stream, and the time allowed for it."""
    alone_s = statistics.median(ask(target, message(7000 + n, options.prompt_words), 2).first_s for n in range(3))
    n_others = options.max_rows - 1
    with concurrent.futures.ThreadPoolExecutor(n_others + 1) as pool:
        texts = [message(8000 + number, options.prompt_words) for number in range(n_others)]
        others = [pool.submit(ask, target, text, 8 * options.max_tokens) for text in texts]
        time.sleep(3 * options.max_rows * alone_s + 1)  # until their prompts are prefilled
        newcomer = ask(target, message(9000, options.prompt_words), 2)
        ended = [other.result() for other in others]
    step_s = statistics.median(other.step_s for other in ended)
    n_streaming = sum(other.pieces[0] < newcomer.started and newcomer.pieces[0] < other.pieces[-1] for other in ended)
    allowed_s = 1.5 * alone_s + step_s
    found = {"alone_s": alone_s, "among_others_s": newcomer.first_s, "step_s": step_s, "allowed_s": allowed_s}
    return {**found, "others": n_streaming}


def gen_speed(checkpoint: Path, options: ServeBenchmarkOptions) -> float:
    """gen.py's tokens per second for one long reply, so that its first, slow steps hardly count."""
    prompt = message(5, options.prompt_words)
    command = [sys.executable, str(ROOT / "gen.py"), str(checkpoint), "--chat", "--prompt", prompt, "--temp", "0"]
    command += ["--max_tokens", str(8 * options.max_tokens), "--verbose", "--no_delay", *server_options(options)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    match = re.search(r"then ([\d.]+) tokens/s", done.stderr)
    if match is None:
        raise UserError(f"gen.py failed: {done.stderr.strip()[-300:]}; run it by hand")
    return float(match[1])


def server_options(options: ServeBenchmarkOptions) -> list[str]:
    given = ["--device", "cpu"]
    given += ["--dtype", options.dtype] if options.dtype else []
    given += ["--quantize", options.quantize] if options.quantize else []
    return [*given, "--plain"] if options.plain else given


@contextlib.contextmanager
def running_server(checkpoint: Path, options: ServeBenchmarkOptions) -> Iterator[tuple[Target, int]]:
    """serve.py in a process of its own, once its model is loaded; and the id of that process."""
    command = [sys.executable, str(ROOT / "serve.py"), str(checkpoint), "--port", "0", "--max_waiting", "1000"]
    command += ["--max_rows", str(options.max_rows), *server_options(options)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise UserError(f"serve.py did not start: {log.read().strip()[-300:]}")
            target = Target("ours", line.split()[-1], checkpoint.stem)
            ask(target, "warm up", 2)
            yield target, process.pid
        finally:
            process.terminate()
            process.wait()


def resident_mib(pid: int) -> float | None:
    """The memory of a process; None if the system does not report it."""
    path = Path(f"/proc/{pid}/status")
    match = re.search(r"VmRSS:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(match[1]) / 1024 if match else None


def write_checkpoint(folder: Path, preset: str) -> Path:
    """A chat model of that size with random weights."""
    import torch

    from common.checkpoint import save_checkpoint
    from model import GPT, PRESETS

    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: use one of {', '.join(PRESETS)}")
    torch.manual_seed(0)
    path = folder / "random.pt"
    save_checkpoint(path, GPT(PRESETS[preset]), {"format": "chat", "dataset": "random weights"})
    return path


def table(found: dict) -> list[str]:
    """The figures in lines."""
    lines = [f"gen.py: {found['gen_tokens_per_s']:.1f} tokens/s"]
    for n, servers in found["clients"].items():
        for name, row in servers.items():
            first = f"first token {row['first_token_s']:.2f} s, at the latest {row['last_first_token_s']:.2f} s"
            steady = row["steady_tokens_per_s"]
            all_at_once = f", {steady:.1f} while all stream" if steady else ""
            lines.append(f"{n:>3} clients, {name}: {row['tokens_per_s']:.1f} tokens/s{all_at_once}, {first}")
    new = found["newcomer"]
    lines.append(
        f"first token alone {new['alone_s']:.2f} s, while {new['others']} others stream {new['among_others_s']:.2f} s "
        f"(1.5 x alone + a step of {1000 * new['step_s']:.0f} ms: {new['allowed_s']:.2f} s)"
    )
    lines.append(f"memory: {found['memory_mib']} MiB before and after")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(ServeBenchmarkOptions, __doc__, argv)
    if options.json:
        require_target("json", options.json)
    with contextlib.ExitStack() as stack:
        folder = Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        checkpoint = write_checkpoint(folder, options.preset)
        found: dict = {"options": dataclasses.asdict(options), "gen_tokens_per_s": gen_speed(checkpoint, options)}
        ours, pid = stack.enter_context(running_server(checkpoint, options))
        targets = [ours]
        if options.peer_url:
            targets.append(Target("peer", options.peer_url, options.peer_model or "random"))
        before = resident_mib(pid)
        found["clients"] = {n: measure_clients(targets, n, options) for n in options.clients}
        found["newcomer"] = measure_newcomer(ours, options)
        found["memory_mib"] = [None if size is None else round(size) for size in (before, resident_mib(pid))]
    print("\n".join(table(found)))
    if options.json:
        with atomic_write(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
