"""The training step and its loop; the only room that goes back and steps (through an `Engine`).

What differs from a textbook trainer:

* Where the images come from is not known here. A `Source` hands out rounds of updates, an update is
  a list of chunks, and a chunk can say how likely a denoiser finds its images. D3PO on rollouts and
  Diffusion-DPO on a data set are two sources of the same step; pairs, labels and rewards are three
  things that a chunk can know (see updates), and the objective asks for what it needs (see losses).
* An image is scored once, however many pairs it is in: `Chunk.win` and `.lose` are row numbers.
* The loss is the mean over all pairs (or images) and steps of the update on all processes, whatever
  the size of the chunks: each chunk contributes its sum, divided by the global count.
* There is no scheduler object and no generator. The learning rate is a function of the step, every
  draw a function of its place, so a checkpoint holds tensors and a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from d3po.engine import Accelerated, Engine
from d3po.health import Health
from d3po.losses import BoundObjective
from d3po.optimizers import Kind, build_optimizer, kind_of
from d3po.policy import Policy
from d3po.run import Run
from d3po.run_folder import Progress
from d3po.updates import Facts, Source, Update
from d3po.zero import Zero
from fifa.config import Config, InputError

R = TypeVar("R")

# ---- settings -----------------------------------------------------------------------------------


class OptimConfig(Config):
    """The optimizer with a linear warm-up, how much goes into one step, and when to stop."""

    kind: Kind = Field(
        "adamw",
        description="adamw; adamw_8bit (bitsandbytes): its state in a quarter of the memory; "
        "adafactor: nearly none.",
    )
    fused: bool = Field(
        False, description="AdamW as one kernel: faster for many weights, equal up to rounding."
    )
    offload: bool = Field(
        False,
        description="Keep the optimizer's state and a copy of the trained weights in CPU memory: "
        "less memory on the device, slower steps.",
    )

    max_steps: int = Field(
        100, ge=1, description="Optimizer steps of the whole run, rounded up to whole rounds."
    )
    learning_rate: float = Field(
        3e-5, gt=0, description="AdamW's learning rate after the warm-up (D3PO, table 2: 3e-5)."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps over which the learning rate rises linearly from 0."
    )
    micro_batch: int = Field(
        1,
        ge=1,
        description="Units a process sends through the network at once: prompt groups online, "
        "pairs offline.",
    )
    accumulation: int = Field(
        1,
        ge=1,
        description="Micro-batches of each process in one step; the step is that of one large "
        "micro-batch.",
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the first and second moment."
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="AdamW's decoupled weight decay (D3PO: 1e-4)."
    )
    epsilon: float = Field(1e-8, gt=0, description="AdamW's term for numerical stability.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Norm to which the gradient is clipped (D3PO: 1); null: not clipped."
    )
    max_skipped: int = Field(
        10,
        ge=1,
        description="Steps in a row that may be skipped because the gradient is not finite; "
        "then the run stops.",
    )

    def units(self, processes: int) -> int:
        """Prompt groups or pairs of one step, over all processes."""
        return self.micro_batch * self.accumulation * processes

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))


# ---- what learns ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Learner:
    """What learns: the policy, wrapped for the processes, its optimizer, the objective."""

    policy: Policy  # its `denoiser` is the wrapped network: what has a gradient goes through it
    optimizer: Any  # that of config.kind in an AcceleratedOptimizer or a Zero
    objective: BoundObjective
    config: OptimConfig

    @classmethod
    def prepare(
        cls, policy: Policy, objective: BoundObjective, config: OptimConfig, run: Run
    ) -> Learner:
        """Wrap policy and optimizer for the devices and processes of the run."""
        optimizer = build_optimizer(
            policy.trainable(),
            config.kind,
            learning_rate=config.learning_rate,
            betas=config.betas,
            epsilon=config.epsilon,
            weight_decay=config.weight_decay,
            fused=config.fused,
            offload=config.offload,
        )
        if run.division == "ddp":
            policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, optimizer)
            return cls(policy, wrapped, objective, config)
        # what is divided exchanges gradients itself: only the precision is left to do
        policy.denoiser = run.accelerator.prepare_model(
            policy.bare, device_placement=False, evaluation_mode=True
        )
        if run.division == "fsdp2":
            wrapped = run.accelerator.prepare_optimizer(optimizer)
            return cls(policy, wrapped, objective, config)
        zero = Zero(policy.bare, policy.trainable(), optimizer, config.max_grad_norm)
        policy.denoiser = zero.network
        return cls(policy, zero, objective, config)

    def engine(self, run: Run) -> Engine:
        """Who takes gradients back and steps for it on the processes of the run."""
        if isinstance(self.optimizer, Zero):
            return self.optimizer
        return Accelerated(run.accelerator, self.policy, self.optimizer, self.config.max_grad_norm)


# ---- one step -----------------------------------------------------------------------------------


def reference_logp(policy: Policy, score: Callable[[nn.Module], R]) -> R:
    """What `score` gives under the reference, without gradient.

    Through the bare network: there are no gradients to exchange.
    """
    with policy.reference():
        return score(policy.bare)


def train_step(learner: Learner, update: Update, run: Run, step: int) -> dict[str, float]:
    """Backward through an update, one optimizer step; what happened, averaged over all processes.

    A step without any pair, or whose gradient is not finite, leaves the weights alone: then `pairs`
    (`images` for objectives on single ones) is 0, or `skipped` is 1.
    """
    unit = learner.objective.unit
    (terms,) = run.total([update.terms])
    if terms == 0:
        return {unit: 0.0, "skipped": 0.0}
    shared: Facts = {}
    update = _with_reference(learner, update)
    if "baseline" in learner.objective.takes:
        shared["baseline"] = _baseline(learner, update, run, terms)
    sums = _backward(learner, update, run, run.processes / terms, shared)
    grad_norm, stepped = learner.engine(run).step(learner.config.rate(step))
    if stepped:
        learner.policy.ema_update()
    *totals, count = run.total([*sums.values(), update.pairs])
    means = {name: total / terms for name, total in zip(sums, totals, strict=True)}
    return {
        **means,
        **{name: float(value) for name, value in shared.items()},
        "grad_norm": grad_norm,
        "learning_rate": learner.config.rate(step),
        unit: count,
        "skipped": 0.0 if stepped else 1.0,
    }


def _with_reference(learner: Learner, update: Update) -> Update:
    """The update with what the reference says of its chunks.

    All are asked together: under full training the reference's weights travel to the device for it.
    """
    asked, policy = learner.objective.takes, learner.policy
    if not any(chunk.lacks(asked) for chunk in update.chunks):
        return update
    with policy.reference():
        chunks = [chunk.with_reference(policy.bare, asked) for chunk in update.chunks]
    return replace(update, chunks=chunks)


@torch.no_grad()
def _baseline(learner: Learner, update: Update, run: Run, terms: float) -> Tensor:
    """KTO's reference point, max(0, mean of logp - ref) over the update on all processes.

    It has to be known before the first chunk goes backward, and costs one more forward without
    gradient.
    """
    total = 0.0
    for chunk in update.chunks:
        assert chunk.ref is not None
        total += float((chunk.logp(learner.policy.bare) - chunk.ref).double().sum())
    (everywhere,) = run.total([total])
    return torch.tensor(max(0.0, everywhere / terms), device=run.device)


def _backward(
    learner: Learner, update: Update, run: Run, scale: float, shared: Facts
) -> dict[str, float]:
    """Accumulate the gradient of scale * sum(loss); sums of the loss and of what is watched.

    `shared` are facts about the update as a whole.
    """
    policy, objective, engine = learner.policy, learner.objective, learner.engine(run)
    sums: dict[str, float] = {}
    for i, chunk in enumerate(update.chunks, 1):
        with nullcontext() if i == len(update.chunks) else engine.alone():
            facts = {**chunk.facts(policy.denoiser, objective.takes), **shared}
            loss = objective.loss(facts)
            engine.backward(loss.sum() * scale)
        seen = {"loss": loss.detach(), **objective.watch(facts)}
        own = torch.stack([value.double().sum() for value in seen.values()]).tolist()  # one wait
        for name, value in zip(seen, own, strict=True):
            sums[name] = sums.get(name, 0.0) + value
    return sums


# ---- the loop -----------------------------------------------------------------------------------


def fit(
    learner: Learner,
    source: Source,
    run: Run,
    evaluate: Callable[[int], object] | None = None,
    evaluate_every: int = 0,
    health: Health | None = None,
) -> Progress:
    """Train for max_steps, rounded up to whole rounds, from where the run folder says.

    `evaluate(step)` is called before the first step, after the last, and at the first end of a
    round at or past each multiple of `evaluate_every` steps (0: not in between). Where `health`
    stops the run, the policy gets the weights of the last good checkpoint back, and what is
    returned is the progress of that checkpoint. A finished run that goes on loses its
    <run>/weights, once the checkpoint to go on from has been read.
    """
    health = Health() if health is None else health
    progress = _resume(learner, run, health)
    total = whole_rounds(learner.config.max_steps, source.updates_per_round)
    if progress.step < total:
        run.first(run.folder.drop_weights)
    with run.progress(total, progress.step):
        if progress.step == 0 and evaluate is not None:
            evaluate(0)
        while progress.step < total and not health.over():
            before = progress.step
            progress = _train_round(learner, source, run, progress, health)
            done = progress.step >= total
            if health.over():
                break
            if evaluate is not None and (done or _crossed(evaluate_every, before, progress.step)):
                evaluate(progress.step)
            if not health.over() and (
                done or _crossed(run.config.checkpoint_every, before, progress.step)
            ):
                _checkpoint(learner, run, progress, health)
    if health.over():
        return _back_to_good(learner, run, health) or progress
    return progress


def _train_round(
    learner: Learner, source: Source, run: Run, progress: Progress, health: Health
) -> Progress:
    index = progress.step // source.updates_per_round
    found = source.round(index)
    if found.metrics:
        health.follow(run, "round", progress.step, {"round": index, **found.metrics})
    for update in found.updates:
        metrics = train_step(learner, update, run, progress.step)
        skipped = progress.skipped_in_a_row + 1 if metrics["skipped"] else 0
        progress = replace(progress, step=progress.step + 1, skipped_in_a_row=skipped)
        health.follow(run, "update", progress.step, metrics)
        run.advance(progress.step, _headline(metrics))
        if health.over():
            break
        _complain(run, progress, metrics, learner.config.max_skipped)
    run.record_time(progress.step)
    return progress


def whole_rounds(steps: int, updates_per_round: int) -> int:
    """`steps` rounded up to a multiple of a round: a rollout is never learned from in part."""
    return -(-steps // updates_per_round) * updates_per_round


def _complain(run: Run, progress: Progress, metrics: Mapping[str, float], limit: int) -> None:
    if not progress.skipped_in_a_row:
        return
    run.say(
        f"warning: step {progress.step} was skipped, its gradient is not finite "
        f"({progress.skipped_in_a_row} in a row, the run stops at {limit})"
    )
    if progress.skipped_in_a_row >= limit:
        raise InputError(
            f"stopped at step {progress.step}: the gradient was not finite {limit} times in a row; "
            "lower optim.learning_rate, or use mixed_precision bf16 or no in place of fp16"
        )


def _headline(metrics: Mapping[str, float]) -> str:
    if "loss" not in metrics:
        return "no pair, all ties"
    parts = [f"loss {metrics['loss']:.4f}"]
    if "accuracy" in metrics:
        parts += [f"accuracy {metrics['accuracy']:.0%}", f"margin {metrics['margin']:+.2g}"]
    if "kl" in metrics:
        parts.append(f"kl {metrics['kl']:.2g}")
    return "  ".join([*parts, f"grad {metrics['grad_norm']:.2g}"])


def _crossed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; never for 0."""
    return every > 0 and now // every > before // every


