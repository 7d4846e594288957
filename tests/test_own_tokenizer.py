"""A vocabulary of one's own from end to end: prepare, train, generate, evaluate, export and import, serve.

The oracle for ids is Hugging Face's tokenizers, with the same tokenizer.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import load_checkpoint, read_info, save_checkpoint
from common.cli import UserError
from common.token_patterns import PATTERNS
from data.dataset import DatasetInfo, FileInfo, SplitInfo, encode_command, open_dataset
from data.encoding import encode_documents
from data.pipeline import Corpus, Dataset, PrepareOptions, prepare
from data.vocabularies import name_of, open_tokenizer
from evaluate import EvaluateOptions, measure
from evaluation.reencoding import reencode
from evaluation.splits import read_split
from exchange.loading import load_checkpoint as load_any
from exchange.loading import load_model
from export import ExportOptions, export
from generation.chat import ChatSession
from generation.engine import Settings, TextEngine
from generation.sampling import Sampling
from setup_tokenizer import GPT2, GPT2_DIGEST, IM_END, IM_START, ROLES, Tokenizer
from tests.tiny import run
from training.datasets import open_data
from training.resume import require_same_data
from training.rows import first_spoken_ids
from training.targets import assistant_targets, document_numbers

WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "naïve", "漢字", "cafés"),
    *("in", "1984", "it's", "user", "assistant", "system", "😀"),
]
TEXT = [" ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 40)) + f".\n\n  The end of {n}." for n in range(200)]
CHAT = [
    [
        *([{"role": "system", "content": "\n Be kind."}] if n % 3 else []),
        {"role": "user", "content": f"{WORDS[n % 9]} <|im_end|> {n}?"},
        {"role": "assistant", "content": f"\n\n{WORDS[n % 7]} {n}."},
    ]
    for n in range(60)
]


def train_vocabulary(path: Path, pattern: str, vocab_size: int = 400) -> Path:
    """A tokenizer.json that `tokenizers` trained on TEXT."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    if pattern != "gpt2":
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
        byte_level = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(path))
    return path


def prepare_text(folder: Path, name: str, tokenizer: str) -> DatasetInfo:
    """TEXT as a data set in `folder`, with what --tokenizer names."""
    options = PrepareOptions(output_dir=str(folder), workers=1, val_fraction=0.3, tokenizer=str(tokenizer))
    return prepare(Dataset(name, "text", "a test", "MIT"), options, Corpus(TEXT, digest="TEXT"))


@pytest.fixture(scope="module", params=["gpt2", "multilingual"])
def folder(request, tmp_path_factory) -> Path:
    """A data folder with text (mine) and chat (talk) in the vocabulary tales, and text in GPT-2's (other)."""
    folder = tmp_path_factory.mktemp("data")
    train_vocabulary(folder / "tales-tokenizer.json", request.param)
    for name, tokenizer in (("mine", "tales"), ("talk", "tales"), ("other", None)):
        kind, documents = ("chat", CHAT) if name == "talk" else ("text", TEXT)
        options = PrepareOptions(output_dir=str(folder), workers=1, val_fraction=0.3, tokenizer=tokenizer)
        prepare(Dataset(name, kind, "a test", "MIT"), options, Corpus(documents))
    return folder


@pytest.fixture(scope="module")
def tales(folder) -> Tokenizer:
    return open_tokenizer("tales", folder)


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory) -> Path:
    """The folder with the checkpoints mine10.pt, talk10.pt and other10.pt."""
    out = tmp_path_factory.mktemp("models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("mine", "talk", "other"):
        assert run(folder, out, dataset=name, block_size=64) == 0
    torch.set_num_threads(threads)
    return out


def oracle(folder: Path):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / "tales-tokenizer.json"))


def test_ids_are_those_of_tokenizers(folder, tales):
    theirs = oracle(folder)
    for text in [*TEXT, "", " ", "\n\n\n", "x" * 500, "\t 12345 '’s", IM_END]:
        assert tales.encode_text(text) == theirs.encode(text, add_special_tokens=False).ids, text
        assert tales.enc.decode(tales.encode_text(text)) == text
    assert tales.special_tokens == {"<|endoftext|>": 400, IM_START: 401, IM_END: 402}
    assert tales.n_vocab == 403


