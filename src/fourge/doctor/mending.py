"""How a routed expert's damaged numbers are mended: which tensors become what.

Exact where possible: with the source the projection is quantized again as nvidia-modelopt "max"
does it, with a sound partner's weight_scale_2 where it fits; a swap of nibbles or tiles is undone;
an all-zero projection gets codes 0 and scales 1. Without the source, gate and up that do not share
weight_scale_2 get one that holds both, and block scales are rounded anew, codes untouched (as vLLM
#55073 does): exact where the ratio is a power of two.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourge.doctor.comparison import Weights, load_packed
from fourge.doctor.evidence import Evidence, Projection
from fourge.doctor.passes import load, load_bytes
from fourge.doctor.rewriting import Made
from fourge.doctor.scales import is_usable
from fourge.doctor.suspects import NIBBLES, SWIZZLED, Diagnosis, swap_nibbles, unswizzle
from fourge.formats import fp8, kernels, nvfp4
from fourge.formats.nvfp4 import AMAX_RANGE, SAFE_SCALE_2, NVFP4Tensor

ONE = 0x38  # E4M3
PARTS = NVFP4Tensor._fields
SHARED = "given one weight_scale_2 for gate and up"
# Rounding of amax / 2688 and back.
FITS = 1 + 2.0**-20


@dataclass
class Mended:
    """Tensors made anew, by name, and for each weight that is sound now (its name) how it was done.

    ``largest_change`` of a block scale that was rounded anew, relative; ``fell``: how many of them
    ended at 2^-9.
    """

    made: dict[str, Made] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    largest_change: float = 0.0
    fell: int = 0

    def note(self, how: str, *projections: Projection) -> None:
        """These projections have been dealt with in this way."""
        self.how |= dict.fromkeys((one.tensor() for one in projections), how)

    def told(self, weights: Iterable[str]) -> str:
        """What happened to these weights, with their number."""
        parts = []
        for how, count in Counter(self.how[name] for name in weights).items():
            change = (
                f" (scales changed by up to {self.largest_change:.2%}, {self.fell:,} fell to 2^-9)"
            )
            rounded = how == SHARED and (self.largest_change or self.fell)
            plural = "s" if count > 1 else ""
            parts.append(f"{count:,} projection{plural} {how}{change if rounded else ''}")
        return "; ".join(parts)


class Mender:
    """Mends one pool of projections at a time: gate and up of an expert, or down."""

    def __init__(
        self, evidence: Evidence, weights: Weights | None, diagnoses: Sequence[Diagnosis]
    ) -> None:
        self._evidence = evidence
        self._weights = weights
        self._causes = {one.projection.tensor(): one.cause for one in diagnoses}
        self._last: tuple[str, NVFP4Tensor] | None = None
        self.mended = Mended()

    def mend(self, pool: Sequence[Projection], damaged: Mapping[str, Collection[str]]) -> None:
        """``damaged``: projection name -> rules that name it. What cannot be mended is left out."""
        own = [one for one in pool if one.name in damaged]
        rules = {rule for names in damaged.values() for rule in names}
        if rules == {"S10"}:
            for one in own:
                self._quiet(one)
        elif self._undo(own):
            return
        elif self._weights is not None and all(map(self._has_original, pool)):
            self._quantize(pool, own, rules)
        elif rules == {"S04"}:
            self._share(pool)
        elif rules <= {"S01", "S03"}:
            self._replace_scale(pool, own)

    def _has_original(self, projection: Projection) -> bool:
        return self._weights is not None and self._weights.has_original(projection)

    def _has_scale_2(self, projection: Projection) -> bool:
        value = self._evidence.scalar(projection, "weight_scale_2")
        return value is not None and is_usable(value)

    def _set(self, projection: Projection, part: str, how: str, make: Callable[[], Tensor]) -> None:
        self.mended.made[projection.tensor(part)] = Made(how, make)

    def _set_scale_2(self, projection: Projection, value: float) -> None:
        info = projection.parts.get("weight_scale_2")
        shape = info.shape if info is not None and info.shape in ((), (1,)) else ()
        scale = torch.tensor(value, dtype=torch.float32).reshape(shape)
        self._set(projection, "weight_scale_2", f"value {value!r}", lambda: scale)

    # ---- with the source

    def _undo(self, own: Sequence[Projection]) -> bool:
        """Undo swaps, if that is all that happened; whether it was."""
        causes = {self._causes.get(one.tensor()) for one in own}
        if not causes or not causes <= {NIBBLES, SWIZZLED}:
            return False
        for one in own:
            nibbles = self._causes[one.tensor()] == NIBBLES
            part = "weight" if nibbles else "weight_scale"

            def make(one: Projection = one, nibbles: bool = nibbles) -> Tensor:
                packed = load_packed(self._evidence.files, one)
                if nibbles:
                    return swap_nibbles(packed).weight
                linear = unswizzle(packed.weight_scale.view(torch.uint8))
                assert linear is not None
                return linear.view(torch.float8_e4m3fn)

            self._set(one, part, "nibbles swapped" if nibbles else "unswizzled", make)
            told = "with both codes of every byte" if nibbles else "with block scales"
            self.mended.note(f"{told} put in order", one)
        return True

    def _quantize(
        self, pool: Sequence[Projection], own: Sequence[Projection], rules: set[str]
    ) -> None:
        assert self._weights is not None
        amaxes = {one.name: kernels.amax(self._weights.original(one)) for one in pool}
        if not all(map(math.isfinite, amaxes.values())):
            return
        partner = self._partner_scale(pool, own)
        fits = partner is not None and all(
            amaxes[one.name] <= partner * AMAX_RANGE * FITS for one in own
        )
        if fits and not rules & {"S04", "S06"}:
            assert partner is not None
            scale_2, chosen = partner, own
        else:
            scale_2, chosen = nvfp4.weight_scale_2(max(amaxes.values())).item(), pool
        for one in chosen:
            for part in PARTS[:2]:
                self._set(
                    one,
                    part,
                    f"quantized with {scale_2!r}",
                    lambda one=one, part=part: self._part(one, scale_2, part),
                )
            self._set_scale_2(one, scale_2)
        self.mended.note("quantized again from the source", *chosen)

    def _partner_scale(self, pool: Sequence[Projection], own: Sequence[Projection]) -> float | None:
        """weight_scale_2 of the sound one of a pair, whose codes stay as they are."""
        for one in pool:
            value = self._evidence.scalar(one, "weight_scale_2")
            if one not in own and value is not None and is_usable(value):
                return value
        return None

    def _part(self, projection: Projection, scale_2: float, part: str) -> Tensor:
        """Codes and block scales lie side by side in a shard, so the last result is kept."""
        assert self._weights is not None
        key = projection.tensor()
        if self._last is None or self._last[0] != key:
            w = self._weights.original(projection)
            self._last = (key, kernels.quantize(w, torch.tensor(scale_2, dtype=torch.float32)))
        return getattr(self._last[1], part)

    # ---- without

    def _quiet(self, projection: Projection) -> None:
        """Scale 1 for blocks of zeros that have 448."""

        def make() -> Tensor:
            codes = load_bytes(self._evidence.files, projection.parts["weight"]).view(-1, 8)
            scale = load(self._evidence.files, projection.parts["weight_scale"])
            idle = ~((codes & 0x77) != 0).any(dim=1).view(scale.shape)
            data = scale.view(torch.uint8)
            return torch.where(idle & (data == 0x7E), ONE, data).to(torch.uint8).view(scale.dtype)

        self._set(projection, "weight_scale", "quiet blocks", make)
        self.mended.note("with the scale 1 for blocks of zeros", projection)

    def _share(self, pool: Sequence[Projection]) -> None:
        """One weight_scale_2 for gate and up, and block scales that keep the weights.

        The larger of both; of a "max" export the smallest that leaves no block scale above 448,
        which is the same if each was quantized with its own.
        """
        scales = {
            one.name: value
            for one in pool
            if (value := self._evidence.scalar(one, "weight_scale_2")) and is_usable(value)
        }
        if len(scales) != 2:
            return
        stored = {one.name: load(self._evidence.files, one.parts["weight_scale"]) for one in pool}
        tops = {name: float(scale.float().max()) for name, scale in stored.items()}
        shared = max(scales.values())
        if max(tops.values()) == fp8.MAX:
            shared = max(top * scales[name] for name, top in tops.items()) / fp8.MAX
            shared = torch.tensor(shared, dtype=torch.float32).item()
        for one in pool:
            value = scales[one.name]
            if value == shared:
                continue
            change, fell = _change(stored[one.name], value, shared)
            self.mended.largest_change = max(self.mended.largest_change, change)
            self.mended.fell += fell

            def make(one: Projection = one, ratio: float = value / shared) -> Tensor:
                return rescale(load(self._evidence.files, one.parts["weight_scale"]), ratio)

            self._set(one, "weight_scale", f"times {value / shared!r}", make)
            self._set_scale_2(one, shared)
        self.mended.note(SHARED, *pool)

    def _replace_scale(self, pool: Sequence[Projection], own: Sequence[Projection]) -> None:
        """An all-zero projection, or one of a pair whose scale is lost: the other's is the same."""
        partner = self._partner_scale(pool, own)
        for one in own:
            zero, sound = _zero_and_sound(self._evidence, one)
            if zero:
                for part, byte in (("weight", 0), ("weight_scale", ONE)):
                    info = one.parts[part]
                    dtype = torch.uint8 if part == "weight" else torch.float8_e4m3fn
                    self._set(
                        one,
                        part,
                        f"all {byte}",
                        lambda info=info, byte=byte, dtype=dtype: torch.full(
                            info.shape, byte, dtype=torch.uint8
                        ).view(dtype),
                    )
                self._set_scale_2(one, SAFE_SCALE_2 if partner is None else partner)
                self.mended.note("of zeros given codes 0 and sound scales", one)
            elif partner is not None and sound and not self._has_scale_2(one):
                self._set_scale_2(one, partner)
                self.mended.note("given the weight_scale_2 of the other of gate and up", one)


