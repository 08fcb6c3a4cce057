"""What is known of a checkpoint: its headers, its config, and what the verbs left in ``fourge/``.

Every record may be missing; one that is there but cannot be read is an error, since a page that
leaves it out silently would be wrong. evaluations.py has the evaluations.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.checkpoint.header import Checkpoint, read_checkpoint
from fourge.checkpoint.inventory import Entry, by_role, inventory
from fourge.checkpoint.metadata import CONFIG_NAME, HF_QUANT_CONFIG_NAME, read_config
from fourge.doctor.findings import Finding
from fourge.errors import CheckpointError
from fourge.layerwise.folders import OWN_FOLDER
from fourge.reports.evaluations import Evaluation, parse_evaluation
from fourge.reports.reading import (
    as_list,
    as_mapping,
    count,
    counts,
    maybe,
    number,
    numbers,
    read_as,
    texts,
)


@dataclass(frozen=True)
class Pass:
    """One calibration pass."""

    name: str
    sequences: int
    tokens: int
    min_tokens: int
    max_tokens: int
    seed: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """fourge/run.json. ``copied``: sha256 of the files taken over from the source; ``roles_in``:
    bytes of the source by role.
    """

    fourge: str
    finished_at: str
    method: str
    recipe: str
    mtp: str
    bytes_in: int
    roles_in: Mapping[str, int]
    copied: Mapping[str, str]
    data_sha256: str
    sequences: int
    tokens: int
    passes: tuple[Pass, ...]
    warnings: tuple[str, ...]
    device: str
    dtype: str
    seconds_of_layers: float
    peak_resident_bytes: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class LayerCoverage:
    """Per pass, one figure per expert: tokens, and the largest absolute input of gate and up, and
    of down.
    """

    layer: int
    never_seen: tuple[int, ...]
    tokens: Mapping[str, tuple[int, ...]]
    gate_up_amax: Mapping[str, tuple[float, ...]]
    down_amax: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Coverage:
    """fourge/coverage.json. ``saturation``: after so many tokens, so many experts seen."""

    passes: tuple[str, ...]
    experts: int
    min_tokens: int
    median_tokens: float
    never_seen: int
    saturation: tuple[tuple[int, ...], tuple[int, ...]] | None
    layers: tuple[LayerCoverage, ...]


@dataclass(frozen=True)
class WeightError:
    """Of one projection in all experts of a layer, and of the worst expert."""

    layer: int
    projection: str
    relative_rms: float
    cosine: float
    worst_expert: int
    worst_rms: float


@dataclass(frozen=True)
class Doctor:
    """fourge/doctor.json. ``files``: sha256 of config.json, and the bytes of the shards as text.
    ``worst``: (projection, relative RMS, cosine).
    """

    fourge: str
    checked_at: str
    files: Mapping[str, str]
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    not_checked: Mapping[str, str]
    weight_error: tuple[WeightError, ...]
    worst: tuple[tuple[str, float, float | None], ...]

    def of(self, severity: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == severity]


@dataclass(frozen=True)
class Records:
    """Everything that a report may show."""

    name: str
    config: Mapping[str, Any]
    config_sha256: str
    algorithm: str
    excluded: tuple[str, ...]
    shards: frozenset[str]
    entries: tuple[Entry, ...]
    run: Run | None
    coverage: Coverage | None
    doctor: Doctor | None
    evaluations: tuple[Evaluation, ...]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def roles(self) -> list[Entry]:
        return by_role(self.entries)


def read_records(folder: Path) -> Records:
    """All records of the checkpoint in ``folder``.

    Raises CheckpointError or ConfigError if it is no quantized checkpoint, or a record is damaged.
    """
    headers: Checkpoint = read_checkpoint(folder)
    text, config = read_config(folder)
    algorithm, excluded = _quantization(folder, config)
    own = folder / OWN_FOLDER
    evaluations = [
        read_as(path, parse_evaluation, "evaluate again")
        for path in sorted((own / "evaluation").glob("*.json"))
    ]
    read = [one for one in evaluations if one is not None]
    return Records(
        name=folder.resolve().name,
        config=config,
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        algorithm=algorithm,
        excluded=excluded,
        shards=frozenset(headers.shards),
        entries=tuple(inventory(headers)),
        run=read_as(own / "run.json", _run, "quantize again"),
        coverage=read_as(own / "coverage.json", _coverage, "quantize again"),
        doctor=read_as(own / "doctor.json", _doctor, "run fourge doctor again"),
        evaluations=tuple(sorted(read, key=lambda one: one.receipt.finished_at, reverse=True)),
    )


def _quantization(folder: Path, config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The algorithm that the metadata names, and the modules that it excludes."""
    block = config.get("quantization_config") or config.get("compression_config") or {}
    nested = read_as(folder / HF_QUANT_CONFIG_NAME, _nested, "export again") or {}
    if not block and not nested:
        raise CheckpointError(
            f"{folder} is not quantized: neither {CONFIG_NAME} nor {HF_QUANT_CONFIG_NAME} names a"
            " quantization; give the folder of a quantized checkpoint."
        )
    if not isinstance(block, Mapping):
        block = {"quant_method": str(block)}
    named = block.get("quant_algo") or nested.get("quant_algo") or block.get("quant_method")
    excluded = block.get("ignore") or nested.get("exclude_modules") or []
    return str(named or "unknown"), texts(excluded if isinstance(excluded, list) else [])


