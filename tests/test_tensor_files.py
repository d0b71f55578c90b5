"""Safetensors files, tensor by tensor."""

import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from autoround.tensor_files import read_heads, read_tensor

TENSORS = {
    "row": torch.arange(5, dtype=torch.int64),
    "half": torch.linspace(-2, 2, 12).view(3, 4).to(torch.bfloat16),
    "tiny": torch.linspace(-2, 2, 3).to(torch.float8_e4m3fn),  # whatever comes next is aligned to one byte
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_what_the_library_reads_is_read(file: Path) -> None:
    heads, known = read_heads(file), load_file(file)
    for name, tensor in known.items():
        found = read_tensor(file, name)
        assert (found.dtype, found.shape) == (heads[name].dtype, heads[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.double(), tensor.double())


def test_another_file_of_the_same_name_is_noticed(file: Path) -> None:
    assert read_tensor(file, "row").tolist() == [0, 1, 2, 3, 4]
    file.unlink()
    save_file({"row": torch.ones(3)}, file)
    assert read_tensor(file, "row").tolist() == [1, 1, 1]


def test_what_is_written_to_a_tensor_is_not_written_to_its_file(file: Path) -> None:
    read_tensor(file, "row").zero_()
    assert read_tensor(file, "row").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="asks for the data of a process")
def test_a_tensor_takes_no_more_data_than_its_own_bytes(tmp_path: Path) -> None:
    """RLIMIT_DATA counts what is mapped to be written to, even where nobody writes."""
    each, size = 2**20, 40
    names = [f"t{index}" for index in range(size)]
    save_file({name: torch.zeros(each, dtype=torch.uint8) for name in names}, tmp_path / "b.safetensors")
    process = psutil.Process()
    read_tensor(tmp_path / "b.safetensors", names[0])
    before = process.memory_info().data
    held = [read_tensor(tmp_path / "b.safetensors", name) for name in names[:10]]
    assert process.memory_info().data - before < 2 * len(held) * each
