"""``fourge/doctor.json``: the findings as they stay with a checkpoint, for its report."""

import hashlib
from datetime import UTC, datetime
from typing import Any

from fourge import __version__
from fourge.checkpoint.metadata import CONFIG_NAME
from fourge.doctor.evidence import Evidence
from fourge.doctor.examine import Report

RECORD_NAME = "doctor.json"


def describe(report: Report, evidence: Evidence) -> dict[str, Any]:
    """The findings, when they were found and in which files: config.json by sha256, shards by their
    size in bytes. Without the folder's place, which is nobody's business once it is published.
    """
    files = evidence.files
    config = files.read(CONFIG_NAME, 0, files.sizes.get(CONFIG_NAME, 0))
    return {
        "fourge": __version__,
        "checked_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {CONFIG_NAME: hashlib.sha256(config).hexdigest()}
        | {name: str(files.sizes[name]) for name in sorted(evidence.shards)},
        **{key: value for key, value in report.to_dict().items() if key != "checkpoint"},
    }
