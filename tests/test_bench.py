"""`jsae-bench`: shapes, turns, ratios, memory, files, and mistakes."""

import json
import math
import subprocess
import sys

import pytest
import torch

from jsae_lightning import bench, kernels
from jsae_lightning.benchmarking import comparison, memory
from jsae_lightning.benchmarking.machine import cpu_name
from jsae_lightning.benchmarking.names import FLOOR, MODEL, NAMES, OURS, PUBLISHED
from jsae_lightning.benchmarking.shapes import PRESETS, Settings, Shape, choose_shape
from jsae_lightning.benchmarking.timing import medians, ratios, take_turns
from jsae_lightning.errors import RunError, UserError

TOY_FLAGS = ["--tokens", "32", "--d-model", "16", "--d-mlp", "24", "--d-sae", "64", "--k", "4", "--repeats", "3"]
RATIOS = {
    "published_over_ours",
    "ours_over_single_dense",
    "penalty_overhead",
    "penalty_overhead_quarter",
    "ours_over_floor",
}


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_forced", [])


@pytest.fixture
def known_memory(monkeypatch):
    """Measure no memory: every contestant is said to need a megabyte."""
    monkeypatch.setattr(comparison, "measure_apart", lambda *arguments: memory.Peak(10**6))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process; return its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jsae-bench", *arguments])
        code = 0
        try:
            bench.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_presets_are_the_shapes_of_the_default_run_and_of_the_paper():
    sizes = {
        name: (p.shape.tokens, p.shape.d_model, p.shape.d_mlp, p.shape.d_sae, p.shape.k, p.shape.gated)
        for name, p in PRESETS.items()
    }
    assert sizes == {
        "tiny": (4096, 128, 512, 2048, 16, False),
        "70m": (4096, 512, 2048, 16384, 32, False),
        "410m": (4096, 1024, 4096, 65536, 32, False),
        "gemma-2-2b": (4096, 2304, 9216, 36864, 32, True),
    }
    assert [p.shape.coef for p in PRESETS.values()][1:3] == [1.0, 0.5]  # the paper's lambda


def test_flags_replace_sizes_of_the_preset():
    assert choose_shape("70m", tokens=None, k=None) == PRESETS["70m"].shape
    changed = choose_shape("70m", tokens=8, gated=True, activation="silu")
    assert (changed.tokens, changed.d_model, changed.gated, changed.activation) == (8, 512, True, "silu")
    assert choose_shape("gemma-2-2b", gated=False).gated is False
    with pytest.raises(UserError, match="--k: 32 is more than the 16 latents"):
        choose_shape("70m", d_sae=16)


