"""The records of ``fourge evaluate`` as values. KL in nats, of the reference to the candidate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fourge.reports.reading import as_list, as_mapping, count, maybe, number, texts

LANES = ("w4a16", "w4a4")
FLOOR = "floor"


class Plain(NamedTuple):
    """Figures over some positions; all None where ``tokens`` is 0."""

    tokens: int
    kl_mean: float | None
    kl_median: float | None
    kl_p95: float | None
    kl_p99: float | None
    kl_max: float | None
    top1: float | None
    ppl_reference: float | None
    ppl_candidate: float | None


class Bucket(NamedTuple):
    """Positions ``first`` to ``last`` of all windows."""

    first: int
    last: int
    figures: Plain


@dataclass(frozen=True)
class Lane:
    """One lane, or the floor: the reference against itself in the candidate's arithmetic."""

    name: str
    whole: Plain
    interval: tuple[float, float] | None
    windows: int
    by_kind: Mapping[str, Plain]
    by_position: tuple[Bucket, ...]
    within_topk: Plain | None
    beyond_topk: Plain | None


class LayerError(NamedTuple):
    """After one layer, by lane: relative error of the hidden state, share of tokens that go to
    other experts (None for a dense layer).
    """

    layer: int
    hidden_error: Mapping[str, float]
    router_changed: Mapping[str, float | None]


class Kind(NamedTuple):
    """One kind of data."""

    name: str
    windows: int
    tokens: int
    sources: tuple[str, ...]


class Paired(NamedTuple):
    """Mean KL minus another candidate's, over the same windows."""

    lane: str
    other: str
    difference: float
    interval: tuple[float, float]
    windows: int


@dataclass(frozen=True)
class Receipt:
    """What the figures depend on. ``files``: sha256 of the checkpoint's files."""

    id: str
    fourge: str
    finished_at: str
    files: Mapping[str, str]
    reference: str
    data_sha256: str
    tokens: int
    windows: int
    kinds: tuple[Kind, ...]
    context: int
    seed: int
    reference_dtype: str
    candidate_dtype: str
    device: str
    input_scale: str
    comparable: str
    overlap: tuple[str, ...]
    index_topk: int | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """One fourge/evaluation/*.json."""

    lanes: tuple[Lane, ...]
    floor: Lane | None
    layers: tuple[LayerError, ...]
    paired: tuple[Paired, ...]
    receipt: Receipt

    @property
    def streams(self) -> tuple[Lane, ...]:
        """The lanes, then the floor."""
        return self.lanes if self.floor is None else (*self.lanes, self.floor)

    def lane(self, name: str) -> Lane | None:
        return next((lane for lane in self.lanes if lane.name == name), None)


def parse_evaluation(raw: Mapping[str, Any]) -> Evaluation:
    """Raises ValueError, KeyError, TypeError or AttributeError where ``raw`` is something else."""
    lanes, floor = as_mapping(raw["lanes"]), raw.get("floor")
    return Evaluation(
        lanes=tuple(_lane(name, lanes[name]) for name in LANES if lanes.get(name)),
        floor=None if floor is None else _lane(FLOOR, floor),
        layers=tuple(_layer(one) for one in as_list(raw.get("layers", []))),
        paired=tuple(_paired(one) for one in as_list(raw.get("paired", []))),
        receipt=_receipt(as_mapping(raw["receipt"])),
    )


def _lane(name: str, raw: Mapping[str, Any]) -> Lane:
    bounds = raw.get("kl_mean_interval")
    return Lane(
        name=name,
        whole=_plain(raw),
        interval=None if bounds is None else _interval(bounds),
        windows=count(raw["windows"]),
        by_kind={str(kind): _plain(one) for kind, one in raw["by_kind"].items()},
        by_position=tuple(
            Bucket(count(one["first"]), count(one["last"]), _plain(one))
            for one in as_list(raw["by_position"])
        ),
        within_topk=_plain(raw["within_topk"]) if raw.get("within_topk") else None,
        beyond_topk=_plain(raw["beyond_topk"]) if raw.get("beyond_topk") else None,
    )


def _plain(raw: Mapping[str, Any]) -> Plain:
    return Plain(count(raw["tokens"]), *(maybe(raw[name]) for name in Plain._fields[1:]))


def _interval(raw: object) -> tuple[float, float]:
    low, high = as_list(raw)
    return number(low), number(high)


def _layer(raw: Mapping[str, Any]) -> LayerError:
    streams = {name: raw[name] for name in (*LANES, FLOOR) if raw.get(name)}
    return LayerError(
        count(raw["layer"]),
        {name: number(one["hidden_error"]) for name, one in streams.items()},
        {name: maybe(one.get("router_changed")) for name, one in streams.items()},
    )


def _paired(raw: Mapping[str, Any]) -> Paired:
    return Paired(
        str(raw["lane"]),
        str(raw["other"]),
        number(raw["difference"]),
        _interval(raw["interval"]),
        count(raw["windows"]),
    )


def _receipt(raw: Mapping[str, Any]) -> Receipt:
    data, topk = raw["data"], raw.get("index_topk")
    return Receipt(
        id=str(raw["id"]),
        fourge=str(raw.get("fourge") or raw["versions"]["fourge"]),
        finished_at=str(raw["finished_at"]),
        files=as_mapping(raw["checkpoint"]["files"]),
        reference=str(raw["reference"]["name"]),
        data_sha256=str(data["sha256"]),
        tokens=count(data["tokens"]),
        windows=count(data["windows"]),
        kinds=tuple(_kind(one) for one in as_list(data["kinds"])),
        context=count(data["context"] if "context" in data else raw["context"]),
        seed=count(raw["seed"]),
        reference_dtype=str(raw["arithmetic"]["reference"]),
        candidate_dtype=str(raw["arithmetic"]["candidate"]),
        device=str(raw["device"]),
        input_scale=str(raw["input_scale"]),
        comparable=str(raw["comparable"]),
        overlap=texts(as_list(raw.get("calibration_overlap", []))),
        index_topk=None if topk is None else count(topk),
        warnings=texts(as_list(data.get("warnings", []))),
    )


def _kind(raw: Mapping[str, Any]) -> Kind:
    sources = [one["name"] if isinstance(one, Mapping) else one for one in as_list(raw["sources"])]
    return Kind(str(raw["name"]), count(raw["windows"]), count(raw["tokens"]), texts(sources))
