"""TrainConfig and train(config): the wiring, and the only file that knows everyone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from d3po.evaluate import EvalConfig, Evaluator
from d3po.families import FamilyConfig, load_family
from d3po.generate import SamplerConfig
from d3po.health import Health, HealthConfig
from d3po.held_out import HeldOut, label_agreement, read_pairs
from d3po.judging import FileJudge, Judge, RewardJudge, Rewards
from d3po.losses import BoundObjective, ObjectiveConfig
from d3po.offline import OfflineConfig, OfflineSource
from d3po.online import OnlineSource
from d3po.online.settings import OnlineConfig, groups_per_update
from d3po.pair_cache import cached_pairs, held_out_prompts, skipped_rows, told
from d3po.policy import Policy, PolicyConfig
from d3po.run import Run, RunConfig
from d3po.run_folder import RunFolder
from d3po.speed import SpeedConfig, encoders, kernels, prepare_network
from d3po.trainer import Learner, OptimConfig, fit, whole_rounds
from d3po.updates import Source, Wants
from fifa.config import Config, InputError, load_config, write_atomic
from fifa.pairs import normalise_prompt

if TYPE_CHECKING:
    from d3po.families import Family


class TrainConfig(Config):
    """Everything a training run depends on."""

    model: str = Field(
        "mini",
        description="What is trained: mini (embedded), a diffusers folder, a Hub id, or one "
        "safetensors file.",
    )
    family: FamilyConfig = Field(FamilyConfig(), description="How the model is opened.")
    method: Literal["d3po", "dpo"] = Field(
        "d3po",
        description="Where images come from. d3po: online, from its own rollouts, as D3PO's; "
        "dpo: a data set of pairs, as Diffusion-DPO's. Most objectives go with either.",
    )
    objective: ObjectiveConfig = Field(description="The loss.")
    policy: PolicyConfig = Field(PolicyConfig(), description="Which weights are trained.")
    optim: OptimConfig = Field(OptimConfig(), description="Optimizer, batch sizes, length.")
    sampler: SamplerConfig = Field(SamplerConfig(), description="How pictures are drawn.")
    online: OnlineConfig | None = Field(None, description="Rollouts and judges, for method d3po.")
    offline: OfflineConfig | None = Field(None, description="The data set, for method dpo.")
    speed: SpeedConfig = Field(SpeedConfig(), description="Ways to compute the same faster.")
    eval: EvalConfig = Field(EvalConfig(), description="Comparisons with the reference.")
    health: HealthConfig = Field(
        HealthConfig(), description="What is unusual, said in warnings; when to stop."
    )
    run: RunConfig = Field(description="Folder, seed, precision, checkpoints, trackers.")

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, values: Any) -> Any:
        """Give the method its section, and refuse the other one's: it would be read by nobody."""
        sections = {"d3po": "online", "dpo": "offline"}
        if not isinstance(values, Mapping):
            return values
        method = values.get("method", "d3po")
        if method not in sections:
            return values
        own = sections[method]
        for other in set(sections.values()) - {own}:
            if values.get(other) is not None:
                raise ValueError(
                    f"method {method} reads '{own}', not '{other}'; remove one of the two"
                )
        return {**values, own: values.get(own) or {}}

    @model_validator(mode="after")
    def _held_out_of_something(self) -> TrainConfig:
        wanted = self.eval.prompts == "heldout"
        if wanted and (self.offline is None or self.offline.held_out_fraction == 0):
            raise ValueError(
                "eval.prompts=heldout needs method dpo and offline.held_out_fraction > 0"
            )
        return self