def _nested(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return as_mapping(raw.get("quantization", {}))


def _run(raw: Mapping[str, Any]) -> Run:
    plan, data, timing = raw["plan"], raw["data"], raw["timing"]
    fingerprint = raw["fingerprint"]
    return Run(
        fourge=str(raw["fourge"]),
        finished_at=str(timing["finished_at"]),
        method=str(fingerprint["recipe"]["method"]),
        recipe=str(plan["recipe"]),
        mtp=str(plan["mtp"]),
        bytes_in=count(plan["bytes_in"]),
        roles_in={str(role): count(one["bytes"]) for role, one in plan["roles"].items()},
        copied=as_mapping(fingerprint["other source files"]),
        data_sha256=str(data["sha256"]),
        sequences=count(data["sequences"]),
        tokens=count(data["tokens"]),
        passes=tuple(_pass(one) for one in as_list(data["passes"])),
        warnings=texts([*as_list(plan["warnings"]), *as_list(data["warnings"])]),
        device=str(timing["device"]),
        dtype=str(timing["dtype"]),
        seconds_of_layers=number(timing["seconds_of_layers"]),
        peak_resident_bytes=count(timing["peak_resident_bytes"]),
        versions={str(name): str(version) for name, version in raw["versions"].items()},
    )


def _pass(raw: Mapping[str, Any]) -> Pass:
    return Pass(
        name=str(raw["name"]),
        sequences=count(raw["sequences"]),
        tokens=count(raw["tokens"]),
        min_tokens=count(raw["min_tokens"]),
        max_tokens=count(raw["max_tokens"]),
        seed=count(raw["seed"]),
        sources=texts(source["name"] for source in as_list(raw["sources"])),
    )


def _coverage(raw: Mapping[str, Any]) -> Coverage:
    passes, summary, curve = texts(as_list(raw["passes"])), raw["summary"], raw.get("saturation")
    return Coverage(
        passes=passes,
        experts=count(summary["experts"]),
        min_tokens=count(summary["min_tokens"]),
        median_tokens=number(summary["median_tokens"]),
        never_seen=count(summary["never_seen"]),
        saturation=curve and (counts(curve["tokens"]), counts(curve["experts_seen"])),
        layers=tuple(_layer(one, passes) for one in as_list(raw["layers"])),
    )


def _layer(raw: Mapping[str, Any], passes: tuple[str, ...]) -> LayerCoverage:
    own = {name: raw["passes"][name] for name in passes}
    layer = LayerCoverage(
        layer=count(raw["layer"]),
        never_seen=counts(raw["never_seen"]),
        tokens={name: counts(one["tokens"]) for name, one in own.items()},
        gate_up_amax={name: numbers(one["gate_up_amax"]) for name, one in own.items()},
        down_amax={name: numbers(one["down_amax"]) for name, one in own.items()},
    )
    sizes = {
        len(values)
        for figures in (layer.tokens, layer.gate_up_amax, layer.down_amax)
        for values in figures.values()
    }
    if len(sizes) != 1:
        raise ValueError(f"layer {layer.layer} has figures for {sorted(sizes)} experts")
    return layer


def _doctor(raw: Mapping[str, Any]) -> Doctor:
    figures = as_mapping(raw.get("figures", {}))
    return Doctor(
        fourge=str(raw["fourge"]),
        checked_at=str(raw["checked_at"]),
        files={str(name): str(state) for name, state in raw["files"].items()},
        findings=tuple(_finding(one) for one in as_list(raw["findings"])),
        checked=texts(as_list(raw["checked"])),
        not_checked={str(rule): str(why) for rule, why in raw["not_checked"].items()},
        weight_error=tuple(_weight_error(one) for one in figures.get("weight_error", [])),
        worst=tuple(
            (str(one["projection"]), number(one["relative_rms"]), maybe(one.get("cosine")))
            for one in figures.get("worst_projections", [])
        ),
    )


def _finding(raw: Mapping[str, Any]) -> Finding:
    return Finding(
        rule=str(raw["rule"]),
        severity=str(raw["severity"]),
        where=str(raw["where"]),
        count=count(raw["count"]),
        message=str(raw["message"]),
        remedy=str(raw["remedy"]),
        engines={str(name): str(effect) for name, effect in raw["engines"].items()},
    )


def _weight_error(raw: Mapping[str, Any]) -> WeightError:
    return WeightError(
        layer=count(raw["layer"]),
        projection=str(raw["projection"]),
        relative_rms=number(raw["relative_rms"]),
        cosine=number(raw["cosine"]),
        worst_expert=count(raw["worst"]["expert"]),
        worst_rms=number(raw["worst"]["relative_rms"]),
    )
