"""Batches cut the corpus the same way always; row files keep what is written and last when told."""

from pathlib import Path

import pytest
import torch

from fourge.errors import OutputError
from fourge.layerwise.activations import (
    Batch,
    LayerActivations,
    RowFile,
    hidden_file,
    make_batches,
    remove_before,
)
from fourge.models.config import from_dict
from fourge.models.moe import Routed
from random_checkpoint import published_config

CPU = torch.device("cpu")


def test_batches_hold_whole_sequences_of_one_pass():
    batches = make_batches([3, 4, 2, 9, 1, 1], [0, 0, 0, 0, 1, 1], batch_tokens=7)
    assert batches == [
        Batch(0, 0, (3, 4)),
        Batch(0, 7, (2,)),
        Batch(0, 9, (9,)),
        Batch(1, 18, (1, 1)),
    ]
    assert sum(batch.tokens for batch in batches) == 20


def test_one_sequence_is_one_batch():
    assert make_batches([5], [0], batch_tokens=2) == [Batch(0, 0, (5,))]


def test_rows_come_back_and_the_file_lasts_only_after_commit(tmp_path: Path):
    rows = torch.randn(6, 4).bfloat16()
    file = RowFile(tmp_path / "rows.bin", width=4, dtype=torch.bfloat16).create()
    file.write(4, rows[4:])
    file.write(0, rows[:4].float())
    assert torch.equal(file.read(0, 6), rows)
    assert not (tmp_path / "rows.bin").exists()
    file.commit()
    file.close()
    again = RowFile(tmp_path / "rows.bin", width=4, dtype=torch.bfloat16).open()
    assert torch.equal(again.read(1, 3), rows[1:4])
    with pytest.raises(OutputError, match="shorter than the run needs"):
        again.read(5, 2)
    again.close()


def test_an_uncommitted_file_leaves_nothing(tmp_path: Path):
    file = RowFile(tmp_path / "rows.bin", width=4, dtype=torch.float32).create()
    file.write(0, torch.ones(2, 4))
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_a_lost_input_is_named(tmp_path: Path):
    config = from_dict(published_config())
    with pytest.raises(OutputError, match=r"hidden-00001\.bin.*cannot be read"):
        hidden_file(tmp_path, config, 1).open()


def test_inputs_of_finished_layers_are_removed(tmp_path: Path):
    for name in ("hidden-00001.bin", "topk-00001.bin", "hidden-00002.bin", "corpus.json"):
        (tmp_path / name).write_bytes(b"")
    remove_before(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.json", "hidden-00002.bin"]


def test_what_waits_between_groups_keeps_every_bit(tmp_path: Path):
    config = from_dict(published_config())
    hidden = hidden_file(tmp_path, config, 1).create()
    hidden.write(0, torch.randn(6, config.hidden_size))
    hidden.commit()
    hidden.close()
    batch = Batch(0, 2, (4,))
    routed = Routed(
        torch.randn(4, config.hidden_size),
        torch.randint(0, 6, (4, config.num_experts_per_tok)),
        torch.rand(4, config.num_experts_per_tok),
        torch.randn(4, config.hidden_size),
    )
    activations = LayerActivations(tmp_path, config, 1, dtype=torch.float32, device=CPU)
    with activations:
        activations.hold(batch, routed, is_first=True)
        for kept, given in zip(activations.take_up(batch), routed, strict=True):
            assert torch.equal(kept, given)
        routed.acc_TD.add_(1)
        activations.hold(batch, routed, is_first=False)
        for kept, given in zip(activations.take_up(batch), routed, strict=True):
            assert torch.equal(kept, given)
        activations.write_output(batch, routed.acc_TD)
        activations.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hidden-00001.bin",
        "hidden-00002.bin",
    ]


def test_selections_reach_the_layer_that_shares_them(tmp_path: Path):
    config = from_dict(published_config(indexer_types=["full", "shared", "shared"], index_topk=3))
    batch = Batch(0, 0, (2, 5))
    selection = torch.arange(15, dtype=torch.int32).reshape(5, 3)
    hidden = hidden_file(tmp_path, config, 0).create()
    hidden.write(0, torch.zeros(7, config.hidden_size))
    hidden.commit()
    hidden.close()
    first = LayerActivations(tmp_path, config, 0, dtype=torch.float32, device=CPU)
    with first:
        assert first.read_topk(batch) is None
        first.write_topk(batch, [None, selection])
        first.write_output(batch, torch.zeros(7, config.hidden_size))
        first.commit()
    second = LayerActivations(tmp_path, config, 1, dtype=torch.float32, device=CPU)
    with second:
        short, long = second.read_topk(batch) or ()
        assert short is None
        assert torch.equal(long, selection)
