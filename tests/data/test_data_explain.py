"""What is told about calibration data."""

from pathlib import Path

import pytest

from autoround.data.explain import SHOWN_CHARS, explain
from tests.data.words import EOS, TEMPLATE, StubWriter, make_tokenizer, words, write_records


def test_every_source_and_the_first_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = write_records(tmp_path / "a.jsonl", "text", [words(20, 20 * index) for index in range(6)] + [""])
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    told = explain(f"{name}:concat=no,self:num=2", tokenizer, nsamples=10, seqlen=16, seed=1, writer=StubWriter(1007))
    assert caplog.messages == [
        f"calibration data: 8 of 10 rows of 16 tokens ({tmp_path / 'a.jsonl'}: 6 of 8 rows, 96 tokens "
        "from 6 documents, 1 dropped (empty), 24 tokens cut off; self: 2 of 2 rows, 32 tokens from 2 documents)"
    ]
    caplog.clear()
    assert str(told).startswith(
        f"""\
{tmp_path / "a.jsonl"}
  from     {tmp_path / "a.jsonl"}
  read     7 documents
  kept     6
  dropped  1 empty
  made     6 of 8 rows, 96 tokens, 24 tokens cut off

self
  from     written by the model itself
  read     2 documents
  kept     2
  dropped  none
  made     2 of 2 rows, 32 tokens

in all: 8 of 10 rows of 16 tokens: 128 tokens

row 1:
  """
    )
    assert len(told.samples) == 3
    assert all(len(text.split()) == 16 for text in told.samples)


def test_padding_is_counted_and_not_shown() -> None:
    told = explain([words(5), words(5)], make_tokenizer(), nsamples=1, seqlen=16, seed=1)
    assert told.padding == 4
    assert "12 tokens, 4 of padding" in str(told)
    assert "from     the caller" in str(told)
    (text,) = told.samples
    assert text.split().count(make_tokenizer().decode([EOS])) == 2


def test_long_rows_are_cut_and_lines_kept() -> None:
    told = explain(["w1\n" * 400], make_tokenizer(), nsamples=1, seqlen=400, seed=1, samples=1)
    left = len(told.samples[0]) - SHOWN_CHARS
    assert left > 0
    assert f" … and {left:,} more characters" in str(told)
    assert explain(["w1"] * 9, make_tokenizer(), nsamples=1, seqlen=4, seed=1, samples=0).samples == ()


def test_a_terminal_obeys_nothing_in_the_text() -> None:
    from autoround.data.explain import _beginning

    assert _beginning("a\x1b[31mb\nc\r\td") == "  a\N{REPLACEMENT CHARACTER}[31mb\n  c\N{REPLACEMENT CHARACTER}\td"
