"""Tables of the command line, where there is no terminal to say how wide they may be."""

import pytest
from rich.table import Table

from stratakv.cli.tables import WIDEST, print_tables


@pytest.fixture(autouse=True)
def without_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):  # the last two ask for codes of colours
        monkeypatch.delenv(name, raising=False)


def a_table(n_columns: int, cell: str) -> Table:
    """One row, of as many different cells."""
    table = Table(title="a title that [says] what it is")
    for i in range(n_columns):
        table.add_column(f"heading {i}", justify="right")
    table.add_row(*(f"{cell}{i}" for i in range(n_columns)))
    return table


@pytest.mark.parametrize("columns", [None, "", "0", "-1", "wide"])
@pytest.mark.parametrize("colours", [False, True])
def test_a_pipe_gets_every_number_whole(
    columns: str | None, colours: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 columns would have room for a letter of each."""
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    if colours:  # as services that build and test ask for them
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
    print_tables("a line before", a_table(11, "1,234,567.8"))
    shown = capsys.readouterr().out
    assert "a line before" in shown and "[says]" in shown and "…" not in shown
    for i in range(11):
        assert f"1,234,567.8{i} " in shown and f"heading {i} " in shown


def test_columns_that_were_asked_for_are_kept_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    print_tables(a_table(11, "1,234,567.8"))
    assert max(map(len, capsys.readouterr().out.splitlines())) == 100


def test_a_line_is_as_long_as_it_wants_beside_a_narrow_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(a_table(1, "1"), "word " * 30)
    assert "word " * 29 in capsys.readouterr().out


def test_long_text_is_folded(capsys: pytest.CaptureFixture[str]) -> None:
    """A reason of a thousand words is not one line."""
    print_tables(a_table(2, "word " * 1000))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) == WIDEST
    assert shown.count("word") == 2000
