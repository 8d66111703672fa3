"""Memory that lasts: zero whoever had it before, and not held beyond a limit."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stratakv.blocks import ram
from stratakv.blocks.ram import LEAST_BYTES, zeros


@pytest.fixture(autouse=True)
def own_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "_spare", ram._Spare())


def spare_bytes() -> int:
    return sum(nbytes for nbytes, _ in ram._spare._memories)


@pytest.mark.parametrize("nbytes", [0, 1, LEAST_BYTES - 1, LEAST_BYTES, 3 * LEAST_BYTES + 5])
def test_memory_is_zero_the_second_time_too(nbytes: int) -> None:
    for _ in range(3):
        memory = zeros(nbytes)
        assert memory.shape == (nbytes,)
        assert not memory.any()
        memory.fill_(0xFF)
        del memory


def test_what_was_let_go_is_given_to_the_next_who_asks() -> None:
    memory = zeros(LEAST_BYTES)
    place = memory.data_ptr()
    part = memory[5:9]
    del memory
    assert spare_bytes() == 0  # a view holds it
    del part
    gc.collect()
    assert spare_bytes() == LEAST_BYTES
    assert zeros(2 * LEAST_BYTES).data_ptr() != place
    assert zeros(LEAST_BYTES).data_ptr() == place


def test_no_more_is_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "SPARE_BYTES", 5 * LEAST_BYTES)
    memories = [zeros(n * LEAST_BYTES) for n in (1, 2, 3, 6)]
    while memories:
        del memories[0]
        assert spare_bytes() <= 5 * LEAST_BYTES


def test_threads_never_share_memory() -> None:
    def use(number: int) -> bool:
        for _ in range(200):
            memory = zeros(LEAST_BYTES)
            if memory.any():
                return False
            memory.fill_(number)
            if not torch.equal(memory, torch.full_like(memory, number)):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(1, 9)))


def test_what_is_spare_makes_room_under_a_limit_of_the_process() -> None:
    """Of the address space, in a process of its own: a limit cannot always be taken back."""
    program = f"""
import resource
from stratakv.blocks.ram import zeros
held = [zeros(40 * {LEAST_BYTES} + i) for i in range(6)]
del held
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * {LEAST_BYTES},) * 2)
assert not zeros(120 * {LEAST_BYTES}).any()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
