"""Attention inside documents: a packed row is what its documents are by themselves, and off means as ever."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from common import checkpoint
from common.cli import UserError, given_options
from common.device import has_cpp_compiler
from model import GPT, IGNORED, GPTConfig, block_mask, dense_mask
from setup_tokenizer import ENDOFTEXT_ID, IM_START_ID
from tests.test_rows import conversations, joined, stream_of
from tests.tiny import differences, load_checkpoint, losses, prepare, run
from training.config import TrainOptions
from training.resume import DEFAULTS_OF_OLDER_RUNS
from training.rows import ChatRows, TextRows
from training.targets import document_numbers

SHAPE = GPTConfig(block_size=24, vocab_size=96, n_vocab=90, n_layer=2, n_head=2, n_embd=32)
LENGTHS = [(5, 1, 9, 1, 1, 7), (24,), (1, 22, 1)]  # of each row's documents


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpt():
    torch.manual_seed(1)
    made = GPT(SHAPE).train()
    with torch.no_grad():
        for weight in made.parameters():  # large enough that every part matters
            weight.add_(0.1 * torch.randn_like(weight))
    return made


@pytest.fixture
def ids():
    return torch.randint(0, SHAPE.n_vocab, (len(LENGTHS), 24), generator=torch.Generator().manual_seed(2))


def documents() -> torch.Tensor:
    return torch.stack([torch.repeat_interleave(torch.tensor(lengths)) for lengths in LENGTHS])


def spans():
    """(row, start, end) of each document."""
    for row, lengths in enumerate(LENGTHS):
        ends = np.cumsum(lengths).tolist()
        yield from ((row, end - length, end) for length, end in zip(lengths, ends, strict=True))


def gradients(gpt: GPT, loss: torch.Tensor) -> dict:
    gpt.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in gpt.named_parameters()}


def test_loss_and_gradients_are_those_of_each_document_by_itself(gpt, ids):
    targets = ids.roll(-1, 1)
    targets[0, 3] = IGNORED
    total = torch.zeros(())
    for row, start, end in spans():
        alone = gpt.hidden(ids[row : row + 1, start:end], positions=torch.arange(start, end))
        logits = F.linear(alone[0], gpt.wte.weight)
        total = total + F.cross_entropy(logits, targets[row, start:end], ignore_index=IGNORED, reduction="sum")
    _, loss = gpt(ids, targets, documents=documents())
    expected = total / (targets != IGNORED).sum()
    torch.testing.assert_close(loss, expected)
    ours, theirs = gradients(gpt, loss), gradients(gpt, expected)
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert abs(gpt(ids, targets)[1] - loss) > 1e-3, "without the mask it is something else"


def test_one_document_a_row_is_the_plain_model(gpt, ids):
    plain, masked = gpt(ids)[0], gpt(ids, documents=torch.zeros_like(ids))[0]
    torch.testing.assert_close(masked, plain)


def test_nothing_leaks_from_one_document_into_another(gpt, ids):
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 1) % SHAPE.n_vocab
    before, after = (gpt(x, documents=documents())[0] for x in (ids, changed))
    assert torch.equal(before[0, 5:], after[0, 5:]) and torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(gpt(ids)[0][0, 5:], gpt(changed)[0][0, 5:]), "without the mask it would"


def visible_by_hand(numbers: torch.Tensor) -> torch.Tensor:
    B, T = numbers.shape
    visible = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for row in range(B):
        for query in range(T):
            for key in range(query + 1):
                visible[row, 0, query, key] = numbers[row, query] == numbers[row, key]
    return visible


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_mask_by_hand(dtype):
    mask = dense_mask(documents(), dtype)
    assert mask.dtype == dtype
    expected = torch.zeros_like(mask).masked_fill(~visible_by_hand(documents()), -torch.inf)
    assert torch.equal(mask, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_under_the_block_mask_equals_the_mask_by_hand():
    """What CUDA uses; on a CPU it has a forward pass alone."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(0, 2, (2, 300), generator=generator).cumsum(1) // 40  # three blocks of 128, the last cut
    q, k, v = (torch.randn(2, 2, 300, 16, generator=generator) for _ in range(3))
    ours = GPT(SHAPE).h[0].attn.attend(q, k, v, block_mask(numbers))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_by_hand(numbers))
    torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(not has_cpp_compiler(), reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_the_compiled_blocks_take_a_block_mask_and_share_code_that_is_made_once(gpt):
    torch._dynamo.reset()
    # Older torches' code for a CPU refuses queries, keys and values in one piece of memory; that for CUDA does not.
    is_recent = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor" if is_recent else "aot_eager")
    for block in gpt.h:
        block.compiled = torch.compile(block.residuals, backend=counter)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 2, (2, 24), generator=generator).cumsum(1) // 4
        x = torch.randn(2, 24, SHAPE.n_embd, generator=generator)
        expected = gpt.eval().blocks(x, None, dense_mask(numbers, x.dtype))
        torch.testing.assert_close(gpt.train().blocks(x, None, block_mask(numbers)), expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1 and len(gpt.h) > 1


class OnCuda(torch.Tensor):
    is_cuda = True


def test_flex_attention_serves_only_what_it_can_do(gpt, monkeypatch):
    """Compiled training on CUDA without dropout; all else has the dense mask."""
    monkeypatch.setattr(model, "block_mask", lambda numbers: "blocks")
    on_cuda = documents().as_subclass(OnCuda)
    gpt.h[0].compiled = gpt.h[0].residuals
    assert gpt.document_mask(on_cuda) == "blocks"
    assert isinstance(gpt.document_mask(documents()), torch.Tensor)
    assert isinstance(gpt.eval().document_mask(on_cuda), torch.Tensor)
    gpt.train().config = dataclasses.replace(SHAPE, dropout=0.1)
    assert isinstance(gpt.document_mask(on_cuda), torch.Tensor)
    gpt.config, gpt.h[0].compiled = SHAPE, None
    assert isinstance(gpt.document_mask(on_cuda), torch.Tensor)


def test_cudnn_whose_backward_pass_gives_nan_does_not_serve_a_dense_mask(gpt, monkeypatch):
    allowed = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    gpt.document_mask(documents())
    assert allowed == []
    gpt.document_mask(documents().as_subclass(OnCuda))
    assert allowed == [False]


def test_the_mask_has_the_precision_of_the_attention(gpt):
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt.document_mask(documents()).dtype == torch.bfloat16
    assert gpt.document_mask(documents()).dtype == torch.float32


# Rows


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
def test_documents_begin_as_they_do_at_use(documents):
    """gen.py puts `<|endoftext|>` before a text and nothing before a conversation."""
    ids = np.concatenate(documents)
    expected = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    numbers = document_numbers(np.stack([ids, np.full_like(ids, 5)]))
    assert (numbers[0] - numbers[0, 0]).tolist() == expected.tolist()
    assert not numbers[1].any()


def test_a_text_sees_in_its_row_what_gen_py_shows_it(tmp_path):
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


@pytest.mark.parametrize("block_size", [15, 40, 63])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_no_two_conversations_of_a_row_share_a_document(tmp_path, block_size, loss_on):
    """Pieces of a cut conversation too, which no `<|endoftext|>` ends in the data."""
    talks = conversations(np.random.default_rng(4), 60)
    stream = stream_of(tmp_path, joined(talks)[:-1])  # the last one is open
    rows = ChatRows(stream, block_size, 5, loss_on, end_pieces=True)
    said, n_cut = [], 0
    for index in range(rows.start_epoch(0)):
        ids, targets = rows.row(index)
        numbers = document_numbers(ids[None])[0]
        place, seen = 0, set()
        for piece in rows._rows[index]:
            _, begin, end = rows._pieces[piece].tolist()
            content = slice(place, min(place + end - begin, block_size))
            assert (ids[content] == stream.read(begin, end)[: block_size - place]).all()
            is_said = ids[content] != ENDOFTEXT_ID
            own = set(numbers[content][is_said].tolist())
            assert len(own) == is_said.any() and not own & seen
            seen |= own
            if place and place < block_size and ids[place] == IM_START_ID:
                assert numbers[place - 1] not in own, "gen.py and evaluate.py show it no <|endoftext|>"
            n_cut += stream.read(end - 1, end)[0] != ENDOFTEXT_ID
            place += int(rows._lengths[piece])
        assert place <= block_size + 1
        said += targets[targets != IGNORED].tolist()
    assert n_cut > 3 or block_size > 40
    plain = ChatRows(stream, block_size, 5, loss_on)
    expected = [plain.row(index)[1] for index in range(plain.start_epoch(0))]
    if loss_on == "assistant":
        assert sorted(said) == sorted(np.concatenate(expected)[np.concatenate(expected) != IGNORED].tolist())


def test_a_cut_conversation_is_not_ended_unless_asked(tmp_path):
    talk = [IM_START_ID, *range(100, 112)] * 2 + [ENDOFTEXT_ID]
    rows = {flag: ChatRows(stream_of(tmp_path, talk), 20, 1, "all", end_pieces=flag) for flag in (False, True)}
    assert rows[False]._lengths.tolist() == [13, 14]
    assert rows[True]._lengths.tolist() == [14, 14]


# Training


@pytest.fixture
def data(tmp_path):
    """Text and chat of random ids with many ends."""
    folder = prepare(tmp_path / "data")
    return prepare(folder, "chat")


@pytest.mark.parametrize(
    "options",
    [{"dataset": "text"}, {"dataset": "chat", "dropout": 0.2, "gradient_accumulation_steps": 2, "dtype": "bfloat16"}],
    ids=["text", "chat"],
)
def test_a_masked_run_resumes_bit_by_bit(data, tmp_path, options):
    name = f"{options['dataset']}10"
    straight, stopped = tmp_path / "a" / name, tmp_path / "b" / name
    assert run(data, straight, document_mask=True, **options) == 0
    assert run(data, stopped, stop_after=5, document_mask=True, **options) == 130
    assert run(data, stopped, resume=True, dataset=options["dataset"]) == 0
    for folder in (straight, stopped):
        folder.with_suffix(".txt").touch()
    assert differences(stopped, straight) == []
    assert load_checkpoint(stopped / f"{name}.pt")["info"]["config"]["document_mask"] is True


def test_the_mask_belongs_to_the_run(data, tmp_path):
    run(data, tmp_path / "a", stop_after=2)
    with pytest.raises(UserError, match=r"--document_mask True contradicts .*text10.pt, which was made with False"):
        run(data, tmp_path / "a", resume=True, document_mask=True)


@pytest.mark.parametrize(("dataset", "is_masked"), [("text", False), ("chat", True), ("text=1,chat=1", False)])
def test_chat_by_itself_is_masked_unless_told_otherwise(data, tmp_path, dataset, is_masked):
    name = dataset.replace("=1,chat=1", "+chat")
    for folder, given, expected in (("a", {}, is_masked), ("b", {"document_mask": not is_masked}, not is_masked)):
        assert run(data, tmp_path / folder, dataset=dataset, max_iters=1, **given) == 0
        saved = load_checkpoint(tmp_path / folder / f"{name}1.pt")
        assert saved["info"]["config"]["document_mask"] is expected
    assert given_options(TrainOptions, ["--no-document_mask"]) == {"document_mask": False}


@pytest.mark.parametrize(
    ("dataset", "name", "other"),
    [("chat", "document_mask", True), ("text", "schedule", "wsd"), ("text", "muon_weight_decay", None)],
)
def test_a_run_from_before_there_was_an_option_goes_on_as_it_began(data, tmp_path, dataset, name, other):
    straight, older = tmp_path / "a", tmp_path / "b"
    options = {"dataset": dataset, name: DEFAULTS_OF_OLDER_RUNS[name]}
    assert run(data, straight, **options) == 0
    assert run(data, older, stop_after=5, **options) == 130
    path = older / f"{dataset}10.pt"
    saved = load_checkpoint(path)
    del saved["info"]["config"][name]
    checkpoint.save_checkpoint(path, checkpoint.build_model(path, saved), saved["info"], saved["training"])
    if other is not None:
        refusal = f"--{name} {other} contradicts .*10.pt, which was made with {options[name]}"
        with pytest.raises(UserError, match=refusal):
            run(data, older, resume=True, dataset=dataset, **{name: other})
    assert run(data, older, resume=True, dataset=dataset) == 0
    assert losses(older / f"{dataset}10.jsonl") == losses(straight / f"{dataset}10.jsonl")


def test_micro_batches_add_up_under_the_mask(data, tmp_path):
    run(data, tmp_path / "a", batch_size=8, document_mask=True)
    run(data, tmp_path / "b", batch_size=2, gradient_accumulation_steps=4, eval_iters=8, document_mask=True)
    first, second = (np.array([row[1] for row in losses(tmp_path / x / "text10.jsonl")[1:]]) for x in "ab")
    np.testing.assert_allclose(first, second, rtol=1e-4)


def test_training_and_validation_use_the_mask_and_without_it_none_is_made(data, tmp_path, monkeypatch):
    made = []
    real = GPT.document_mask

    def noted(gpt, numbers):
        made.append(numbers)
        return real(gpt, numbers)

    monkeypatch.setattr(GPT, "document_mask", noted)
    run(data, tmp_path / "off", max_iters=2, eval_interval=1)
    assert made == []
    run(data, tmp_path / "on", max_iters=2, eval_interval=1, document_mask=True)
    assert len(made) == 2 + 3 * 2, "two steps and three evaluations of two batches, once for all layers"
    assert any(numbers.max() > 0 for numbers in made)
    plain, masked = (losses(tmp_path / x / "text2.jsonl") for x in ("off", "on"))
    assert plain[1][1] != masked[1][1] and plain[0][2] != masked[0][2]
