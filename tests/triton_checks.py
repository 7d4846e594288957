"""The Triton kernel without a GPU: its numbers in Triton's interpreter, and its compilation for several GPUs.

    python -m tests.triton_checks numbers        # prints {name: error or null} for checks, and for planted faults
    python -m tests.triton_checks compilation

A program of its own, because Triton decides when it is imported whether it interprets its kernels.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__" and sys.argv[1] == "numbers":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton

import fast.generation
from fast import triton_attention
from fast.triton_attention import N_WARPS, TritonAttention, attend, block_of, find_fault
from generation.decoding import decode_at, new_cache
from generation.row_cache import RowCache, decode_rows
from model import GPT
from tests.tiny_gpt import generating_gpt, seeded

SHAPES = ((1, 64), (3, 20), (2, 128))  # heads and their size; Triton's blocks have sizes that are powers of two
POSITIONS = (0, 1, 63, 64, 65, 127, 128, 129, 256, 257, 300)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


# --- numbers ---


def attention(n_head: int, size: int, dtype: torch.dtype) -> None:
    """`attend` compared with a softmax in float64, for rows of the cache in another order than the tokens."""
    generator = seeded()
    rows = torch.randperm(len(POSITIONS) + 2, generator=generator)[: len(POSITIONS)]
    shape = (2, len(POSITIONS) + 2, n_head, POSITIONS[-1] + 5, size)
    cache = torch.randn(shape, generator=generator).to(dtype)
    qkv = (2 * torch.randn(len(POSITIONS), 3 * n_head * size, generator=generator)).to(dtype)
    expected_cache, before = cache.clone(), qkv.clone()
    found = attend(qkv, cache, torch.tensor(POSITIONS), rows)
    assert found.dtype == dtype and found.shape == (len(POSITIONS), n_head * size)
    for token, (position, row) in enumerate(zip(POSITIONS, rows.tolist(), strict=True)):
        query, key, value = before[token].view(3, n_head, size)
        expected_cache[0, row, :, position], expected_cache[1, row, :, position] = key, value
        keys, values = expected_cache[:, row, :, : position + 1].double()
        weights = (keys @ query.double()[:, :, None] / size**0.5).softmax(1)  # (H, positions, 1)
        expected = (weights * values).sum(1).flatten()
        torch.testing.assert_close(found[token].double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert cache.equal(expected_cache), "the cache differs"
    assert qkv.equal(before)


def later_keys() -> None:
    """What is stored after a row's position, left by a longer text, has no influence, even if it is NaN."""
    cache = torch.full((2, 1, 1, 8, 16), torch.nan)
    cache[:, :, :, :3] = 1
    found = attend(torch.ones(1, 48), cache, torch.tensor([3]), torch.tensor([0]))
    torch.testing.assert_close(found, torch.ones(1, 16))


def large_scores() -> None:
    """Scores of thousands, whose exponentials do not exist."""
    cache = torch.zeros(2, 1, 1, 300, 16)
    cache[0, 0, 0, 200], cache[1, 0, 0, 200] = 1000, 5
    found = attend(torch.ones(1, 48) * 100, cache, torch.tensor([250]), torch.tensor([0]))
    torch.testing.assert_close(found, torch.full((1, 16), 5.0))


@torch.inference_mode()
def decode_steps() -> None:
    """A model's decode steps for rows of different lengths, and for chosen rows of a RowCache."""
    gpt = generating_gpt()
    config, lengths = gpt.config, [2, 5, 3]
    ids = torch.tensor([3, 1, 4])
    found, caches = [], []
    for is_fast in (False, True):
        if is_fast:
            use_kernel(gpt)
        cache, row_cache = new_cache(gpt, 3), RowCache(config, 5, torch.device("cpu"), torch.float32)
        for one in (cache, row_cache):
            one.keys_values.copy_(torch.randn(one.keys_values.shape, generator=seeded()))
        found.append(decode_at(gpt, ids, torch.tensor(lengths), 6, cache))
        found.append(decode_rows(gpt, ids, [4, 0, 2], lengths, row_cache))
        found.append(decode_rows(gpt, ids[:1], [3], lengths[:1], row_cache))
        caches += [cache.keys_values, row_cache.keys_values]
    for plain, fast_one in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(fast_one, plain, rtol=1e-4, atol=1e-4)
    for plain, fast_one in zip(caches[:2], caches[2:], strict=True):
        torch.testing.assert_close(fast_one, plain, rtol=1e-4, atol=1e-4)


def use_kernel(gpt: GPT) -> None:
    assert fast.generation._use_triton_attention(gpt)
    assert all(type(block.attn) is TritonAttention for block in gpt.h)


