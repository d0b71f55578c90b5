"""What is foretold of runs: without reading weights, for every kind of model, and what to do where it does not fit."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from autoround.backends.host import group_free
from autoround.cli.plan import as_json, as_text
from autoround.errors import ModelError, UsageError
from autoround.forecast import foretell as foretelling
from autoround.forecast import memory
from autoround.forecast.foretell import foretell
from autoround.forecast.machine import room
from autoround.forecast.types import Forecast, Room
from autoround.model.source import SafetensorsSource
from tests.engine import mixtures, small
from tests.fakehub import FakeHub

PLANS = """
import sys
from autoround.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": small.make,
    "gpt2": lambda: small.make("gpt2"),
    "gemma3": lambda: small.make("gemma3"),
    "qwen3_moe": lambda: mixtures.make("qwen3_moe"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small.make().to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def planned(folder: Path, *, probe: bool = False, **settings: object) -> Forecast:
    """The forecast of the only run of a recipe."""
    (found,) = foretell(dataclasses.replace(small.recipe(folder.parent), model=str(folder), **settings), probe=probe)
    return found


def test_targets_of_all_experts_are_counted(tmp_path: Path) -> None:
    mixtures.make("qwen3_moe").save_pretrained(tmp_path / "model")
    one, two = (planned(tmp_path / "model", starved_experts=policy) for policy in ("rtn", "route_all"))
    assert two.memory.blocks[0].host > one.memory.blocks[0].host


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MODELS[name]().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, key: pytest.fail(f"{key} was read"))
    found = planned(tmp_path / "model", probe=True, clip_search=True)
    assert found.seconds is not None
    assert 0 < found.seconds.step < found.seconds.block < found.seconds.total
    assert found.memory.process < found.memory.host
    paths = [path for need in found.memory.blocks for path in need.paths]
    assert sorted(paths) == sorted(block.path for block in found.plan.blocks)
    assert len(found.memory.blocks) == (2 if name == "gemma3" else 1)
    assert all(need.host > need.codes > 0 for need in found.memory.blocks)
    assert found.shortages == ()


def test_what_steps_and_mixtures_leave_in_the_heap_is_counted(saved: Path, tmp_path: Path) -> None:
    found = planned(saved, iters=2, clip_search=False)
    weights, tuned = found.plan.blocks[0].weights, found.memory
    # weights, offsets, rounded weights and gradients, in float32, and what lies between them when they are freed
    assert tuned.blocks[0].host > 4 * 4 * weights * memory.CPU_KEPT
    mixtures.make("qwen3_moe").save_pretrained(tmp_path / "experts")
    experts = planned(tmp_path / "experts").memory
    beside = experts.host - experts.process - max(experts.others, *(need.host for need in experts.blocks))
    dense = tuned.host - tuned.process - max(tuned.others, *(need.host for need in tuned.blocks))
    assert beside - dense == round(memory.CPU_KEPT * memory.EXPERTS_CACHES)


def test_codes_and_activations_are_counted_to_the_byte(saved: Path) -> None:
    found = planned(saved)
    weights = sum(layer.shape.out_features * layer.shape.in_features for layer in found.plan.blocks[0].layers)
    groups = weights // 32
    assert found.memory.blocks[0].codes == weights + groups * 3  # a byte each, a float16 and a byte for a group
    itemsize = 2 if "bfloat16" in found.numerics else 4
    assert found.memory.slots == 2 * found.memory.activations == 4 * small.ROWS * small.TOKENS * 64 * itemsize
    more = planned(saved, nsamples=2 * small.ROWS)
    grown = more.memory.blocks[0].host - found.memory.blocks[0].host
    # two streams, which their outputs replace; a byte for every token tells whether it counts
    assert grown >= 2 * small.ROWS * small.TOKENS * 64 * itemsize


def test_rounding_to_nearest_needs_no_activations(saved: Path) -> None:
    found = planned(saved, iters=0, clip_search=False, dataset=None, probe=True)
    assert found.memory.activations == 0
    assert found.seconds is not None and found.seconds.step == 0


def test_a_hub_model_is_planned_by_its_headers(saved: Path, tmp_path: Path) -> None:
    words = ["plan", "org/m", "--dataset", "python-docs", "--seqlen", "16", "--nsamples", "16", "--group_size", "32",
             "--no_probe", "--log_json"]  # fmt: skip
    with FakeHub(models={"org/m": saved}) as hub:
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", PLANS, *words], env=environment, cwd=tmp_path,
                              capture_output=True, text=True, check=False)  # fmt: skip
        asked = [request for request in hub.requests if request.path.endswith(".safetensors")]
    assert done.returncode == 0, done.stderr
    assert len(asked) == len(list(saved.glob("*.safetensors"))) > 1
    assert {request.status for request in asked} == {206}
    assert list((tmp_path / "home").rglob("*.safetensors")) == []
    told = json.loads(done.stdout)
    local = planned(saved, dataset="python-docs", bits=4, iters=200, clip_search=None, batch_size=8)
    assert told["files"] == local.files
    assert told["memory"]["blocks"] == [dataclasses.asdict(need) | {"paths": list(need.paths)}
                                        for need in local.memory.blocks]  # fmt: skip


