"""Training by several processes, as `accelerate launch` starts them: equal weights everywhere, gradients averaged each step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from forerun.types import UserError


@dataclass(frozen=True)
class Processes:
    """This process among `count`; the first one writes files and talks."""

    rank: int = 0
    count: int = 1
    accelerator: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """Where this process works; None: wherever the config says."""
        return None if self.accelerator is None else str(self.accelerator.device)

    def average(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.accelerator is not None:
            for tensor in tensors:
                if tensor is not None:
                    tensor.copy_(self.accelerator.reduce(tensor, reduction="mean"))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes ahead; the others follow when it is through, and find what it left on disk."""
        if self.accelerator is not None and not self.first:
            self.accelerator.wait_for_everyone()
        yield
        if self.accelerator is not None and self.first:
            self.accelerator.wait_for_everyone()

    def close(self) -> None:
        if self.accelerator is not None:
            self.accelerator.end_training()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def join() -> Processes:
    """The processes that this one was launched with; alone where nothing launched it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        return Processes()
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise UserError("several processes need accelerate: pip install 'forerun[multi-gpu]'") from error
    # The first process may write texts for hours while the others wait.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patient])
    if accelerator.num_processes != count:  # they would write over each other
        raise UserError(
            f"{count} processes were launched and accelerate joined {accelerator.num_processes}; run accelerate test"
        )
    return Processes(accelerator.process_index, count, accelerator)