def test_everyone_takes_a_turn_in_every_round():
    now, calls, reported = [0.0], [], []

    def step(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    found = take_turns(
        {"a": [step("a", 1.0)], "b": [step("b0", 6.0), step("b1", 2.0)]},
        2,
        after=lambda: calls.append("after"),
        synchronize=lambda: calls.append("wait"),
        report=lambda *line: reported.append(line),
        clock=lambda: now[0],
    )
    assert found == {"a": [1.0, 1.0], "b": [4.0, 4.0]}
    once = [part for name in ("a", "b0", "b1") for part in ("wait", name, "wait", "after")]
    assert calls == once * 2
    assert reported == [(1, {"a": 1.0, "b": 4.0}), (2, {"a": 1.0, "b": 4.0})]


def test_medians_and_ratios_by_hand():
    assert medians({"a": [3.0, 1.0, 100.0], "b": [1.0, 2.0]}) == {"a": 3.0, "b": 1.5}
    found = ratios(
        {"published": 14.0, "ours": 2.0, "single_dense": 1.6, "ours_without_penalty": 1.25, "ours_quarter": 1.5}
        | {"floor": 1.0}
    )
    assert found == pytest.approx(
        {
            "published_over_ours": 7.0,
            "ours_over_single_dense": 1.25,
            "penalty_overhead": 0.6,
            "penalty_overhead_quarter": 0.2,
            "ours_over_floor": 2.0,
        }
    )
    assert ratios({"ours": 2.0, "floor": 4.0}) == dict.fromkeys(RATIOS) | {"ours_over_floor": 0.5}


needs_linux = pytest.mark.skipif(not memory._CLEAR.exists(), reason="Linux alone tells a process's high-water mark")


@needs_linux
def test_the_peak_is_what_a_step_takes_at_its_highest():
    """32 MB and 64 MB at the same time, then 64 MB again; what was used before and freed hides nothing."""
    megabyte = 2**20

    def step():
        first = torch.ones(8 * megabyte)
        second = torch.ones(16 * megabyte)
        del first, second
        torch.ones(16 * megabyte)

    for _ in range(2):
        assert memory.peak_growth(step) == pytest.approx(96 * megabyte, abs=4 * megabyte)


@needs_linux
def test_a_contestants_peak_is_measured_in_a_process_of_its_own():
    """The floor's largest results are (tokens, d_sae) twice, one after the other: 32 MB, beside y of 2 MB."""
    peak = memory.measure_apart(FLOOR, PRESETS["tiny"].shape, Settings("tiny", threads=1))
    assert peak.fits
    assert 30e6 < peak.bytes < 60e6


def test_free_memory_is_the_machines_less_a_share_or_the_control_groups(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree:  500 kB\nMemAvailable:  700 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes() == (700 - 150) * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1024\n")
    assert memory.free_bytes() == (700 - 150) * 1024
    (tmp_path / "memory.max").write_text("5120\n")
    assert memory.free_bytes() == 4096
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "missing")
    assert memory.free_bytes() is None


def test_what_does_not_fit_is_said_not_tried_to_the_end():
    shape = Shape(2**34, 128, 512, 2048, 16, False, "gelu")
    assert memory.measure_apart(OURS, shape, Settings("tiny")) == memory.Peak(None, fits=False)


def test_another_failure_of_the_measuring_process_is_no_lack_of_memory():
    with pytest.raises(RunError, match="floor: the process that measures its memory failed: .*kernels: 'fast'"):
        memory.measure_apart(FLOOR, PRESETS["tiny"].shape, Settings("tiny", kernels="fast"))


def test_the_processors_name_is_found_or_replaced(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A Fine Processor\nmodel name\t: Another\n")
    assert cpu_name(tmp_path / "cpuinfo") == "A Fine Processor"
    assert cpu_name(tmp_path / "missing")


def test_one_run_writes_every_figure(command, tmp_path):
    """Contestants without a language model of their shape; real processes for the memory of two."""
    path = tmp_path / "new" / "bench.json"
    code, out, err = command(*TOY_FLAGS, "--only", "ours,floor,language_model", "--json", str(path))
    assert code == 0, err
    record = json.loads(path.read_text())
    assert set(record["ratios"]) == RATIOS
    assert list(record["seconds"]) == [FLOOR, OURS]  # in the order of their turns
    assert record["ratios"]["ours_over_floor"] == record["seconds"][OURS] / record["seconds"][FLOOR]
    assert record["ratios"]["published_over_ours"] is None
    assert {len(values) for values in record["seconds_of_rounds"].values()} == {3}
    assert record["shape"] == {
        "tokens": 32, "d_model": 16, "d_mlp": 24, "d_sae": 64, "k": 4, "gated": False, "activation": "gelu"
    }  # fmt: skip
    assert set(record["peak_bytes"]) == {FLOOR, OURS}
    assert record["left_out"] == {MODEL: "--d-model is not that of the preset's model"}
    assert {"torch", "jsae_lightning", "cpu", "cores", "threads", "dtype", "kernels"} <= set(record["versions"])
    assert record["versions"]["kernels"] == "cpu"  # what `auto` chose
    assert "left out: language model" in out
    assert "| ours, with the penalty" in out
    assert "round 3 of 3" in err and "round" not in out


@pytest.mark.parametrize(
    "flags", [["--gated"], ["--dtype", "bf16-mixed"], ["--kernels", "reference", "--threads", "1"]]
)
def test_all_contestants_run_and_agree(command, tmp_path, known_memory, flags):
    path = tmp_path / "bench.json"
    code, _, err = command(*TOY_FLAGS, *flags, "--json", str(path))
    assert code == 0, err
    record = json.loads(path.read_text())
    assert set(record["seconds"]) == set(NAMES) - {MODEL}
    assert all(math.isfinite(value) for value in record["ratios"].values())
    losses = record["losses"]
    tolerance = {"rel": 0.02 if "bf16-mixed" in flags else 1e-5}
    assert losses["published"] == pytest.approx(losses["ours"], **tolerance)
    assert losses["ours_quarter"] == pytest.approx(losses["ours"], **tolerance)
    assert losses["pair_dense"] == pytest.approx(losses["ours_without_penalty"], **tolerance)
    assert set(record["peak_bytes"].values()) == {10**6}


def test_what_does_not_fit_is_left_out_and_the_others_run(command, tmp_path, monkeypatch):
    def peak(name, *arguments):
        return memory.Peak(None, fits=False) if name == PUBLISHED else memory.Peak(10**6)

    monkeypatch.setattr(comparison, "measure_apart", peak)
    code, out, _ = command(*TOY_FLAGS, "--only", "published,ours", "--json", str(tmp_path / "bench.json"))
    assert code == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert list(record["seconds"]) == [OURS]
    assert "left out: JSAE as published, dense: does not fit into the memory that is free" in out


def test_a_model_without_room_beside_the_pair_is_left_out(monkeypatch):
    monkeypatch.setattr(comparison, "free_bytes", lambda: 100)
    peaks = {OURS: memory.Peak(50, started_with=20), MODEL: memory.Peak(5, started_with=31)}
    assert MODEL in comparison._without_room_beside(peaks, [OURS, MODEL])
    assert comparison._without_room_beside(peaks | {MODEL: memory.Peak(5, started_with=30)}, [OURS, MODEL]) == {}
    assert comparison._without_room_beside({}, [OURS, MODEL]) == {}  # on CUDA nothing is measured apart


def test_a_sweep_writes_table_figure_and_json(command, tmp_path, known_memory):
    png, path = tmp_path / "g.png", tmp_path / "g.json"
    flags = ["--sweep", "--doublings", "1", "--png", str(png), "--json", str(path)]
    code, out, err = command(*TOY_FLAGS, *flags)
    assert code == 0, err
    record = json.loads(path.read_text())
    assert set(record["exponents"]) == set(record["points"]) == {"tokens", "d_sae", "k", "d_mlp"}
    assert [point["shape"]["d_mlp"] for point in record["points"]["d_mlp"]] == [24, 48]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "| exponent |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--k 0", "argument --k: '0' is no positive whole number"),
        ("--tokens many", "argument --tokens: 'many' is no positive whole number"),
        ("--k 4000", "--k: 4000 is more than the 2048 latents: lower it or raise --d-sae"),
        ("--preset 71m", "argument --preset: invalid choice: '71m' (choose from"),
        ("--only ours,theirs", "argument --only: 'theirs' is not known: choose from floor,single_dense"),
        ("--kernels fast", "kernels: 'fast' is not known: choose one of auto"),
        ("--activation sine --only floor", "--activation: 'sine' is not known: choose one of gelu"),
        ("--sweep --train", "not allowed with argument"),
        ("--sweep --only ours", "--only: has no effect with --sweep"),
        ("--doublings 2", "--doublings: has no effect without --sweep"),
        ("--png a.png", "--png: has no effect without --sweep"),
        ("--steps 2", "--steps: has no effect without --train"),
        ("sae.k=3", "sae.k=3: settings of jsae-train are for --train"),
        ("--train --k 3", "--k: has no effect with --train: give data.*, sae.* or model.*"),
        ("--train --preset 70m", "--preset: has no effect with --train: give experiment=NAME"),
        ("--train smoke", "smoke: is no override: give KEY=VALUE"),
        ("--json .", ".: is a folder: give a file's name"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_mistakes_are_one_line(command, known_memory, arguments, message):
    code, out, err = command(*arguments.split())
    assert code == 2, err
    assert err.startswith("jsae-bench: error: ") and message in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(command):
    code, _, err = command("--device", "cuda")
    assert code == 2
    assert "--device: cuda, but torch sees no CUDA device: use --device cpu" in err


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nsys.argv = ['jsae-bench', '--help']\nfrom jsae_lightning.bench import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--preset" in done.stdout
    for name in (*PRESETS, *NAMES):
        assert name in done.stdout.replace("\n", " ")
