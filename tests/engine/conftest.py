"""A tiny random model, and transformers' model of a checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine_models import write_model


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Products of tiny models are over before a second thread has begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def their_model() -> Callable[[Path], Any]:
    """transformers' model in float32; its two latent norms with the configured epsilon, as vllm and
    sglang have them.
    """

    def load(folder: Path) -> Any:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm.variance_epsilon = model.config.rms_norm_eps
            layer.self_attn.q_a_layernorm.variance_epsilon = model.config.rms_norm_eps
        return model.eval().requires_grad_(False)

    return load
