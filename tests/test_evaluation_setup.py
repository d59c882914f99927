"""The device of an evaluation's rank."""

import pytest
import torch

from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_setup import choose_device


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch would say with two GPUs, and this process be the second of two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


@pytest.mark.usefixtures("two_gpus")
def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"device: 3 processes, but torch sees 2 GPU\(s\): start at most 2"):
        choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_a_rank_that_sees_its_own_gpu_only_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choose_device("auto") == torch.device("cuda", 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="2 processes, but torch sees 1 GPU"):
        choose_device("auto")


def test_a_machine_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        choose_device("cuda")
