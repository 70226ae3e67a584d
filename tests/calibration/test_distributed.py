"""Two processes on half the data each find what one process finds on all of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rankloom import Calibration, Targets
from rankloom.calibration import exact_gradients, gradient_svd
from rankloom.calibration.data import mean_loss
from rankloom.targets import find_targets
from tests import zoo


def measure(parts: list[dict[str, Any]]) -> dict[str, Any]:
    model = zoo.build("convnet")
    targets = find_targets(model, Targets())
    data = Calibration(parts)
    report = gradient_svd(model, targets, data, rank=2, oversample=2)
    gradients, exact = exact_gradients(model, targets, data)
    return {
        "gradients": gradients,
        "sketch": {n: (s.U * s.S) @ s.V.T for n, s in report.svds.items()},
        "captured": torch.tensor([s.captured for s in report.svds.values()]),
        "loss": torch.tensor([report.loss, report.tokens, exact.loss, mean_loss(model, data)]),
    }


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    parts = unequal()
    mine = parts[:1] if rank == 0 else parts[1:]
    torch.save(measure(mine), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def unequal() -> list[dict[str, Any]]:
    """Ranks with unequal shares: weights have to be summed too, not averaged."""
    return [zoo.batch("convnet", seed, rows) for seed, rows in ((0, 5), (1, 2), (2, 4))]


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    want = measure(unequal())
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for key in ("gradients", "sketch"):
            for name in want[key]:
                torch.testing.assert_close(got[key][name], want[key][name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got["captured"], want["captured"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-12, atol=0)
