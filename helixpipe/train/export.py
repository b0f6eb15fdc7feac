"""Export: a checkpoint of a run as a Hugging Face folder, on one process, whatever the ranks that wrote it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from helixpipe.errors import CheckpointError, ConfigError
from helixpipe.files import fault
from helixpipe.hub import adapter as adapters
from helixpipe.hub.architecture import Architecture
from helixpipe.hub.folder import Folder
from helixpipe.hub.known import fitting
from helixpipe.hub.write import lines_of, named_dtype, refuse_existing, shards_of, size_in_bytes, write_folder
from helixpipe.parts.lora import DOWN, UP, Lora
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.shape import ModelShape
from helixpipe.train import manifest as manifests
from helixpipe.train.checkpoint import quiet
from helixpipe.train.manifest import Manifest


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    checkpoint: Path
    step: int
    architecture: str
    dtype: str
    files: int
    parameters: int
    adapter: bool = False
    """Whether it is adapters alone."""


def export(
    run: str | Path, folder: str | Path, dtype: str | None = None, max_shard_size: str = "5GB", merge: bool = False
) -> Exported:
    """Write the newest good checkpoint of a run, or the checkpoint that `run` is, as a folder that transformers loads; of a
    run with LoRA as one of adapters that PEFT loads, or with `merge` as a whole model again.

    `dtype`: that of the folder which the run came from when not given, or what the checkpoint has, as adapters always do.
    Raises ConfigError or CheckpointError; the folder is then not there.
    """
    target, most = Path(folder), size_in_bytes(max_shard_size)
    kind = None if dtype is None else named_dtype(dtype)
    refuse_existing(target)
    checkpoint, manifest = _find(Path(run))
    shape = _shape(manifest)
    came_from = manifest.config.get("model", {}).get("path")
    source = Folder.open(came_from) if came_from else None
    tensors = _Tensors(checkpoint)
    if shape.lora is None and merge:
        raise ConfigError(f"--merge: {checkpoint} has no adapters; leave it out")
    if shape.lora is not None and not merge:
        return _export_adapters(target, checkpoint, manifest.step, source, shape, tensors, kind or tensors.dtype)
    architecture = source.architecture if source else fitting(shape)
    kind = kind or _dtype_of(source) or tensors.dtype
    read, shape = _Merged(tensors, shape).read, replace(shape, lora=None)
    config = _config(architecture, shape, manifest, source, kind)
    lines = lines_of(architecture.places(shape))
    shards = shards_of(lines, kind, most)
    write_folder(target, config, shards, kind, read, source.path if source else None)
    name = str(kind).removeprefix("torch.")
    return Exported(target, checkpoint, manifest.step, architecture.name, name, len(shards), shape.parameter_count)


def _export_adapters(
    target: Path,
    checkpoint: Path,
    step: int,
    source: Folder | None,
    shape: ModelShape,
    tensors: _Tensors,
    dtype: torch.dtype,
) -> Exported:
    """Adapters alone, in PEFT's format: on the weights, and with the config, of the folder that the run came from."""
    if source is None:
        raise ConfigError(
            f"{checkpoint}: its weights came from no folder, and adapters belong to one; export the whole model with --merge"
        )
    architecture = source.architecture
    if differs := architecture.differences(shape, source.config):
        raise ConfigError(
            f"model.{next(iter(differs))}: not as in {source.path}, and adapters cannot say so; export the whole model with --merge"
        )
    places = adapters.places_of(architecture, shape)
    config = adapters.config_of(architecture, shape, source.path)
    shards = {adapters.WEIGHTS: lines_of(places)}
    write_folder(target, config, shards, dtype, tensors.read, None, adapters.CONFIG)
    count = sum(math.prod(place.size) for place in places.values())
    return Exported(target, checkpoint, step, architecture.name, str(dtype).removeprefix("torch."), 1, count, True)