def no_compiler() -> None:
    """If the kernel does not run, the model keeps torch's attention and the reason is printed."""
    gpt = generating_gpt()
    error = RuntimeError("Failed to find C compiler.\nPlease specify via CC")
    with (
        mock.patch.object(triton_attention, "attend", side_effect=error),
        contextlib.redirect_stderr(io.StringIO()) as warned,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        assert not fast.generation._use_triton_attention(gpt)
    reason = "RuntimeError: Failed to find C compiler. Please specify via CC"
    assert warned.getvalue() == f"warning: the attention kernel is not used: {reason}\n" and not printed.getvalue()
    assert not any(isinstance(block.attn, TritonAttention) for block in gpt.h)


@torch.inference_mode()
def other_rows() -> None:
    """A step that selects some rows of a KVCache as a slice keeps torch's attention."""
    gpt = generating_gpt()
    ids, found = torch.tensor([3, 1]), []
    for is_fast in (False, True):
        if is_fast:
            use_kernel(gpt)
        cache = new_cache(gpt, 4)
        cache.select(torch.tensor([0, 0]), 1, slice(2, 4))
        mask = torch.ones(2, 1, 1, 1, dtype=torch.bool)
        found.append((gpt.hidden(ids[:, None], cache, torch.zeros(2, 1, dtype=torch.long), mask), cache.keys_values))
    torch.testing.assert_close(found[1], found[0])


def self_check() -> None:
    for dtype in TOLERANCES:
        fault = find_fault(2, 20, dtype, torch.device("cpu"))
        assert fault is None, fault


CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"attention, {n_head} x {size}, {dtype}": lambda shape=(n_head, size), dtype=dtype: attention(*shape, dtype)
        for n_head, size in SHAPES
        for dtype in TOLERANCES
    },
    "later keys": later_keys,
    "large scores": large_scores,
    "decode steps": decode_steps,
    "no compiler": no_compiler,
    "other rows": other_rows,
    "large head": lambda: attention(1, 300, torch.float32),
    "self-check": self_check,
}
# Changes of the kernel's source, each of which `find_fault` has to notice.
FAULTS = {
    "scale": ("other=0.0).to(tl.float32) * scale", "other=0.0).to(tl.float32)"),
    "own key": ("is_before = cached < position", "is_before = cached <= position"),
    "last key": ("is_before = cached < position", "is_before = cached < position - 1"),
    "running sum": ("total = total * shrink", "total = total"),
    "running result": ("result = result * shrink", "result = result"),
    "row": ("row = tl.load(rows_pointer + token)", "row = token"),
    "where it is stored": (
        "keys_pointer + start + position * size + columns, new_key",
        "keys_pointer + start + columns, new_key",
    ),
    "values": ("tl.store(values_pointer", "tl.store(keys_pointer"),
}


def error_of(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception as error:  # what is raised is what the test reports
        return f"{type(error).__name__}: {error}"
    return None


def check_numbers() -> dict[str, dict[str, str | None]]:
    found = {"checks": {name: error_of(check) for name, check in CHECKS.items()}, "faults": {}}
    source = textwrap.dedent(inspect.getsource(triton_attention._attend.fn))
    with tempfile.TemporaryDirectory() as folder:
        for name, (old, new) in FAULTS.items():
            assert source.count(old) == 1, f"the kernel contains {old!r} {source.count(old)} times"
            path = Path(folder, f"{name.replace(' ', '_')}.py")  # Triton reads a kernel's source from its file
            path.write_text("import triton\nimport triton.language as tl\n\n\n" + source.replace(old, new))
            names: dict = {}
            exec(compile(path.read_text(), str(path), "exec"), names)
            with mock.patch.object(triton_attention, "_attend", names["_attend"]):
                found["faults"][name] = error_of(self_check)
    return found


# --- compilation ---


def compile_for(capability: int, dtype: str) -> None:
    """Compile the kernel for GPUs of a compute capability, as for GPT-2, whose tensors are aligned to 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"n_head": 12, "size": 64, "padded_size": 64, "block": block_of(64)}
    types = {"positions_pointer": "*i64", "rows_pointer": "*i64", "scale": "fp32", "block_size": "i32"}
    names = triton_attention._attend.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else f"*{dtype}") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name in signature if name.endswith(("r", "block_size"))
    }
    source = ASTSource(triton_attention._attend, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": N_WARPS})
    assert len(made.asm["cubin"]) > 1000
    assert "ld.global.v4" in made.asm["ptx"], "several numbers per load"


def check_compilation() -> dict[str, str | None]:
    return {
        f"sm_{capability}, {dtype}": error_of(lambda capability=capability, dtype=dtype: compile_for(capability, dtype))
        for capability, dtype in ((75, "fp16"), (80, "bf16"), (90, "bf16"), (90, "fp32"))
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(check_numbers() if sys.argv[1] == "numbers" else check_compilation()))
