"""Fine-tuning: the Accelerate loop, from a network and data to the best weights of a run."""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from dery_cli.data.batches import raise_errors
from dery_cli.errors import DeryError, UsageError
from dery_cli.runtime.devices import waiter
from dery_cli.training import checkpoint as ckpt
from dery_cli.training import optim
from dery_cli.training.distill import Objective, check_head, make_trainee
from dery_cli.training.guard import MOST_TIMES, SLOWER, LossGuard
from dery_cli.training.launch import (
    agree_on_signal,
    locked,
    make_accelerator,
    share_batch_norms,
)
from dery_cli.training.loaders import score, train_loader, valid_loader
from dery_cli.training.plan import Plan, make_plan
from dery_cli.training.progress import Clock, FinetuneResult, Progress, diverged, is_better
from dery_cli.training.recipe import FinetuneConfig
from dery_cli.training.runlog import append_metrics, finite_or_none, rewind_metrics
from dery_cli.training.sampling import (
    check_labels,
    derive_seed,
    labels_of,
    random_state_kept,
    seed_all,
)
from dery_cli.training.signals import Interruption
from dery_cli.training.state import Trained, load_strict, run_identity

UPDATES_BETWEEN_CHECKS = 16
"""On an accelerator losses are looked at this seldom, since looking waits for the device."""


