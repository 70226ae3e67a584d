"""One process or several (torchrun, accelerate launch): who writes files, and waiting for one another."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["device", "is_main", "on_cpu", "process_count", "wait"]


def on_cpu() -> bool:
    """Whether there is nothing faster than the CPU; launchers have to be told, or they look for GPUs to connect."""
    return not torch.accelerator.is_available()


def device() -> torch.device:
    """Where this process computes."""
    return torch.device(_state().device)


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return bool(_state().is_main_process)


def process_count() -> int:
    """How many processes share the run."""
    return int(_state().num_processes)


def wait() -> None:
    """Wait until every process is here; nothing in a single one."""
    _state().wait_for_everyone()


def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=on_cpu())