# The flags of diffusers' training scripts, and the override each one stands for.
FLAGS: dict[str, str] = {
    "pretrained_model_name_or_path": "model={}",
    "output_dir": "run.dir={}",
    "seed": "run.seed={}",
    "mixed_precision": "run.mixed_precision={}",
    "checkpointing_steps": "run.checkpoint_every={}",
    "checkpoints_total_limit": "run.keep_checkpoints={}",
    "resume_from_checkpoint": "run.resume={}",
    "report_to": "run.trackers=[{}]",
    "max_train_steps": "optim.max_steps={}",
    "learning_rate": "optim.learning_rate={}",
    "lr_warmup_steps": "optim.warmup_steps={}",
    "train_batch_size": "optim.micro_batch={}",
    "gradient_accumulation_steps": "optim.accumulation={}",
    "adam_weight_decay": "optim.weight_decay={}",
    "adam_epsilon": "optim.epsilon={}",
    "max_grad_norm": "optim.max_grad_norm={}",
    "beta_dpo": "objective.beta={}",
    "rank": "policy.rank={}",
    "guidance_scale": "sampler.guidance={}",
    "num_inference_steps": "sampler.steps={}",
    "train_data_dir": "offline.data={}",
    "proportion_empty_prompts": "offline.empty_prompts={}",
    "num_validation_images": "eval.images={}",
    "validation_steps": "eval.every={}",
}


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A TrainConfig from a YAML file and dotted.key=value overrides."""
    return load_config(TrainConfig, path, overrides)


# ---- what it will do ----------------------------------------------------------------------------


def arithmetic(config: TrainConfig, processes: int = 1) -> str:
    """How the batch sizes multiply, as text; raises InputError where they do not fit."""
    optim = config.optim
    unit = "groups" if config.online else "pairs"
    product = (
        f"{optim.micro_batch} {unit} x {optim.accumulation} accumulated x {processes} processes"
    )
    if config.online is None:
        size = optim.micro_batch * optim.accumulation * processes
        return (
            f"one update: {product} = {size} pairs, {2 * size} images at one time each\n"
            f"the run: {optim.max_steps} updates = {optim.max_steps * size} pairs"
        )
    online, size = config.online, groups_per_update(config.online, optim, processes)
    # how many of a path's steps have noise depends on the model's schedule, which is not read here
    steps = online.step_count or f"at most {config.sampler.steps - online.skip_last}"
    updates = online.groups // size * online.inner_epochs
    total = whole_rounds(optim.max_steps, updates)
    objective = BoundObjective.from_config(config.objective)

    def learned_from(groups: int) -> str:
        if objective.unit == "images":
            return f"at most {groups * online.images} images"
        return f"at most {groups * online.images * (online.images - 1) // 2} pairs"

    return (
        f"one round: {online.groups} groups x {online.images} images = "
        f"{online.groups * online.images} images, {learned_from(online.groups)}\n"
        f"one update: {product} = {size} groups, {learned_from(size)} x {steps} steps\n"
        f"one round: {online.groups // size} updates x {online.inner_epochs} inner epochs = "
        f"{updates} updates\n"
        f"the run: {total} updates = {total // updates} rounds = "
        f"{total // updates * online.groups * online.images} images"
    )


# ---- wiring -------------------------------------------------------------------------------------


def train(config: TrainConfig) -> RunFolder:
    """Train as the config says, from where its run folder left off; returns the finished folder.

    Raises InputError for whatever a person can put right.
    """
    run = Run(_with_labels_saved(config))
    try:
        _check_division(config, run)
        objective = BoundObjective.from_config(config.objective)
        family = _family(config, run)
        family.gradient_checkpointing(config.optim.gradient_checkpointing)
        prepare_network(config.speed, family.denoiser)
        policy = Policy(family, config.policy, run.mesh)
        held_out = evaluation_prompts(config)
        health = Health(config.health, config.objective.beta)
        rewards = Rewards(config.run.judge_device or run.device)
        source = _source(config, objective.wants, family, policy, held_out, rewards, run)
        evaluator = _evaluator(config, family, policy, held_out, rewards, run, health)
        learner = Learner.prepare(policy, objective, config.optim, run)
        run.open(config, config.optim.units(run.processes))
        _tell_what_was_skipped(source, run)
        with kernels(config.speed, run.device, run.accelerator.mixed_precision):
            # Only now: reference and policy have to be scored in one precision, by one kernel.
            watch = _held_out(config, family, policy, run, health)
            if config.speed.offload_encoders:
                for part in encoders(family):
                    part.to("cpu")
            _check_labels(config, evaluator, run, health)
            every = config.eval.every
            end = fit(learner, source, run, _all(evaluator, watch), every, health)
        with policy.averaged():
            weights = run.save_weights(policy.saver(), end.step)
        run.say(f"weights are in {weights}")
        if health.stopped is not None:
            raise InputError(f"stopped, as health.stop asks: {health.stopped.words}")
        return run.folder
    finally:
        run.close()


def _with_labels_saved(config: TrainConfig) -> RunConfig:
    """People label the pictures of exact weights: save those after every round."""
    if config.online is None or config.online.labels is None:
        return config.run
    return config.run.model_copy(update={"checkpoint_every": 1})


_PIECES = {
    "zero2": "gradients in pieces (DeepSpeed's ZeRO-2)",
    "fsdp2": "weights in pieces (FSDP2)",
}


def _check_division(config: TrainConfig, run: Run) -> None:
    """InputError for settings that do not go with weights or gradients in pieces."""
    if run.division == "ddp":
        return
    wrong = {
        f"optim.kind={config.optim.kind}": config.optim.kind != "adamw",
        "optim.offload": config.optim.offload,
        "run.mixed_precision=fp16": run.accelerator.mixed_precision == "fp16",
        "speed.channels_last": config.speed.channels_last,
        "speed.compile": config.speed.compile is not None,
    }
    if found := [name for name, asked in wrong.items() if asked]:
        raise InputError(
            f"{', '.join(found)} cannot be had with {_PIECES[run.division]}: change it, or launch "
            "with configs/accelerate/ddp.yaml"
        )


def _family(config: TrainConfig, run: Run) -> Family:
    """The model, on the device of the run but for a denoiser that is still to be cut up."""
    place = run.device if run.mesh is None else torch.device("cpu")
    family = load_family(config.model, _base_dtype(config, run), place, config.family)
    for part in encoders(family):
        part.to(run.device)
    return family


def _base_dtype(config: TrainConfig, run: Run) -> torch.dtype:
    """Frozen weights may be stored in half precision; trained ones are float32."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if config.policy.method == "full" or run.device.type == "cpu":
        return torch.float32
    return half.get(run.accelerator.mixed_precision, torch.float32)


