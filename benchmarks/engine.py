"""The embedded engine against transformers' generate, on the example model, in one run.

    .venv/bin/python benchmarks/engine.py [--threads 2] [--rounds 3] [--steps 24] [--only SECTION]

The example model is quantized to NVFP4 first; transformers gets the same weights expanded, in
float32 as the engine computes on a CPU, with its own cache. Rounds of the two alternate, so that
both see the same machine. Every step's seconds are taken twice: by the clock, and of processor
time, which others on the machine disturb less (of several threads, waiting ones count as working).
Prints one JSON document:

throughput   batches of 1, 8 and 32 prompts of 128 tokens, greedy: prompt and decode tokens/s
context      one decode step of a batch of 8 at several contexts, and the indexer's part in it
speculation  real conversations, greedy: tokens/s and accepted drafts with 0, 1 and 3 drafts
prefix       the step to the first token of a prompt of 1024 tokens, new and with 960 of them known
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from quantize_vs_modelopt import REPOSITORY, describe_run, run_child

from fourge import LLM, SamplingParams
from fourge.engine.engine import Engine
from fourge.models.kernels import decode as kernels

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = REPOSITORY / "examples" / "tiny-glm"
SECTIONS = ("throughput", "context", "speculation", "prefix")
BATCHES = (1, 8, 32)
DRAFTS = (0, 1, 3)
MOST_TOKENS = 96  # of a text
PROMPT = 128
CONTEXTS = (32, 64, 256, 512, 1024, 2048)
THEIR_CONTEXTS = (64, 512)


class Seconds(NamedTuple):
    """By the clock, and of processor time."""

    clock: float
    processor: float


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine against transformers' generate.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="decode steps a round")
    parser.add_argument("--only", choices=SECTIONS, help="this section alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = quantize(Path(folder))
        theirs = Theirs(checkpoint)
        sections: dict[str, Callable[[], Any]] = {
            "throughput": lambda: [throughput(checkpoint, theirs, one, options) for one in BATCHES],
            "context": lambda: context(checkpoint, theirs, options),
            "speculation": lambda: [
                own for batch in (1, 8) for own in speculation(checkpoint, batch, options)
            ],
            "prefix": lambda: prefix(checkpoint),
        }
        report = {"benchmark": "engine", **describe_run(), "threads": options.threads} | {
            name: sections[name]() for name in SECTIONS if options.only in (None, name)
        }
    print(json.dumps(report, indent=2))


def quantize(folder: Path) -> Path:
    from random_checkpoint import write_input_ids

    data = write_input_ids(folder / "data.jsonl", sequences=8, length=64, vocab=2000)
    out = folder / "out"
    run_child(
        "fourge", sys.executable, ["quantize", str(MODEL), str(out), "--data", str(data)], folder
    )
    return out


class Theirs:
    """transformers' model with the weights of an engine's, and the times of its steps."""

    def __init__(self, checkpoint: Path) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            MODEL, dtype=torch.float32
        ).eval()
        ours = make_engine(checkpoint)._runner._weights
        for layer, weights in zip(self.model.model.layers, ours.layers, strict=True):
            if "mlp.experts.down_proj" in weights:
                layer.mlp.experts.gate_up_proj.data = weights["mlp.experts.gate_up_proj"]
                layer.mlp.experts.down_proj.data = weights["mlp.experts.down_proj"]

    @torch.inference_mode()
    def steps(self, prompts: list[list[int]], count: int) -> list[Seconds]:
        """Seconds of the prompts' pass and of each decode step."""
        times = [now()]

        def note(*_: Any, **__: Any) -> torch.Tensor:
            times.append(now())
            return torch.zeros(len(prompts), dtype=torch.bool)

        tokens = torch.tensor(prompts)
        self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count + 1,
            do_sample=False, eos_token_id=None, pad_token_id=0, stopping_criteria=[note],
        )  # fmt: skip
        return differences(times)


def make_engine(checkpoint: Path, **options: Any) -> Engine:
    return Engine(checkpoint, device="cpu", **options)


def our_steps(engine: Engine, prompts: list[list[int]], count: int) -> list[Seconds]:
    """The same of the engine; all prompts go through together."""
    params = SamplingParams(temperature=0, max_tokens=count + 1, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(f"{number}", prompt, params)
    times = [now()]
    while engine.has_work:
        engine.step()
        times.append(now())
    return differences(times)


def now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def differences(times: list[Seconds]) -> list[Seconds]:
    return [
        Seconds(later.clock - earlier.clock, later.processor - earlier.processor)
        for earlier, later in itertools.pairwise(times)
    ]


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(2000) for _ in range(length)] for _ in range(count)]


