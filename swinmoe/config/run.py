"""What a run is: data, optimisation, schedule, parallelism, checkpoints, and the arms of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from swinmoe.config.checks import (
    Range,
    above,
    at_least,
    below_one,
    check_folder_name,
    check_ranges,
    divisors,
    probability,
)
from swinmoe.config.finetune import FinetuneConfig
from swinmoe.config.model import ModelConfig, Pair
from swinmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Per-image augmentation; every draw depends on (seed, epoch, sample index) only."""

    crop_padding: int = 0
    """Pad by so many pixels and crop back at random (small images)."""
    random_resized_crop: tuple[float, float] | None = None
    """Area range of a random resized crop, e.g. (0.08, 1.0) on ImageNet; None = none."""
    horizontal_flip: float = 0.0
    rand_augment: str | None = None
    """timm's RandAugment string, e.g. `rand-m9-mstd0.5-inc1`."""
    color_jitter: float = 0.0
    """Used where rand_augment is not set."""
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "data.augment",
            crop_padding=at_least(0, "use 0 for none"),
            horizontal_flip=probability(),
            color_jitter=at_least(0, "use 0 for none"),
            random_erasing=probability(),
        )
        area = self.random_resized_crop
        if area is not None and not 0 < area[0] <= area[1] <= 1:
            raise ConfigError(
                f"data.augment.random_resized_crop={list(area)} is not a range of areas; use e.g. [0.08, 1.0], or null"
            )


@dataclass(frozen=True, kw_only=True)
class MixupConfig:
    """Mixup and CutMix on batches (timm's)."""

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        beta = at_least(0, "it is a Beta distribution's parameter; use 0 for none")
        check_ranges(self, "data.mixup", mixup=beta, cutmix=beta, prob=probability(), switch_prob=probability())


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    name: Literal["digits", "fashion_mnist", "folder", "synthetic", "tar", "zip"] = "digits"
    root: str | None = None
    """Folder of `fashion_mnist`, `folder`, `tar` and `zip`; None = the usual places, which an error lists."""
    train_files: str | None = None
    """Below root. `zip`: the map of training images; `tar`: shards, as `name-{000000..000999}.tar`. None = as usual."""
    eval_files: str | None = None
    """Likewise, of the evaluation images."""
    num_classes: int | None = None
    """`tar` and `zip`: labels are 0 ... num_classes - 1; None = up to the highest training label."""
    label_key: str = "label"
    """`tar`: where the class id is in a sample's `.json`."""
    index_dir: str | None = None
    """`tar`: folder for the index made of each shard; None = beside the shard."""
    shuffle_window: int | None = None
    """`tar`: an epoch visits shards in random order and shuffles so many images at a time, so that reading stays almost
    sequential; None = shuffle all images."""
    image_size: Pair = (32, 32)
    holdout: int = 0
    """So many training images, drawn by `holdout_seed`, are kept out of training and evaluated, not the test set."""
    holdout_seed: int = 0
    limit: int | None = None
    """Use only the first so many training and evaluation images (debugging)."""
    download: bool = False
    """`fashion_mnist`: let torchvision download it if it is found nowhere."""
    synthetic_samples: int = 512
    synthetic_classes: int = 10
    channels: int | None = None
    """1 or 3; None = as the data set has them."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    workers: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "data",
            image_size=at_least(1, "give height and width in pixels"),
            holdout=at_least(0, "use 0 for the data set's own evaluation images"),
            limit=at_least(1, "use null for all images"),
            num_classes=at_least(1, "use null for the highest training label plus one"),
            shuffle_window=at_least(1, "use null to shuffle all images"),
            synthetic_samples=at_least(1),
            synthetic_classes=at_least(1),
            workers=at_least(0, "use 0 to load in the training process"),
        )
        if self.channels not in (None, 1, 3):
            raise ConfigError(f"data.channels={self.channels} is not possible; use 1 (grey), 3 (RGB) or null")
        if self.shuffle_window is not None and self.name != "tar":
            raise ConfigError(
                f"data.shuffle_window={self.shuffle_window} is for data.name=tar, not {self.name}; use null, which "
                "shuffles all images"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with the no-decay set of the Swin papers."""

    base_lr: float = 1e-3
    lr_batch: int = 0
    """Linear scaling: peak rate base_lr·(global batch/lr_batch), warm-up and minimum likewise; 0 = no scaling."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_grad_norm: float | None = 5.0
    layer_decay: float = 1.0
    """Each layer's rate over that of the layer above it (BEiT, SimMIM); see `train.layer_decay`; 1 = one rate."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "optim",
            base_lr=above(0, "use e.g. 1e-3"),
            lr_batch=at_least(0, "use 0 for no scaling"),
            betas=below_one("use e.g. [0.9, 0.999]"),
            eps=above(0, "use e.g. 1e-8"),
            weight_decay=at_least(0, "use 0 for none"),
            clip_grad_norm=above(0, "use null for no clipping"),
            layer_decay=Range(0, 1, low_open=True, advice="use e.g. 0.9, or 1 for one rate"),
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then cosine down to `min_lr`."""

    warmup_epochs: float = 0.0
    warmup_steps: int | None = None
    """Overrides warmup_epochs."""
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    warmup_prefix: bool = True
    """True: the cosine begins after the warm-up (Microsoft's Swin-MoE); False: it runs under it from step 0."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "schedule",
            warmup_epochs=at_least(0, "use 0 for no warm-up"),
            warmup_steps=at_least(0, "use 0 for no warm-up, null to count epochs"),
            warmup_lr=at_least(0),
            min_lr=at_least(0),
        )


