"""The configuration of `helixpipe train`: frozen dataclasses.

A key is `section.name` everywhere: in a TOML file under `[section]`, on the command line as
`--section.name value`, and in every error. What its values must be: `config_check`. How it is read and written: `config_text`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from helixpipe.config_data import DataConfig
from helixpipe.config_lora import LoraConfig
from helixpipe.config_rope import RopeConfig
from helixpipe.errors import ConfigError
from helixpipe.hub.adapter import Adapter
from helixpipe.hub.folder import Folder
from helixpipe.mesh import MeshShape
from helixpipe.parts.freezing import freeze
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Setting
from helixpipe.predict.profile import Profile
from helixpipe.predict.steps import Order, order_of_steps
from helixpipe.schedule import families
from helixpipe.schedule.partition import check_cut, refuse_bidirectional
from helixpipe.schedule.schedule import Schedule

DEFAULT_MODEL = "tiny"
OrAuto = Annotated[int, "auto"]
"""A whole number; or auto, which is a number by the time that a config is built."""
ELEMENT_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class ModelConfig:
    """A shape by name, or a model from files; and any of its fields to change."""

    name: str | None = None
    """A shape of helixpipe.parts.shapes.SHAPES, tiny when unset; the keys below change it."""
    path: str | None = None
    """In the place of a name, a Hugging Face folder: config.json and weights, from which training begins. Of the keys below
    only those that say how weights are used may then change: rope, rope_base, window, norm_eps, ..."""
    adapter: str | None = None
    """A folder of PEFT's: LoRA adapters on the weights in path, with which training goes on. They say what train.lora is."""
    layers: int | None = None
    """Decoder layers."""
    hidden: int | None = None
    """Size of the residual stream."""
    heads: int | None = None
    """Query heads."""
    kv_heads: int | None = None
    """Key/value heads; 0 is as many as heads."""
    head_dim: int | None = None
    """Size of a head; 0 is hidden / heads."""
    ffn: int | None = None
    """Inner size of the MLP."""
    vocabulary: int | None = None
    """Token ids; bytes of text need 256."""
    norm: Literal["rms", "layer"] | None = None
    """RMSNorm or LayerNorm."""
    norm_eps: float | None = None
    """What the norm adds to the variance."""
    norm_offset: bool | None = None
    """Whether an RMSNorm multiplies by 1 + weight."""
    norm_bias: bool | None = None
    """Whether a LayerNorm has a bias."""
    norms: Literal["before", "after", "both"] | None = None
    """Norms before attention and MLP, after each of them, or both."""
    embed_norm: bool | None = None
    """A norm of what the embedding makes, which is layer 0's norm before attention too."""
    embed_scale: float | None = None
    """What the embedding's rows are multiplied by."""
    positions: Literal["rope", "learned"] | None = None
    """Rotary or learned positions."""
    rope_base: float | None = None
    """The base of rotary positions."""
    rope: RopeConfig = field(default_factory=lambda: RopeConfig())
    """How rotary positions are scaled to longer sequences: a table with a type, a factor and what the type needs."""
    rotary_share: float | None = None
    """The share of a head that is rotated."""
    window_rope_base: float | None = None
    """The base of layers with a window, never scaled; 0 is as all layers."""
    context: int | None = None
    """The longest sequence that learned positions have room for; of rotary ones what the model was made for, and no limit."""
    mlp: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"] | None = None
    """Three matrices with a gate (the first three), or two."""
    qkv_bias: bool | None = None
    """Biases of q, k and v."""
    o_bias: bool | None = None
    """Bias of attention's output projection."""
    bias: bool | None = None
    """Biases of all linear layers but q, k, v and the head."""
    qk_norm: bool | None = None
    """A norm of q and k."""
    qk_norm_over: Literal["head", "width"] | None = None
    """Whether that is over each head or over all of them."""
    attention_scale: float | None = None
    """What attention's scores are multiplied by; 0 is head_dim ** -0.5."""
    softcap: float | None = None
    """c of c * tanh(score / c) in attention; 0 is none."""
    window: int | None = None
    """A token sees the window - 1 before it and itself; 0 is all."""
    window_pattern: tuple[bool, ...] | None = None
    """Which layers have the window, repeated over the layers; all of them when unset."""
    head_softcap: float | None = None
    """The softcap of the logits."""
    head_transform: bool | None = None
    """A linear layer, activation and norm before the logits."""
    tied: bool | None = None
    """Whether the head uses the embedding's table."""
    causal: bool | None = None
    """Whether a token attends only to those before it."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Which schedule. Options that stay unset are the family's own defaults."""

    family: str = "helix"
    """A published schedule: helix, 1f1b, gpipe, ... (helixpipe.schedule.families)."""
    ranks: int = 2
    """Pipeline ranks: processes, one device each where there are devices."""
    microbatches: int = 4
    """Micro-batches a step, on each replica; more fill the pipeline better."""
    folds: int | None = None
    """helix: micro-batch groups of folds x ranks; 1 is the naive order, 2 the two-fold."""
    travel: Literal["none", "qkv", "attention"] | None = None
    """helix: what moves with the attention to the rank that runs it."""
    groups: Literal["sequential", "forward_first"] | None = None
    """helix: one group after another (least memory), or all forward first (least bubble)."""
    balance: Literal["number", "work"] | None = None
    """helix: micro-batches take their places by number, or by the cost of their attention where documents differ."""
    segments: int | None = None
    """seq1f1b: pieces of a sequence."""
    stages_per_rank: int | None = None
    """interleaved: stages on a rank."""
    group: int | None = None
    """interleaved: micro-batches (or segments of them) that take a stage together; 0 is the fewest that feed all ranks."""
    placement: Literal["looped", "v", "line"] | None = None
    """constructed: stages round the ranks, there and back, or one a rank."""
    memory: str | None = None
    """constructed: what a rank's forwards may keep, as 24GiB, or as 1.5 times what one micro-batch leaves; unset, ranks times that."""
    tries: int | None = None
    """constructed: runs against the clock that improve an order; 0 chooses."""
    delay: float | None = None
    """constructed: what a message is taken to be on its way, in forwards of a stage; 0.5 when unset."""
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each stage, in order, where the family is not to choose; stage c x ranks + r is on rank r of interleaved ones."""
    vocabulary: Literal["last", "spread"] = "last"
    """Whether the head is on the last rank, or head and embedding are divided by words over all ranks, whatever the family."""
    partition: Literal["auto", "computation_wise", "even"] = "auto"
    """How a sequence is cut into segments: of as much computation each, or of as many tokens; auto is the family's own."""
    evenness: float = 0.0
    """How far computation-wise cuts are moved towards even ones, 0 to 1: 0.5 saves memory and costs little time."""
    profile: str = ""
    """A file of helixpipe profile, by whose measured costs segments are cut and stages balanced; "" is by FLOPs."""
    segment_multiple: int = 128
    """Segment lengths are multiples of it, the last excepted: kernels like round numbers."""