def finetune(
    model: nn.Module,
    train: Dataset[Any],
    valid: Dataset[Any] | None,
    config: FinetuneConfig,
    run_dir: Path,
    *,
    classes: Sequence[str],
    device: str | torch.device | None = None,
    resume: bool | None = False,
    teacher: nn.Module | None = None,
    teacher_identity: str = "unnamed",
    origin: Mapping[str, str] = MappingProxyType({}),
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    forgiving: bool = True,
) -> FinetuneResult:
    """Train ``model``, keeping checkpoints and ``metrics.jsonl`` in ``run_dir``.

    Afterwards the model holds the best weights (averaged where they are averaged, the last ones
    without validation data), in eval mode, on the device it was trained on. Every random draw
    comes from (seed, epoch, image, update), so on a CPU a resumed run gives the same numbers as an
    uninterrupted one to the bit. Under ``torchrun`` or ``accelerate launch`` every process calls
    this.

    Args:
        model: Maps normalised images to logits; parameters of blocks are named ``blocks.*``.
        train: Gives (augmented, normalised image, label); told by index, in any order.
        valid: Gives (normalised image, label); the best checkpoint is chosen on it.
        config: How.
        run_dir: The run's folder; an earlier run in it is replaced unless ``resume``.
        classes: Class names in label order.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; None takes what Accelerate finds best.
        resume: Go on from the last checkpoint; None does so where it is of this very run.
        teacher: Network to learn from, shown the same images (see ``Teacher``).
        teacher_identity: Which it is; a run is resumed with the same one only.
        origin: What else a resumed run has to have in common with the one begun, by name: hashes of
            the network it started from, of the images.
        progress: Called after every update, in the main process.
        stop: Asked between updates; True saves a checkpoint and returns.
        warn: Told, in one line each, what the user should know of the run.
        forgiving: Go back and on more slowly where the loss rises; else that is an error at once.

    Raises:
        UsageError: Settings, data and network do not fit together.
        DeryError: The folder is in use, a checkpoint is damaged or cannot be written, or the loss
            is not finite any more.
        KeyboardInterrupt: Ctrl-C, here or in another process, after a checkpoint was saved.
    """
    for dataset, what in ((train, "training"), (valid, "validation")):
        if dataset is not None:
            check_labels(labels_of(dataset), len(classes), what)
    check_head(model, len(classes))
    accelerator = make_accelerator(config, device)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    identity = run_identity(
        config,
        classes,
        labels_of(train),
        images=len(train),  # type: ignore[arg-type]
        teacher=None if teacher is None else teacher_identity,
        origin=origin,
    )
    alone = accelerator.num_processes == 1
    with random_state_kept(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # DDP's own
        run = _Run(
            accelerator, model, train, valid, config, run_dir, classes, teacher, identity, warn
        )
        run.most_times = MOST_TIMES if forgiving else 0
        with locked(accelerator, run_dir), Interruption(repeated=not alone) as interruption:
            try:
                run.begin(resume)
                run.go(progress, lambda: interruption.received is not None or bool(stop and stop()))
                result = run.result()
                if not (result.finished or alone):
                    interruption.received = agree_on_signal(accelerator, interruption.received)
            finally:
                run.close(required)
    interruption.redeliver()
    return result


class _Run:
    """One run: what it trains, where it stands."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        train: Dataset[Any],
        valid: Dataset[Any] | None,
        config: FinetuneConfig,
        run_dir: Path,
        classes: Sequence[str],
        teacher: nn.Module | None,
        identity: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.train = train
        self.config = config
        self.run_dir = run_dir
        self.classes = list(classes)
        self.warn = warn
        processes = accelerator.num_processes
        self.plan: Plan = make_plan(config, len(train), processes=processes)  # type: ignore[arg-type]
        for note in self.plan.notes:
            warn(note)
        seed_all(derive_seed(config.seed, "adapter"))
        self.trainee = make_trainee(model, config, teacher).to(accelerator.device)
        if teacher is not None:
            teacher = teacher.to(accelerator.device).eval()
        self.objective = Objective(config, len(classes), teacher)
        self.trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
        self.fixed_norms = optim.norms_to_fix(model, config)
        groups = optim.parameter_groups(model, config)
        if self.trainee.adapter is not None:
            adapter = list(self.trainee.adapter.parameters())
            groups.append({"params": adapter, "lr": config.lr, "weight_decay": 0.0})
        optimizer = optim.make_optimizer(groups, config)
        self.trained = Trained(
            model=model,
            ema=optim.make_ema(model, config),
            adapter=self.trainee.adapter,
            optimizer=optimizer,
            scaler=accelerator.scaler,
        )
        # Accelerate's wrapper looks packages up at every step; it is needed to unscale fp16 only.
        scaled = accelerator.scaler is not None
        self.optimizer = accelerator.prepare_optimizer(optimizer) if scaled else optimizer
        self.identity = identity
        self.valid_loader = (
            None if valid is None else valid_loader(accelerator, valid, self.plan, config)
        )
        self.wrapped: nn.Module = self.trainee
        self.step = 0
        self.saved_step: int | None = None
        self.losses: list[torch.Tensor] = []  # of updates not yet looked at
        self.loss_sum, self.loss_count = 0.0, 0  # since the last report
        self.last_loss: float | None = None
        self.guard = LossGuard(len(classes))
        self.calmed = 0  # times that the rate was lowered
        self.most_times = MOST_TIMES
        self.good_step = 0  # of the last report, where to go back to
        self.risen = ""  # what is wrong with the loss, where something is
        self.best: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.clock = Clock(waiter(accelerator.device))

    # -- the loop ---------------------------------------------------------------------------

    def begin(self, resume: bool | None) -> None:
        """Start afresh, or from the last checkpoint; afterwards there is one to fall back to."""
        if resume is None:
            resume = self._go_on()
        elif resume:
            self._load()
        if not resume and self.accelerator.is_main_process:
            ckpt.keep_only(self.run_dir, last=None, best=None)
            rewind_metrics(self.run_dir, -1)
        self._enter_phase()
        if not resume:
            self._score_start()
            self._save(good=True)
        self.accelerator.wait_for_everyone()

    def go(self, progress: Callable[[Progress], None] | None, stop: Callable[[], bool]) -> None:
        """Train to the end, or until ``stop``; go back and on more slowly where the loss rises."""
        while True:
            loader = train_loader(self.accelerator, self.train, self.plan, self.config, self.step)
            batches = raise_errors(loader)
            try:
                self._train(batches, progress, stop)
            finally:
                batches.close()  # ends the loading processes
                loader.end()
            if not self.risen:
                return
            self._calm()

    def _score_start(self) -> None:
        """The network as it came is the first that may be the best."""
        if self.valid_loader is None:
            return
        found = score(self.accelerator, self.trained.evaluated, self.valid_loader, self.classes)
        self._keep_best({"step": 0, **found})

    def _calm(self) -> None:
        """Go back to the last report, with a lower rate."""
        times, wrong, at = self.calmed + 1, self.risen, self.step
        self.losses, self.risen = [], ""
        self._load(self.good_step)
        factor = SLOWER ** (self.calmed - times)
        for group in self.optimizer.param_groups:
            for rate in ("lr", "initial_lr"):
                if rate in group:
                    group[rate] *= factor
        self.calmed = times
        self._enter_phase()
        self.warn(
            f"{wrong} at update {at}: going back to update {self.step}, with a rate of 1/"
            f"{SLOWER**times} of what was asked for"
        )

    def _train(
        self,
        batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
        progress: Callable[[Progress], None] | None,
        stop: Callable[[], bool],
    ) -> None:
        reports = set(self.plan.reports)
        while self.step < self.plan.steps:
            wish = self._look(stop())
            if self.risen:
                return
            if wish:
                self._save()  # no report: what there is to go back to stays
                return
            with self.clock.update(frozen=self.plan.phase(self.step).frozen):
                lr = self._update(batches)
            report = None
            if self.step in reports:
                self.clock.settle()  # else the report would wait for the updates
                with self.clock.report():
                    report = self._report(lr)
                if self.risen:
                    return
            if progress is not None and self.accelerator.is_main_process:
                progress(self._progress(lr, report))

    def _update(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """One optimizer update; returns its learning rate."""
        config, accelerator = self.config, self.accelerator
        phase = self.plan.phase(self.step)
        if self.step == phase.start and self.step:
            self._enter_phase()
        lr = optim.head_rate(self.optimizer)
        total: torch.Tensor | float = 0.0
        for micro in range(config.grad_accum):
            images_BCHW, labels_B = next(batches)
            rank = accelerator.process_index
            seed_all(derive_seed(config.seed, "update", self.step, micro, rank))
            with accelerator.accumulate(self.wrapped):
                loss = self.objective(self.wrapped, images_BCHW, labels_B)
                accelerator.backward(loss)
            total = total + loss.detach() / config.grad_accum
        if config.clip_grad:
            accelerator.clip_grad_norm_(self.trainee.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.scheduler.step_update(self.step - phase.start)
        if self.trained.ema is not None:
            self.trained.ema.update(self.model, step=self.step)
        assert isinstance(total, torch.Tensor)
        self.losses.append(total)
        return lr

    def _look(self, stop: bool, *, now: bool = False) -> bool:
        """Look at the losses and the wish to stop, together on all processes.

        Raises:
            DeryError: A loss is not finite, or the weights where it is looked ``now``.
        """
        alone = self.accelerator.num_processes == 1
        patient = self.accelerator.device.type != "cpu" and not (now or (alone and stop))
        if patient and len(self.losses) < UPDATES_BETWEEN_CHECKS:
            return False
        self.clock.settle()
        flag = torch.tensor([float(stop)], device=self.accelerator.device)
        seen = torch.cat([flag, *(loss.float().reshape(1) for loss in self.losses)])
        if not alone:
            seen = self.accelerator.reduce(seen, reduction="mean")
        wish, *losses = seen.tolist()
        first = self.step - len(losses) + 1
        self.losses = []
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                self._object(f"the loss is {loss}", step)
                break
            self.guard.add(loss)
            if self.guard.risen and (self.calmed < self.most_times or not self.most_times):
                self._object(f"the loss rose to {loss:.3g} from {self.guard.start:.3g}", step)
                break
            self.loss_sum += loss
            self.loss_count += 1
            self.last_loss = loss
        if now and not self.risen and not self.trained.is_finite:
            # a gradient breaks them an update before the loss
            self._object("the weights are not finite", self.step)
        return bool(wish > 0)

    def _object(self, wrong: str, step: int) -> None:
        """Remember what is wrong with the loss, to go back.

        Raises:
            DeryError: It was gone back too often.
        """
        if self.calmed >= self.most_times:
            raise diverged(self.run_dir, wrong, step, self.plan.steps)
        self.risen = wrong

    def _report(self, lr: float) -> dict[str, Any] | None:
        """Score, note and save; nothing where the loss has risen."""
        self._look(False, now=True)
        if self.risen:
            return None
        line: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.plan.epoch(self.step), 4),
            "lr": lr,
            "train_loss": self.loss_sum / max(self.loss_count, 1),
        }
        self.loss_sum, self.loss_count = 0.0, 0
        if self.valid_loader is not None:
            network = self.trained.evaluated
            line.update(score(self.accelerator, network, self.valid_loader, self.classes))
        done = self.step == self.plan.steps
        better = done if self.valid_loader is None else is_better(line, self.best)
        self.history.append(line)
        if self.accelerator.is_main_process:
            append_metrics(self.run_dir, line)
        if better:
            self._keep_best(
                {k: v for k, v in line.items() if k == "step" or k.startswith("valid_")}
            )
        self._save(good=True)
        return line

    def _keep_best(self, best: dict[str, Any]) -> None:
        """Write the weights that are scored now as the best."""
        self.best = best
        if self.accelerator.is_main_process:
            state = {"classes": self.classes, **finite_or_none(best)}
            weights = {"model": self.trained.evaluated.state_dict()}
            ckpt.save_checkpoint(self.run_dir, "best", self.step, weights, state)

    # -- phases -----------------------------------------------------------------------------

    def _enter_phase(self) -> None:
        """Freeze or free the blocks, and start this phase's schedule."""
        config, phase = self.config, self.plan.phase(self.step)
        optim.set_trainable(self.model, frozen=phase.frozen, trainable=self.trainable)
        optim.set_train_mode(self.model, frozen=phase.frozen, fixed=self.fixed_norms)
        share_batch_norms(self.accelerator, self.trainee, self.warn)
        scale = SLOWER**-self.calmed
        self.scheduler = optim.make_scheduler(self.optimizer, config, phase, scale=scale)
        self.scheduler.step_update(self.step - phase.start)
        if self.wrapped is not self.trainee:
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.wrapped = self.accelerator.prepare_model(self.trainee)

    # -- saving -----------------------------------------------------------------------------

    def _save(self, *, good: bool = False) -> None:
        """Save everything a resumed run needs, then remove older checkpoints.

        Args:
            good: Whether a run whose loss rises goes back to here.
        """
        self._look(False, now=True)
        if self.saved_step == self.step or self.risen:
            return
        self.saved_step = self.step
        self.good_step = self.step if good else self.good_step
        if self.accelerator.is_main_process:
            state = {
                "run": self.identity,
                "steps": self.plan.steps,
                "random": {"seed": self.config.seed, "step": self.step},
                "loss": [self.loss_sum, self.loss_count],
                "best": finite_or_none(self.best),
                "guard": [self.calmed, self.good_step, self.guard.first, self.guard.recent],
                "fixed_norms": sorted(self.fixed_norms),
            }
            self.trained.save(self.run_dir, self.step, state)
            kept = {self.step, self.good_step}
            ckpt.keep_only(self.run_dir, last=kept, best=self.best.get("step"))
        self.accelerator.wait_for_everyone()

    def _go_on(self) -> bool:
        """Load the last checkpoint if it is of this very run; say what becomes of an unfinished."""
        try:
            self._load()
        except DeryError as error:
            if ckpt.is_unfinished(self.run_dir):
                self.warn(f"the unfinished run in {self.run_dir} is replaced: {error.message}")
            elif not isinstance(error, UsageError):
                self.warn(f"the run in {self.run_dir} is begun anew: {error.message}")
            return False
        if self.step:
            self.warn(f"going on from update {self.step} of {self.plan.steps}")
        return True

    def _load(self, step: int | None = None) -> None:
        """Take everything from the last checkpoint, or from that of a step."""
        saved = self.trained.load(self.run_dir, self.identity, step=step)
        self.step = self.saved_step = saved.step
        self.loss_sum, self.loss_count = saved.state["loss"]
        self.best = {k: math.nan if v is None else v for k, v in saved.state["best"].items()}
        if self.best:  # the end would fall back on the last weights, without a word
            ckpt.load_checkpoint(
                ckpt.checkpoint_folder(self.run_dir, "best", self.best["step"]), only="model"
            )
        self.calmed, self.good_step, first, recent = saved.state["guard"]
        self.guard = LossGuard(len(self.classes), first, recent)
        self.fixed_norms = frozenset(saved.state["fixed_norms"])
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            kept = {self.step, self.good_step}
            ckpt.keep_only(self.run_dir, last=kept, best=self.best.get("step"))
            self.history = rewind_metrics(self.run_dir, self.step, self.warn)

    # -- the end ----------------------------------------------------------------------------

    def result(self) -> FinetuneResult:
        """The result; the model gets the best weights where there are any."""
        best, last = (ckpt.find_checkpoint(self.run_dir, kind) for kind in ("best", "last"))
        assert last is not None
        if best is not None:
            weights = ckpt.load_checkpoint(best, only="model").tensors["model"]
            load_strict(self.model, weights, best / "model.safetensors")
        return FinetuneResult(
            finished=self.step == self.plan.steps,
            steps=self.step,
            epochs=self.plan.epoch(self.step),
            batch_size=self.plan.batch_size,
            best_step=self.best.get("step", 0),
            best={k: v for k, v in self.best.items() if k != "step"},
            history=tuple(self.history),
            seconds=self.clock.seconds,
            updates_per_second=self.clock.updates_per_second,
            best_dir=best,
            last_dir=last,
        )

    def close(self, required: dict[str, bool]) -> None:
        """Give the model back as it came, but trained; free what Accelerate holds."""
        self.accelerator.free_memory()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None
        self.model.eval()

    def _progress(self, lr: float, report: dict[str, Any] | None) -> Progress:
        reports = len(self.plan.reports) - bisect.bisect(self.plan.reports, self.step)
        return Progress(
            step=self.step,
            steps=self.plan.steps,
            epoch=self.plan.epoch(self.step),
            lr=lr,
            loss=self.last_loss,
            images_per_second=self.plan.batch_size * self.clock.updates_per_second,
            eta=self.clock.eta(self.plan, self.step, reports),
            report=report,
        )