class _Merged:
    """A checkpoint's parameters, with adapters added to what they are beside."""

    def __init__(self, tensors: _Tensors, shape: ModelShape) -> None:
        self.tensors, self.scale = tensors, 0.0 if shape.lora is None else shape.lora.scale
        named = shape.parameter_elements(shape.chain())
        self.adapted = {name.removesuffix(f".{UP}.weight") for name in named if name.endswith(f".{UP}.weight")}

    def read(self, name: str) -> Tensor:
        """A parameter, by its full name; W + scale * B A in float32 or wider."""
        found = self.tensors.read(name)
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self.adapted:
            return found
        wide = torch.promote_types(found.dtype, torch.float32)
        up, down = (self.tensors.read(f"{layer}.{which}.weight").to(wide) for which in (UP, DOWN))
        return found.to(wide).addmm_(up, down, alpha=self.scale)


def _find(run: Path) -> tuple[Path, Manifest]:
    """A good checkpoint of a run folder, or the one that is named."""
    if why := fault(run / manifests.NAME):
        raise CheckpointError(f"{run}: {why}; give a run folder or one of its checkpoints")
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder; give a run folder or one of its checkpoints")
    if (run / manifests.NAME).exists() or run.name.startswith("step-"):
        return run, manifests.verify(run)
    inside = run if run.name == "checkpoints" else run / "checkpoints"
    bad: list[str] = []
    found = manifests.find_newest(inside, bad.append)
    if found is None:
        raise CheckpointError(f"{run}: no good checkpoint in {inside}; give a run folder or one of its checkpoints")
    return found


def _shape(manifest: Manifest) -> ModelShape:
    """The shape that was trained."""
    fields: dict[str, Any] = dict(manifest.shape)
    lora = fields.get("lora")
    return ModelShape(**fields | {"rope": Rotary(**fields.get("rope", {})), "lora": Lora(**lora) if lora else None})


def _config(
    architecture: Architecture, shape: ModelShape, manifest: Manifest, source: Folder | None, dtype: torch.dtype
) -> dict[str, Any]:
    """What config.json says: the folder's, with what the run has changed."""
    if shape.positions == "rope" and shape.rope.type != "dynamic":  # whose length is the original one
        lengths = [shape.context, manifest.config.get("train", {}).get("sequence_length", 0)]
        if (source is None or source.shape.rope != shape.rope) and shape.rope.original:
            lengths.append(int(shape.rope.original * (shape.rope.factor or 1)))
        shape = replace(shape, context=max(lengths))
    found = architecture.write(shape, source.config if source else None)
    if architecture.model_class not in (found.get("architectures") or []):
        found["architectures"] = [architecture.model_class]
    key = "torch_dtype" if "torch_dtype" in found and "dtype" not in found else "dtype"
    return found | {key: str(dtype).removeprefix("torch.")}


def _dtype_of(source: Folder | None) -> torch.dtype | None:
    name = source and (source.config.get("dtype") or source.config.get("torch_dtype"))
    try:
        return named_dtype(name) if isinstance(name, str) else None
    except ConfigError:
        return None


class _Tensors(FileSystemReader):
    """The parameters in a checkpoint, one at a time; its table is read once."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint
        self._table = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._table

    @property
    def dtype(self) -> torch.dtype:
        """The widest of any parameter."""
        each = [line.properties.dtype for name, line in self._lines.items() if name.startswith("model.")]
        return max((dtype for dtype in each if dtype.is_floating_point), key=lambda dtype: dtype.itemsize)

    @property
    def _lines(self) -> dict[str, TensorStorageMetadata]:
        every = self._table.state_dict_metadata.items()
        return {name: line for name, line in every if isinstance(line, TensorStorageMetadata)}

    def read(self, name: str) -> Tensor:
        """A parameter, by its full name."""
        line = self._lines.get(f"model.{name}")
        if line is None:
            raise CheckpointError(f"{self.checkpoint}: {name} is not in it; choose another checkpoint")
        found = torch.empty(line.size, dtype=line.properties.dtype)
        with quiet():
            try:
                load({f"model.{name}": found}, storage_reader=self, no_dist=True)
            except CheckpointException as error:
                cause = next(iter(error.failures.values()))[0]
                raise CheckpointError(f"{self.checkpoint}: {name}: {' '.join(str(cause).split())}") from None
        return found
