"""data/train-tokenizer.py: what it learns, writes, refuses and says; and the lesson, which learns the same merges."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import UserError
from common.token_patterns import PATTERNS
from common.tokenizer_json import merge_pairs, parse_tokenizer_json
from data.dataset import DatasetInfo, FileInfo, SplitInfo, info_bytes
from data.readers.inputs import input_files
from data.readers.recognize import recognize_files
from data.tokenizer_texts import ChosenTexts, SpreadSample, bytes_that_fit, survey
from data.tokenizer_training import TrainTokenizerOptions, learn, train_tokenizer
from setup_tokenizer import SPECIAL_TOKENS, get_base_tokenizer
from tests.generated_texts import generated_texts
from tests.test_layouts import telegram

ROOT = Path(__file__).resolve().parent.parent
STORIES = [f"Once upon a time there were {n} cats and {n * n} dogs. They didn't play.\n\nThe end." for n in range(200)]


@pytest.fixture
def stories(tmp_path, quick_disk) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in STORIES), "utf-8")
    return path


def trained(path: Path, name: str = "tales", vocab_size: int = 300, **changes) -> tuple[dict, Path]:
    """(content, path) of a tokenizer learned from a file and written next to it."""
    settings = {"input": (str(path),), "output_dir": str(path.parent)} | changes
    written = train_tokenizer(TrainTokenizerOptions(name=name, vocab_size=vocab_size, **settings))
    return json.loads(written.read_text("utf-8")), written


def chosen_texts(path: Path, max_bytes: int = 10**9) -> list[str]:
    found = recognize_files(input_files([path]), [str(path)])
    return list(ChosenTexts(found, survey(found), max_bytes))


def facts_of(path: Path, **changes) -> dict:
    return trained(path, **changes)[0]["model"]["jojo"]


# --- what is written ---


def test_the_file_has_as_many_ids_as_asked_for_and_the_control_tokens_last(stories, capsys):
    content, path = trained(stories, licence="MIT", source="a test")
    assert path == stories.parent / "tales-tokenizer.json"
    vocabulary = parse_tokenizer_json(path.read_text("utf-8"), str(path))
    assert len(vocabulary.tokens) == 297
    assert sorted(content["model"]["vocab"].values()) == list(range(300))
    assert {token: content["model"]["vocab"][token] for token in SPECIAL_TOKENS} == dict(
        zip(SPECIAL_TOKENS, (297, 298, 299), strict=True)
    )
    facts = content["model"]["jojo"]
    assert (facts["name"], facts["digest"], facts["pattern"]) == ("tales", vocabulary.digest, "gpt2")
    assert (facts["licence"], facts["source"]) == ("MIT", "a test")
    out = capsys.readouterr().out
    assert "read 200 texts" in out and "sample" not in out
    assert "300 ids (256 bytes, 41 merges, 3 control tokens)" in out
    assert "licence: MIT; source: a test" in out


def test_transformers_reads_the_file(stories):
    from transformers import PreTrainedTokenizerFast

    _, path = trained(stories, pattern="multilingual")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    ids = tokenizer("Once upon a time<|im_end|>")["input_ids"]
    assert ids[-1] == 299 and tokenizer.decode(ids[:-1]) == "Once upon a time"
    assert len(tokenizer) == 300


def test_bytes_per_token_and_longest_tokens_are_those_of_the_text(stories):
    content, path = trained(stories)
    facts = content["model"]["jojo"]
    n_bytes = sum(len(story.encode()) for story in STORIES)
    gpt2 = sum(len(get_base_tokenizer().encode_ordinary(story)) for story in STORIES)
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    own = sum(len(tokenizer.encode(story).ids) for story in STORIES)
    assert facts["measured_bytes"] == facts["text_bytes"] == n_bytes
    assert facts["bytes_per_token"] == pytest.approx(n_bytes / own, abs=1e-3)
    assert facts["bytes_per_token_gpt2"] == pytest.approx(n_bytes / gpt2, abs=1e-3)
    lengths = sorted((len(tokenizer.decode([id_])) for id_ in range(297)), reverse=True)
    assert [len(token) for token in facts["longest_tokens"]] == lengths[:10]


PROGRAM = "import sys; from data.tokenizer_training import *; from tests.generated_texts import generated_texts\n"
PROGRAM += "texts = generated_texts(3000, seed=6)\nif sys.argv[1] == 'reversed': texts.reverse()\n"
PROGRAM += "print(learn(texts, PATTERNS['multilingual'], 1000).digest)"


def test_neither_threads_nor_the_order_of_texts_change_the_vocabulary():
    digests = set()
    for threads, order in (("1", "in order"), ("2", "in order"), ("2", "reversed")):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", PROGRAM, order]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


def test_the_same_files_give_the_same_bytes(stories, tmp_path):
    first = trained(stories)[1].read_bytes()
    assert trained(stories, force=True)[1].read_bytes() == first


def test_the_order_of_the_files_does_not_matter(tmp_path, quick_disk):
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path, texts in zip(paths, (STORIES[:120], STORIES[120:]), strict=True):
        path.write_text("\n<|endoftext|>\n".join(texts), "utf-8")
    files = [
        trained(paths[0], input=tuple(map(str, order)), max_bytes=4000, force=True)[1].read_bytes()
        for order in (paths, paths[::-1])
    ]
    assert files[0] == files[1]


def test_exports_of_messengers_and_dumps_are_read_as_the_prepare_scripts_read_them(tmp_path, quick_disk):
    export = telegram(*[(("Al", "Bo")[n % 2], n // 10, f"zap {n} zap") for n in range(90)])
    path = tmp_path / "result.json"
    path.write_text(json.dumps(export), "utf-8")
    with pytest.raises(UserError, match='give --me "Bo"'):
        trained(path, vocab_size=264)
    assert "Ġzap" in trained(path, vocab_size=264, me="Bo")[0]["model"]["vocab"]
    dump = tmp_path / "dump.txt"
    dump.write_text("<|endoftext|>".join(STORIES), "utf-8")
    sizes = [
        facts_of(dump, name=f"divided{divide}", divide_within_lines=divide)["text_bytes"] for divide in (False, True)
    ]
    assert sizes[0] - sizes[1] == 199 * len("<|endoftext|>")


# --- what is read ---


def test_of_conversations_the_contents_are_read_and_nothing_else(tmp_path, quick_disk):
    chats = [
        {"messages": [{"role": "user", "content": f"zap {n} zap"}, {"role": "assistant", "content": "zap zap zap"}]}
        for n in range(50)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
    assert chosen_texts(path)[:2] == ["zap 0 zap", "zap zap zap"]
    content, _ = trained(path, vocab_size=264)
    assert "Ġzap" in content["model"]["vocab"] and "us" not in content["model"]["vocab"]


def test_folders_compressed_files_and_records_are_read_and_repaired(tmp_path, quick_disk, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo"))
    (folder / "b.jsonl").write_text('{"text": "Itâ€™s three \\ud83d"}\n{"text": ""}\n', "utf-8")
    (folder / "c.json").write_text('[{"id": 1}]', "utf-8")
    assert chosen_texts(folder) == ["one\ntwo", "It’s three \ufffd"]
    out = capsys.readouterr().out
    assert "c.json contains neither chat nor a text" in out
    assert "read 2 texts" in out and "record without text: 1" in out


def test_a_large_input_is_sampled_evenly_and_that_is_said(stories, capsys):
    n_bytes = sum(len(story.encode()) for story in STORIES)
    content, _ = trained(stories, vocab_size=270, max_bytes=n_bytes // 4)
    assert n_bytes // 4 - 200 < content["model"]["jojo"]["text_bytes"] <= n_bytes // 4
    out = capsys.readouterr().out
    assert "learned from a sample: 49 texts" in out and "--max_bytes" in out
    taken = chosen_texts(stories, n_bytes // 4)
    positions = [STORIES.index(text) for text in taken]
    assert all(1 <= after - before <= 6 for before, after in itertools.pairwise(positions))
    assert positions[0] < 6 and positions[-1] > 193


def test_memory_decides_how_much_is_read(stories):
    """Ten times the memory is enough for more than ten times the text, because words repeat; but not for new words."""
    repeating, new = STORIES[:199] * 5, [" ".join(f"w{n * 50 + m}" for m in range(50)) for n in range(200)]
    one, ten = (bytes_that_fit(repeating, PATTERNS["gpt2"], memory) for memory in (1e6, 1e7))
    assert ten > 20 * one
    one, ten = (bytes_that_fit(new, PATTERNS["gpt2"], memory) for memory in (1e6, 1e7))
    assert 9 * one < ten < 15 * one
    assert bytes_that_fit(["one text"], PATTERNS["gpt2"], 1e6) > 1000


def test_long_texts_are_read_whole(tmp_path, quick_disk):
    text = "\n".join(f"line {n}" for n in range(100_000)) + "x" * 600_000
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}), "utf-8")
    parts = chosen_texts(tmp_path / "long.jsonl")
    assert "".join(parts) == text and max(map(len, parts)) <= 1 << 18
    assert parts[0].endswith("\n")


def test_a_single_long_text_is_sampled_in_parts(tmp_path, quick_disk):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "\n".join(f"line {n}" for n in range(400_000))}), "utf-8")
    parts = chosen_texts(tmp_path / "long.jsonl", 1_500_000)
    assert 1_000_000 < sum(map(len, parts)) <= 1_500_000
    numbers = [int(part.partition(" ")[2].partition("\n")[0]) for part in parts]
    assert numbers[0] < 100_000 and numbers[-1] > 300_000


def test_packed_files_are_measured_before_they_are_sampled(stories, capsys):
    packed = stories.with_suffix(".txt.gz")
    packed.write_bytes(gzip.compress(stories.read_bytes()))
    n_bytes = sum(len(story.encode()) for story in STORIES)
    assert packed.stat().st_size < n_bytes // 4
    facts = facts_of(packed, vocab_size=270, max_bytes=n_bytes // 4)
    assert facts["text_bytes"] <= n_bytes // 4


def test_a_spread_sample_is_of_all_the_stream():
    sample = SpreadSample(1000)
    texts = [f"{n:010}" for n in range(10_000)]
    for text in texts:
        sample.add(text, 10)
    numbers = list(map(int, sample.texts))
    assert 50 <= len(numbers) <= 100
    assert len({after - before for before, after in itertools.pairwise(numbers)}) == 1
    assert numbers[-1] > 9_700


# --- what is refused ---


def test_a_vocabulary_that_the_text_does_not_support_is_refused(stories):
    with pytest.raises(UserError, match=r"too few for --vocab_size 60000, .*; use --vocab_size \d+ at most") as caught:
        trained(stories, vocab_size=60_000)
    possible = int(str(caught.value).split("--vocab_size ")[2].split()[0])
    assert not (stories.parent / "tales-tokenizer.json").exists()
    assert len(trained(stories, vocab_size=possible)[0]["model"]["vocab"]) == possible


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 259}, "--vocab_size must be at least 260"),
        ({"vocab_size": 65_537}, "at most 65536"),
        ({"name": "../x"}, "letters, digits"),
        ({"name": "gpt2"}, "GPT-2's tokenizer"),
        ({"pattern": "gpt4"}, "gpt2 or multilingual"),
        ({"input": ()}, "--input is missing"),
        ({"max_bytes": 0}, "at least 1"),
    ],
)
def test_options_out_of_range_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        TrainTokenizerOptions(**{"input": ("a.txt",), **changes})


def test_a_tokenizer_is_not_replaced_without_force(stories):
    _, path = trained(stories)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists; choose another --name, or replace it with --force"):
        trained(stories, vocab_size=310)
    assert path.read_bytes() == before
    assert len(trained(stories, vocab_size=310, force=True)[0]["model"]["vocab"]) == 310


def test_a_tokenizer_that_prepared_data_uses_is_kept(stories):
    splits = {split: SplitInfo(2, (FileInfo(f"fairy-{split}.bin", "0"),)) for split in ("train", "val")}
    info = DatasetInfo("fairy", "text", "a test", "MIT", tokenizer="tales", n_vocab=300, splits=splits)
    (stories.parent / "fairy.json").write_bytes(info_bytes(info))
    with pytest.raises(UserError, match=r"uses a tokenizer tales \(fairy\)"):
        trained(stories)
    trained(stories, name="other")
    trained(stories, force=True)


def test_a_damaged_file_stops_the_training_with_its_sentence(stories):
    damaged = stories.parent / "damaged.txt"
    damaged.write_bytes(b"fine\n" * 1000 + b"\xff\xfe\n" * 3)
    with pytest.raises(UserError, match=r"damaged\.txt is not UTF-8 at byte 5000"):
        trained(stories, input=(str(stories), str(damaged)))
    assert not (stories.parent / "tales-tokenizer.json").exists()


@pytest.mark.parametrize(("content", "named"), [("{}\n", "neither chat nor a text"), ('{"text": " "}\n', "no text")])
def test_an_input_without_text_is_refused(tmp_path, content, named):
    (tmp_path / "a.jsonl").write_text(content, "utf-8")
    with pytest.raises(UserError, match=named):
        trained(tmp_path / "a.jsonl")


def test_a_sample_without_any_text_is_refused(stories):
    with pytest.raises(UserError, match="smaller than every text"):
        trained(stories, max_bytes=10)


def test_without_the_package_one_sentence_says_what_to_install(stories, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # which makes its import fail
    with pytest.raises(UserError, match=r"pip install tokenizers==\d") as caught:
        trained(stories)
    version = str(caught.value).split("tokenizers==")[1]
    assert f"tokenizers=={version} " in (ROOT / "requirements.txt").read_text("utf-8")


def test_the_script_runs_from_any_folder(stories, tmp_path):
    command = [sys.executable, ROOT / "data" / "train-tokenizer.py", "--input", "stories.txt", "--output_dir", "."]
    done = subprocess.run([*command, "--vocab_size", "300"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mine-tokenizer.json: 300 ids" in done.stdout
    done = subprocess.run([*command, "--vocab_size", "300"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: mine-tokenizer.json exists") and done.stderr.count("\n") == 1


# --- the lesson ---


@pytest.fixture(scope="module")
def lesson():
    spec = importlib.util.spec_from_file_location("learn_bpe", ROOT / "testing_tools" / "learn_bpe.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["learn_bpe"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("texts", [STORIES, generated_texts(400, seed=7), ["aaaaaaa aaaa aaaaa" * 9]])
def test_the_lesson_learns_the_merges_of_the_library_and_encodes_alike(lesson, texts, pattern):
    import tokenizers

    merges = list(lesson.learn(texts, 150, pattern))
    vocabulary = learn(texts, pattern, 256 + 150)
    tokens = {id_: bytes([byte]) for byte, id_ in lesson.byte_ids().items()}
    for merge in merges:
        tokens[merge.new] = tokens[merge.pair[0]] + tokens[merge.pair[1]]
    assert [tokens[id_] for id_ in range(len(tokens))] == list(vocabulary.tokens)
    assert [(tokens[left], tokens[right]) for (left, right), *_ in merges] == merge_pairs(vocabulary)
    from common.tokenizer_json import tokenizer_json

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(vocabulary, {})))
    ids = {merge.pair: merge.new for merge in merges}
    assert [lesson.encode(text, ids, pattern) for text in texts] == [tokenizer.encode(text).ids for text in texts]
    assert merges[-1].n_tokens == sum(len(tokenizer.encode(text).ids) for text in texts)


def test_the_lesson_needs_text(lesson, tmp_path, monkeypatch):
    (tmp_path / "blank.txt").write_text(" \n\n  \n", "utf-8")
    monkeypatch.setattr(sys, "argv", ["learn_bpe.py", "--input", str(tmp_path / "blank.txt")])
    with pytest.raises(UserError, match=r"blank.txt contains no text; use --input with a file that contains some"):
        lesson.main()


def test_the_lesson_prints_what_each_merge_makes(lesson, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["learn_bpe.py", "--merges", "100", "--verbose"])
    lesson.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{len(lesson.EXAMPLE)} tokens before the first merge, each a byte"
    # counted by hand: "es" is in six "newest" and three "widest", as often as "st", and "e" has a lower id than "s"
    assert lines[0] == "   1: 'e' + 's' -> 'es', id 256, 9 times; 85 tokens now"
    assert lines[1] == "      l|o|w| |l|o|w|e|r| |n|e|w|es|t| |w|i|d|es|t"
    assert lines[2] == "   2: 'es' + 't' -> 'est', id 257, 9 times; 76 tokens now"
    assert lines[-1] == "no pair occurs twice any more"
