"""Cells, their results and the page: that work goes on, failures are told, and figures are those of the results."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from autoround.errors import DataError
from benchmarks import bench, cells, environments, heap, limited, page, peers, quality
from benchmarks.cells import Place, Run
from benchmarks.cost import Failed, measure
from benchmarks.peers import Job, Tool

CELL = Run(model="small-llama", bits=4, data=(4, 32), tool="autoround", recipe="rtn", seed=0)
DATA = {"rows": 4, "seqlen": 32, "seed": 0}


def job(folder: Path, source: Path) -> Job:
    texts, tokens = folder / "texts.jsonl", folder / "tokens.json"
    peers.write_calibration(AutoTokenizer.from_pretrained(source), texts, tokens, **DATA)
    return Job(
        source=source, texts=texts, tokens=tokens, output=folder / "out", bits=4, group_size=32, sym=True, **DATA
    )


def test_names_are_unique_and_patterns_select() -> None:
    found = cells.all_cells()
    names = [cell.name for cell in found]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == {"step", "run", *page.SLOPES}
    own = bench.select(["run/*/autoround.rtn/seed0"], found)
    assert {cell.name.split("/")[2] for cell in own} == {"w2g64", "w4g64"}
    with pytest.raises(SystemExit, match="found no such cell"):
        bench.select(["run/nothing"], found)


def test_commands_do_all_that_they_can_where_nothing_is_named() -> None:
    assert environments.parse([]) == list(environments.NEEDED)
    assert environments.parse(["gptqmodel"]) == ["gptqmodel"]
    assert heap.parse([]).ways == list(heap.WAYS)
    assert limited.parse([]).parts == list(limited.PARTS)


def test_every_tool_gets_the_same_rows(float_folder: Path, tmp_path: Path) -> None:
    made = job(tmp_path, float_folder)
    tokenizer = AutoTokenizer.from_pretrained(float_folder)
    texts = [json.loads(line)["text"] for line in made.texts.read_text().splitlines()]
    rows = json.loads(made.tokens.read_text())
    assert [tokenizer(text).input_ids[:32] for text in texts] == rows
    assert len(rows) == 4
    for tool in peers.TOOLS.values():
        for recipe in tool.recipes.values():
            words = " ".join(recipe(made))
            assert str(made.output.name) in words
    with pytest.raises(DataError, match="needed 1000000"):
        peers.write_calibration(tokenizer, made.texts, made.tokens, rows=1_000_000, seqlen=32, seed=0)


@pytest.mark.slow
def test_a_cell_is_run_judged_and_kept(float_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(tmp_path, float_folder)
    monkeypatch.setattr(Place, "job", lambda self, model, own, **settings: made)
    monkeypatch.setattr(bench.models, "source", lambda name, folder: float_folder)
    monkeypatch.setattr(cells, "all_cells", lambda: [CELL])
    place, results = Place(folder=tmp_path), tmp_path / "bench.json"
    (place.of(CELL.name)).mkdir(parents=True)
    bench.run_cell(CELL, place)
    bench.judge_all([CELL], place, tokens=1000)
    earlier = {"run/small-llama/w4g64/4x32/auto-round.rtn/seed0": {"error": "no | wheel", **bench.about()}}
    results.write_text(json.dumps(earlier))
    found = bench.collect(place, results)
    assert json.loads(results.read_text()) == found
    assert found.keys() == {*earlier, CELL.name}
    own = found[CELL.name]
    assert own["cost"]["seconds"] > 0
    kl = quality.estimate({"a": page.mean_scores([own])})["a"][quality.ALL]["kl"].value
    assert kl > 0.001
    page.write(found, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert f"{kl:.{page.digits(kl)}f}" in text
    assert "failed: no / wheel" in text
    assert "![Time against KL divergence](page/small-llama-w4g64-4x32.svg)" in text
    assert (tmp_path / "page" / "small-llama-w4g64-4x32.svg").stat().st_size > 1000


def test_a_failure_is_a_result_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["python3", "-c", "raise SystemExit('no such kernel')"]
    with pytest.raises(Failed, match="no such kernel"):
        measure(command, tmp_path / "log.txt", {})
    monkeypatch.setattr(Place, "job", lambda self, model, own, **settings: None)
    broken = Tool(version="broken", recipes={"rtn": lambda job: command})
    monkeypatch.setitem(peers.TOOLS, "autoround", broken)
    bench.run_cell(CELL, Place(folder=tmp_path))
    found = json.loads((tmp_path / "cells" / CELL.name / bench.RESULT).read_text())
    assert "no such kernel" in found["error"]
    assert "cost" not in found


def judged(kl: float, seconds: float = 1.0) -> dict[str, object]:
    """A result of which two documents of ten tokens have a divergence."""
    fields = {"tokens_D": [10.0, 10.0], "nll_D": [1.0, 1.0], "kl_D": [kl, kl], "agrees_D": [5.0, 5.0]}
    return {"quality": {"documents": {"docs": fields}}, "cost": {"seconds": seconds}}


def test_our_fastest_recipe_of_no_larger_divergence_stands_beside_each_of_theirs() -> None:
    made = {"autoround.fast": (3.0, 10.0), "autoround.slow": (1.0, 40.0), "auto-round.light": (2.0, 50.0),
            "auto-round.default": (0.5, 90.0), "gptqmodel.gptq": (3.0, 20.0)}  # fmt: skip
    rows = [page.Row(title, {"seed0": judged(*each)}) for title, each in made.items()]
    lines = [line.strip("| ").split(" | ") for line in page.reach_table(rows)[2:]]
    assert [[line[0].split(", ")[1], *line[3:]] for line in lines] == [
        ["default", "none"],
        ["light", "autoround, slow", "0.1000", "40", "0.80", "1"],
        ["gptq", "autoround, fast", "0.3000", "10", "0.50", "1"],
    ]
    assert page.reach_table(rows[:2]) == []


def test_two_recipes_are_compared_over_the_seeds_that_both_have() -> None:
    ours = page.Row("autoround.fast", {"seed0": judged(2.0, 10.0)})
    theirs = page.Row("auto-round.light", {"seed0": judged(2.5, 50.0), "seed1": judged(1.0, 90.0)})
    assert page.reach_table([ours, theirs])[2] == (
        "| auto-round 0.16.1, light | 0.2500 | 50 | autoround, fast | 0.2000 | 10 | 0.20 | 1 |"
    )
    assert page.quality_cells(theirs, ours)[:3] == ["0.1750 ± 0.0000", "0.1750", "+0.0500, +0.0500 to +0.0500"]
    assert page.quality_cells(theirs, page.Row("autoround.fast", {}))[2] == ""


def test_means_over_seeds_and_spreads() -> None:
    found = page.mean_scores([judged(1.0), judged(3.0), {}])
    assert torch.equal(found["docs"].kl_D, torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert page.spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0–3.0)"
    assert page.spread([3.0]) == "3"


def test_a_slope_is_the_time_of_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def words(job: Job) -> list[str]:
        return ["python3", "-c", f"import time; time.sleep({0.3 + (job.iters or 0) * 0.02})"]

    def settings(self: Place, model: str, own: Path, **given: object) -> Job:
        paths = {"source": own, "texts": own, "tokens": own, "output": own}
        return Job(**paths, bits=4, group_size=64, sym=True, rows=1, seqlen=1, seed=0, iters=given["iters"])

    monkeypatch.setattr(Place, "job", settings)
    monkeypatch.setitem(peers.TOOLS, "autoround", Tool(version="fake", recipes={"default": words}))
    cell = cells.Slope(topic="pace", model="any", bits=4, data=(1, 1), tool="autoround", seed=0, steps=(5, 105))
    found = cell.measure(Place(folder=tmp_path))
    assert found["step_seconds"] == pytest.approx(0.02, rel=0.5)
    assert found["settings"]["compiled"]


def test_page_of_steps_and_slopes(tmp_path: Path) -> None:
    start = {"step": 0.1, "bound": 0.08, "fraction": 0.8, "square_rate": 400.0, "first": 5.0}
    about = {"machine": "a machine", "commit": "abc", "day": "today"}
    results = {f"step/w4g64/seed{seed}": {"cold": start | {"first": 30.0}, "warm": start, **about} for seed in (0, 1)}
    results["step/w4g64/seed1"]["warm"] = start | {"fraction": 0.9}
    for tool, seconds in (("autoround", 0.1), ("auto-round", 0.19)):
        results[f"pace/smollm2-blocks-1/w4g64/32x256/{tool}/seed0"] = {"step_seconds": seconds, **about}
    for width, seconds, commit in ((384, 0.07, "abc"), (768, 0.28, "def")):
        own = about | {"commit": commit, "day": "yesterday"}
        results[f"width/llama-width-{width}/w4g64/32x256/autoround/seed0"] = {"step_seconds": seconds, **own}
    page.write(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "- a machine; today to yesterday" in text
    assert "| `llama-width-768/w4g64/32x256` | 280.0 | 4.00 | def |" in text
    assert "| w4g64 | 100.0 (100.0–100.0) | 80.0 (80.0–80.0) | 0.85 (0.80–0.90) | 400 (400–400) |" in text
    assert "| `smollm2-blocks-1/w4g64/32x256` | 100.0 | 190.0 | 1.90 | abc |" in text
