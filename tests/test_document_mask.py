"""Attention inside documents: where documents begin in a row, and training with the mask and without it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from common.checkpoint import digest
from common.cli import UserError, given_options
from model import GPT, IGNORED, GPTConfig
from setup_tokenizer import ENDOFTEXT_ID, IM_START_ID
from tests.test_rows import conversations, joined, stream_of
from tests.tiny import load_checkpoint, losses, run, same_as
from training.options import TrainOptions
from training.resume import DEFAULTS_OF_OLDER_RUNS
from training.rows import ChatRows, TextRows
from training.targets import ROWS_PER_LONG_ROW, document_numbers, document_positions

pytestmark = pytest.mark.usefixtures("one_thread", "quick_disk")


# --- rows ---


@pytest.mark.parametrize(
    "documents",
    [
        [[7, 8], [ENDOFTEXT_ID, 9], [ENDOFTEXT_ID, 7, 7, 8]],
        [[ENDOFTEXT_ID, 9, 8], [ENDOFTEXT_ID], [ENDOFTEXT_ID]],
        [[IM_START_ID, 7, IM_START_ID, 8], [ENDOFTEXT_ID], [IM_START_ID, 9], [ENDOFTEXT_ID], [ENDOFTEXT_ID]],
        [[8, IM_START_ID, 9], [ENDOFTEXT_ID, 7, IM_START_ID, 8], [ENDOFTEXT_ID]],
    ],
    ids=["text", "text-padded", "chat-padded", "pieces-of-long-messages"],
)
def test_documents_begin_as_in_generation(documents):
    """gen.py puts `<|endoftext|>` before a text and nothing before a conversation."""
    ids = np.concatenate(documents)
    expected = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    numbers = document_numbers(np.stack([ids, np.full_like(ids, 5)]))
    assert (numbers[0] - numbers[0, 0]).tolist() == expected.tolist()
    assert not numbers[1].any()


def test_a_text_attends_to_what_gen_py_puts_before_it(tmp_path):
    texts = [np.random.default_rng(length).integers(0, 500, length).tolist() for length in (3, 9, 1, 20, 6, 30)]
    stream = stream_of(tmp_path, [i for text in texts for i in (*text, ENDOFTEXT_ID)])
    rows, seen = TextRows(stream, 16, 1), []
    for row in range(rows.start_epoch(0)):
        ids, targets = rows.row(row)
        for number in np.unique(numbers := document_numbers(ids[None])[0]):
            seen.append((ids[numbers == number].tolist(), targets[numbers == number].tolist()))
    for text in texts[1:]:
        prompt = [ENDOFTEXT_ID, *text]
        whole = [*text, ENDOFTEXT_ID]
        parts = [pair for pair in seen if pair[0][0] == ENDOFTEXT_ID and pair[0] == prompt[: len(pair[0])]]
        assert any(targets == whole[: len(ids)] for ids, targets in parts), text


def test_a_document_in_a_row_is_computed_as_in_generation():
    """At position 0, with nothing before it."""
    talks = conversations(np.random.default_rng(8), 4)
    ids = np.array(joined(talks))[None]
    ids[0, 2] += ids.sum() % ROWS_PER_LONG_ROW == 0  # not one of the rows below
    documents = document_numbers(ids)
    positions = document_positions(ids, documents)
    gpt = GPT(GPTConfig(50304, 50259, ids.shape[1], n_layer=2, n_head=2, n_embd=16)).eval()
    ids, documents, positions = (torch.from_numpy(array) for array in (ids, documents, positions))
    together, _ = gpt(ids, documents=documents, positions=positions)
    for number in range(len(talks)):
        is_own = documents[0] == number
        alone, _ = gpt(ids[:, is_own])
        torch.testing.assert_close(together[:, is_own], alone)


def test_one_row_in_sixteen_trains_late_positions():
    ids = np.random.default_rng(1).integers(0, 500, (4000, 12))
    ids[:, 6] = ENDOFTEXT_ID
    positions = document_positions(ids, document_numbers(ids))
    counts_on = (positions == np.arange(12)).all(axis=1)
    assert 0.8 < counts_on.mean() * ROWS_PER_LONG_ROW < 1.2
    assert (positions[~counts_on] == [*range(6), *range(6)]).all()
    assert (document_positions(ids[7:8], document_numbers(ids[7:8])) == positions[7]).all(), "in any batch"


@pytest.mark.parametrize("block_size", [15, 40, 63])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_no_two_conversations_of_a_row_share_a_document(tmp_path, block_size, loss_on):
    """Nor do pieces of a cut conversation, which no `<|endoftext|>` ends in the data."""
    talks = conversations(np.random.default_rng(4), 60)
    stream = stream_of(tmp_path, joined(talks)[:-1])  # the last one has no end
    rows = ChatRows(stream, block_size, 5, loss_on, end_pieces=True)
    targets_seen, n_cut = [], 0
    for index in range(rows.start_epoch(0)):
        ids, targets = rows.row(index)
        numbers = document_numbers(ids[None])[0]
        position, seen = 0, set()
        for piece in rows._rows[index]:
            _, begin, end = rows._pieces[piece].tolist()
            content = slice(position, min(position + end - begin, block_size))
            assert (ids[content] == stream.read(begin, end)[: block_size - position]).all()
            is_content = ids[content] != ENDOFTEXT_ID
            own = set(numbers[content][is_content].tolist())
            assert len(own) == is_content.any() and not own & seen
            seen |= own
            if position and position < block_size and ids[position] == IM_START_ID:
                assert numbers[position - 1] not in own, "gen.py and evaluate.py put no <|endoftext|> before it"
            n_cut += stream.read(end - 1, end)[0] != ENDOFTEXT_ID
            position += int(rows._lengths[piece])
        assert position <= block_size + 1
        targets_seen += targets[targets != IGNORED].tolist()
    assert n_cut > 3 or block_size > 40
    plain = ChatRows(stream, block_size, 5, loss_on)
    expected = [plain.row(index)[1] for index in range(plain.start_epoch(0))]
    if loss_on == "assistant":
        assert sorted(targets_seen) == sorted(np.concatenate(expected)[np.concatenate(expected) != IGNORED].tolist())


def test_a_cut_conversation_is_not_ended_unless_asked(tmp_path):
    talk = [IM_START_ID, *range(100, 112)] * 2 + [ENDOFTEXT_ID]
    rows = {flag: ChatRows(stream_of(tmp_path, talk), 20, 1, "all", end_pieces=flag) for flag in (False, True)}
    assert rows[False]._lengths.tolist() == [13, 14]
    assert rows[True]._lengths.tolist() == [14, 14]


# --- training ---


@pytest.mark.parametrize(
    "options",
    [{"dataset": "text"}, {"dataset": "chat", "dropout": 0.2, "gradient_accumulation_steps": 2, "dtype": "bfloat16"}],
    ids=["text", "chat"],
)
def test_a_masked_run_resumes_bit_by_bit(data, tmp_path, options):
    name = f"{options['dataset']}10"
    straight, stopped = tmp_path / "a" / name, tmp_path / "b" / name
    assert run(data, straight, document_mask=True, **options) == 0
    straight.with_suffix(".txt").touch()
    assert run(data, stopped, document_mask=True, stop_after=5, **options) == 130
    assert run(data, stopped, resume=True, dataset=options["dataset"]) == 0
    assert same_as(stopped, straight) == []
    assert load_checkpoint(stopped / f"{name}.pt")["info"]["config"]["document_mask"] is True


def test_resume_does_not_change_the_mask(data, tmp_path):
    run(data, tmp_path / "a", stop_after=2)
    with pytest.raises(UserError, match=r"--document_mask True contradicts .*text10.pt, which was made with False"):
        run(data, tmp_path / "a", resume=True, document_mask=True)


@pytest.mark.parametrize(("dataset", "is_masked"), [("text", False), ("chat", True), ("text=1,chat=1", False)])
def test_only_unmixed_chat_data_is_masked_by_default(data, tmp_path, dataset, is_masked):
    name = dataset.replace("=1,chat=1", "+chat")
    for folder, given, expected in (("a", {}, is_masked), ("b", {"document_mask": not is_masked}, not is_masked)):
        assert run(data, tmp_path / folder, dataset=dataset, max_iters=1, **given) == 0
        saved = load_checkpoint(tmp_path / folder / f"{name}1.pt")
        assert saved["info"]["config"]["document_mask"] is expected
    assert given_options(TrainOptions, ["--no-document_mask"]) == {"document_mask": False}


def forget_option(path, name: str) -> None:
    """Make a checkpoint like one from before the option `name` existed."""
    saved = torch.load(path, weights_only=True)
    del saved["info"]["config"][name]
    saved["digests"]["info"] = digest(saved["info"])
    torch.save(saved, path)


@pytest.mark.parametrize(
    ("dataset", "name", "other"),
    [("chat", "document_mask", True), ("text", "schedule", "wsd"), ("text", "muon_weight_decay", None)],
)
def test_a_run_from_before_an_option_existed_continues_as_it_began(data, tmp_path, dataset, name, other):
    straight, older = tmp_path / "a", tmp_path / "b"
    options = {"dataset": dataset, name: DEFAULTS_OF_OLDER_RUNS[name]}
    assert run(data, straight, **options) == 0
    assert run(data, older, stop_after=5, **options) == 130
    forget_option(older / f"{dataset}10.pt", name)
    if other is not None:
        refusal = f"--{name} {other} contradicts .*10.pt, which was made with {options[name]}"
        with pytest.raises(UserError, match=refusal):
            run(data, older, resume=True, dataset=dataset, **{name: other})
    assert run(data, older, resume=True, dataset=dataset) == 0
    assert losses(older / f"{dataset}10.jsonl") == losses(straight / f"{dataset}10.jsonl")


def test_micro_batches_add_up_with_the_mask(data, tmp_path):
    run(data, tmp_path / "a", batch_size=8, document_mask=True)
    run(data, tmp_path / "b", batch_size=2, gradient_accumulation_steps=4, eval_iters=8, document_mask=True)
    first, second = (np.array([row[1] for row in losses(tmp_path / x / "text10.jsonl")[1:]]) for x in "ab")
    np.testing.assert_allclose(first, second, rtol=1e-4)


def test_training_and_validation_use_the_mask_only_if_asked(data, tmp_path):
    def documents_of_calls(folder: str, **options) -> list[torch.Tensor | None]:
        """The document numbers that each call of the model gets, in training and in validation."""
        found = []

        def note(model, arguments, settings):
            call = inspect.signature(GPT.forward).bind(model, *arguments, **settings)
            found.append(call.arguments.get("documents"))

        def adjust(training):
            training.model.register_forward_pre_hook(note, with_kwargs=True)

        run(data, tmp_path / folder, max_iters=2, eval_interval=1, adjust=adjust, **options)
        return found

    off, on = documents_of_calls("off"), documents_of_calls("on", document_mask=True)
    assert len(off) == len(on) == 2 + 3 * 2, "two steps and three evaluations of two batches"
    assert off == [None] * len(off)
    assert any(numbers.max() > 0 for numbers in on)
    plain, masked = (losses(tmp_path / x / "text2.jsonl") for x in ("off", "on"))
    assert plain[1][1] != masked[1][1] and plain[0][2] != masked[0][2]