@dataclass(frozen=True)
class MeshConfig:
    """Ranks beside the pipeline's: in all schedule.ranks x dp x cp x tp processes."""

    dp: OrAuto = 1
    """Replicas: each trains on its own share of a batch, and gradients are summed once a step. auto: as many as the ranks that
    torchrun started allow, with train.batch_size, so that a run goes on in a smaller or larger world."""
    cp: int = 1
    """Ranks that share every sequence: each has a part of its tokens."""
    tp: int = 1
    """Ranks that share every layer's matrices: each has a part of the heads and of the MLP's columns."""
    context_method: Literal["ring", "ulysses"] = "ring"
    """How attention meets the tokens of other cp ranks: keys and values travel, or tokens are exchanged for heads."""
    layout: Literal["zigzag", "striped", "plain"] = "zigzag"
    """Which tokens a cp rank of a ring has: the first two give all ranks the same work; ulysses is always plain."""
    optimizer: Literal["replicated", "sharded"] = "replicated"
    """sharded: each of the dp x cp replicas keeps the state of its share of the parameters, and updates it (ZeRO-1)."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and the optimizer (AdamW, warm-up, a schedule of the learning rate)."""

    steps: int = 120
    """Optimizer steps in all."""
    objective: Literal["next_token", "masked", "masked_diffusion"] = "next_token"
    """The next token, of a causal model. Of a bidirectional one (model.causal false) tokens that are masked: a fixed share of
    them, or of each sequence a share t drawn anew, whose losses weigh 1 / t (LLaDA)."""
    mask_share: float | None = None
    """masked: the share of tokens that the model is asked for; 0.15 when unset."""
    mask_replace: tuple[float, float, float] | None = None
    """masked: shares of these that become the mask token, become a random word, and stay; 0.8, 0.1 and 0.1 when unset."""
    mask_token: int | None = None
    """masked, masked_diffusion: an id; when unset, of the tokenizer in a prepared folder or in model.path."""
    microbatch_size: int = 1
    """Sequences in a micro-batch."""
    batch_size: int | None = None
    """Sequences in a step, on all replicas, from which schedule.microbatches follows; when unset, as many as these are."""
    sequence_length: int = 1024
    """Tokens in a sequence."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    learning_rate: float = 2e-3
    """At its highest, after the warm-up."""
    min_learning_rate: float | None = None
    """Where the learning rate ends; a tenth of learning_rate when unset."""
    warmup_steps: int = 30
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: down by a cosine, by a line, not at all, or stable and then down by a line over decay_steps."""
    decay_steps: int | None = None
    """wsd: the last steps, over which the learning rate falls; a tenth of steps when unset."""
    weight_decay: float = 0.1
    """On matrices alone."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay of the first and second moment."""
    z_loss: float = 0.0
    """What the mean of (log-sum-exp of the logits)^2 weighs beside the cross entropy, such as 1e-4; losses shown are without."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained: names, or patterns such as "embed*" or "layers.0-15.*" (layers 0 to 15)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters to train in the place of the weights, which are frozen: a table with a rank, and alpha and targets."""
    clip_norm: float = 1.0
    """Gradients above this norm, over all ranks, are scaled down to it; 0 is no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Of a step whose loss or gradient norm is no finite number: end the run, or go on without its update. Where it came from is told."""
    nonfinite_limit: int = 10
    """skip: how many such steps in a row a run may have."""
    evaluate_every: int = 40
    """Steps between evaluations on held-out data; 0 is only the first and the last."""
    evaluate_sequences: int = 16
    """Sequences in an evaluation, spread evenly over what is held out, whatever a batch is; as many as fit side by side."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How a rank computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What parts compute in; weights and optimizer stay float32 (float64 for float64)."""
    recompute: Literal["none", "full", "selective"] = "selective"
    """What a forward does not keep and the backward computes again; selective is all but attention."""
    mlp_chunk: int = 0
    """Tokens at a time through the MLP, on all cp and tp ranks together; 0 is all at once."""
    head_chunk: int = 0
    """Tokens at a time through the head and the loss; 0 is all at once."""
    timeout_s: float = 300.0
    """A wait for another rank that lasts longer is an error."""
    port: int = 0
    """Where local ranks meet; 0 is any free port."""
    threads: int = 1
    """CPU threads of a rank."""
    attention: Literal["auto", "cudnn", "fa3", "flash", "efficient"] = "auto"
    """CUDA's kernel in half precision: cuDNN, FlashAttention 3 (its package), flash, memory-efficient; auto is what torch itself takes."""
    compile: bool = False
    """torch.compile makes kernels of what parts compute elementwise; takes a C++ compiler, on CUDA Triton, and time at the start."""
    communicators: Literal["direction", "pair"] = "direction"
    """NCCL's, between two ranks: one a direction, so that messages to and fro travel at once; or one a pair, where they are dear."""


