"""The training step and its loop; the only room that calls backward() or optimizer.step().

What differs from a textbook trainer:

* Where the pairs come from is not known here. A `Source` hands out rounds of updates, an update is
  a list of chunks, and a chunk can say how likely a denoiser finds its images. D3PO on rollouts and
  Diffusion-DPO on a data set are two sources of the same step.
* An image is scored once, however many pairs it is in: `Chunk.win` and `.lose` are row numbers.
* The loss is the mean over all pairs and steps of the update on all processes, whatever the size of
  the chunks: each chunk contributes its sum, divided by the global count.
* There is no scheduler object and no generator. The learning rate is a function of the step, every
  draw a function of its place, so a checkpoint holds tensors and a few numbers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from d3po.health import Health
from d3po.objectives import OBJECTIVES, Objective, pair_metrics
from d3po.optimizers import Kind, build_optimizer
from d3po.policy import Policy
from d3po.run import Progress, Run, flatten
from d3po.sampling import Reduce
from fifa.config import Config, InputError, nearest

# ---- settings -----------------------------------------------------------------------------------


class ObjectiveConfig(Config):
    """Which loss, how strongly it is held to the reference, and in which unit."""

    name: str = Field(
        description="A name of d3po.objectives.OBJECTIVES (dpo, d3po_clipped, ipo, ...), or "
        "package.module:function."
    )
    beta: float = Field(
        gt=0,
        description="Strength of the pull to the reference, per unit of log-probability "
        "(published, on "
        "'mean': D3PO 0.1, Diffusion-DPO 2000 to 5000).",
    )
    options: dict[str, float] = Field(
        {}, description="Further numbers the objective takes, such as clip or label_smoothing."
    )
    reduce: Reduce = Field(
        "mean",
        description="Unit of log-probability: 'mean' per latent element, as published, or "
        "'sum' in nats.",
    )


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

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its numbers filled in: (win, lose, ref_win, ref_lose) -> unreduced loss."""

    function: Objective
    arguments: Mapping[str, float]

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> BoundObjective:
        """Look the objective up and check its options against its signature."""
        function = _objective(config.name)
        parameters = inspect.signature(function).parameters
        known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
        for name in config.options:
            if name not in known or name == "beta":
                allowed = ", ".join(sorted(set(known) - {"beta"})) or "none"
                raise InputError(
                    f"objective.options.{name}: {config.name} takes no such option, allowed: "
                    f"{allowed}"
                )
            _check_limits(name, config.options[name])
        defaults = {name: parameters[name].default for name in known if name != "beta"}
        return cls(function, {**defaults, **config.options, "beta": config.beta})

    def __call__(self, win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> Tensor:
        """The unreduced loss."""
        return self.function(win, lose, ref_win, ref_lose, **self.arguments)

    def watch(self, win: Tensor, lose: Tensor, ref_win: Tensor, ref_lose: Tensor) -> list[Tensor]:
        """What WATCHED names, unreduced."""
        beta, clip = self.arguments["beta"], self.arguments.get("clip")
        values = pair_metrics(win, lose, ref_win, ref_lose, beta, clip)
        return [values[key] for key in WATCHED.values()]


WATCHED = {
    # our name in metrics.jsonl -> name in pair_metrics
    "accuracy": "implicit_accuracy",
    "margin": "implicit_margin",
    "win_ratio": "win_ratio",
    "lose_ratio": "lose_ratio",
    "clipped": "clipped_share",
}


LIMITS = {"clip": (0.0, 1.0), "label_smoothing": (0.0, 0.5)}  # of options, both ends excluded


def _check_limits(name: str, value: float) -> None:
    low, high = LIMITS.get(name, (-math.inf, math.inf))
    if not low < value < high:
        raise InputError(
            f"objective.options.{name} is {value}, it must lie between {low} and {high}"
        )


def _objective(name: str) -> Objective:
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, colon, function = name.partition(":")
    if not colon:
        near = nearest(name, OBJECTIVES)
        hint = f"did you mean '{near}'?" if near else f"known are {', '.join(OBJECTIVES)}"
        raise InputError(f"objective.name: unknown objective '{name}'; {hint}")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"objective.name: cannot import '{name}': {error}") from None
    return found


