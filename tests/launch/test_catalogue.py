"""Catalogues: names, values, and what is said of wrong ones."""

import pytest

from fourge.errors import LaunchError
from fourge.launch.catalogue import load, versions

NONE = frozenset[str]()


def test_releases():
    assert versions("vllm") == ["0.33.0"]
    assert versions("sglang") == ["0.5.23"]
    assert load("vllm", "v0.33.0").version == "0.33.0"
    with pytest.raises(LaunchError, match=r"no catalogue of vllm 0\.1, but of 0\.33\.0"):
        load("vllm", "0.1")


def test_sizes_of_the_catalogues():
    for engine, options, variables in (("vllm", 320, 318), ("sglang", 531, 770)):
        catalogue = load(engine)
        assert len({spec.flag for spec in catalogue.specs.values()}) == options
        assert len(catalogue.environment) == variables


def test_names():
    vllm, sglang = load("vllm"), load("sglang")
    for name in ("-tp", "--tensor_parallel_size", "--tensor-parallel-size"):
        spec = vllm.find(name)
        assert spec is not None
        assert spec.flag == "--tensor-parallel-size"
    assert vllm.find("--tensor-parallel-siz") is None
    assert sglang.find("--tp_size") is None
    assert sglang.prefixed("--cuda-graph-max-bs") == [
        "--cuda-graph-max-bs-decode",
        "--cuda-graph-max-bs-prefill",
    ]
    assert vllm.nearest("--max-modl-len") == "--max-model-len"


@pytest.mark.parametrize(
    ("name", "negation"),
    [
        ("--no-enable-prefix-caching", True),
        ("--disable-prefix-caching", True),
        ("--enable-prefix-caching", False),
        ("-ep", False),
        ("--no-async-scheduling", True),
        ("--enable-uvicorn-access-log", True),
        ("--disable-uvicorn-access-log", False),
    ],
)
def test_negations(name: str, negation: bool):
    spec = load("vllm").find(name)
    assert spec is not None
    assert spec.negates(name) is negation


@pytest.mark.parametrize(
    ("engine", "flag", "values", "wrong"),
    [
        ("vllm", "--max-model-len", ["200k"], None),
        ("vllm", "--max-model-len", ["auto"], None),
        ("vllm", "--max-model-len", ["-1"], None),
        ("vllm", "--max-model-len", ["long"], "no number"),
        ("vllm", "--port", ["8000.5"], "no whole number"),
        ("vllm", "--gpu-memory-utilization", ["0,9"], "no number"),
        ("vllm", "--served-model-name", ["a", "b"], None),
        ("vllm", "--all2all-backend", ["deep"], "none of its choices"),
        ("vllm", "--hf-overrides", ["{'a': 1}"], "no JSON"),
        ("vllm", "--speculative-config", ['{"num_tokens": 1}'], "'num_tokens' is not known"),
        ("vllm", "--speculative-config", ['{"moe_backend": "x"}'], "moe_backend 'x'"),
        ("vllm", "--speculative-config", ['{"method": "mtp", "moe_backend": null}'], None),
        ("vllm", "--attention-backend", ["B12X_MLA_SPARSE"], "none of what vllm 0.33.0 knows"),
        ("sglang", "--attention-backend", ["b12x"], "none of its choices"),
        ("sglang", "--context-length", ["128k"], None),
        ("sglang", "--enable-metrics", ["yes"], "takes no value"),
        ("sglang", "--cuda-graph-bs-decode", ["1", "2", "x"], "no whole number"),
    ],
)
def test_values(engine: str, flag: str, values: list[str], wrong: str | None):
    catalogue = load(engine)
    spec = catalogue.find(flag)
    assert spec is not None
    found = catalogue.fault(spec, values, NONE)
    assert found is None if wrong is None else wrong in str(found)


def test_parsers_of_plugins_may_have_any_name():
    catalogue = load("vllm")
    spec = catalogue.find("--tool-call-parser")
    assert spec is not None
    assert catalogue.fault(spec, ["mine"], NONE) is not None
    assert catalogue.fault(spec, ["mine"], frozenset({"--tool-parser-plugin"})) is None