@dataclass(frozen=True)
class RunConfig:
    """The run folder: config.toml, metrics.jsonl, checkpoints/ and the timeline of one step."""

    folder: str = ""
    """Where; "" is a new one, runs/<name>-<number>. Ranks on several machines must share it."""
    name: str = ""
    """Of new folders; "" is the config file's name, or 'default'."""
    checkpoint_every: int = 40
    """Steps between checkpoints (the last step has one too); 0 is none but those of checkpoint_minutes."""
    checkpoint_minutes: float = 0.0
    """Minutes after which there is a checkpoint too; 0 is none but those of checkpoint_every."""
    checkpoint_async: bool = True
    """Checkpoints are written while training goes on, from a copy of weights and moments in the CPU's memory; false: a step waits."""
    keep: int = 2
    """Checkpoints to keep: the newest ones, and those of the next two keys."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of it are kept for good; 0 is none."""
    keep_hours: float = 0.0
    """Checkpoints that are younger are kept; 0 is none."""
    resume: str = ""
    """'auto' continues the newest good checkpoint of the run folder, or starts where there is none; a path, that run's or that checkpoint."""
    timeline_step: int = 10
    """The step whose timeline is written, as .json, .svg, .html and for Perfetto; 0 is none."""
    profile_step: int = 0
    """The step that torch's profiler traces on every rank, in profile/, with the allocator's history on CUDA; 0 is none."""
    asks: tuple[str, ...] = ()
    """Keys that the config leaves open, such as train.learning_rate in what helixpipe plan writes: a run is refused without them."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the numbers of metrics.jsonl go too: tensorboard (event files in the run folder), wandb (Weights & Biases, as its
    own variables say: WANDB_MODE=offline, ...). They need helixpipe[logging]."""

    @property
    def saves(self) -> bool:
        """Whether there are checkpoints."""
        return bool(self.checkpoint_every or self.checkpoint_minutes)


