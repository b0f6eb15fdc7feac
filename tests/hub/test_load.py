"""Folders that transformers wrote, loaded: the same loss, on one rank and on several, and of every rank its own share alone.

transformers computes RMSNorm, rotary tables and the softmax in float32 whatever the model's precision, so losses agree to
float32's last bits (1e-6 of a nat, 6e-8 measured), GPT-2's to float64's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from saved import KEYS, LAYERS, batch, loss_of, model_of, saved
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import helixpipe as hp
from helixpipe.hub import load as loading
from helixpipe.hub.folder import Folder
from helixpipe.hub.headers import Stored
from helixpipe.hub.load import Range
from helixpipe.parts.part import Part

_meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}


def ours(
    folder: Path,
    family: str = "1f1b",
    ranks: int = 1,
    mesh: Any = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> float:
    """Of a step without an update."""
    schedule = hp.build_schedule(family, ranks=ranks, layers=LAYERS, microbatches=4, **options)
    pipeline = hp.Pipeline(hp.load(folder), schedule, mesh, dtype=dtype, timeout_s=30)
    return pipeline.step(*batch())


@pytest.mark.parametrize("name", KEYS)
def test_the_loss_is_transformers_own(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    assert ours(tmp_path) == pytest.approx(loss_of(model), abs=1e-12 if name == "gpt2" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_of_any_precision_become_masters_without_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(tmp_path, "llama", dtype)
    loaded = {
        name: p
        for part in hp.load(tmp_path).shape.chain()
        for name, p in hp.load(tmp_path).part(part).named_parameters()
    }
    assert {p.dtype for p in loaded.values()} == {torch.float32}
    assert ours(tmp_path, dtype=torch.float32) == pytest.approx(loss_of(model.float()), abs=1e-5)


def test_many_files_and_torchs_own_are_as_one(tmp_path: Path) -> None:
    model = saved(tmp_path / "one", "qwen3")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    pickled = tmp_path / "pickled"
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    losses = [ours(tmp_path / name) for name in ("one", "many", "pickled")]
    assert losses[0] == losses[1] == losses[2] == pytest.approx(loss_of(model), abs=1e-6)


def test_names_without_a_prefix_and_a_tied_table_stored_twice(tmp_path: Path) -> None:
    """A base model alone has no head, and one that is tied needs none; older GPT-2 files hold masks beside."""
    model = saved(tmp_path / "whole", "gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    assert "wte.weight" in tensors
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(LAYERS)}
    save_file(tensors | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}, file, {"format": "pt"})
    assert ours(tmp_path / "base") == ours(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, file, {"format": "pt"})
    assert ours(tmp_path / "whole") == ours(tmp_path / "base")


def test_what_is_said_of_rotary_positions_is_computed(tmp_path: Path) -> None:
    """Beyond the original length."""
    scaling = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}
    model = saved(tmp_path, "llama", rope_parameters=scaling)
    assert ours(tmp_path) == pytest.approx(loss_of(model), abs=1e-6)
    assert abs(loss_of(model) - loss_of(model_of("llama"))) > 1e-4


class Asked(NamedTuple):
    """What a rank read: file tensor -> numbers in the rows and columns that it asked for."""

    loss: float
    numbers: dict[str, int]


def on_a_rank(folder: Path, family: str, sizes: tuple[tuple[str, int], ...], options: dict[str, Any]) -> Asked:
    """On a rank of the four."""
    if sizes not in _meshes:
        names, counts = zip(*sizes, strict=True)
        _meshes[sizes] = init_device_mesh("cpu", counts, mesh_dim_names=names)
    numbers: dict[str, int] = {}
    read = loading.read_range

    def spy(stored: Stored, asked: Range) -> torch.Tensor:
        found = read(stored, asked)
        numbers[stored.name] = numbers.get(stored.name, 0) + found.numel()
        return found

    loading.read_range = spy
    try:
        loss = ours(folder, family, dict(sizes)["pp"], _meshes[sizes], **options)
    finally:
        loading.read_range = read
    return Asked(loss, numbers)


CASES: list[tuple[str, str, dict[str, Any], tuple[tuple[str, int], ...]]] = [
    ("llama", "1f1b", {}, (("pp", 2), ("dp", 2))),
    ("qwen2", "helix", {"folds": 1, "travel": "qkv"}, (("pp", 2), ("dp", 2))),
    ("phi3", "1f1b", {}, (("pp", 2), ("tp", 2))),
    ("gpt2", "helix", {"folds": 1, "travel": "attention"}, (("pp", 2), ("tp", 2))),
    ("llama", "1f1b", {"vocabulary": "spread"}, (("pp", 2), ("dp", 2))),
    ("gpt2", "zb_h1", {"vocabulary": "spread"}, (("pp", 2), ("tp", 2))),
]


@pytest.mark.parametrize(("name", "family", "options", "sizes"), CASES, ids=lambda each: str(each)[:24])
def test_a_rank_reads_its_own_share_alone(
    name: str,
    family: str,
    options: dict[str, Any],
    sizes: tuple[tuple[str, int], ...],
    tmp_path: Path,
    four_ranks: Ranks,
) -> None:
    """What visits is read by its owner alone, and tensor parallelism reads of every cut tensor one part a rank."""
    model = saved(tmp_path, name)
    found: list[Asked] = four_ranks.run(on_a_rank, tmp_path, family, sizes, options)
    loss = ours(tmp_path)
    assert [asked.loss for asked in found] == pytest.approx([loss] * 4, abs=1e-9)
    replicas = 2  # of each number that is not divided
    stored = Folder.open(tmp_path).sources
    total = {source.stored.name: math.prod(source.stored.size) for source in stored.values()}
    read = {tensor: sum(asked.numbers.get(tensor, 0) for asked in found) for tensor in total}
    cut = {"q", "k", "v", "o", "gate", "up", "down"} if "tp" in dict(sizes) else set()
    for parameter, source in stored.items():
        module, kind = parameter.split(".")[-2:]
        divided = module in cut and not (kind == "bias" and module in ("o", "down"))
        assert read[source.stored.name] == total[source.stored.name] * (1 if divided else replicas), parameter
    assert all(len(asked.numbers) < len(total) for asked in found)  # nobody reads all
    del model


def test_one_tensor_at_a_time_is_there_beside_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was read is still there when the next is asked for, but the parameters."""
    import weakref

    saved(tmp_path, "llama", torch.bfloat16)
    pieces: list[weakref.ref[torch.Tensor]] = []
    read = loading.read_range

    def spy(stored: Stored, asked: Range) -> torch.Tensor:
        assert not any(piece() is not None for piece in pieces)
        found = read(stored, asked)
        pieces.append(weakref.ref(found))
        return found

    monkeypatch.setattr(loading, "read_range", spy)
    model = hp.load(tmp_path)
    parts = [model.part(part) for part in model.shape.chain()]
    assert len(pieces) == len(model.sources)
    assert parts


def test_a_part_that_another_rank_owns_has_sizes_and_no_memory(tmp_path: Path) -> None:
    from helixpipe.model.decoder import Held

    saved(tmp_path, "llama")
    model = hp.load(tmp_path)
    (gate,) = [
        parameter
        for name, parameter in model.part_for(
            Part("mlp", 1), Held(model.shape, owns=lambda name: False)
        ).named_parameters()
        if name == "gate.weight"
    ]
    assert gate.shape == (24, 16)
    assert gate.untyped_storage().nbytes() == 4


def test_progress_counts_every_number_once(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    model = hp.load(tmp_path)
    told: list[int] = []
    model.tell = told.append
    for part in model.shape.chain()[:-1]:  # the head's table is the embedding's
        model.part(part)
    assert sum(told) == model.shape.parameter_count - 2 * 16
