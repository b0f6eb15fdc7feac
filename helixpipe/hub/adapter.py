"""Adapter: a folder of PEFT's, adapter_config.json and adapter_model.safetensors, read and written. No torch.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    layers.0.qkv.q.lora_a.weight    [rank, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    layers.0.qkv.q.lora_b.weight    [out, rank]

Which layers have one, the tensors say: target_modules may be names, endings or a pattern. What would make PEFT compute
anything else is refused by its key and value.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.files import fault
from helixpipe.hub.architecture import Architecture, Place
from helixpipe.hub.entries import typed
from helixpipe.hub.folder import Folder, Source
from helixpipe.hub.headers import DTYPES, read_json, stored_in
from helixpipe.parts.lora import DOWN, LAYERS, UP, Lora, is_adapter
from helixpipe.parts.shape import ModelShape

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY = "model.adapter"
_PREFIX = "base_model.model."
_OURS = {"lora_A": DOWN, "lora_B": UP}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "bias", "init_lora_weights"})
_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "target_modules",
    "layers_pattern", "megatron_core", "qalora_group_size",
})  # fmt: skip
"""Keys that say nothing of what is computed, or what the tensors say too, or that mean nothing without another key."""
_ADVICE = {"lora_dropout": "nothing is dropped here; set it to 0 to go on without"}


@dataclass(frozen=True)
class Adapter:
    """One that belongs to a model's weights."""

    path: Path
    lora: Lora
    sources: Mapping[str, Source]
    """Full name of each of its parameters -> where it is."""

    @staticmethod
    def open(path: str | Path, folder: Folder) -> Adapter:
        """Raises ConfigError for one of another model or size, or one that asks for what there is not here."""
        path = Path(path)
        try:
            return _opened(path, folder.architecture, folder.shape)
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from None


def _opened(path: Path, architecture: Architecture, shape: ModelShape) -> Adapter:
    if why := fault(path / CONFIG):
        raise ConfigError(f"{path}: {why}; give a folder with an {CONFIG}")
    if not (path / CONFIG).is_file():
        what = f"no {CONFIG} in it" if path.is_dir() else "no such folder"
        raise ConfigError(f"{path}: {what}; give a folder that PEFT's save_pretrained wrote")
    config = read_json(path / CONFIG)
    try:
        _refuse(config)
        rank = typed("r", config.get("r", 8), "int")
        alpha = typed("lora_alpha", config.get("lora_alpha", 8), "float")
        rslora = typed("use_rslora", config.get("use_rslora") or False, "bool")
        if rank < 1 or not alpha > 0:
            raise ConfigError(f"r: {rank}, with lora_alpha {alpha:g}; both are more than 0")
    except ConfigError as error:
        raise ConfigError(f"{path / CONFIG}: {error}") from None
    stored = stored_in(path, (WEIGHTS, PICKLED))
    modules = _modules(architecture, shape)
    found: dict[str, str] = {}
    for name, line in stored.items():
        found[_ours(name, modules, architecture.name, line.file)] = name
    layers = {name.rsplit(".", 2)[0] for name in found}
    targets = tuple({layer.rsplit(".", 1)[1] for layer in layers})
    if not targets:
        raise ConfigError(f"{path}: no adapter is in its weights; give a folder that PEFT's save_pretrained wrote")
    lora = Lora(rank, alpha, targets, rslora)
    turned = [place for ours, place in architecture.places(shape).items() if ours.removesuffix(".weight") in layers]
    if config.get("fan_in_fan_out") and not all(place.transposed for place in turned):
        raise ConfigError(
            f"{path / CONFIG}: fan_in_fan_out: true, and {architecture.name}'s weights are [out, in]; set it to false"
        )
    sources: dict[str, Source] = {}
    for ours, size in _sizes(replace(shape, lora=lora)).items():
        if ours not in found:
            raise ConfigError(f"{path}: {_theirs(ours, modules)} is missing; every layer must have the same adapters")
        line = stored[found[ours]]
        if line.size != size:
            raise ConfigError(
                f"{line.file}: {line.name} is {list(line.size)}, and of this model and r {rank} it is {list(size)}; "
                "give the adapter that belongs to model.path"
            )
        if line.dtype not in DTYPES:
            raise ConfigError(f"{line.file}: {line.name} is {line.dtype}; known: {', '.join(DTYPES)}")
        sources[ours] = Source(line, Place(line.name, size, 0, size[0], False), key=KEY)
    return Adapter(path, lora, sources)