def test_no_message_becomes_a_control_token_and_the_roles_are_found(tales):
    for conversation in CHAT:
        ids = np.array(tales.encode_chat(conversation, end_of_conversation=True))
        controls = ids[ids >= tales.endoftext].tolist()
        assert controls == [tales.im_start, tales.im_end] * len(conversation) + [tales.endoftext]
        spans = tales.message_spans(ids)
        assert [ROLES[role] for role in spans.role] == [message["role"] for message in conversation]
        assert spans.is_closed.all()
        decoded = [tales.enc.decode(ids[a + 1 : b - 1]) for a, b in zip(spans.start, spans.end, strict=True)]
        assert decoded == [f"{message['role']}\n{message['content']}" for message in conversation]


def test_batches_of_documents_have_the_same_ids_as_single_ones(tales):
    documents = [*TEXT[:20], "  \n \n", "<|im_start|>", "a  b   ", *CHAT[:20], " " * 200_000 + "x"]
    expected = []
    for document in documents:
        text = isinstance(document, str)
        expected += tales.encode_document(document) if text else tales.encode_chat(document, end_of_conversation=True)
    assert encode_documents(documents, tales).tolist() == expected


def test_long_white_space_is_encoded_and_decodes_to_itself(tales):
    text = "a" + " " * 1_000_000 + "b" + "\n" * 300_000
    assert tales.enc.decode(tales.encode_text(text)) == text


def test_the_json_names_the_tokenizer_and_its_digest(folder, tales):
    content = json.loads((folder / "mine.json").read_text("utf-8"))
    assert (content["tokenizer"], content["n_vocab"]) == ("tales", 403)
    assert content["tokenizer_digest"] == tales.digest
    assert "tokenizer" not in content["options"]
    assert "tokenizer_digest" not in json.loads((folder / "other.json").read_text("utf-8")), "as before for GPT-2's"
    streams, info = open_dataset(folder, "mine")
    documents = [document for split in ("train", "val") for document in _documents(streams[split])]
    assert sorted(documents) == sorted(TEXT)
    assert streams["val"].tokenizer == tales and info.endoftext == tales.endoftext


def _documents(stream) -> list[str]:
    ids = stream.read(0, len(stream))
    parts = np.split(ids, np.flatnonzero(ids == stream.tokenizer.endoftext) + 1)[:-1]
    return [stream.tokenizer.enc.decode(part[:-1].tolist()) for part in parts]


def test_targets_of_both_ways_agree(folder, tales):
    stream = open_dataset(folder, "talk")[0]["train"]
    ids = stream.read(0, len(stream))
    targets = assistant_targets(ids, tales)
    first = np.flatnonzero(targets & ~np.append(False, targets[:-1]))
    assert first_spoken_ids(np.append(ids, [0] * 20), tales).tolist() == first.tolist()
    said = tales.enc.decode(ids[targets].tolist())
    in_train = [text for conversation in CHAT for text in [conversation[-1]["content"]]]
    assert {part.strip() for part in said.split(IM_END) if part} <= {text.strip() for text in in_train}
    assert document_numbers(np.array([[7, 400, 401, 5, 401]]), 403).tolist() == [[0, 1, 2, 2, 2]]


def test_a_model_has_the_rows_of_its_vocabulary_and_carries_it(models, folder, tales, tmp_path):
    shutil.copy(models / "talk10.pt", tmp_path / "alone.pt")  # the tokenizer's file is not there
    model, info = load_model(tmp_path / "alone.pt")
    assert (model.config.n_vocab, model.config.vocab_size) == (403, 448)
    assert Tokenizer.from_info(info, "alone.pt") == tales
    assert Tokenizer.from_info(info, "alone.pt").enc.decode([50, 60]) == tales.enc.decode([50, 60])
    assert "json" not in load_checkpoint(models / "other10.pt", ("info",))["info"]["tokenizer"]


