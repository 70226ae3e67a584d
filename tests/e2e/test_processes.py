"""Two processes that share a batch train the same adapter as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny


@pytest.mark.parametrize("method", ["lora-one"])
def test_two_processes_equal_one(tmp_path: Path, tiny_reviews: Path, method: str) -> None:
    # Without dropout: each process draws its own masks, so nothing could be equal.
    model = tiny.save_llama(tmp_path / "model", dropout=0.0)
    shared = [f"model={model}", f"data={tiny_reviews}", f"method={method}", "steps=8", "lr=1e-2", "threads=1"]
    one = [sys.executable, "-m", "rankloom", "train", *shared, "batch_size=4", f"output={tmp_path / 'one'}", "--quiet"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rankloom", "train"]
    two = [sys.executable, *launcher, *shared, "batch_size=2", f"output={tmp_path / 'two'}", "calibration_samples=32"]
    for command in (one, two):
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("accuracy") == 1, "one process speaks"
    first, second = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("one", "two"))
    for key in first:
        assert torch.allclose(first[key], second[key], atol=2e-4), key
