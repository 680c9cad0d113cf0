"""Host memory that a CUDA device may reach by itself, for as long as an object lives."""

import weakref

import torch

from common.errors import Internal
from services.worker.stage import Stage


def pin(stage: Stage, owner: object) -> None:
    """Pins the stage until `owner` is gone: copies between it and the device then go on beside the host, at the link's speed.

    Raises `Internal` when the device refuses.
    """
    memory = torch.frombuffer(stage.memory(), dtype=torch.uint8)
    address, size = memory.data_ptr(), memory.numel()
    status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    if status:
        raise Internal(f"the stage of {size} bytes can't be pinned: CUDA error {status}")
    weakref.finalize(owner, torch.cuda.cudart().cudaHostUnregister, address)
