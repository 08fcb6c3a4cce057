"""Figures as a person reads them, and the words that both the page and the card use."""

from collections.abc import Iterable, Mapping

from fourge.checkpoint.names import Role
from fourge.reports.evaluations import Lane
from fourge.reports.records import Doctor, Records

NONE = "-"
QUANTIZE = "fourge quantize SOURCE OUT --data FILE.jsonl"
EVALUATE = "fourge evaluate CHECKPOINT --reference SOURCE --data FILE.jsonl"
DOCTOR = "fourge doctor CHECKPOINT --record"
DOCTOR_WITH_SOURCE = "fourge doctor CHECKPOINT --source SOURCE --record"
# Community scale for the mean KL divergence in nats: below each bound, so it is called.
KL_SCALE = ((0.01, "near-lossless"), (0.05, "good"), (0.1, "noticeable"))
BEYOND_SCALE = "significant"
LANE_TITLES = {
    "w4a16": "W4A16",
    "w4a4": "W4A4",
    "floor": "floor",
}
# What safetensors dtypes of routed experts are, where a checkpoint is NVFP4.
PACKED_DTYPES = {"U8": "NVFP4 codes", "F8_E4M3": "block scales", "F32": "scales per projection"}


def kl(value: float | None) -> str:
    """Four digits; ``0`` where there is no difference at all."""
    return NONE if value is None else f"{value:.4g}"


def kl_interval(bounds: tuple[float, float] | None) -> str:
    return NONE if bounds is None else f"{bounds[0]:.3g} to {bounds[1]:.3g}"


def verdict(value: float) -> str:
    """The word of the community scale."""
    return next((word for bound, word in KL_SCALE if value < bound), BEYOND_SCALE)


def perplexity(value: float | None) -> str:
    return NONE if value is None else f"{value:.5g}"


def percent(share: float | None, digits: int = 2) -> str:
    return NONE if share is None else f"{share:.{digits}%}"


def integer(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def plural(number: int, noun: str) -> str:
    """``1 error``, ``2,000 errors``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def joined(words: Iterable[str], *, most: int = 6) -> str:
    """The first few, and how many more."""
    every = list(words)
    more = len(every) - most
    return ", ".join(every[:most]) + (f" and {more:,} more" if more > 0 else "")


def doctor_verdict(doctor: Doctor) -> str:
    """``2 errors, 1 warning``, or that nothing was found."""
    errors, warnings = len(doctor.of("error")), len(doctor.of("warning"))
    if not errors and not warnings:
        return "nothing wrong"
    counts = [(errors, "error"), (warnings, "warning")]
    return ", ".join(plural(number, noun) for number, noun in counts if number)


def is_nvfp4(records: Records) -> bool:
    """Whether the metadata names NVFP4, in any case and lane."""
    return "NVFP4" in records.algorithm.upper()


def dtype_words(records: Records, role: str, dtype: str) -> str:
    """``U8 (NVFP4 codes)`` for what is packed; the dtype alone elsewhere."""
    packed = any(one.role == role and one.dtype == "U8" for one in records.entries)
    if is_nvfp4(records) and role == Role.ROUTED_EXPERT and packed and dtype in PACKED_DTYPES:
        return f"{dtype} ({PACKED_DTYPES[dtype]})"
    return dtype


def changed_since(files: Mapping[str, str], records: Records) -> bool:
    """Whether the checkpoint's files are no longer those of a record, as far as the names of its
    shards and config.json (by sha256) tell.
    """
    shards = {name for name in files if name.endswith(".safetensors")}
    return shards != records.shards or files.get("config.json") != records.config_sha256


def missing_records(records: Records) -> list[tuple[str, str]]:
    """What was not measured, and the command that would."""
    doctor = records.doctor
    found = [
        (records.coverage is None, "expert coverage", QUANTIZE),
        (not records.evaluations, "KL divergence and perplexity", EVALUATE),
        (doctor is None, "the doctor's findings", DOCTOR),
        (
            is_nvfp4(records) and not (doctor and doctor.weight_error),
            "the experts' weights against their source",
            DOCTOR_WITH_SOURCE,
        ),
    ]
    return [(what, command) for is_missing, what, command in found if is_missing]


def lane_title(lane: Lane | str) -> str:
    name = lane if isinstance(lane, str) else lane.name
    return LANE_TITLES[name]