def test_a_chat_uses_the_models_ids(models, tales):
    model, info = load_model(models / "talk10.pt")
    settings = Settings(Sampling(temperature=0), stop_ids=(tales.im_end,))
    engine = TextEngine(model, settings, tokenizer=Tokenizer.from_info(info, "talk10.pt"))
    session = ChatSession(engine, max_tokens=8)
    reply = "".join(session.reply("the cat"))
    ids = tales.encode_chat([{"role": "user", "content": "the cat"}], add_generation_prompt=True)
    expected = []
    for _ in range(8):
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids, *expected]]))[0][0, -1].argmax())
        if token == tales.im_end:
            break
        expected.append(token)
    assert reply == tales.enc.decode(expected)


def test_a_resumed_run_keeps_the_vocabulary(models, folder, tmp_path, one_thread):
    assert run(folder, tmp_path, dataset="mine", block_size=64, stop_after=5) == 130
    assert run(folder, tmp_path, resume=True, dataset="mine") == 0
    ours, theirs = (load_checkpoint(path / "mine10.pt", ("model",))["model"] for path in (tmp_path, models))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_bits_per_byte_compare_across_vocabularies(models, folder):
    paths = (str(models / "mine10.pt"), str(models / "other10.pt"))
    reports = {
        name: measure(EvaluateOptions(paths, dataset=(name,), data_dir=str(folder), device="cpu"))["datasets"][name]
        for name in ("mine", "other")
    }
    for report in reports.values():
        mine, other = (result["all"] for result in report["results"])
        assert mine["text_bytes"] == other["text_bytes"] and mine["tokens"] != other["tokens"]
        bootstrap = report["verdict"]["bootstrap"]
        assert bootstrap["measure"] == "bits per byte" and bootstrap["units"] == "60 documents"
        best, second = sorted((mine["bits_per_byte"], other["bits_per_byte"]))
        assert bootstrap["difference"] == pytest.approx(second - best, rel=1e-4)
    # The same model scores the same on a split that was encoded for it and on one that is encoded again.
    for index in range(2):
        numbers = [report["results"][index]["all"] for report in reports.values()]
        assert numbers[0]["tokens"] == numbers[1]["tokens"]
        assert numbers[0]["bits_per_byte"] == pytest.approx(numbers[1]["bits_per_byte"], rel=1e-6)


def test_conversations_are_encoded_again_message_by_message(folder, tales):
    stream = open_dataset(folder, "talk")[0]["val"]
    ids = stream.read(-1, len(stream))
    is_trained = np.ones(len(ids), dtype=bool)
    own, _ = reencode(ids, is_trained, True, tales, GPT2)
    back, flags = reencode(own, np.ones(len(own), dtype=bool), True, GPT2, tales)
    assert back.tolist() == ids.tolist() and flags.all()
    mine, theirs = (read_split("talk", stream, True, tokenizer=each) for each in (tales, GPT2))
    assert mine.counted["all"][1] == theirs.counted["all"][1]
    assert len(mine.spans) == len(theirs.spans)


def test_a_character_that_is_cut_off_is_left_out_when_encoded_again(tales):
    ids = np.array([GPT2.endoftext, *GPT2.encode_text("A 漢字")])
    cut, _ = reencode(ids[:-1], np.ones(len(ids) - 1, dtype=bool), False, GPT2, tales)
    assert tales.enc.decode(cut[1:].tolist()) == "A 漢"


