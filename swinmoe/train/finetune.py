"""`swinmoe finetune`: training that begins with somebody's weights, some of which may stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from swinmoe.checkpoint import Tensors, checkpoints, open_checkpoint
from swinmoe.checkpoint.load_report import LoadReport
from swinmoe.checkpoint.manifest import MANIFEST
from swinmoe.checkpoint.reader import locate
from swinmoe.checkpoint.tensor_file import TensorFile
from swinmoe.config import BalanceLossConfig, FinetuneConfig, RunConfig
from swinmoe.config.io import Tree, build, load, merge, to_tree, with_overrides
from swinmoe.errors import ConfigError, DamagedError
from swinmoe.models import SwinTransformer
from swinmoe.moe.losses import LOSSES, active_losses
from swinmoe.train.arm import Arm, make_arm
from swinmoe.train.freeze import freeze
from swinmoe.train.loop import fit
from swinmoe.train.pretrained import Pretrained, complete_model, load_weights, open_pretrained, without_head
from swinmoe.train.resume import restore
from swinmoe.train.schedule import Length, planned_steps
from swinmoe.train.session import Session, open_session

HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Plan:
    """A run, wholly resolved, and the weights that it begins with."""

    run: RunConfig
    source: Pretrained | None
    """None: the run goes on from a checkpoint of its own, and needs no other weights."""
    notes: tuple[str, ...] = ()
    """What was decided on the way, for people."""

    @property
    def settings(self) -> FinetuneConfig:
        assert self.run.finetune is not None
        return self.run.finetune


def plan_finetuning(config: Path | str, source: Path | str | None, overrides: Sequence[str] = ()) -> Plan:
    """A fine-tuning run from a YAML file, the weights to begin with, and `key=value` overrides.

    The file's `model` section is laid on top of the source's own configuration: it says what changes (classes, image
    size, window, drop path, capacity ...), or names a `preset` where the source does not say what it is. The image size
    is that of the data unless said otherwise. A run that `resume` lets go on takes its model from its own checkpoint,
    and the source may be gone.

    Raises:
        ConfigError: keys that do not exist or contradict each other, or a new head without a number of classes.
        CheckpointError: see `open_pretrained`.
    """
    opened: list[Pretrained] = []

    def prepare(tree: Tree) -> Tree:
        settings = dict(tree.get("finetune") or {})
        if source is not None:
            settings["source"] = str(source)
        given = dict(tree.get("model") or {})
        # Checked first: a mistyped key must not cost the reading of a large file.
        checked = load(RunConfig, config, overrides, prepare=lambda t: {**t, "model": {}, "finetune": settings})
        assert checked.finetune is not None
        own = _own_config(checked)
        if own is not None and own.finetune is not None:
            settings = {"source": own.finetune.source} | settings
            given.pop("preset", None)  # it stands for what the checkpoint says in full
            return {**tree, "model": merge(to_tree(own.model), given), "finetune": settings}
        if not settings.get("source"):
            raise ConfigError("finetune needs weights to begin with: give --from CKPT, or finetune.source in the file")
        found = open_pretrained(checked.finetune.source, checked.finetune.weights, checked.finetune.allow)
        opened.append(found)
        if "num_classes" not in given and checked.finetune.head == "new":
            raise ConfigError(
                "finetune.head=new draws a new classifier, but model.num_classes is not said; set it to the number "
                "of classes of the new data, or finetune.head=keep to go on with the old ones"
            )
        if "img_size" not in given:
            size = (tree.get("data") or {}).get("image_size")
            if size is not None:
                given["img_size"] = size
        return {**tree, "model": complete_model(given, found), "finetune": settings}

    run = load(RunConfig, config, overrides, prepare=prepare)
    return _settle(Plan(run, opened[0] if opened else None))


def _own_config(run: RunConfig) -> RunConfig | None:
    """That of the checkpoint which `run` will go on from; None where it begins anew.

    `restore` decides which checkpoint that is; all of a run say the same of the model.
    """
    if run.resume == "never":
        return None
    folder = Path(run.output_dir) / run.name / "checkpoints"
    there = [Path(run.resume)] if run.resume != "auto" else checkpoints(folder)[::-1]
    for path in there:
        try:
            return build(RunConfig, yaml.safe_load(open_checkpoint(path).read_text("config.yaml")))
        except DamagedError:  # passed over, or refused, by `restore`, which says why
            continue
    return None


def _settle(plan: Plan) -> Plan:
    """Balance losses off where they would have no router to teach."""
    settings, moe = plan.settings, plan.run.model.moe
    if moe is None or not active_losses(moe.losses):
        return plan
    wanted = settings.trains_routers if settings.balance is None else settings.balance
    if wanted:
        note = "" if settings.trains_routers else "balance losses act on features alone: routers are frozen"
        return replace(plan, notes=(note,) if note else ())
    assert set(LOSSES) <= {field.name for field in fields(BalanceLossConfig)}
    quiet = with_overrides(plan.run, {"model": {"moe": {"losses": dict.fromkeys(LOSSES, 0.0)}}})
    why = "finetune.balance=false" if settings.trains_routers else "routers are frozen"
    return replace(plan, run=quiet, notes=(f"balance losses are off: {why}",))


def finetune(plan: Plan, *, show: bool = True) -> tuple[Path, Arm]:
    """Train the model of `plan`, from its weights; returns the output folder and the trained arm.

    Records, checkpoints and `resume` are those of any run; a resumed run goes on from its own checkpoint, and the
    checkpoint that it leaves needs nothing of the one it came from. On several processes every rank reads the source
    whole before its experts are spread.

    Raises:
        SwinMoEError: see `load_weights`, `freeze`, `open_session`, `make_arm` and `fit`.
    """
    run = plan.run
    folder = Path(run.output_dir) / run.name
    with open_session("finetune", run, config=run, folder=folder, resume=run.resume, show=show) as session:
        job = session.job(run)
        length = Length(steps=planned_steps(run.train, job.stream.steps_per_epoch))
        begun: list[tuple[LoadReport | None, tuple[str, ...]]] = []

        def prepare(model: SwinTransformer) -> None:
            report = None if plan.source is None else begin_with(model, plan.source, plan.settings)
            begun.append((report, freeze(model, plan.settings.freeze)))

        arm = make_arm(
            "model", run, session.mesh, session.accelerator, length, job.stream.steps_per_epoch, prepare=prepare
        )
        moments = None if plan.source is None else _moments_of(plan.source)
        fresh = set() if moments is None else arm.begin_with_moments(moments)
        start = restore(job, [arm])
        session.begin()
        session.describe(arm)
        _tell(session, plan, arm, *begun[0])
        if moments is not None:
            but = f"; {len(fresh)} tensors begin without, {', '.join(sorted(fresh)[:3])} first" if fresh else ""
            session.progress.say(f"  AdamW's moments were carried over with the model{but}")
        fit(job, [arm], start)
    return folder, arm


def _moments_of(source: Pretrained) -> Tensors | None:
    """What `swinmoe upcycle --moments carry` left beside a model, to be trained on with; None elsewhere. Those of a
    training checkpoint belong to its own run, and to what that was trained on."""
    if not Path(source.path).is_dir():
        return None
    place, _ = locate(source.path)
    file = place / "optimizer.safetensors"
    if not file.is_file():
        return None
    stored = open_checkpoint(place) if (place / MANIFEST).is_file() else None
    if stored is not None and "optimizer" in stored.groups:  # with hashes, where whoever saved them kept any
        return stored.tensors("optimizer")
    return Tensors(repr(str(file)), [TensorFile(file)])


def begin_with(model: SwinTransformer, source: Pretrained, settings: FinetuneConfig) -> LoadReport:
    """Bring `source` into a fresh model; the report, in which a new head is told from missing tensors.

    Raises:
        SwinMoEError: see `load_weights`.
    """
    if settings.head == "keep":
        return load_weights(model, source, allow=settings.allow, class_map=settings.class_map, how=settings.upcycle)
    report = load_weights(model, without_head(source), allow=(*settings.allow, "head.*"), how=settings.upcycle)
    left = tuple(name for name in HEAD if name in source.found.named)
    return replace(
        report,
        reinitialised={**report.reinitialised, **dict.fromkeys((n for n in report.missing if n in HEAD), "a new head")},
        missing=tuple(name for name in report.missing if name not in HEAD),
        unused=(*report.unused, *left),
    )


def _tell(session: Session, plan: Plan, arm: Arm, report: LoadReport | None, frozen: Sequence[str]) -> None:
    """The load record, and the same in a few lines for people."""
    settings, say = plan.settings, session.progress.say
    if report is None or plan.source is None:
        say(f"goes on from a checkpoint of its own; {settings.source} is not read again")
    else:
        session.records.write(
            "load",
            arm=arm.name,
            seed=arm.run.seed,
            source=report.source,
            weights=plan.source.weights,
            loaded=report.loaded,
            resized=dict(report.resized),
            reinitialised=dict(report.reinitialised),
            unused=report.unused,
            missing=report.missing,
            upcycled=bool(arm.raw.moe_layers()) and not plan.source.sparse,
            freeze=settings.freeze,
            frozen=frozen,
        )
        say(report.summary())
    parameters = list(arm.raw.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    held = f", {len(frozen)} tensors frozen (finetune.freeze={settings.freeze})" if frozen else ""
    say(f"  training {trained:,} of {sum(p.numel() for p in parameters):,} parameters held here{held}")
    for note in plan.notes:
        say(f"  {note}")
