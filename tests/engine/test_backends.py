"""Devices by name, what they choose, and that a run goes on with the choices it began with."""

import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import cpu_vec_isa

from autoround.backends.base import BACKENDS, Numerics, jit, load, named, select, select_all
from autoround.backends.cpu import COMPILE_TOKEN_STEPS, CPU, EXPLICIT_ATTENTION_TOKENS, CpuBackend
from autoround.backends.gpu import CUDA, XPU
from autoround.backends.hpu import HPU
from autoround.engine import Run, quantize
from autoround.errors import JournalError, UsageError
from autoround.forecast.machine import room
from autoround.journal import MANIFEST, Journal
from tests.engine.small import TOKENS, make, pin, recipe, stopped

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def test_the_cpu_by_name() -> None:
    for name in ("cpu", " CPU "):
        assert select(name) == (CPU, torch.device("cpu"))


@NO_GPU
def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    assert select("auto") == (CPU, torch.device("cpu"))


@NO_GPU
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "0", "7", "0,1,2,3", "cuda:0, cuda:1"])
def test_a_device_that_is_not_there(name: str) -> None:
    has = "a device of this machine, which has a CPU and no accelerator that torch sees; use cpu"
    with pytest.raises(UsageError, match=f"^device_map: found '{name}'; needed {has}$"):
        select(name)


@pytest.mark.parametrize(
    ("count", "name", "has"),
    [
        (1, "1", "one CUDA device, 0; use one of them, or auto"),
        (1, "0,1,2,3", "one CUDA device, 0; use one of them, or auto"),
        (2, "cuda:2", "CUDA devices 0 to 1; use one of them, or auto"),
        (2, "cuda:0,cuda:2", "CUDA devices 0 to 1; use one of them, or auto"),
    ],
)
def test_a_number_that_is_too_large_is_told_which_there_are(
    count: int, name: str, has: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=f"found '{name}'; needed a device of this machine, which has a CPU and {has}"):
        select(name)
    assert select("0")[1] == torch.device("cuda", 0)


@pytest.mark.parametrize(
    "name", ["tpu", "", "gpu", "cuda:first", "cpu:x", "cpu:0", "-1", "0,,1", "{mlp: gpu}", "{mlp}"]
)
def test_names_that_are_no_device(name: str) -> None:
    needed = "needed auto, cpu, cuda, xpu, hpu, or numbers of accelerators with commas between them"
    with pytest.raises(UsageError, match=f"^{re.escape(f'device_map: found {name!r}; {needed}')}$"):
        select(name)


def test_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("0,1,2,3", " cuda:0, 1 ,CUDA:2,3"):
        assert select_all(name) == (CUDA, tuple(torch.device("cuda", index) for index in range(4)))
    assert select("3,1") == (CUDA, torch.device("cuda", 3))


@pytest.mark.parametrize(("name", "needed"), [("0,cuda:0", "each device once"), ("cpu,cuda:0", "devices of one kind")])
def test_devices_that_do_not_go_together(name: str, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=f"device_map: found '{name}'; needed {needed}"):
        select_all(name)


def test_devices_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    first, second, third = (torch.device("cuda", index) for index in range(3))
    for text in ("{mlp:1,q_proj: cuda:1}", '{"mlp": 1, "q_proj": 1}'):
        assert select_all(text) == (CUDA, (first, second))
        assert named(text) == {"": first, "mlp": second, "q_proj": second}
    assert select_all("{'': 2, mlp: cuda}") == (CUDA, (third, first))
    assert (select_all("{mlp: cpu}"), named("0,1"), named("auto")) == ((CPU, (torch.device("cpu"),)), {}, {})


@pytest.mark.parametrize(("text", "needed"), [
    ("{mlp: 1}", "a device of this machine"), ("{mlp: 0, up_proj: cpu}", "devices of one kind"),
    ("{}", "a device for a module, such as {mlp: 1}"),
])  # fmt: skip
def test_devices_of_modules_that_are_refused(text: str, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=f"^device_map: found {text!r}; needed {needed}"):
        select_all(text)


