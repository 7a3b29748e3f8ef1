"""The form of the LSTM scans whose programs wait for each other, in the interpreter, where they take turns."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")
if torch.cuda.is_available():
    pytest.skip("these run in Triton's interpreter", allow_module_level=True)

import kernels.lstm_scan
import kernels.lstm_scan_kernel
from kernels.lstm_scan import lstm_scan, sizes_of
from tests.interleaved import interleaved
from tests.operations import numbers
from tests.races import watched

pytestmark = pytest.mark.slow

SIZES = {  # diagonal, (b h w f), taps: two parts of the features, or three; non-square; one step alone
    "diagonal": (True, (1, 2, 3, 17), 2),
    "diagonal-3-parts": (True, (1, 2, 2, 40), 2),
    "diagonal-images": (True, (3, 2, 2, 17), 2),
    "one-pixel": (True, (1, 1, 1, 17), 2),
    "row": (False, (2, 3, 2, 17), 3),
    "row-5-taps": (False, (1, 2, 3, 17), 5),
}
of_nothing = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # programs compute with numbers that nobody wrote
SEEDS = {"diagonal-3-parts": (0, 1, 2), "row": (0, 1, 2)}  # of orders of programs; one for the other sizes


def both_ways(diagonal: bool, size: tuple, taps: int, form: str) -> list[torch.Tensor]:
    """The hidden states and the gradients of gates and weights."""
    b, h, w, f = size
    d = 2 if diagonal else 1
    pre, weight = (x.requires_grad_() for x in numbers((b, h, w, d, 4 * f), (d, 4 * f, taps * f), scale=0.3))
    hidden = lstm_scan(pre, weight, diagonal, form)
    return [hidden, *torch.autograd.grad(hidden, [pre, weight], torch.ones_like(hidden))]


@pytest.mark.parametrize(
    ("diagonal", "size", "taps", "seed"),
    [pytest.param(*SIZES[name], seed, id=f"{name}-{seed}") for name in SIZES for seed in SEEDS.get(name, (0,))],
)
def test_in_any_order_of_programs_it_is_the_streamed_form_without_races(diagonal, size, taps, seed):
    expected = both_ways(diagonal, size, taps, "streamed")
    with watched(strict=True) as watch, interleaved(seed):
        found = both_ways(diagonal, size, taps, "shared")
    assert not watch.hazards and all(map(torch.equal, found, expected))


@of_nothing
@pytest.mark.parametrize("seed", range(2))
def test_a_program_that_does_not_wait_is_found(monkeypatch, seed):
    monkeypatch.setattr(
        kernels.lstm_scan_kernel, "wait", mock.Mock(side_effect=lambda counts, steps, patience: patience)
    )
    with watched() as watch, interleaved(seed):
        both_ways(*SIZES["diagonal"], "shared")
    assert {hazard.kind for hazard in watch.hazards} >= {"two programs"}


def test_a_step_that_is_counted_before_all_threads_stored_is_found():
    with watched() as watch, interleaved(0):
        both_ways(*SIZES["diagonal"], "shared")
    (line,) = watch.barriers
    with watched(without=line) as watch, interleaved(0):
        both_ways(*SIZES["diagonal"], "shared")
    assert {hazard.kind for hazard in watch.hazards} >= {"two programs"}


@of_nothing
def test_a_program_that_waits_in_vain_gives_up_with_an_error(monkeypatch):
    """One after another, the first waits for what the second never begins."""
    monkeypatch.setattr(kernels.lstm_scan, "PATIENCE", 5)
    with pytest.raises(RuntimeError, match="waited in vain for another one"):
        both_ways(*SIZES["diagonal"], "shared")


def test_more_programs_than_run_at_once_are_refused(monkeypatch):
    monkeypatch.setattr(kernels.lstm_scan, "multiprocessors", lambda device: 3)
    with pytest.raises(ValueError, match="form='shared': expected another form: 4 programs for 3 multiprocessors"):
        both_ways(*SIZES["diagonal"], "shared")


@pytest.mark.parametrize(
    ("b", "f", "dtype", "processors", "chosen"),
    [
        (16, 128, torch.bfloat16, 132, "shared"),  # 16 images, 2 directions, 4 parts of the features: 128 programs
        (16, 128, torch.bfloat16, 127, "streamed"),
        (17, 128, torch.bfloat16, 132, "streamed"),
        (16, 112, torch.bfloat16, 132, "streamed"),
        (8, 136, torch.bfloat16, 132, "streamed"),  # no multiple of 16
        (8, 256, torch.bfloat16, 132, "shared"),
        (16, 128, torch.float32, 132, "streamed"),
        (1, 512, torch.bfloat16, 132, "launches"),
    ],
)
def test_it_is_chosen_for_many_features_where_all_programs_run_at_once(b, f, dtype, processors, chosen, monkeypatch):
    monkeypatch.setattr(kernels.lstm_scan, "multiprocessors", lambda device: processors)
    pre, weight = torch.empty(b, 32, 33, 2, 4 * f, dtype=dtype, device="meta"), torch.empty(2, 4 * f, 2 * f)

    def names() -> list[str]:
        return [sizes_of(pre, weight, True, "auto", False, backward)[3].name for backward in (False, True)]

    assert "shared" not in names()  # in the interpreter
    monkeypatch.setattr(kernels.lstm_scan.triton.knobs.runtime, "interpret", False)
    assert names() == [chosen, chosen]
