"""lm-eval's own client of transformers, ``--model hf``, on a quantized checkpoint.

lm-eval brings 350 MB of packages (scipy, scikit-learn, lxml), so ``make test`` does not install it.
Where it is, these tests run: pip install lm-eval accelerate; pytest tests/transformers_
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fourge_process import run

# The package's own warnings, and that of transformers that a block was given twice.
pytestmark = pytest.mark.filterwarnings("default")

CONTEXT = "def read(path):\n    with open(path) as"
COMMAND = "import fourge.transformers; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
TASK = """
task: arithmetic
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""


class Request:
    """What lm-eval's clients read of a request."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval")


@pytest.fixture(scope="module")
def tiny(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model with its tokenizer, quantized."""
    out = tmp_path_factory.mktemp("tiny") / "NVFP4"
    data = tiny_glm.parent / "evaluation" / "coding.jsonl"
    done = run("quantize", tiny_glm, out, "--method", "max", "--data", data)
    assert done.status == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def client(lm_eval: Any, tiny: Path) -> Any:
    return lm_eval.HFLM(pretrained=str(tiny), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def expanded(
    client: Any,
    tiny: Path,
    load: Callable[..., Any],
    expand: Callable[[Path, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    return load(expand(tiny, tmp_path_factory.mktemp("expanded") / "model"))


def test_likelihoods_are_those_of_the_expanded_model(client: Any, expanded: Any, tiny: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny))
    endings = [" file:\n        return file", " banana banana banana", " else" * 40]
    found = client.loglikelihood([Request(CONTEXT, ending) for ending in endings])
    context = tokenizer(CONTEXT)["input_ids"]
    for ending, (likelihood, is_greedy) in zip(endings, found, strict=True):
        ids = tokenizer(CONTEXT + ending)["input_ids"]
        assert ids[: len(context)] == context
        logits = expanded(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        targets = torch.tensor(ids[len(context) :])
        scores = logits[len(context) - 1 : -1].double().log_softmax(-1)
        expected = scores.gather(-1, targets[:, None]).sum().item()
        assert likelihood == pytest.approx(expected, abs=1e-3)
        assert is_greedy == bool((scores.argmax(-1) == targets).all())
    assert found[0][0] > found[1][0]


def test_texts_are_those_of_the_expanded_model(client: Any, expanded: Any, tiny: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny))
    prompts = [CONTEXT, "The quick brown fox" * 30]  # beyond index_topk (64)
    options = {"until": [], "max_gen_toks": 20, "do_sample": False}
    found = client.generate_until([Request(prompt, dict(options)) for prompt in prompts])
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        made = expanded.generate(**ids, max_new_tokens=20, do_sample=False)
        expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == expected.split(tokenizer.eos_token)[0]


def test_a_loaded_model_may_be_given(lm_eval: Any, tiny: Path, load: Callable[..., Any]):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny))
    client = lm_eval.HFLM(pretrained=load(tiny), tokenizer=tokenizer, batch_size=1)
    ((likelihood, _),) = client.loglikelihood([Request(CONTEXT, " file:\n        return file")])
    assert -200 < likelihood < 0


def test_the_command_line_of_the_readme_runs(lm_eval: Any, tiny: Path, tmp_path: Path):
    rows = [
        {"question": CONTEXT, "choices": [" file", f" {word * 6}"]}
        for word in ("zebra", "quark", "violin", "glacier")
    ]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.json")))
    command = [sys.executable, "-c", COMMAND, "run", "--model", "hf", "--device", "cpu"]
    options = ["--model_args", f"pretrained={tiny},dtype=float32", "--tasks", "arithmetic"]
    places = ["--include_path", tmp_path, "--output_path", tmp_path / "results.json"]
    done = subprocess.run(
        [*command, *options, *map(str, places)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("results*.json")
    assert json.loads(results.read_text())["results"]["arithmetic"]["acc,none"] == 1.0
