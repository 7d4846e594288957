"""fast/allocator.py: freed memory stays with the process until it is returned on request."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


with_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")


def printed(body: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.split()


@with_glibc
def test_freed_memory_is_kept_until_it_is_returned_and_its_addresses_stay():
    body = """\
    import torch
    from fast.allocator import give_back_freed_memory, keep_freed_memory
    def held_mib(what):
        return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) // 1024
    keep_freed_memory()
    before, addresses = held_mib("VmRSS"), held_mib("VmData")
    tensor, behind = torch.ones(256, 2**18), torch.ones(2**10)  # 256 MiB, and what makes them a gap when they are freed
    del tensor
    print(held_mib("VmRSS") - before > 250)
    give_back_freed_memory()
    print(held_mib("VmRSS") - before < 20)
    print(held_mib("VmData") - addresses > -20)  # half the machine's memory, if the end were cut off"""
    assert printed(body) == ["True", "True", "True"]


@with_glibc
def test_tensors_of_other_threads_are_in_the_memory_with_huge_pages_too():
    body = """\
    import threading
    import torch
    from fast.allocator import keep_freed_memory
    keep_freed_memory()
    tensors = []
    thread = threading.Thread(target=lambda: tensors.append(torch.ones(2**20)))
    thread.start()
    thread.join()
    heap = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")).split()[0]
    start, end = (int(address, 16) for address in heap.split("-"))
    print(start <= tensors[0].data_ptr() < end)"""
    assert printed(body) == ["True"]
