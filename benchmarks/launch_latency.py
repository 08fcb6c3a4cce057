"""How long ``fourge launch`` and ``check-launch`` take beyond Python's own start.

    python benchmarks/launch_latency.py CHECKPOINT FILE > benchmarks/results/launch_latency.json

Processor time of fresh processes, which a busy machine disturbs less; all samples are kept, and the
least of them counts. The target is half a second.
"""

import json
import platform
import resource
import subprocess
import sys

RUNS = 5


def seconds(*words: str) -> list[float]:
    """Processor time of a fresh Python, run by run; the first one compiles."""
    found = []
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return found


def main() -> None:
    """Print the document."""
    checkpoint, file = sys.argv[1:]
    verb = ("-m", "fourge.cli.main")
    samples = {
        "python": seconds("-c", "pass"),
        "launch": seconds(
            *verb, "launch", checkpoint, "--engine", "sglang", "--hardware", "8xh200"
        ),
        "check-launch": seconds(*verb, "check-launch", file),
    }
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    document = {
        "command": ["python", *sys.argv],
        "commit": commit.stdout.strip(),
        "machine": {"machine": platform.machine(), "python": platform.python_version()},
        "samples_s": samples,
        "beyond_python_s": {
            name: min(own) - min(samples["python"])
            for name, own in samples.items()
            if name != "python"
        },
    }
    json.dump(document, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
