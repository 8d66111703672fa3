"""Digests are of bytes, and are remembered only while a file is unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from stratakv.models import SilentProgress
from stratakv.models.digests import FileDigests

QUIET = SilentProgress()


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object) -> str:
        raise AssertionError("the files were read")

    monkeypatch.setattr("stratakv.models.digests.digest_of", read)


def test_digest_is_that_of_the_joined_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"key")
    (tmp_path / "b").write_bytes(b"value")
    digests = FileDigests(tmp_path / "memory")
    assert digests.of([tmp_path / "a", tmp_path / "b"], QUIET) == blake3(b"keyvalue").hexdigest()
    assert digests.of([tmp_path / "b", tmp_path / "a"], QUIET) == blake3(b"valuekey").hexdigest()


def test_unchanged_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"key")
    digest = FileDigests(tmp_path / "memory").of([tmp_path / "a"], QUIET)
    forbid_reading(monkeypatch)
    assert FileDigests(tmp_path / "memory").of([tmp_path / "a"], QUIET) == digest


def test_change_is_seen_even_with_size_and_time_set_back(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"key")
    digests = FileDigests(tmp_path / "memory")
    digests.of([file], QUIET)
    before = file.stat()
    file.write_bytes(b"yek")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.of([file], QUIET) == blake3(b"yek").hexdigest()


def test_memory_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"key")
    assert FileDigests(tmp_path / "a" / "memory").of([tmp_path / "a"], QUIET) == blake3(b"key").hexdigest()