def rescale(scale: Tensor, ratio: float) -> Tensor:
    """Block scales times a ratio, rounded to E4M3 and kept within 2^-9 and 448; 0 stays 0."""
    exact = fp8.from_e4m3(scale) * ratio
    return fp8.to_e4m3(torch.where(exact > 0, exact.clamp(fp8.SMALLEST, fp8.MAX), exact))


def _change(scale: Tensor, old: float, new: float) -> tuple[float, int]:
    """Largest relative change of a block's factor, and how many scales fell to 2^-9."""
    before = fp8.from_e4m3(scale).double() * old
    rounded = rescale(scale, old / new)
    after = fp8.from_e4m3(rounded).double() * new
    changes = ((after - before).abs() / before)[before > 0]
    fell = (rounded.view(torch.uint8) == 1) & (scale.view(torch.uint8) != 1)
    return (float(changes.max()) if len(changes) else 0.0), int(fell.sum())


def _zero_and_sound(evidence: Evidence, projection: Projection) -> tuple[bool, bool]:
    """Whether a projection is all zero, by its codes or as nvidia-modelopt spoils one (scale_2 0,
    every block scale NaN); and whether all its block scales are positive numbers.
    """
    scale = load_bytes(evidence.files, projection.parts["weight_scale"])
    nan = (scale & 0x7F) == 0x7F
    codes = load_bytes(evidence.files, projection.parts["weight"])
    spoilt = bool(nan.all()) and evidence.scalar(projection, "weight_scale_2") == 0
    return spoilt or not bool((codes & 0x77).any()), not bool((nan | (scale > 0x7F)).any())