class FakeAccelerator:
    """What the backends of Intel's devices call, with answers of a machine that has two of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def is_bf16_supported(self) -> bool:
        return True

    def memory_allocated(self, index: int) -> int:
        return 1000 + index

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=2000 + device.index)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 500 + device.index, 2000 + device.index

    def get_device_name(self, device: torch.device | None = None) -> str:
        return "fake"

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")


def test_intel_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeAccelerator()
    monkeypatch.setattr(torch, "xpu", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_all("auto") == (XPU, (torch.device("xpu"),))
    assert select_all("0,1") == (XPU, (torch.device("xpu", 0), torch.device("xpu", 1)))
    with pytest.raises(UsageError, match="a CPU and XPU devices 0 to 1; use one of them, or auto"):
        select("xpu:2")
    assert (XPU.compute_dtype(), XPU.attention(64), XPU.compiler) == (torch.bfloat16, "sdpa", "inductor")
    assert XPU.compile_helps(10**9)
    assert XPU.memory_bytes() == 2001
    assert XPU.device_bytes(torch.device("xpu", 1)) == 2001
    assert room(Path(), torch.device("xpu", 1)).device == 501
    assert XPU.title(torch.device("xpu", 1)) == "2 x fake"
    XPU.release_memory()
    assert fake.calls == ["empty_cache"]


def test_drivers_that_do_not_tell_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("the driver does not tell")

    fake = FakeAccelerator()
    monkeypatch.setattr(fake, "mem_get_info", refuse)
    monkeypatch.setattr(torch, "xpu", fake)
    assert room(Path(), torch.device("xpu", 0)).device is None


def test_gaudi(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, package, bridge = FakeAccelerator(), ModuleType("habana_frameworks"), ModuleType("habana_frameworks.torch")
    package.__spec__ = ModuleSpec("habana_frameworks", None)
    modules = {"habana_frameworks": package, "habana_frameworks.torch": bridge, "habana_frameworks.torch.hpu": fake}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_all("hpu:0,hpu:1") == (HPU, (torch.device("hpu", 0), torch.device("hpu", 1)))
    assert (HPU.compute_dtype(), HPU.attention(64), HPU.compiler) == (torch.bfloat16, "sdpa", "hpu_backend")
    assert HPU.compile_helps(10**9)
    assert HPU.memory_bytes() == 2001
    assert HPU.device_bytes(torch.device("hpu", 1)) is None
    assert room(Path(), torch.device("hpu", 1)).device is None
    assert HPU.title(torch.device("hpu", 1)) == "2 x fake"
    HPU.release_memory()


def test_the_device_is_checked_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device_map"):
        quantize(tmp_path / "no_model", recipe(tmp_path, device_map="tpu"))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_answers_what_the_engine_asks(name: str) -> None:
    if not load(name).count():
        pytest.skip("needs the device")
    backend, device = select(name)
    assert backend.name == device.type == name
    assert backend.compute_dtype() in (torch.float32, torch.bfloat16, torch.float16)
    assert backend.attention(64) in ("eager", "sdpa")
    assert backend.memory_bytes() >= 0
    assert (backend.device_bytes(device) or 1) > 0
    assert (backend.free_device_bytes(device) or 0) <= (backend.device_bytes(device) or 0)
    assert backend.title(device)
    backend.release_memory()


def test_choices_of_the_cpu() -> None:
    assert CPU.compute_dtype() in (torch.float32, torch.bfloat16)
    assert CPU.attention(EXPLICIT_ATTENTION_TOKENS) == "eager"
    assert CPU.attention(EXPLICIT_ATTENTION_TOKENS + 1) == "sdpa"
    assert not CPU.compile_helps(COMPILE_TOKEN_STEPS - 1)
    assert CPU.memory_bytes() > 10**7


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's allocator")
def test_freed_memory_goes_back_to_the_system() -> None:
    pieces = [torch.ones(25_000) for _ in range(2000)]  # 200 MB in pieces that the allocator does not map one by one
    keep = pieces[::50]
    del pieces
    before = CPU.memory_bytes()
    CPU.release_memory()
    assert before - CPU.memory_bytes() > 100e6
    assert float(keep[-1].sum()) == 25_000


def test_without_a_compiler_nothing_is_compiled_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert CPU.lacks() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert CPU.lacks().startswith("the C++ compiler ")
    monkeypatch.setenv("CXX", "mine -O2")
    assert CPU.lacks() == "the C++ compiler mine"
    monkeypatch.setattr("autoround.numerics.COMPILE_SEARCHED", 0)
    monkeypatch.setattr("autoround.backends.cpu.COMPILE_TOKEN_STEPS", 0)
    tuned = quantize(make(), recipe(tmp_path / "unasked", torch_compile=None, clip_search=True))
    assert tuned.numerics.compiler is None
    with pytest.raises(UsageError, match="torch_compile: found no compiler; needed the C.. compiler mine; install it"):
        quantize(make(), recipe(tmp_path / "asked", torch_compile=True))


def test_a_run_that_goes_on_compiles_as_before_or_says_that_it_cannot(tmp_path: Path) -> None:
    pin(make(), recipe(tmp_path), compiler="inductor")
    assert quantize(make(), recipe(tmp_path, torch_compile=None)).numerics.compiler == "inductor"
    with pytest.raises(UsageError, match="torch_compile: found it off for a run whose blocks so far are compiled"):
        quantize(make(), recipe(tmp_path, torch_compile=False))
    assert quantize(make(), recipe(tmp_path, torch_compile=False, restart=True)).numerics.compiler is None


def test_a_cpu_tells_the_compiler_ahead_what_it_can_do() -> None:
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    CPU.prepare_compiler()
    assert cpu_vec_isa.valid_vec_isa_list.cache_info().currsize == 1


@pytest.mark.parametrize("compiled", [True, False])
def test_the_compiler_is_prepared_while_text_is_read(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = Event()

    def read(run: Run) -> None:
        assert begun.wait(10 if compiled else 0) is compiled
        raise KeyboardInterrupt

    monkeypatch.setattr(CpuBackend, "prepare_compiler", lambda backend: begun.set())
    monkeypatch.setattr(Run, "_calibration", read)
    with pytest.raises(KeyboardInterrupt):
        next(iter(quantize(make(), recipe(tmp_path, torch_compile=compiled))))


def test_a_function_is_compiled_on_demand_only() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert jit(double, compiler=None) is double
    assert jit(double, compiler="inductor") is not double


def test_numerics_name_a_dtype() -> None:
    numerics = Numerics(device="cpu", dtype="bfloat16", attention="eager", compiler=None, threads=1, micro_batches=1)
    assert numerics.torch_dtype is torch.bfloat16


def recorded(run: Run) -> dict[str, Any]:
    numerics: dict[str, Any] = json.loads((run.journal_folder / MANIFEST).read_text())["numerics"]
    return numerics


def test_choices_are_recorded(tmp_path: Path) -> None:
    run = quantize(make(), recipe(tmp_path))
    next(iter(run))
    assert recorded(run) == {
        "device": "cpu",
        "dtype": str(CPU.compute_dtype()).removeprefix("torch."),
        "attention": CPU.attention(TOKENS),
        "compiler": None,
        "threads": torch.get_num_threads(),
        "micro_batches": 1,
    }


def test_compiling_is_recorded_where_there_are_steps(tmp_path: Path) -> None:
    run = quantize(make(), recipe(tmp_path, "rtn", torch_compile=True))
    next(iter(run))
    assert recorded(run)["compiler"] is None


def test_recorded_choices_are_used_when_a_run_goes_on(tmp_path: Path) -> None:
    chosen = {"dtype": "float64", "attention": "sdpa", "threads": torch.get_num_threads() + 1}
    made = pin(make(), recipe(tmp_path, iters=1), **chosen)
    run = quantize(make(), made)
    assert run.model.skeleton.config._attn_implementation == "sdpa"
    next(iter(run))
    assert recorded(run) == {**recorded(run), **chosen}
    assert torch.get_num_threads() == chosen["threads"]
    kept = Journal(run.journal_folder, {}).activations.read(0)
    assert {tensor.dtype for tensor in kept.values()} == {torch.float64}
    assert [done.resumed for done in quantize(make(), made)] == [True, False]


def test_a_new_run_chooses_anew(tmp_path: Path) -> None:
    pin(make(), recipe(tmp_path), dtype="float64")
    run = quantize(make(), recipe(tmp_path, overwrite=True))
    next(iter(run))
    assert recorded(run)["dtype"] == str(CPU.compute_dtype()).removeprefix("torch.")


def test_a_run_does_not_go_on_elsewhere(tmp_path: Path) -> None:
    made = pin(make(), recipe(tmp_path), device="cuda")
    with pytest.raises(JournalError, match="numerics.device: was 'cuda', now 'cpu'"):
        stopped(make(), made, after=1)
