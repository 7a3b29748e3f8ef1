"""`python -m cli.doctor`, and which device a name means."""

import shutil

import pytest
import torch

from cli import doctor, machine
from kernels import native


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cpu")])


def test_a_machine_without_a_gpu_is_well(capsys, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/big").write_bytes(bytes(3 << 20))
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "convolutions, LSTM scans, loss: torch, as " in out and "a step of training and a sample work" in out
    assert f"cached sampler: a function compiled for {native.cpu()[0]} draws a row" in out
    assert f"torch {torch.__version__}" in out and f"runs: {tmp_path}/runs, 3 MiB, " in out and "all is well" in out


def test_a_device_that_fails_is_named(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("meta")])
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "! a step of training and a sample: " in out and "1 of these lines want attention" in out


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((9.0, torch.zeros(8)), "expected 8.0000 nats, as on the CPU, found 9.0000"),
        ((8.001, torch.ones(8)), "expected torch's pixels on the CPU, found 100 % others"),
    ],
)
def test_a_device_that_computes_something_else_is_named(found, words, capsys, monkeypatch):
    results = iter([found, (8.0, torch.zeros(8))])
    monkeypatch.setattr(doctor, "check", lambda device, backend=None: next(results))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert words in out and "a sample work" not in out


def test_a_disk_that_is_nearly_full_is_named(capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 29))
    assert doctor.main([]) == 1
    assert "! runs: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "processes", "expected"),
    [("auto", 1, "cuda:0"), ("cuda", 1, "cuda:0"), ("cuda:1", 1, "cuda:1"), ("cpu", 1, "cpu"), ("cuda", 2, "cuda:1")],
)
def test_of_two_gpus(name, processes, expected, two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(processes - 1))
    assert machine.choose_device(name) == torch.device(expected)
    assert two_gpus == [torch.device(expected)] * (expected != "cpu")


@pytest.mark.parametrize(
    ("name", "processes", "words"),
    [
        ("cuda:2", 1, "device='cuda:2': expected less than 2, the number of GPUs here"),
        ("cuda:1", 2, "as several processes take one GPU each"),
        ("cuda:-1", 1, "cuda:N"),
    ],
)
def test_a_gpu_that_is_not_there(name, processes, words, two_gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=words):
        machine.choose_device(name)
    assert two_gpus == []


@pytest.fixture
def two_gpus(monkeypatch):
    """As if there were two GPUs; the list is of those that became the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current