def _source(
    config: TrainConfig,
    wants: Wants,
    family: Family,
    policy: Policy,
    held_out: Sequence[str],
    rewards: Rewards,
    run: Run,
) -> Source:
    reduce = config.objective.reduce
    if config.offline is not None:
        cache = cached_pairs(config.offline, family, run, held_out)
        return OfflineSource(
            config.offline, config.optim, family, policy, cache, run, reduce, wants, config.speed
        )
    assert config.online is not None  # the config's validator put it there
    judge, names = _judge(config.online, rewards, run)
    prompts = _training_prompts(config.online, config.run.seed, held_out)
    return OnlineSource(
        config.online,
        config.sampler,
        config.optim,
        family,
        policy,
        judge,
        names,
        prompts,
        run,
        reduce,
        wants,
    )


def _judge(config: OnlineConfig, rewards: Rewards, run: Run) -> tuple[Judge, list[str]]:
    if config.labels is not None:
        return FileJudge(config.labels, run.folder.samples, config.images), ["labels"]
    return RewardJudge(rewards(config.judges)), list(config.judges)


def _evaluator(
    config: TrainConfig,
    family: Family,
    policy: Policy,
    prompts: Sequence[str],
    rewards: Rewards,
    run: Run,
    health: Health,
) -> Evaluator | None:
    if not prompts:
        return None
    judges = rewards(config.eval.judges)
    return Evaluator(config.eval, config.sampler, family, policy, judges, prompts, run, health)


def _held_out(
    config: TrainConfig, family: Family, policy: Policy, run: Run, health: Health
) -> HeldOut | None:
    if config.offline is None or not config.offline.held_out_fraction or not config.health.pairs:
        return None
    pairs = read_pairs(config.offline, config.health.pairs, family.image_size, kept_out=True)
    if not pairs:
        return None
    objective, noise = config.objective, config.offline.noise
    beta = 1.0 if objective.beta is None else objective.beta  # margins in plain log-ratios then
    return HeldOut(pairs, family, policy, run, health, beta, noise, objective.reduce)