# ---- what a step is made of ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chunk:
    """Images that go through the network together, and the pairs among them.

    B images, Q pairs, S steps (or noise levels) trained on.
    """

    logp: Callable[[nn.Module], Tensor]  # denoiser -> (B, S), with gradient
    win: Tensor  # (Q,) long: row of each pair's winner
    lose: Tensor  # (Q,) long
    steps: int  # S
    ref: Tensor | None = None  # (B, S) under the reference; None: computed when its turn comes


@dataclass(frozen=True, eq=False)
class Update:
    """This process's share of one optimizer step.

    `idle` is gone through when `chunks` is empty here but not on another process: DDP adds
    gradients up while it walks back through a network, so every process has to walk.
    """

    chunks: Sequence[Chunk]
    pairs: int  # on this process; each may be in several chunks, at different steps
    idle: Callable[[], Chunk] | None = None  # None: this process always has chunks

    @property
    def terms(self) -> int:
        """Pairs times steps on this process."""
        return sum(len(chunk.win) * chunk.steps for chunk in self.chunks)


@dataclass(frozen=True, eq=False)
class Round:
    """Updates that can be made before the source has to look at the policy again."""

    metrics: Mapping[str, Any]  # about the round as a whole; empty if there is nothing to say
    updates: Iterator[Update]


class Source(Protocol):
    """Where updates come from; round `index` depends on nothing but the index and the policy."""

    updates_per_round: int

    def round(self, index: int) -> Round:
        """The updates of round `index`; consumed in order, each after the step before it."""
        ...


@dataclass(frozen=True, eq=False)
class Learner:
    """What learns: the policy, wrapped for the processes, its optimizer, the objective."""

    policy: Policy  # its `denoiser` is the wrapped network: what has a gradient goes through it
    optimizer: Any  # AcceleratedOptimizer around that of config.kind
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
        policy.denoiser, wrapped = run.accelerator.prepare(policy.bare, optimizer)
        return cls(policy, wrapped, objective, config)


# ---- one step -----------------------------------------------------------------------------------


def reference_logp(policy: Policy, logp: Callable[[nn.Module], Tensor]) -> Tensor:
    """What `logp` gives under the reference, without gradient.

    Through the bare network: processes may have different numbers of chunks, and must not wait for
    each other here.
    """
    with policy.reference():
        return logp(policy.bare)


def train_step(learner: Learner, update: Update, run: Run, step: int) -> dict[str, float]:
    """Backward through an update, one optimizer step; what happened, averaged over all processes.

    A step without any pair, or whose gradient is not finite, leaves the weights alone: then `pairs`
    is 0, or `skipped` is 1.
    """
    (terms,) = run.total([update.terms])
    if terms == 0:
        return {"pairs": 0.0, "skipped": 0.0}
    sums = _backward(learner, update, run, run.processes / terms)
    grad_norm, stepped = _optimizer_step(learner, run, step)
    *totals, pairs = run.total([*sums, update.pairs])
    means = dict(zip(("loss", *WATCHED), (total / terms for total in totals), strict=True))
    return {
        **means,
        "grad_norm": grad_norm,
        "learning_rate": learner.config.rate(step),
        "pairs": pairs,
        "skipped": 0.0 if stepped else 1.0,
    }


def _backward(learner: Learner, update: Update, run: Run, scale: float) -> list[float]:
    """Accumulate the gradient of scale * sum(loss); return sums of the loss and of WATCHED."""
    chunks = update.chunks or ([update.idle()] if update.idle else [])
    sums = torch.zeros(1 + len(WATCHED), dtype=torch.float64)
    for i, chunk in enumerate(chunks):
        ref = reference_logp(learner.policy, chunk.logp) if chunk.ref is None else chunk.ref
        last = i == len(chunks) - 1  # gradients of the processes meet once, on the last way back
        with nullcontext() if last else run.accelerator.no_sync(learner.policy.denoiser):
            logp = chunk.logp(learner.policy.denoiser)
            four = logp[chunk.win], logp[chunk.lose], ref[chunk.win], ref[chunk.lose]
            loss = learner.objective(*four)
            run.accelerator.backward(loss.sum() * scale)
        watched = [loss.detach(), *learner.objective.watch(*four)]
        sums += torch.stack([value.double().sum() for value in watched]).cpu()
    return sums.tolist()