def throughput(
    checkpoint: Path, theirs: Theirs, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    engine = make_engine(
        checkpoint, max_num_batched_tokens=batch * PROMPT, max_num_seqs=batch,
        enable_prefix_caching=False,
    )  # fmt: skip
    prompts = random_prompts(batch, PROMPT)
    ways = {
        "fourge": lambda: our_steps(engine, prompts, options.steps),
        "transformers": lambda: theirs.steps(prompts, options.steps),
    }
    samples: dict[str, list[list[Seconds]]] = {name: [] for name in ways}
    for run in ways.values():
        run()  # warm
    for _ in range(options.rounds):
        for name, run in ways.items():
            samples[name].append(run())
    result: dict[str, Any] = {"batch": batch, "prompt_tokens": PROMPT}
    for kind in Seconds._fields:
        for name, rounds in samples.items():
            seconds = [[round(getattr(step, kind), 6) for step in one] for one in rounds]
            result[f"{name}_{kind}"] = {
                "prompt_tokens_per_s": batch
                * PROMPT
                / statistics.median(one[0] for one in seconds),
                "decode_tokens_per_s": batch
                / statistics.median(itertools.chain.from_iterable(one[1:] for one in seconds)),
                "seconds": seconds,
            }
        for what in ("prompt_tokens_per_s", "decode_tokens_per_s"):
            ours, theirs_ = result[f"fourge_{kind}"][what], result[f"transformers_{kind}"][what]
            result[f"ratio_{what}_{kind}"] = ours / theirs_
    print(f"batch {batch} done", file=sys.stderr)
    return result


def context(checkpoint: Path, theirs: Theirs, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median processor seconds of a decode step of 8 sequences, and the indexer's part."""
    results = []
    select = kernels.select
    for length in CONTEXTS:
        engine = make_engine(checkpoint, max_num_batched_tokens=4096, enable_prefix_caching=False)
        spent = [0.0]

        def timed(*arguments: Any, spent: list[float] = spent) -> Any:
            begun = time.process_time()
            result = select(*arguments)
            spent[-1] += time.process_time() - begun
            return result

        kernels.select = timed
        params = SamplingParams(temperature=0, max_tokens=options.steps + 2, ignore_eos=True)
        for number, prompt in enumerate(random_prompts(8, length)):
            engine.add(f"{number}", prompt, params)
        steps = []
        while engine.has_work:
            begun = time.process_time()
            progressed = engine.step()
            steps.append((len(progressed), time.process_time() - begun, spent[-1]))
            spent.append(0.0)
        kernels.select = select
        steps = steps[-options.steps :]  # all of them decode 8 sequences
        result = {
            "context": length,
            "step_s": statistics.median(step for _, step, _ in steps),
            "indexer_s": statistics.median(own for _, _, own in steps),
            "rest_s": statistics.median(step - own for _, step, own in steps),
        }
        if length in THEIR_CONTEXTS:
            their_steps = theirs.steps(random_prompts(8, length), options.steps)[1:]
            result["transformers_step_s"] = statistics.median(one.processor for one in their_steps)
        results.append(result)
    print("contexts done", file=sys.stderr)
    return results


def speculation(checkpoint: Path, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of rounds in which the numbers of drafts take turns."""
    llms = {
        drafts: LLM(
            checkpoint, device="cpu", speculative_tokens=drafts, enable_prefix_caching=False
        )
        for drafts in DRAFTS
    }
    tokenizer = llms[0].tokenizer
    assert tokenizer is not None
    lines = (MODEL.parent / "conversations" / "broad.jsonl").read_text().splitlines()[:batch]
    texts = [
        tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        for line in lines
    ]
    prompts = [llms[0].tokens(text)[:128] for text in texts]
    params = SamplingParams(temperature=0, max_tokens=MOST_TOKENS, ignore_eos=True)
    samples: dict[int, list[Seconds]] = {drafts: [] for drafts in DRAFTS}
    for _ in range(options.rounds + 1):
        for drafts, llm in llms.items():
            begun = now()
            llm.generate(prompts, params)
            samples[drafts] += differences([begun, now()])
    results = []
    for drafts, llm in llms.items():
        seconds, stats = samples[drafts][1:], llm.stats()  # the first one warmed up
        tokens = batch * MOST_TOKENS
        results.append(
            {
                "batch": batch,
                "drafts": drafts,
                "tokens_per_s": tokens / statistics.median(one.clock for one in seconds),
                "tokens_per_processor_s": tokens
                / statistics.median(one.processor for one in seconds),
                "mean_acceptance_length": stats.get("mean_acceptance_length"),
                "acceptance_per_position": stats.get("acceptance_per_position"),
                "seconds": seconds,
            }
        )
    return results


def prefix(checkpoint: Path) -> dict[str, Any]:
    engine = make_engine(checkpoint)
    known = random_prompts(1, 960)[0]
    tails = random_prompts(4, 64, seed=1)
    found = [our_steps(engine, [known + tail], 0) for tail in tails]
    return {
        "prompt_tokens": 1024,
        "first_step_s": [one[0].clock for one in found],
        "first_step_processor_s": [one[0].processor for one in found],
        "cached_prompt_tokens": engine.stats()["cached_prompt_tokens"],
    }


if __name__ == "__main__":
    main()
