"""Second moments of what experts' projections read: the measure of error that their weights get.

    H_e = sum_t g_t^2 x_t x_t^T / sum_t g_t^2        over the tokens t that were routed to expert e

x is the input of gate and up, or of down, as a four-bit multiplication sees it, rounded to NVFP4; g
the routing weight with which the expert's output is added. So e^T H e is what an error e of a row
of weights adds to the layer's squared output. Of inputs as they are, H would let errors grow along
directions that inputs avoid and rounded ones do not: on the example model W4A16 was as good and
W4A4 no better than ``max``.
Kept as far as a method needs it: the diagonal, the 16 x 16 blocks on the diagonal ("local
Hessians"), or all of it.

Few tokens say little, and an error that they cannot see is not small. So H_e is drawn towards a
prior, which is what the layer's other tokens would be to that expert: their inputs for gate and up,
and for down, whose columns are the expert's own, what the expert makes of a sample of them.

    (n H_e + k H_prior) / (n + k)        n tokens of the expert, k = PRIOR_TOKENS

One token in eight is held out of H_e and kept, so that weights can be judged by tokens that they
were not fitted to. Nothing here depends on how a layer is cut into groups.

Shapes: N tokens of one call, K columns of the input, B = K / 16, S = 16, D hidden, I intermediate,
R kept tokens, T tokens of a batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fourge.calibrate.kinds import ALL_COUNT, HOLD_OUT, LAYER_SAMPLE, MOST_HELD, Kind
from fourge.formats import kernels
from fourge.formats.layout import BLOCK_SIZE
from fourge.formats.nvfp4 import AMAX_RANGE
from fourge.models import chunks
from fourge.models.config import ModelConfig
from fourge.models.moe import Routed, inner

# Measured on held-out tokens with 2 to 64 thousand tokens of calibration (docs/quality.md): for
# blocks four times their 16 columns, for all columns twice their number.
PRIOR_TOKENS = {Kind.DIAGONAL: 64, Kind.BLOCKS: 64}
PRIOR_TOKENS_PER_COLUMN = 2


def zeros(kind: Kind, width: int, device: torch.device) -> torch.Tensor:
    """float32: [K], [B, S, S] or [K, K]; of no numbers for NONE."""
    shape = {
        Kind.NONE: (0,),
        Kind.DIAGONAL: (width,),
        Kind.BLOCKS: (width // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE),
        Kind.FULL: (width, width),
    }[kind]
    return torch.zeros(shape, dtype=torch.float32, device=device)


def add(moment: torch.Tensor, x_NK: torch.Tensor, weight_N: torch.Tensor) -> None:
    """moment += sum of weight x x^T, of as much of it as the moment has."""
    if not (moment.numel() and x_NK.numel()):
        return
    x_NK = as_multiplied(x_NK).float()
    weighted_NK = x_NK * weight_N[:, None]
    if moment.dim() == 1:
        moment += (weighted_NK * x_NK).sum(0)
    elif moment.dim() == 3:
        x_BNS, weighted_BNS = (
            one.unflatten(-1, (-1, BLOCK_SIZE)).transpose(0, 1) for one in (x_NK, weighted_NK)
        )
        moment.baddbmm_(weighted_BNS.mT, x_BNS)
    else:
        moment.addmm_(weighted_NK.mT, x_NK)


def as_multiplied(x_NK: torch.Tensor) -> torch.Tensor:
    """Rounded to NVFP4, with an input_scale that just holds these tokens."""
    largest = torch.stack(torch.aminmax(x_NK)).abs().max().float()
    return kernels.quantize_activations(x_NK, (largest / AMAX_RANGE).clamp(min=1e-30))


def counted(first: int, count: int) -> Iterator[tuple[slice, int]]:
    """Rows of ``count`` tokens that count for moments, and how often each does, when ``first`` came
    before them; see ALL_COUNT.
    """
    stride, start, stop = 1, 0, ALL_COUNT
    while start < first + count:
        begin, end = max(start, first), min(stop, first + count)
        begin += (start - begin) % stride
        if begin < end:
            yield slice(begin - first, end - first, stride), stride
        stride, start = 2 * stride, stop
        stop += stride * ALL_COUNT


def reduced(moment: torch.Tensor, kind: Kind) -> torch.Tensor:
    """What a method that needs ``kind`` sees of a moment that holds at least that."""
    if kind == Kind.NONE:
        return moment.new_zeros(0)
    if kind == Kind.DIAGONAL and moment.dim() > 1:
        return moment.diagonal(dim1=-2, dim2=-1).flatten()
    if kind == Kind.BLOCKS and moment.dim() == 2:
        blocks = moment.unflatten(0, (-1, BLOCK_SIZE)).unflatten(-1, (-1, BLOCK_SIZE))
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    return moment


class Measures(NamedTuple):
    """The moments that an expert's weights are fitted to, all of one kind."""

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass
class HeldOut:
    """Tokens of one expert that nothing is fitted to: evenly spread over all that it got, never
    more than MOST_HELD. Rows of the compute dtype, routing weights float32.
    """

    x_RD: list[torch.Tensor] = field(default_factory=list)
    gate_R: list[torch.Tensor] = field(default_factory=list)
    kept: int = 0
    met: int = 0
    stride: int = 1

    def meet(self, x_ND: torch.Tensor, gate_N: torch.Tensor) -> None:
        """Keep every ``stride``-th; when there are too many, every second of all so far."""
        rows = slice((self.stride - 1 - self.met) % self.stride, None, self.stride)
        self.met += len(x_ND)
        self.x_RD.append(x_ND[rows].clone())
        self.gate_R.append(gate_N[rows].clone())
        self.kept += len(self.x_RD[-1])
        while self.kept > MOST_HELD:
            self.x_RD = [torch.cat(self.x_RD)[1::2].clone()]
            self.gate_R = [torch.cat(self.gate_R)[1::2].clone()]
            self.kept, self.stride = len(self.x_RD[0]), 2 * self.stride


