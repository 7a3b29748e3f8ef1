"""The model of the kernels' time: `bench.model` and `bench.machine_code`."""

import json

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

from bench import model
from bench.machine_code import BARRIER, RATES, Instruction, clocks
from bench.stand_in import in_processes

NOTHING = 7  # the number of no counter


def instruction(name: str, stall: int = 1, writes: int = NOTHING, reads: int = NOTHING, waits: int = 0, rest: str = ""):
    return Instruction(name, rest, stall, writes, reads, waits)


END = instruction("EXIT")


def test_a_warp_waits_as_its_instructions_say():
    assert clocks([instruction("IADD3", stall=5), instruction("FMUL", stall=7), END], 1, 1, 300) == 12


@pytest.mark.parametrize("l2", [300, 600])
def test_who_reads_a_load_waits_for_the_l2_cache(l2):
    load = instruction("LDG.E.128", writes=2)
    assert clocks([load, END], 1, 1, l2) == 1
    assert clocks([load, instruction("FADD", waits=1 << 3), END], 1, 1, l2) == 2
    assert clocks([load, instruction("FADD", waits=1 << 2), END], 1, 1, l2) == 512 / 56 + l2 + 1


def test_groups_of_copies_are_waited_for_but_the_last_ones():
    copies = 3 * [instruction("LDGSTS.E.128"), instruction("LDGDEPBAR")]
    of_one = 512 / 56
    for keeps, arrived in ((0, 3), (1, 2), (2, 1)):
        wait = instruction("DEPBAR.LE", rest=f" SB0, 0x{keeps}")
        assert clocks([*copies, wait, END], 1, 1, 300) == pytest.approx(arrived * of_one + 300 + 1, abs=1)


def test_a_unit_that_each_part_has_serves_four_warps_at_once():
    products = 100 * [instruction("HMMA.16816.F32.BF16", writes=0)]
    busy, late = RATES["HMMA"][1:]
    whole = 100 * busy + late + 1
    for warps, times in ((1, 1), (4, 1), (8, 2)):
        wait = instruction("FADD", waits=1)
        found = clocks([*products, wait, END], warps, 1, 300)
        assert found == pytest.approx(whole + (times - 1) * 100 * busy, rel=0.02)
    both = clocks([*products, instruction("FADD", waits=1), END], 4, 2, 300)
    assert both == pytest.approx(2 * 100 * busy + late, rel=0.5)  # two programs, the second one begins later


def test_all_warps_meet_at_a_barrier():
    assert clocks([instruction("BAR.SYNC"), END], 8, 1, 300) == pytest.approx(1 + BARRIER, abs=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "multiply_adds"),
    [  # positions · gates · features read, of both taps; and of one tap, the matrix that moves rows
        ("diagonal scan 28×29, f = 16, b = 16", 2 * 32 * 64 * 16 + 32 * 32 * 16),
        ("diagonal scan 32×33, f = 128, b = 16", 2 * 32 * 512 * 128),
        ("diagonal scan 32×33, f = 128, b = 16, backward", 2 * 32 * 512 * 128),
    ],
)
def test_loops_are_walked_as_often_as_the_mathematics_says(name, multiply_adds):
    (out,) = in_processes(model.traced, [name])  # in this process Triton interprets
    products = sum(x.name.startswith("HMMA.16816") for x in out.steps[0])
    assert products * out.warps * 16 * 8 * 16 == multiply_adds and out.stack == 0


@pytest.mark.slow
def test_the_table(tmp_path, capsys, monkeypatch):
    name, file = "diagonal scan 28×29, f = 16, b = 16, backward", tmp_path / "rows.json"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert model.main(["--only", name, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    near, far = row["clk a step"]
    assert row["kernel"] == name and 500 < near <= far < 5000 and row["programs"] == 32
    assert row["ms"] == pytest.approx([x * 56 / model.CLOCK for x in (near, far)], abs=1e-3)
    assert name in capsys.readouterr().out


def test_what_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        model.main(["--only", "nonsense"])
    assert "nonsense" in capsys.readouterr().err