def _which_kernels(given: object) -> object:
    """Yes and no are all and none, as checkpoints have it that were written when these were the choices."""
    return {True: "all", False: "none"}[given] if isinstance(given, bool) else given


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and manner of training. Batches are counted globally, over all ranks and micro-batches."""

    epochs: float | None = 1
    steps: int | None = None
    """Optimiser steps; overrides epochs."""
    batch_size: int = 64
    """Images per optimiser step, over all processes and accumulation steps."""
    eval_batch_size: int = 256
    accumulation: int = 1
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    tf32: bool = False
    """On a GPU: float32 matrix products and convolutions in TensorFloat-32, which rounds their operands to 10 bits of
    mantissa. The gate stays exact (`moe.router.fp32`)."""
    offload_activations: bool = False
    """What the backward pass needs waits for it in the host's memory (pinned, for a GPU); weights stay."""
    compile: bool = False
    """Blocks are compiled by `torch.compile`: minutes at the start, faster steps. See `models.compile_blocks`."""
    native_kernels: Annotated[Literal["none", "experts", "all"], BeforeValidator(_which_kernels)] = "experts"
    """What our kernels in C++ compute on a CPU, in fp32; seconds of a C++ compiler, the first time. `experts`: experts'
    MLPs, where there is a compiler. `all`: attention and dense MLPs too, and no compiler is an error. `compile` takes
    those of attention and dense MLPs anyway, where it can. See `models.use_native_kernels`."""
    eval_every_epochs: float | None = 1
    """None = at the end only."""
    dead_expert_window: int = 100
    """An expert that got no token over so many steps is called dead."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "train",
            epochs=above(0, "for a fixed number of steps set train.steps"),
            steps=at_least(1, "use null to count epochs"),
            eval_batch_size=at_least(1),
            label_smoothing=below_one(),
            ema_decay=Range(0, 1, low_open=True, high_open=True, advice="use e.g. 0.9999, or null for no average"),
            eval_every_epochs=above(0, "use null to evaluate at the end only"),
            dead_expert_window=at_least(1),
        )
        if self.epochs is None and self.steps is None:
            raise ConfigError("train.epochs and train.steps are both null; give one of them")
        if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
            raise ConfigError(
                f"train.batch_size={self.batch_size} cannot be split into train.accumulation={self.accumulation} "
                "micro-batches; use a divisor"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the work. `ep_size` ranks share one set of experts; the rest are data-parallel replicas.

    A layer with fewer experts than `ep_size` cuts each expert's hidden width into ep_size/E slices. Results do not
    depend on anything here, up to rounding (and to `payload`).
    """

    ep_size: int = 1
    """Ranks that share one set of experts, neighbours in rank order. It divides the number of experts, or is a
    multiple of it."""
    weight_group: int = 1
    """Neighbouring ranks that gather each other's expert weights, so that fewer tokens have to travel. 1: tokens
    travel; `ep_size`: only weights do; a divisor between: both."""
    exchange: Literal["flat", "2dh"] = "flat"
    """How tokens travel: in one all-to-all, or in two stages, inside nodes and then between them (2DH)."""
    local_size: int | None = None
    """2DH: neighbouring ranks that count as one node; null = as many as the launcher started on this machine."""
    chunks: int = 1
    """Parts in which tokens travel, each overlapping with the experts' work on another; 1 = no overlap."""
    payload: Literal["full", "bf16"] = "full"
    """What travelling tokens and their gradients are rounded to; `full` = not at all."""
    zero: bool = False
    """ZeRO stage 1 by FairScale's OSS: each rank keeps the moments of some parameters, steps those and sends them to
    the others; dense ones are dealt out over all ranks, experts over their replicas."""
    shard_dense: bool = False
    """FSDP2 in DDP's place: each rank keeps a band of rows of every dense parameter, of its gradient and moments."""
    timeout_minutes: float = 10.0
    """After so long a collective that does not finish is an error that names it."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "parallel",
            ep_size=at_least(1, "use 1 for data parallelism alone"),
            weight_group=at_least(1, "use 1 where tokens travel"),
            local_size=at_least(1, "use null for the launcher's processes per machine"),
            chunks=at_least(1, "use 1 for no overlap"),
            timeout_minutes=above(0, "use e.g. 10"),
        )
        if self.ep_size % self.weight_group:
            raise ConfigError(
                f"parallel.weight_group={self.weight_group} does not divide parallel.ep_size={self.ep_size}; use one "
                f"of {divisors(self.ep_size)}"
            )
        if self.token_group == 1:
            self._refuse_without_travel()
        local = self.local_size
        if local is None:
            return
        if self.exchange != "2dh":
            raise ConfigError(f"parallel.local_size={local} is for exchange=2dh; set that, or local_size to null")
        if self.ep_size % local or local % self.weight_group:
            fitting = [n for n in divisors(self.ep_size) if n % self.weight_group == 0]
            raise ConfigError(
                f"parallel.local_size={local} does not cut ep_size={self.ep_size} ranks into nodes of whole groups of "
                f"weight_group={self.weight_group}; use one of {fitting}"
            )

    @property
    def token_group(self) -> int:
        """Ranks among which tokens travel."""
        return self.ep_size // self.weight_group

    def _refuse_without_travel(self) -> None:
        still = {"exchange": "flat", "chunks": 1, "payload": "full"}
        for name, neutral in still.items():
            if (value := getattr(self, name)) != neutral:
                raise ConfigError(
                    f"parallel.{name}={value} has no meaning where no token travels (ep_size={self.ep_size}, "
                    f"weight_group={self.weight_group}); use {name}={neutral}, or let tokens travel"
                )

    def check_experts(self, num_experts: int, what: str = "model.moe.num_experts") -> None:
        """`ConfigError` unless `num_experts` experts can be spread like this."""
        ep = self.ep_size
        if num_experts % ep and ep % num_experts:
            multiples = list(range(2 * num_experts, ep + num_experts + 1, num_experts))
            raise ConfigError(
                f"parallel.ep_size={ep} does not divide {what}={num_experts}, nor is it a multiple of it; use one of "
                f"{divisors(num_experts) + multiples}"
            )
        slices = max(1, ep // num_experts)
        if slices % self.weight_group and self.weight_group % slices:
            fitting = [n for n in divisors(ep) if slices % n == 0 or n % slices == 0]
            raise ConfigError(
                f"parallel.weight_group={self.weight_group} gathers neither whole experts nor an even part of their "
                f"{slices} slices ({what}={num_experts} on ep_size={ep} ranks); use one of {fitting}"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and how many to keep."""

    every_steps: int = 0
    """0 = at epochs only."""
    every_epochs: int = 1
    """0 = not at epochs."""
    keep_last: int = 2
    """Newest checkpoints that stay."""
    keep_best: int = 0
    """And so many with the highest accuracy, of those saved at a step that was evaluated."""
    asynchronous: bool = False
    """Write while training goes on; costs memory for a copy of what is written."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "checkpoint",
            every_steps=at_least(0, "use 0 to save at epochs only"),
            every_epochs=at_least(0, "use 0 for none at epochs"),
            keep_last=at_least(1, "the newest checkpoint always stays"),
            keep_best=at_least(0, "use 0 to keep the newest only"),
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is recorded on the way."""

    every_steps: int = 10
    tensorboard: bool = False
    peak_flops: float | None = None
    """The machine's peak FLOP/s for the log's MFU; None = measured by a matrix product at start."""

    def __post_init__(self) -> None:
        check_ranges(self, "log", every_steps=at_least(1), peak_flops=above(0, "use null to have it measured"))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """`swinmoe train`: one model, one job."""

    name: str = "run"
    seed: int = 0
    output_dir: str = "runs"
    """Records, checkpoints and reports go to `output_dir/name`."""
    resume: str = "never"
    """`never` (a used folder is an error), `auto` (newest complete checkpoint, or afresh), or a checkpoint's path."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    finetune: FinetuneConfig | None = None
    """Set by `swinmoe finetune`: weights to start from, and what of them stays."""

    def __post_init__(self) -> None:
        check_folder_name("name", self.name, "; the folder above it is output_dir")
        if self.model.moe is not None:
            self.parallel.check_experts(self.model.moe.num_experts)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`swinmoe compare`: twins trained side by side. Each arm is the base run with its own overrides."""

    name: str = "compare"
    output_dir: str = "runs"
    resume: str = "never"
    seeds: tuple[int, ...] = (0,)
    match: Literal["steps", "flops", "active_params", "seconds"] = "steps"
    budget_seconds: float | None = None
    """match = seconds: accumulated step time per arm."""
    reference: str | None = None
    """The arm whose length sets the FLOP budget (match: flops) and that others are paired with; None = the first."""
    schedule: Literal["lockstep", "sequential"] = "lockstep"
    """`lockstep`: all arms on each batch before the next; `sequential`: one arm after the other."""
    base: dict[str, Any] = field(default_factory=dict)
    """Keys of a run."""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> overrides of the base run's keys, e.g. {dense: {model: {moe: null}}, sparse: {}}."""
    sample_images: int = 12
    """Test images shown in the report with their patches coloured by expert."""

    def __post_init__(self) -> None:
        check_folder_name("name", self.name, "; the folder above it is output_dir")
        check_ranges(
            self,
            "compare",
            budget_seconds=above(0, "give the accumulated step time that each arm may use"),
            sample_images=at_least(1),
        )
        for arm in self.arms:
            check_folder_name("arm name", arm)
        if not self.arms:
            raise ConfigError("compare needs at least one arm; e.g. arms: {dense: {model: {moe: null}}, sparse: {}}")
        if not self.seeds:
            raise ConfigError("compare.seeds is empty; give at least one seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"compare.seeds={list(self.seeds)} names a seed twice; give each once")
        if self.reference is not None and self.reference not in self.arms:
            raise ConfigError(f"compare.reference={self.reference!r} is not an arm; use one of {list(self.arms)}")
        if self.match == "seconds" and self.budget_seconds is None:
            raise ConfigError("match: seconds needs budget_seconds, the accumulated step time each arm may use")
