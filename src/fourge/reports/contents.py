"""What is in the checkpoint and what the doctor found in it: sizes, weights, findings."""

from collections.abc import Iterable

from fourge.doctor.findings import Finding
from fourge.layerwise.budget import format_bytes
from fourge.reports import charts
from fourge.reports.blocks import (
    Bar,
    Block,
    FindingGroup,
    Missing,
    Paragraph,
    Section,
    Sizes,
    Table,
    Tone,
)
from fourge.reports.records import Doctor, Records
from fourge.reports.wording import (
    DOCTOR,
    DOCTOR_WITH_SOURCE,
    NONE,
    changed_since,
    doctor_verdict,
    dtype_words,
    integer,
    is_nvfp4,
    joined,
    percent,
    plural,
)

TONES: dict[str, Tone] = {"error": "bad", "warning": "warn", "info": "plain"}
ENGINE_NAMES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}
MESSAGES_SHOWN = 4
SIZE_INTRO = (
    "Bytes by role and dtype, from the headers. Only the routed experts should be packed; the rest"
    " keeps every byte of the source."
)
WEIGHTS_INTRO = (
    "The dequantized experts against the source's weights. NVFP4 by the largest value of every"
    " block has a relative RMS error near 0.095 on weights that are close to normal; a layer or an"
    " expert far from its neighbours is worth a look."
)
DOCTOR_INTRO = (
    "fourge doctor examines files, config, tensors and scales as vLLM and SGLang would read them."
)


def size_section(records: Records) -> Section:
    """Stacked bars of the checkpoint and its source, over the table by role."""
    roles = list(dict.fromkeys(entry.role for entry in records.roles))
    own = dict.fromkeys(roles, 0)
    for entry in records.roles:
        own[entry.role] += entry.bytes
    sums = [("this checkpoint", own)]
    if records.run is not None:
        sums.append(("its source", dict(records.run.roles_in)))
        roles += [role for role in records.run.roles_in if role not in own]
    longest = max(sum(sizes.values()) for _, sizes in sums)
    bars = tuple(_bar(title, sizes, roles, longest) for title, sizes in sums)
    rows = tuple(
        (
            entry.role,
            dtype_words(records, entry.role, entry.dtype),
            integer(entry.tensors),
            integer(entry.parameters) if entry.parameters else NONE,
            format_bytes(entry.bytes),
            percent(entry.bytes / max(1, records.bytes), 1),
        )
        for entry in records.roles
    )
    columns = ("role", "dtype", "tensors", "parameters", "bytes", "share")
    table = Table(columns, rows, "", frozenset({"dtype"}))
    colours = tuple(roles.index(entry.role) for entry in records.roles)
    excluded = joined(records.excluded, most=12) or "nothing"
    note = Paragraph(f"{records.algorithm}; excluded from it: {excluded}.", "soft")
    return Section("size", "Size by role", SIZE_INTRO, (Sizes(bars, colours, table), note))


def _bar(title: str, sizes: dict[str, int], roles: list[str], longest: int) -> Bar:
    parts = tuple(
        (roles.index(role), 100 * size / max(1, longest))
        for role, size in sizes.items()
        if size > 0
    )
    return Bar(title, format_bytes(sum(sizes.values())), parts)


def weights_section(records: Records) -> Section:
    """Error of the weights, layer by layer, and the worst projections."""
    doctor = records.doctor
    if not is_nvfp4(records):
        text = f"fourge compares the weights of NVFP4 checkpoints; this one is {records.algorithm}."
        blocks: tuple[Block, ...] = (Paragraph(text, "soft"),)
    elif doctor is None or not doctor.weight_error:
        blocks = (Missing("the experts' weights against their source", DOCTOR_WITH_SOURCE),)
    else:
        blocks = (charts.weight_error(doctor.weight_error), _worst(doctor))
    return Section("weights", "Quantization error by layer", WEIGHTS_INTRO, blocks)


def _worst(doctor: Doctor) -> Table:
    rows = tuple(
        (name, f"{rms:.4f}", NONE if cosine is None else f"{cosine:.5f}")
        for name, rms, cosine in doctor.worst
    )
    return Table(("projection", "relative RMS", "cosine"), rows, "The worst projections")


def doctor_section(records: Records) -> Section:
    """Findings grouped by rule, and what was not looked at."""
    doctor = records.doctor
    if doctor is None:
        blocks: tuple[Block, ...] = (Missing("the doctor's findings", DOCTOR),)
        return Section("doctor", "Doctor", DOCTOR_INTRO, blocks)
    found: list[Block] = []
    if changed_since(doctor.files, records):
        text = "The checkpoint has changed since it was examined: run fourge doctor --record again."
        found.append(Paragraph(text, "warn"))
    tone: Tone = "bad" if doctor.of("error") else "warn" if doctor.of("warning") else "good"
    looked = f"{doctor_verdict(doctor)}; {plural(len(doctor.checked), 'rule')} checked"
    found.append(Paragraph(f"{looked} on {doctor.checked_at}.", tone))
    found += _groups(doctor.findings)
    if doctor.not_checked:
        found.append(_not_checked(doctor))
    return Section("doctor", "Doctor", DOCTOR_INTRO, tuple(found))


def _groups(findings: Iterable[Finding]) -> list[FindingGroup]:
    by_rule: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault((finding.rule, finding.severity), []).append(finding)
    return [_group(own) for own in by_rule.values()]


def _group(findings: list[Finding]) -> FindingGroup:
    first = findings[0]
    return FindingGroup(
        rule=first.rule,
        severity=first.severity,
        tone=TONES.get(first.severity, "plain"),
        places=plural(sum(one.count for one in findings), "place"),
        messages=tuple((one.where, one.message) for one in findings[:MESSAGES_SHOWN]),
        more=max(0, len(findings) - MESSAGES_SHOWN),
        remedy=first.remedy,
        engines=tuple(
            (ENGINE_NAMES.get(name, name), effect) for name, effect in first.engines.items()
        ),
    )


def _not_checked(doctor: Doctor) -> Table:
    reasons: dict[str, list[str]] = {}
    for rule, reason in doctor.not_checked.items():
        reasons.setdefault(reason, []).append(rule)
    rows = tuple((", ".join(ids), reason) for reason, ids in reasons.items())
    return Table(("rules", "why not"), rows, "Not checked", frozenset({"why not"}), folded=True)
