"""Numbers between the host and a device, without waiting for what the device has to do before.

Copies from and to pinned memory are queued like everything else; on the CPU nothing is copied.
"""

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """``values`` on the device; they must not be changed any more."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetched:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors, self._arrived = tensors, None
        if tensors[0].is_cuda:
            self._tensors = tuple(
                torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(
                    one, non_blocking=True
                )
                for one in tensors
            )
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