def _check_labels(
    config: TrainConfig, evaluator: Evaluator | None, run: Run, health: Health
) -> None:
    """Ask the evaluation's judges about the labels of training pairs, before the first step."""
    wanted = config.health.pairs
    if config.offline is None or not wanted or evaluator is None or run.start is not None:
        return
    size = evaluator.family.image_size
    pairs = read_pairs(config.offline, wanted, size, kept_out=False)
    if pairs:
        health.follow(run, "labels", 0, label_agreement(pairs, evaluator.rewards))


def _all(*watchers: Callable[[int], object] | None) -> Callable[[int], None] | None:
    """One function of the step that calls each; None if there is none."""
    own = [watcher for watcher in watchers if watcher is not None]

    def call(step: int) -> None:
        for watcher in own:
            watcher(step)

    return call if own else None


def _tell_what_was_skipped(source: Source, run: Run) -> None:
    if not isinstance(source, OfflineSource):
        return
    rows = skipped_rows(source.cache)
    listed = (
        f"; the rows set aside are listed in {run.folder.path / 'skipped.jsonl'}" if rows else ""
    )
    run.say(told(source.cache.summary) + listed)
    if rows:
        text = (source.cache.folder / "skipped.jsonl").read_text(encoding="utf-8")
        run.first(lambda: write_atomic(run.folder.path / "skipped.jsonl", text))


# ---- prompts ------------------------------------------------------------------------------------


def evaluation_prompts(config: TrainConfig) -> list[str]:
    """The prompts that policy and reference are compared on; none without eval.prompts."""
    spec = config.eval.prompts
    if spec is None:
        return []
    if spec == "heldout" and config.offline is not None:
        prompts = held_out_prompts(config.offline)
        if not prompts:
            raise InputError(
                f"eval.prompts=heldout: offline.held_out_fraction="
                f"{config.offline.held_out_fraction:g} holds out none of the few prompts of "
                f"{config.offline.data}; raise it"
            )
    else:
        prompts = read_prompts(spec, config.eval.count, config.eval.seed)
    return prompts[: config.eval.count]


def _training_prompts(config: OnlineConfig, seed: int, held_out: Sequence[str]) -> list[str]:
    prompts = read_prompts(config.prompts, config.prompt_count, seed)
    never = {normalise_prompt(prompt) for prompt in held_out}
    kept = [prompt for prompt in prompts if normalise_prompt(prompt) not in never]
    if not kept:
        raise InputError(f"every prompt of {config.prompts} is also one of eval.prompts")
    return kept


def read_prompts(spec: str, count: int, seed: int) -> list[str]:
    """`count` prompts of miniworld:train or miniworld:heldout, or all those of a text file."""
    if spec == "miniworld:train" or spec == "miniworld:heldout":
        from fifa.miniworld import prompts

        return prompts("train" if spec == "miniworld:train" else "heldout", count, seed)
    try:
        lines = Path(spec).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read prompts from {spec}: {error}; give miniworld:train, "
            "miniworld:heldout or a "
            "text file with one prompt a line"
        ) from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InputError(f"{spec} holds no prompt")
    return found


# ---- a finished run -----------------------------------------------------------------------------


def run_config(path: str | Path) -> TrainConfig:
    """The settings of the run in folder `path`; InputError if it is no run folder."""
    file = Path(path) / "config.yaml"
    if not file.is_file():
        raise InputError(f"{path} is not a run folder: it has no config.yaml")
    return load(file)


def load_run(
    path: str | Path, device: str = "cpu", live: bool = False
) -> tuple[TrainConfig, Policy]:
    """The settings of a run and its policy with the trained weights in place.

    Takes <run>/weights, or the newest checkpoint of a run that has not ended: the averaged ones if
    there is an average. With `live` always that checkpoint, and the weights themselves.
    """
    config, folder = run_config(path), RunFolder(path)
    policy = Policy(load_family(config.model, device=device, config=config.family), config.policy)
    if folder.weights.is_dir() and not live:
        policy.load(folder.weights)
        return config, policy
    checkpoint = folder.newest()
    if checkpoint is None:
        raise InputError(f"{path} has no checkpoint{'' if live else ' and no weights'} yet")
    state = checkpoint.tensors("policy")
    if not live:
        state |= {name: state[f"ema.{name}"] for name in state if f"ema.{name}" in state}
    policy.load_state_dict(state)
    return config, policy
