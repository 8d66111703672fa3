"""Sizes and numbers as people write them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratakv.errors import ConfigurationError
from stratakv.units import format_bytes, parse_bytes, whole


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (1, 1),
        (4096, 4096),
        (2**60 + 1, 2**60 + 1),
        (str(2**60 + 1), 2**60 + 1),
        ("9" * 400, int("9" * 400)),
        (2e9, 2_000_000_000),
        (np.int64(7), 7),
        ("7", 7),
        ("7B", 7),
        ("2KiB", 2048),
        ("2kb", 2000),
        ("512 MB", 512_000_000),
        ("1.5GiB", 3 * 2**29),
        (".5GiB", 2**29),
        (" 2 gib ", 2**31),
        ("1TiB", 2**40),
        ("3t", 3 * 10**12),
    ],
)
def test_a_size_is_read(text: int | str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "0", 0, -5, 2.5, True, None, "1e3", "2 PiB", "0.2", "1 2", "2GiBs", "nan", "1,5GiB"]
)
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(ConfigurationError, match="a size i"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1000 * 1024, "1000 KiB"),
        (2**20, "1 MiB"),
        (5 * 2**30, "5 GiB"),
        (2**42, "4096 GiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_a_size_is_written(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@given(st.integers(1, 2**50))
def test_what_is_written_is_read_again_within_three_digits(n_bytes: int) -> None:
    assert abs(parse_bytes(format_bytes(n_bytes)) - n_bytes) <= n_bytes * 0.006


@pytest.mark.parametrize("number", [3, np.int64(3), torch.tensor(3), torch.tensor([3])])
def test_a_whole_number_is_an_int(number: object) -> None:
    found = whole("tokens", number)
    assert type(found) is int
    assert found == 3


WRONG = [
    3.0,
    "3",
    None,
    True,
    torch.tensor(True),
    torch.tensor(3.0),
    torch.tensor([3, 4]),
    [3],
    torch.ones(1, device="meta"),
]


@pytest.mark.parametrize("number", WRONG)
def test_what_is_no_whole_number_is_refused(number: object) -> None:
    with pytest.raises(ConfigurationError, match="tokens must be a whole number, got"):
        whole("tokens", number)