def test_a_hub_model_without_safetensors(tmp_path: Path) -> None:
    small.make().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with FakeHub(models={"org/m": tmp_path / "model"}) as hub:
        done = subprocess.run([sys.executable, "-c", PLANS, "plan", "org/m"], env=hub.environment(tmp_path / "home"),
                              capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("auto-round: error: org/m: found no safetensors (")
    assert done.stderr.count("\n") == 1


def test_what_does_not_fit_is_told_with_flags_that_do(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"nsamples": 512, "batch_size": 2, "seqlen": 32, "dataset": "python-docs"}
    monkeypatch.setattr(foretelling, "_process_bytes", lambda: 400_000_000)
    whole = planned(saved, **settings)
    assert whole.shortages == ()
    tight = Room(host=whole.memory.host - 1, host_limit="its control group", device=None, disk=whole.disk - 1)
    monkeypatch.setattr(foretelling, "room", lambda folder, device: tight)
    found = planned(saved, **settings)
    memory, disk = found.shortages
    assert (memory.what, memory.free, disk.what, disk.needed) == ("memory", tight.host, "disk", whole.disk)
    flags = dict(flag.removeprefix("--").split(" ") for flag in memory.flags)
    assert set(flags) <= {"batch_size", "gradient_accumulate_steps", "activations", "nsamples"}
    given = {name: int(value) if value.isdigit() else value for name, value in flags.items()}
    assert planned(saved, **settings | given).memory.host <= tight.host
    text = as_text(found)
    assert f"use {' '.join(memory.flags)}" in text
    assert "(its control group)" in text
    assert json.loads(as_json(found))["fits"] is False


def test_where_no_flag_helps_it_is_said(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        foretelling, "room", lambda folder, device: Room(host=1, host_limit="x", device=None, disk=1 << 40)
    )
    assert "no flag would make it fit" in as_text(planned(saved))


def test_of_several_devices_it_is_said_that_one_is_counted(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "counted as if the first device did all of it"
    assert words not in planned(saved).numerics
    both = torch.device("cuda:0"), torch.device("cuda:1")
    monkeypatch.setattr(foretelling, "select_all", lambda device_map: (None, both))
    assert words in as_text(planned(saved))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"device_map": "cuda:93"}, UsageError, "device_map: found 'cuda:93'; needed a device of this machine"),
        ({"model": "no/such.gguf"}, ModelError, "found no such file"),
        ({"max_shard_size": "much"}, UsageError, "max_shard_size: found 'much'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(saved: Path, settings: dict[str, str], error: type[Exception], message: str) -> None:
    made = dataclasses.replace(small.recipe(saved.parent), **{"model": str(saved), **settings})
    with pytest.raises(error, match=message):
        foretell(made, probe=False)


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(str(content))


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text("0::/outer/inner\n")
    group(tmp_path / "outer", memory_max=1000, memory_current=300)
    group(tmp_path / "outer" / "inner", memory_max="max", memory_current=200)
    assert group_free(tmp_path, groups) == 700
    group(tmp_path / "outer" / "inner", memory_max=600, memory_stat="anon 10\ninactive_file 150\n")
    assert group_free(tmp_path, groups) == 550


def test_control_groups_of_version_1_and_none(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    groups.write_text("4:memory:/jobs/one\n3:cpuset:/\n")
    folder = tmp_path / "memory" / "jobs" / "one"
    folder.mkdir(parents=True)
    assert group_free(tmp_path, groups) is None
    (folder / "memory.limit_in_bytes").write_text("500\n")
    (folder / "memory.usage_in_bytes").write_text("100\n")
    assert group_free(tmp_path, groups) == 400
    assert group_free(tmp_path, tmp_path / "absent") is None


def test_a_limit_on_this_process_counts(tmp_path: Path) -> None:
    code = """
import resource, sys, torch
from pathlib import Path
from autoround.forecast.machine import room
before = room(Path("absent/folder"), torch.device("cpu"))
resource.setrlimit(resource.RLIMIT_DATA, (2**40, resource.RLIM_INFINITY))
assert room(Path("."), torch.device("cpu")).host_limit == before.host_limit
resource.setrlimit(resource.RLIMIT_DATA, (2**33, resource.RLIM_INFINITY))
print(room(Path("."), torch.device("cpu")).host)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert 0 < int(done.stdout) < 2**33
    assert room(tmp_path / "not" / "there", torch.device("cpu")).disk > 0
