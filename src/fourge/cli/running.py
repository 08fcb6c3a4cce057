"""``fourge launch --run``: the engine as a child, its log in a few lines, and the smoke test."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from fourge.cli.show import console, duration, print_json, say
from fourge.launch.options import Endpoint
from fourge.launch.process import EngineProcess
from fourge.launch.render import Launch
from fourge.launch.smoke import Outcome, Target, smoke_test

# A first start compiles kernels and reads half a terabyte.
START_TIMEOUT_S = 3600.0
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}


def run_engine(made: Launch, endpoint: Endpoint, *, as_json: bool) -> bool:
    """Start, wait, test, and serve until Ctrl-C; whether the smoke test passed."""
    command = made.commands[0]
    environment = {**os.environ, **{one.name: one.value for one in command.environment}}
    handle, name = tempfile.mkstemp(prefix=f"fourge-{made.plan.engine}-", suffix=".log")
    os.close(handle)
    url = f"http://{EVERYWHERE.get(endpoint.host, endpoint.host)}:{endpoint.port}"
    say(f"starting {made.plan.engine}; its log is {name}")
    with (
        _ending_as_interrupt(),
        EngineProcess(command.words, environment, Path(name), on_phase=_show_phase) as engine,
    ):
        seconds = engine.wait_healthy(f"{url}/health", START_TIMEOUT_S)
        say(f"healthy after {duration(seconds)}; smoke test")
        target = Target(
            url=url,
            model=endpoint.model_name,
            api_key=endpoint.api_key,
            index_topk=made.plan.served.config.index_topk,
            context=made.plan.context,
            drafts=made.plan.load.drafts,
        )
        outcomes = []
        for outcome in smoke_test(target):
            _show_outcome(outcome)
            outcomes.append(outcome)
        passed = all(outcome.passed is not False for outcome in outcomes)
        if as_json:
            checks = [asdict(outcome) for outcome in outcomes]
            print_json({"passed": passed, "url": url, "start_s": round(seconds, 2),
                        "checks": checks, "log": name})  # fmt: skip
        if passed:
            _serve(engine, url)
        else:
            say(f"the smoke test failed; stopping {made.plan.engine}")
    return passed


def _serve(engine: EngineProcess, url: str) -> None:
    """Wait for Ctrl-C, which is how serving ends, or for the engine's own end."""
    say(f"serving at {url}/v1; Ctrl-C stops it")
    try:
        status = engine.wait()
    except KeyboardInterrupt:
        say("stopping")
    else:
        say(f"the engine ended by itself, with status {status}")


@contextmanager
def _ending_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does, so that the engine is never left behind."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_phase(phase: str) -> None:
    say(f"  {phase}")


def _show_outcome(outcome: Outcome) -> None:
    styles = {True: "[green]passed[/]", False: "[bold red]failed[/]", None: "[dim]left out[/]"}
    console.print(f"  {styles[outcome.passed]} {outcome.name}: ", end="")
    say(f"{outcome.detail} ({outcome.seconds:.1f} s)")
