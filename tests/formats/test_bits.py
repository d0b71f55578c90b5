"""The bit stream: hand-derived words, and three implementations that agree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoround.formats.bits import pack_stream, unpack_stream
from autoround.formats.packed import unpack_words


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


# 32 codes and the words they make: the first code in the lowest bits, written here by hand in the base of a code.
GOLDEN = {
    # Codes 0 1 2 3 repeated: byte 0b11100100.
    2: ([0, 1, 2, 3] * 8, [0xE4E4E4E4, 0xE4E4E4E4]),
    # Codes 0 … 7 repeated are the octal digits 7654321076543210… of one number of 96 bits: its lowest word ends inside
    # digit 10 (a 2, of which 0b10 is bits 30 and 31 and nothing is left over), the next inside digit 21 (a 5: 0b1 is
    # bit 31, 0b10 the lowest bits of the last word).
    3: ([0, 1, 2, 3, 4, 5, 6, 7] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    # Codes 0 … 15 twice: nibbles.
    4: ([*range(16)] * 2, [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98]),
    8: (
        [*range(224, 256)],
        [0xE3E2E1E0, 0xE7E6E5E4, 0xEBEAE9E8, 0xEFEEEDEC, 0xF3F2F1F0, 0xF7F6F5F4, 0xFBFAF9F8, 0xFFFEFDFC],
    ),
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words(bits: int) -> None:
    codes, words = GOLDEN[bits]
    packed = pack_stream(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[_signed(word) for word in words]]


@pytest.mark.parametrize(("place", "words"), [(10, [3 << 30, 1, 0]), (21, [0, 1 << 31, 3]), (9, [7 << 27, 0, 0])])
def test_three_bit_codes_across_words(place: int, words: list[int]) -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, place] = 7
    packed = pack_stream(codes, 3)
    assert packed.tolist() == [[_signed(word) for word in words]]
    assert torch.equal(unpack_stream(packed, 3), codes)


@given(
    bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 5), periods=st.integers(1, 4), seed=st.integers(0, 2**31)
)
def test_round_trip(bits: int, rows: int, periods: int, seed: int) -> None:
    codes = torch.randint(
        2**bits, (rows, 32 * periods), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    words = pack_stream(codes, bits)
    assert words.shape == (rows, bits * periods)
    assert torch.equal(unpack_stream(words, bits), codes)
    assert torch.equal(unpack_words(words.t(), bits).t(), codes.int())


@pytest.mark.parametrize("bits", [3, 4])
def test_chunks_do_not_show(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(2**bits, (7, 64), dtype=torch.uint8)
    whole = pack_stream(codes, bits)
    monkeypatch.setattr("autoround.formats.bits._CHUNK", 128)
    assert torch.equal(pack_stream(codes, bits), whole)
    assert torch.equal(unpack_stream(whole, bits), codes)
