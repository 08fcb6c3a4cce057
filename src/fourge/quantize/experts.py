"""What becomes of the experts of a group: every target's method, the judge, the choice.

A method's rivals are quantized too, and whichever is best on held-out tokens is written: an expert
is never worse there than ``max`` makes it. Several targets share what they have in common.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fourge.calibrate.kinds import Kind
from fourge.calibrate.moments import ExpertInputs, LayerInputs, Measures
from fourge.checkpoint.names import PROJECTIONS, expert_name
from fourge.errors import CheckpointError
from fourge.layerwise.groups import Group
from fourge.models.config import ModelConfig
from fourge.models.moe import Observer, Routed
from fourge.quantize import judge
from fourge.quantize.fitting import Fitting
from fourge.quantize.methods import METHODS
from fourge.quantize.methods.expert import Expert, Quantized, pool_amax
from fourge.quantize.recipe import NEEDS

NOTHING = Measures(torch.empty(0), torch.empty(0))


@dataclass(frozen=True)
class Choice:
    """What was written for an expert, and how far every candidate was off on held-out tokens."""

    method: str
    errors: dict[str, judge.Errors] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What has been made of one expert so far, by method, and in how many seconds."""

    made: dict[str, Quantized] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Inputs:
    """What a layer's tokens are to the experts of the group at hand; for ``max`` nothing."""

    def __init__(
        self, fitting: Fitting, config: ModelConfig, tokens: int, device: torch.device
    ) -> None:
        self._kind, self._config, self._device = fitting.kind, config, device
        self._wanted = fitting.is_wanted
        self._layer = LayerInputs(self._kind, config, tokens, device)
        self._experts: dict[int, ExpertInputs] = {}

    def begin(self, group: Group) -> None:
        """Forget the last group's experts."""
        self._experts = {
            expert: ExpertInputs(self._kind, self._config, self._device)
            for expert in (group.experts if self._wanted else ())
        }

    def note(self, routed: Routed, start: int) -> None:
        """A batch, before its experts run."""
        if self._wanted:
            self._layer.note(routed, start)

    def observer(self, also: Observer) -> Observer:
        """``also``, and this."""

        def observe(
            expert: int, x_ND: torch.Tensor, h_NI: torch.Tensor, gate_N: torch.Tensor
        ) -> None:
            also(expert, x_ND, h_NI, gate_N)
            self._experts[expert].observe(x_ND, h_NI, gate_N)

        return observe if self._wanted else also

    def quantize(
        self, group: Group, weights: Mapping[str, torch.Tensor], expert: int, method: str,
        known: Known,
    ) -> tuple[Quantized, Choice]:  # fmt: skip
        """The best of ``method`` and its rivals. ``known``: what other targets had made of this
        expert; what is made is added.
        """
        names = [expert_name(group.layer, expert, projection) for projection in PROJECTIONS]
        prefix = names[0].removesuffix("gate_proj.weight")
        own = Expert(prefix, *(weights[name] for name in names))
        candidates = (method, *METHODS[method].rivals)
        for name in candidates:
            if name not in known.made:
                began = time.monotonic()
                measures = self._measures(expert, own, name)
                if not all(bool(one.isfinite().all()) for one in measures):
                    pool_amax(own)  # which names the weight, if it is one that is not finite
                    raise CheckpointError(
                        f"activations of layer {group.layer} are not finite (inputs of"
                        f" {prefix.removesuffix('.')}): the source's weights overflow; check the"
                        " source."
                    )
                known.made[name] = METHODS[name].quantize(own, measures)
                known.seconds[name] = time.monotonic() - began
        found = {name: known.made[name] for name in candidates}
        if len(candidates) == 1:
            return found[method], Choice(method)
        held_out = self._experts[expert].held_out
        errors = judge.output_errors(own, found, held_out, self._layer.sample())
        if held_out.kept < judge.LEAST_TOKENS:
            # The layer's sample is what their priors come from: it would not find out those that
            # believe too much of few tokens.
            trusted = {name: one for name, one in errors.items() if NEEDS[name] != Kind.FULL}
        else:
            trusted = errors
        chosen = judge.best(trusted, method)
        return found[chosen], Choice(chosen, errors)

    def _measures(self, expert: int, own: Expert, method: str) -> Measures:
        kind = NEEDS[method]
        if kind == Kind.NONE:
            return NOTHING
        weights = {"gate_proj": own.gate_proj, "up_proj": own.up_proj}
        return self._experts[expert].measures(kind, self._layer, weights)