class ExpertInputs:
    """What one expert's tokens have been so far."""

    def __init__(self, kind: Kind, config: ModelConfig, device: torch.device) -> None:
        self._gate_up = zeros(kind, config.hidden_size, device)
        self._down = zeros(kind, config.moe_intermediate_size, device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens = self._fitted = 0
        self.held_out = HeldOut()

    def observe(self, x_ND: torch.Tensor, h_NI: torch.Tensor, gate_N: torch.Tensor) -> None:
        """Further tokens of the expert, in order."""
        held = slice((HOLD_OUT - 1 - self._tokens) % HOLD_OUT, None, HOLD_OUT)
        self.held_out.meet(x_ND[held], gate_N[held])
        weight_N = gate_N.float().square()
        weight_N[held] = 0
        for rows, stride in counted(self._tokens, len(x_ND)):
            weight_R = stride * weight_N[rows]
            add(self._gate_up, x_ND[rows], weight_R)
            add(self._down, h_NI[rows], weight_R)
            self._weight += weight_R.sum()
            self._fitted += len(weight_R)
        self._tokens += len(x_ND)

    def measures(
        self, kind: Kind, layer: "LayerInputs", expert: Mapping[str, torch.Tensor]
    ) -> Measures:
        """Moments of ``kind``, drawn towards the layer's. ``expert``: its gate_proj and up_proj."""
        if kind == Kind.NONE:
            return Measures(reduced(self._gate_up, kind), reduced(self._down, kind))
        sample_RD = layer.sample()
        h_RI = inner(sample_RD, {name: expert[name].to(sample_RD.dtype) for name in expert})
        down_prior = zeros(kind, h_RI.shape[-1], h_RI.device)
        add(down_prior, h_RI, torch.full((len(h_RI),), 1 / len(h_RI), device=h_RI.device))
        own = [reduced(one, kind) for one in (self._gate_up, self._down)]
        if self._tokens and float(self._weight) > 0:
            own = [one / self._weight.float() for one in own]
            # Tokens that were not meant for the expert make less of it; their pattern counts.
            down_prior *= _trace(own[1]) / _trace(down_prior).clamp(min=1e-30)
        fitted = self._fitted - self._fitted // HOLD_OUT
        return Measures(
            _drawn(own[0], layer.moment(kind), fitted, kind),
            _drawn(own[1], down_prior, fitted, kind),
        )


class LayerInputs:
    """What all tokens of a layer have been: the prior of every expert."""

    def __init__(self, kind: Kind, config: ModelConfig, tokens: int, device: torch.device) -> None:
        """``tokens``: how many there will be."""
        self._moment = zeros(kind, config.hidden_size, device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._sample: list[torch.Tensor] = []
        self._stride = max(1, tokens // LAYER_SAMPLE)

    def note(self, routed: Routed, start: int) -> None:
        """A batch, before its experts run; ``start`` tokens came before it."""
        weight_T = routed.gates_TK.float().square().sum(-1)
        for rows in chunks.slices(len(weight_T), chunks.ROWS):
            add(self._moment, routed.x_TD[rows], weight_T[rows])
        self._weight += weight_T.sum()
        self._sample.append(routed.x_TD[-start % self._stride :: self._stride].clone())

    def sample(self) -> torch.Tensor:
        """[R, D]: every so many-th token."""
        self._sample = [torch.cat(self._sample)]
        return self._sample[0]

    def moment(self, kind: Kind) -> torch.Tensor:
        """The mean over all tokens."""
        return reduced(self._moment, kind) / self._weight.float().clamp(min=1e-30)


def _drawn(own: torch.Tensor, prior: torch.Tensor, tokens: int, kind: Kind) -> torch.Tensor:
    strength = PRIOR_TOKENS.get(kind, PRIOR_TOKENS_PER_COLUMN * own.shape[-1])
    share = strength / (tokens + strength)
    return own * (1 - share) + prior * share


def _trace(moment: torch.Tensor) -> torch.Tensor:
    return (moment if moment.dim() == 1 else moment.diagonal(dim1=-2, dim2=-1)).sum()