# ---- checkpoints --------------------------------------------------------------------------------


def _checkpoint(learner: Learner, run: Run, progress: Progress, health: Health) -> None:
    scaler = run.accelerator.scaler
    note = replace(
        progress,
        reference=learner.policy.fingerprint(),
        units=learner.config.units(run.processes),
        scaler=None if scaler is None else scaler.state_dict(),
    )
    tensors = {
        "policy": learner.policy.state_dict(),
        "optimizer": learner.engine(run).tensors(),
    }
    run.save(note, tensors, health.to_keep(run.folder.steps()))


def _back_to_good(learner: Learner, run: Run, health: Health) -> Progress | None:
    """Give the policy the weights of the newest checkpoint that a healthy window followed."""
    good = run.first(lambda: run.folder.newest_of(health.good) or run.folder.newest())
    if good is not None:
        learner.policy.load_state_dict(good.tensors("policy"))
    run.say(
        f"the weights are those of {good.path if good else 'this step, no checkpoint is older'}"
    )
    return None if good is None else good.progress


def _resume(learner: Learner, run: Run, health: Health) -> Progress:
    """Load the checkpoint that the run folder found; without one, begin at step 0."""
    if run.start is None:
        return Progress()
    progress, reference = run.start.progress, learner.policy.fingerprint()
    if progress.reference != reference:
        raise InputError(
            f"{run.start.path} was trained against another reference (fingerprint "
            f"{progress.reference}, the model now is {reference}): the base model has changed since"
        )
    learner.policy.load_state_dict(run.start.tensors("policy"))
    tensors = run.start.tensors("optimizer")
    stored, kind = kind_of(tensors), learner.config.kind
    if stored not in (None, kind):
        raise InputError(
            f"{run.start.path} was trained with optim.kind={stored}, not {kind}: keep the kind to "
            "go on from it"
        )
    learner.engine(run).load(tensors)
    if progress.scaler is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(progress.scaler)
    health.replay(run.first(run.folder.rows))
    run.say(f"resumed from {run.start.path}, step {progress.step}")
    return progress