def test_transformers_reads_an_export_and_so_do_we(models, tales, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(ExportOptions(str(models / "talk10.pt"), str(tmp_path / "out")))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*TEXT[:20], "漢字\n\n  x", "12345"]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tales.encode_text(text)
    messages = [{"role": "user", "content": "the cat"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tales.encode_chat(messages, add_generation_prompt=True)
    model, info = load_model(tmp_path / "out")
    imported = Tokenizer.from_info(info, "out")
    assert (imported.name, imported.digest) == ("tales", tales.digest)
    original, _ = load_model(models / "talk10.pt")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    x = torch.tensor([ids])
    with torch.no_grad():
        assert torch.equal(model(x)[0], original(x)[0])
        torch.testing.assert_close(other(x).logits, original(x)[0], atol=1e-4, rtol=1e-4)


def test_gguf_holds_the_vocabulary_or_is_refused(models, tales, tmp_path):
    from tests.test_export_gguf import read_gguf

    options = ExportOptions(str(models / "talk10.pt"), str(tmp_path / "out"), gguf="f32")
    if tales.vocabulary.pattern != PATTERNS["gpt2"]:
        with pytest.raises(UserError, match="does not know the pattern of the tokenizer tales"):
            export(options)
        return
    export(options)
    facts, tensors = read_gguf(tmp_path / "out" / "model-f32.gguf")
    assert len(facts["tokenizer.ggml.tokens"]) == 403 and facts["tokenizer.ggml.eos_token_id"] == tales.im_end
    assert tuple(tensors["token_embd.weight"].shape) == (8, 403)


# What is refused


def test_a_mixture_of_two_tokenizers_is_refused(folder):
    with pytest.raises(
        UserError, match=r"mine was prepared with the tokenizer tales and other with gpt2_chatml"
    ) as found:
        open_data("mine=1,other=1", str(folder))
    assert "--tokenizer tales" in str(found.value)


def test_weights_of_another_vocabulary_are_refused(models, folder, tmp_path):
    again = f"python prepare_with_extended_tokenizer.py --dataset {{}} --output_dir {folder} --tokenizer {{}}"
    for dataset, model, found in (("mine", "other10.pt", "gpt2_chatml"), ("other", "mine10.pt", "tales")):
        with pytest.raises(UserError, match=f"{model} has the tokenizer {found}, but {dataset} was ") as caught:
            run(folder, tmp_path, dataset=dataset, init_from=str(models / model))
        option = "gpt2" if found == "gpt2_chatml" else str(models / model)
        assert str(caught.value).endswith(f"; encode it with the model's: {again.format(dataset, option)}")
    assert run(folder, tmp_path, dataset="mine", init_from=str(models / "mine10.pt"), max_iters=2) == 0


def test_data_is_prepared_with_the_vocabulary_of_a_checkpoint(models, folder, tales, tmp_path):
    data, checkpoint = tmp_path / "data", str(models / "mine10.pt")
    data.mkdir()
    assert open_tokenizer(checkpoint, data) == tales and open_tokenizer(checkpoint, data).name == "tales"
    assert open_tokenizer(str(models / "other10.pt"), data) is GPT2
    train_vocabulary(data / "tales-tokenizer.json", "gpt2", 350)  # another one of that name
    prepare_text(data, "mine", "tales")
    with pytest.raises(UserError, match=r"but mine was prepared with another one of that name; encode it") as caught:
        run(data, tmp_path, dataset="mine", init_from=checkpoint)
    option = str(caught.value).rpartition(" ")[2]
    info = prepare_text(data, "mine", option)
    assert info.tokenizer == f"tales-{tales.digest[:8]}" and info.tokenizer_digest == tales.digest
    assert run(data, tmp_path, dataset="mine", init_from=checkpoint, max_iters=2) == 0
    # Data of that vocabulary is prepared again if another one has taken its name.
    shutil.copy(folder / "tales-tokenizer.json", data)
    prepare_text(data, "more", "tales")
    assert prepare_text(data, "more", checkpoint).tokenizer == "tales", "already prepared"
    train_vocabulary(data / "tales-tokenizer.json", "gpt2", 350)
    assert prepare_text(data, "more", checkpoint).tokenizer == info.tokenizer
    assert open_dataset(data, "more")[0]["train"].tokenizer == tales


def test_a_name_in_a_checkpoint_is_not_a_path(models, folder, tales, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, safe in (("../../x", "x"), ("my tales", "my_tales"), ("gpt2", "gpt2"), ("..", "own")):
        info = read_info(models / "mine10.pt")
        save_checkpoint(tmp_path / "m.pt", load_model(models / "mine10.pt")[0], change_name(info, name))
        found = open_tokenizer(str(tmp_path / "m.pt"), data)
        assert found == tales and found.name == f"{safe}-{tales.digest[:8]}"


def change_name(info: dict, name: str) -> dict:
    return {**info, "tokenizer": {**info["tokenizer"], "name": name}}


def test_the_command_that_encodes_data_again():
    own = DatasetInfo("mine", "text", source="a test", licence="MIT")
    assert encode_command("mine", own, "my model.pt") == (
        "python prepare_with_extended_tokenizer.py --dataset mine --tokenizer 'my model.pt'"
    )
    unknown = encode_command("mine", DatasetInfo("mine", "text"), "tales", "other data")
    assert unknown.endswith("--input FILE --name mine --output_dir 'other data' --tokenizer tales")
    shard = SplitInfo(9, (FileInfo("a.bin", "ab", 9, start_byte=1024),))
    published = DatasetInfo("fineweb", "text", source="a hub", licence="ODC-By", splits={"train": shard, "val": shard})
    assert encode_command("fineweb", published, "tales") == "python data/prepare-fineweb-text.py --tokenizer tales"


def test_a_copy_of_gpt2s_vocabulary_is_gpt2s(models, folder, tmp_path):
    export(ExportOptions(str(models / "other10.pt"), str(tmp_path / "exported")))
    assert open_tokenizer(str(tmp_path / "exported"), folder) is GPT2
    shutil.copytree(tmp_path / "exported", tmp_path / "gpt2")
    assert open_tokenizer(str(tmp_path / "gpt2" / "tokenizer.json"), folder) is GPT2  # may have GPT-2's names
    data = shutil.copytree(folder, tmp_path / "data")
    described = json.loads((data / "other.json").read_text("utf-8"))
    info = prepare_text(data, "copy", str(tmp_path / "exported"))
    assert (info.tokenizer, info.tokenizer_digest) == (described["tokenizer"], None)
    # An earlier version recorded a digest and kept a file of the vocabulary.
    described |= {"tokenizer": "exported", "tokenizer_digest": GPT2_DIGEST}
    (data / "other.json").write_text(json.dumps(described), "utf-8")
    assert open_data("other=0.5,copy=0.5", str(data)).tokenizer is GPT2
    assert run(data, tmp_path / "new", dataset="other", init_from=str(models / "other10.pt"), max_iters=2) == 0


def test_a_lost_copy_of_the_vocabulary_is_written_again(folder, tales, tmp_path, capsys):
    file, data = shutil.copy(folder / "tales-tokenizer.json", tmp_path / "bought.json"), tmp_path / "data"
    prepare_text(data, "mine", file)
    (data / "bought-tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"the tokenizer of mine, not found; copy .* --name mine --tokenizer FILE$"):
        open_dataset(data, "mine")
    capsys.readouterr()
    prepare_text(data, "mine", file)
    assert "already prepared" in capsys.readouterr().out
    assert open_dataset(data, "mine")[0]["train"].tokenizer == tales


def test_a_vocabulary_stays_the_same_under_another_name(models, folder, tales, tmp_path, capsys, monkeypatch):
    (tmp_path / "bought").mkdir()
    shutil.copy(folder / "tales-tokenizer.json", tmp_path / "bought" / "tokenizer.json")
    renamed = open_tokenizer(str(tmp_path / "bought"), folder)  # a folder means its tokenizer.json
    assert renamed.name == "bought" and renamed == tales and renamed != GPT2
    with monkeypatch.context() as here:
        here.chdir(tmp_path)
        assert open_tokenizer("bought", folder) == tales
    data = shutil.copytree(folder, tmp_path / "data")
    options = PrepareOptions(output_dir=str(data), workers=1, tokenizer=str(tmp_path / "bought" / "tokenizer.json"))
    prepare(Dataset("more", "text", "a test", "MIT"), options, Corpus(TEXT))
    assert open_data("mine=0.5,more=0.5", str(data)).tokenizer == tales
    info = load_any(models / "mine10.pt", ("info",))["info"]
    facts = {**info["data"], "tokenizer": "bought"}
    require_same_data(facts, info, "mine10.pt")
    with pytest.raises(
        UserError, match="has the tokenizer tales, but its data was prepared again with another one, called bought;"
    ):
        require_same_data({**facts, "tokenizer_digest": "another"}, info, "mine10.pt")
    assert run(data, tmp_path / "new", dataset="more", init_from=str(models / "mine10.pt"), max_iters=2) == 0
    capsys.readouterr()
    measure(EvaluateOptions((str(models / "mine10.pt"),), dataset=("more",), data_dir=str(data), device="cpu"))
    assert "encoded again" not in capsys.readouterr().out


def test_gpt2s_names_are_only_those_of_its_tokenizer(models, folder, tmp_path):
    for name in ("gpt2", "gpt2_chatml"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "tokenizer.json"
        shutil.copy(folder / "tales-tokenizer.json", path)
        with pytest.raises(UserError, match=f"would be called {name}, which is the name of GPT-2's own") as caught:
            open_tokenizer(str(path), folder)
        subprocess.run(str(caught.value).rpartition(": ")[2], shell=True, check=True, cwd=tmp_path)
        assert open_tokenizer(str(tmp_path / "own-tokenizer.json"), folder).name == "own"
    export(ExportOptions(str(models / "mine10.pt"), str(tmp_path / "out" / "gpt2")))
    path = tmp_path / "out" / "gpt2" / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"name": "tales"', '"name": "gpt2"'), "utf-8")
    assert Tokenizer.from_info(load_model(path.parent)[1], "out").name == "own"


def test_the_command_for_damaged_data_keeps_its_tokenizer(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "data")
    for name, command in (("mine", "--name mine --tokenizer tales"), ("other", "--name other")):
        content = bytearray((copy / f"{name}-val.bin").read_bytes())
        content[0] ^= 1
        (copy / f"{name}-val.bin").write_bytes(content)
        with pytest.raises(UserError, match=f"does not match the sha256 .* {command}$"):
            open_dataset(copy, name)


def test_a_missing_or_other_vocabulary_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "data")
    (copy / "tales-tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tales-tokenizer.json, the tokenizer of mine, not found; copy"):
        open_dataset(copy, "mine")
    train_vocabulary(copy / "tales-tokenizer.json", "gpt2", 350)
    with pytest.raises(UserError, match="is not the vocabulary with which mine was prepared"):
        open_dataset(copy, "mine")
    (copy / "tales-tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        open_dataset(copy, "mine")
    with pytest.raises(UserError, match=r"the tokenizer 'nothing' is not in .*train-tokenizer.py --name nothing"):
        open_tokenizer("nothing", copy)
    with pytest.raises(UserError, match=r"the tokenizer 'my tales' is not in .*--name NAME --input FILE$"):
        open_tokenizer("my tales", copy)
    with pytest.raises(UserError, match=r"no.json not found"):
        open_tokenizer(str(tmp_path / "no.json"), copy)


def test_a_tokenizer_json_from_elsewhere_is_copied_next_to_the_data(folder, tales, tmp_path):
    (tmp_path / "bought").mkdir()
    shutil.copy(folder / "tales-tokenizer.json", tmp_path / "bought" / "tokenizer.json")
    out = tmp_path / "out"
    options = PrepareOptions(output_dir=str(out), workers=1, tokenizer=str(tmp_path / "bought" / "tokenizer.json"))
    info = prepare(Dataset("mine", "text", "a test", "MIT"), options, Corpus(TEXT))
    assert info.tokenizer == "bought" and info.tokenizer_digest == tales.digest
    assert open_tokenizer("bought", out).digest == tales.digest
    train_vocabulary(tmp_path / "bought" / "tokenizer.json", "gpt2", 350)
    with pytest.raises(UserError, match=r"bought-tokenizer.json contains another vocabulary"):
        prepare(Dataset("mine", "text", "a test", "MIT"), options, Corpus(TEXT))


def test_a_file_names_its_tokenizer():
    assert [name_of(Path(path)) for path in ("a/b/tokenizer.json", "x/tales-tokenizer.json", "x/my bpe.json")] == [
        *("b", "tales", "my_bpe"),
    ]


def test_a_checkpoint_without_its_vocabulary_is_refused(models, tmp_path):
    model, info = load_model(models / "mine10.pt")
    broken = {**info, "tokenizer": {"name": "tales", "n_vocab": 403}}
    save_checkpoint(tmp_path / "broken.pt", model, broken)
    with pytest.raises(UserError, match=r"broken.pt lacks its tokenizer tales"):
        Tokenizer.from_info(load_any(tmp_path / "broken.pt", ("info",))["info"], "broken.pt")


def test_a_pattern_that_joins_a_role_and_its_line_end_is_refused(folder):
    from common.tokenizer_json import Vocabulary

    tokens = (*(bytes([byte]) for byte in range(256)), b"r\n")
    with pytest.raises(UserError, match="does not separate 'user' from the newline"):
        Tokenizer.from_vocabulary("joined", Vocabulary(r"[\s\S]+", tokens))