@dataclass(frozen=True)
class Config:
    """Everything a run is decided by."""

    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def shape(self) -> ModelShape:
        """The model's shape; raises ConfigError."""
        changes = dataclasses.asdict(self.model)
        name, path, adapter = changes.pop("name"), changes.pop("path"), changes.pop("adapter")
        rope = {key: value for key, value in changes.pop("rope").items() if value is not None}
        changes = {key: value for key, value in changes.items() if value is not None}
        folder = Folder.open(path) if path else None
        shape = folder.changed(changes) if folder else named_shape(name or DEFAULT_MODEL, **changes)
        if adapter and folder is None:
            raise ConfigError(f"model.adapter: '{adapter}' belongs to weights in a folder; give model.path too")
        read = Adapter.open(adapter, folder).lora if adapter and folder else None
        shape = dataclasses.replace(shape, lora=self.train.lora.lora(read))
        shape = dataclasses.replace(shape, rope=shape.rope.with_keys(rope, shape.context)) if rope else shape
        return freeze(shape, self.train.freeze)

    @property
    def model_title(self) -> str:
        """What the model is called."""
        return self.model.name or (Path(self.model.path).name if self.model.path else DEFAULT_MODEL)

    def build_schedule(self) -> Schedule:
        """The schedule, checked. Raises ConfigError."""
        asked, setting = self.schedule, self.setting()
        options = self.schedule_options()
        if asked.segments is not None and asked.segments > 1:  # far too many would take minutes to build first
            refuse_bidirectional(setting.shape, asked.segments)
            check_cut(setting.sequence_length, asked.segments, setting.segment_multiple)
        return setting.build(asked.family, asked.ranks, asked.microbatches, **options)

    def schedule_options(self) -> dict[str, Any]:
        """What of the section [schedule] is the family's own, and what is every family's. Raises ConfigError."""
        asked = self.schedule
        given = {key: value for key in FAMILY_OPTIONS if (value := getattr(asked, key)) is not None}
        for key in given:
            if key not in families.options(asked.family):
                having = [name for name in families.FAMILIES if key in families.options(name)]
                raise ConfigError(
                    f"schedule.{key}: {asked.family} has no such option, {', '.join(having)} has; remove the key"
                )
        return given | {"vocabulary": asked.vocabulary, "layers_per_stage": asked.layers_per_stage or ()}

    def order_of_steps(self, schedule: Schedule) -> Order | None:
        """A step's micro-batches -> the order in which they run; None where it is always that of the config's schedule."""
        return order_of_steps(self.setting(), schedule, self.schedule.family, self.schedule_options())

    def setting(self, device: str = "") -> Setting:
        """What predictions need to know of this run; of the machine, only its profile.

        `device`: what the run came to use, where that is known; `runtime.device` when not given, and auto then counts as
        cpu.
        """
        runtime, schedule = self.runtime, self.schedule
        shape = self.shape()
        profile, kind = None, "cuda" if (device or runtime.device).startswith("cuda") else "cpu"
        if schedule.profile and shape.lora is not None:
            raise ConfigError(
                f"schedule.profile: '{schedule.profile}' was measured without adapters, and train.lora has some; leave it out"
            )
        if schedule.profile:
            profile = Profile.load(schedule.profile)
            profile.check_fits(shape, dtype=runtime.dtype)
            kind = profile.device_type
        keeping = Keeping(runtime.recompute, ELEMENT_BYTES[runtime.dtype], runtime.mlp_chunk, runtime.head_chunk, kind)
        found = Setting(
            shape,
            self.train.sequence_length,
            keeping=keeping,
            microbatch_size=self.train.microbatch_size,
            tensor_parallel=self.mesh.tp,
            context_parallel=self.mesh.cp,
            data_parallel=self.mesh.dp,
            profile=profile,
            partition=schedule.partition,
            evenness=schedule.evenness,
            segment_multiple=schedule.segment_multiple,
            context_method=self.mesh.context_method,
            layout=self.mesh.layout,
            optimizer=self.mesh.optimizer,
        )
        return found.of_family(schedule.family)

    def segment_lengths(self, schedule: Schedule) -> tuple[int, ...] | None:
        """Tokens of each segment; None when sequences stay whole."""
        return None if schedule.segments == 1 else self.setting().segment_lengths(schedule.segments)

    def mesh_shape(self) -> MeshShape:
        """All ranks, by direction."""
        asked = self.mesh
        return MeshShape(self.schedule.ranks, asked.dp, asked.cp, asked.tp, asked.context_method, asked.layout)

    @property
    def batch_size(self) -> int:
        """Sequences in a step."""
        return self.schedule.microbatches * self.train.microbatch_size * self.mesh.dp


_OF_NO_FAMILY = ("layers_per_stage",)
FAMILY_OPTIONS = tuple(
    option.name
    for option in dataclasses.fields(ScheduleConfig)
    if option.default is None and option.name not in _OF_NO_FAMILY
)
