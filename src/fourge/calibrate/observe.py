"""Statistics of one MoE layer, gathered while tokens flow through it.

Per pass and expert: tokens routed, amax of the input of gate/up and of the input of down, and the
sum of squares of each input channel (the diagonal of X^T X, which weighted scale searches need).
Unquantized weights, natural top-k routing, no padding: the numbers are those of the BF16 model.
Memory: passes x experts x (hidden + intermediate) x 4 bytes, of one layer at a time.

Shapes: P passes, E experts, D hidden size, F expert intermediate size, N tokens of one expert.
"""

from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from fourge.checkpoint.writer import write_file
from fourge.errors import CheckpointError, OutputError
from fourge.models.moe import Observer


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's experts saw. Field names are the tensor names of the saved file."""

    tokens: torch.Tensor  # int64 [P, E]
    gate_up_amax: torch.Tensor  # float32 [P, E], max |x|; 0 where no token came
    down_amax: torch.Tensor  # float32 [P, E]
    gate_up_square_sum: torch.Tensor  # float32 [P, E, D], sum over tokens of x^2
    down_square_sum: torch.Tensor  # float32 [P, E, F]
    first_seen: torch.Tensor  # int64 [E], tokens up to the first of the expert's; 0 for none yet

    @classmethod
    def empty(
        cls, *, passes: int, experts: int, hidden: int, inner: int, device: torch.device
    ) -> "LayerStatistics":
        """Zeros everywhere: no token seen."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(passes, experts, *shape, dtype=dtype, device=device)

        first_seen = torch.zeros(experts, dtype=torch.int64, device=device)
        return cls(
            zeros(dtype=torch.int64), zeros(), zeros(), zeros(hidden), zeros(inner), first_seen
        )

    def observer(self, pass_index: int) -> Observer:
        """The callback that adds one expert's tokens to the figures of a pass."""

        def observe(
            expert: int, x_ND: torch.Tensor, h_NF: torch.Tensor, _gate_N: torch.Tensor
        ) -> None:
            at = (pass_index, expert)
            self.tokens[at] += x_ND.shape[0]
            for amax, square_sum, values in (
                (self.gate_up_amax, self.gate_up_square_sum, x_ND),
                (self.down_amax, self.down_square_sum, h_NF),
            ):
                # aminmax carries NaN along, so a broken activation is noticed at the end.
                low, high = torch.aminmax(values)
                amax[at] = torch.maximum(amax[at], torch.maximum(-low, high).float())
                square_sum[at] += values.float().square().sum(0)

        return observe

    def note_first_seen(self, experts_TK: torch.Tensor, start: int) -> None:
        """Note the experts that a batch chose for the first time; ``start`` tokens came before it.

        Batches must come in the order of their tokens.
        """
        if not experts_TK.numel():
            return
        ordinal_T = torch.arange(1, len(experts_TK) + 1, device=experts_TK.device) + start
        ordinal_TK = ordinal_T[:, None].expand_as(experts_TK)
        unseen = torch.iinfo(torch.int64).max
        first_E = torch.full_like(self.first_seen, unseen)
        first_E.scatter_reduce_(0, experts_TK.flatten(), ordinal_TK.flatten(), "amin")
        is_new_E = (self.first_seen == 0) & (first_E != unseen)
        self.first_seen.copy_(torch.where(is_new_E, first_E, self.first_seen))

    def layer_amax(self) -> tuple[float, float]:
        """Largest |input| of gate/up and of down over all passes and experts of the layer."""
        return float(self.gate_up_amax.max()), float(self.down_amax.max())

    def never_seen(self) -> list[int]:
        """Experts that no token of any pass reached."""
        return torch.nonzero(self.tokens.sum(0) == 0).flatten().tolist()

    def check_finite(self, layer: int) -> None:
        """Raise CheckpointError if an activation of the layer was NaN or infinite."""
        gate_up, down = self.layer_amax()
        if not torch.isfinite(torch.tensor([gate_up, down])).all():
            raise CheckpointError(
                f"activations of layer {layer} are not finite (amax {gate_up} before gate/up,"
                f" {down} before down): the source's weights overflow; check the source."
            )

    def save(self, path: Path) -> None:
        """Write the tensors as a safetensors file."""
        tensors = {name: getattr(self, name).cpu() for name in self.__dataclass_fields__}
        write_file(path, safetensors.torch.save(tensors))

    @classmethod
    def load(cls, path: Path) -> "LayerStatistics":
        """Read a file that ``save`` wrote; OutputError if it is not as it was written."""
        try:
            return cls(**safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError, TypeError) as error:
            raise OutputError(
                f"{path} is damaged ({error}): it was changed from outside; choose another output"
                " folder and start again."
            ) from error