def _refuse(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"peft_type: {json.dumps(config.get('peft_type'))}; only LORA is known")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"bias: {json.dumps(config['bias'])}; biases are not trained here, only none is known")
    how = config.get("init_lora_weights", True)
    if not isinstance(how, bool) and how not in (None, "gaussian"):
        raise ConfigError(
            f"init_lora_weights: {json.dumps(how)} may change the weights beside it; convert it to plain LoRA"
        )
    for key, value in config.items():
        if key in _READ or key in _IGNORED or not value:
            continue
        advice = _ADVICE.get(key, "it may change what is computed")
        raise ConfigError(f"{key}: {json.dumps(value, default=str)[:60]} is not known here: {advice}")


def _modules(architecture: Architecture, shape: ModelShape) -> dict[str, list[str]]:
    """Module of theirs -> linear layers of ours that it is, by full name."""
    found: dict[str, list[str]] = {}
    for ours, place in architecture.places(shape).items():
        if ours.endswith(".weight"):
            found.setdefault(place.tensor.removesuffix(".weight"), []).append(ours.removesuffix(".weight"))
    return found


def _ours(name: str, modules: Mapping[str, list[str]], architecture: str, file: Path) -> str:
    """What a tensor is here; raises ConfigError."""
    match = re.fullmatch(r"(.+)\.(lora_A|lora_B)\.weight", name.removeprefix(_PREFIX))
    ours = modules.get(match[1], []) if match else []
    if len(ours) > 1:
        each = ", ".join(one.rsplit(".", 1)[1] for one in ours)
        raise ConfigError(f"{file}: {name} is one adapter of {each} together, and here each has its own")
    if not match or not ours or not re.fullmatch(rf"layers\.\d+\.\w+\.({'|'.join(LAYERS)})", ours[0]):
        raise ConfigError(f"{file}: {name} is of no linear layer that can have an adapter in {architecture}")
    return f"{ours[0]}.{_OURS[match[2]]}.weight"


def _theirs(ours: str, modules: Mapping[str, list[str]]) -> str:
    """The name of a tensor in a file."""
    layer, which, _ = ours.rsplit(".", 2)
    module = next(module for module, layers in modules.items() if layer in layers)
    return f"{_PREFIX}{module}.{_THEIRS[which]}.weight"


def _sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Adapters' parameters, by full name."""
    return {
        full: size
        for part in shape.chain()
        for name, size in shape.parameters(part).items()
        if is_adapter(full := shape.parameter_name(part, name))
    }


def places_of(architecture: Architecture, shape: ModelShape) -> dict[str, Place]:
    """Full name of every adapter's parameter -> its place in a file. Raises ConfigError where theirs is one of several of ours."""
    modules = _modules(architecture, replace(shape, lora=None))
    shared = {layer: (module, layers) for module, layers in modules.items() for layer in layers if len(layers) > 1}
    found: dict[str, Place] = {}
    for ours, size in _sizes(shape).items():
        layer = ours.rsplit(".", 2)[0]
        if layer in shared:
            module, layers = shared[layer]
            each = ", ".join(one.rsplit(".", 1)[1] for one in layers)
            raise ConfigError(
                f"train.lora.targets: {layer.rsplit('.', 1)[1]}, and {architecture.name} has {each} in one matrix, "
                f"{module.rsplit('.', 1)[1]}, of which PEFT has no adapter for a piece; export the whole model with --merge"
            )
        found[ours] = Place(_theirs(ours, modules), size, 0, size[0], False)
    return found


def config_of(architecture: Architecture, shape: ModelShape, base: Path) -> dict[str, Any]:
    """What adapter_config.json says of a shape with adapters on the weights in a folder."""
    lora = shape.lora
    assert lora is not None
    files = {ours: tensor.file for tensor in architecture.tensors for ours in tensor.ours}
    inside = {
        ours.rsplit(".", 1)[-1]: file for ours, file in files.items() if re.match(r"layers\.N\.(qkv|proj|mlp)\.", ours)
    }
    ends = Counter(file.rsplit(".", 1)[-1] for file in files.values())
    targets = [
        file.rsplit(".", 1)[-1] if ends[file.rsplit(".", 1)[-1]] == 1 else file.split(".N.", 1)[1]
        for file in (inside[target] for target in lora.targets)
    ]
    turned = all(t.transposed for t in architecture.tensors if any(inside[x] == t.file for x in lora.targets))
    return {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": sorted(set(targets)),
        "task_type": "CAUSAL_LM",
        "use_rslora": lora.rslora,
    }