def _optimizer_step(learner: Learner, run: Run, step: int) -> tuple[float, bool]:
    """Clip, step, clear; (norm before clipping, whether the weights moved)."""
    optimizer, config = learner.optimizer, learner.config
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    norm = float(run.accelerator.clip_grad_norm_(learner.policy.trainable(), limit))
    stepped = math.isfinite(norm)
    # The fp16 scaler wants to see overflows: it skips the step itself and lowers its scale.
    if stepped or run.accelerator.scaler is not None:
        optimizer.step()
        stepped = stepped and not optimizer.step_was_skipped
    if stepped:
        learner.policy.ema_update()
    optimizer.zero_grad(set_to_none=True)
    return norm, stepped


# ---- the loop -----------------------------------------------------------------------------------


def fit(
    learner: Learner,
    source: Source,
    run: Run,
    evaluate: Callable[[int], object] | None = None,
    evaluate_every: int = 0,
) -> Progress:
    """Train for max_steps, rounded up to whole rounds, from where the run folder says.

    `evaluate(step)` is called before the first step, after the last, and at the first end of a
    round at or past each multiple of `evaluate_every` steps (0: not in between).
    """
    progress = _resume(learner, run)
    total = whole_rounds(learner.config.max_steps, source.updates_per_round)
    health = Health()
    with run.progress(total, progress.step):
        if progress.step == 0 and evaluate is not None:
            evaluate(0)
        while progress.step < total:
            before = progress.step
            progress = _train_round(learner, source, run, progress, health)
            done = progress.step >= total
            if evaluate is not None and (done or _crossed(evaluate_every, before, progress.step)):
                evaluate(progress.step)
            if done or _crossed(run.config.checkpoint_every, before, progress.step):
                _checkpoint(learner, run, progress)
    return progress


def _train_round(
    learner: Learner, source: Source, run: Run, progress: Progress, health: Health
) -> Progress:
    index = progress.step // source.updates_per_round
    found = source.round(index)
    if found.metrics:
        run.record("round", progress.step, {"round": index, **found.metrics})
    for update in found.updates:
        metrics = train_step(learner, update, run, progress.step)
        skipped = progress.skipped_in_a_row + 1 if metrics["skipped"] else 0
        progress = replace(progress, step=progress.step + 1, skipped_in_a_row=skipped)
        run.record("update", progress.step, metrics)
        run.advance(progress.step, _headline(metrics))
        _complain(run, progress, metrics, learner.config.max_skipped)
        if metrics["pairs"]:
            for warning in health.look({**found.metrics, **metrics}):
                run.say(f"warning: {warning}")
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
    if not metrics["pairs"]:
        return "no pair, all ties"
    return (
        f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.0%}  "
        f"margin {metrics['margin']:+.2g}  grad {metrics['grad_norm']:.2g}"
    )


def _crossed(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]; never for 0."""
    return every > 0 and now // every > before // every


# ---- checkpoints --------------------------------------------------------------------------------


def _checkpoint(learner: Learner, run: Run, progress: Progress) -> None:
    scaler = run.accelerator.scaler
    note = replace(
        progress,
        reference=learner.policy.fingerprint(),
        scaler=None if scaler is None else scaler.state_dict(),
    )
    tensors = {
        "policy": learner.policy.state_dict(),
        "optimizer": _optimizer_tensors(learner.optimizer),
    }
    run.save(note, tensors)


def _resume(learner: Learner, run: Run) -> Progress:
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
    _load_optimizer(learner.optimizer, run.start.tensors("optimizer"))
    if progress.scaler is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(progress.scaler)
    run.say(f"resumed from {run.start.path}, step {progress.step}")
    return progress


def _optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """The state as {"<parameter number>.<name>": tensor}; the settings live in the config.

    8-bit Adam nests part of its state in a dict of its own; those names have another dot.
    """
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for i, own in state.items():
        for name, value in flatten(own).items():
            tensor = torch.as_tensor(value)
            shared = tensor.data_ptr() in seen  # 8-bit Adam: one table of levels for all weights
            seen.add(tensor.data_ptr())
            tensors[f"{i}.{name}"] = tensor.clone() if shared else tensor
    return tensors


def _load_optimizer(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, *inner, name = key.split(".")
        own = state.setdefault(int(number), {})
        for part in inner:
            own = own.setdefault(part, {})
        counts = value.ndim == 0 and value.dtype == torch.int64  # was a Python number
        own[name] = value.item() if counts else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
