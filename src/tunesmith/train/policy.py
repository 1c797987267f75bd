"""A trainer that draws answers, has them judged, and makes the better ones likelier.

A step begins with prompts. Where a generation is over, answers to the next prompts are drawn and judged
(`train.rollouts`); its micro-batches then go the way of all others: their loss is a function of the log-probabilities
of the answers' tokens (`objectives.policy`). Of several processes, all know the prompts of a generation, and each draws
its answers of them. What an advantage is, and which loss, is said in `train.grpo` and `train.rloo`.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from tunesmith.data.batches import Batch, FlatCollator, PaddedCollator, documents_of
from tunesmith.data.questions import Question, Questions
from tunesmith.data.samplers import Generations, batch_loader, register_sampler
from tunesmith.data.tool_turns import ToolTurns, check_tool_template
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import Model
from tunesmith.model.generate import Sampling, room_of, stop_ids
from tunesmith.objectives.logprobs import TokenLogProbs
from tunesmith.objectives.policy import (
    Correction,
    Drawn,
    PolicyOptions,
    TokenLosses,
    divisors,
    policy_logprobs,
    policy_losses,
    sampler_correction,
)
from tunesmith.settings.policy import PolicyConfig
from tunesmith.text import shorten
from tunesmith.train.generator import Generator, OwnDecoding, seed_of
from tunesmith.train.loaders import Batching
from tunesmith.train.meter import BatchLoss, Extreme
from tunesmith.train.preference import without_dropout
from tunesmith.train.reference import (
    AsItIs,
    GivenModel,
    Reference,
    check_sharded,
    given_reference,
    reference_of,
    starts_as_base,
)
from tunesmith.train.rewards import SHOWN, Rewards
from tunesmith.train.rollouts import Answered, Deal, Judge, Trial, Window, trials_of, without_silent
from tunesmith.train.rows import Given, RowsTrainer, Sources, TrainSource
from tunesmith.train.selftest import EXACT, ROUNDED
from tunesmith.train.setup import as_config, checked_model, faster_layers, given_model, ready_for_batches
from tunesmith.train.sharding import whole_weights
from tunesmith.train.together import all_or_none, in_order
from tunesmith.train.tools import Conversing, tools_of
from tunesmith.train.vllm_server import Server, VLLMServer
from tunesmith.types import IGNORE_INDEX

logger = logging.getLogger(__name__)
OF_TOKENS = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
"""Means over the tokens of answers."""
PARITY = "sampling/sampling_logp_difference/mean"
"""The mean difference, in nats a token, between what the generator and the trainer say of the drawn tokens."""
CALLS, FAILURES = "tools/call_frequency", "tools/failure_frequency"
"""Calls of functions in an answer, and the share of calls that failed."""
ELSEWHERE = 0.1
"""As many nats a token a generator elsewhere may differ before the first step: it rounds in its own way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """What a loader gives for a micro-batch: the questions of the generation that it belongs to."""

    numbers: tuple[int, ...]


class _AskingFlat(FlatCollator):
    """Makes flat batches of answers; of rows, which have none yet, their numbers."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return Prompts(numbers=tuple(int(row["number"]) for row in rows))


class _AskingPadded(PaddedCollator):
    """Makes padded batches of answers; of rows, which have none yet, their numbers."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return Prompts(numbers=tuple(int(row["number"]) for row in rows))


class PolicyTrainer(RowsTrainer):
    """What trainers share that learn from rewards. The arguments are those of TRL's trainers.

    `reward_funcs` is a function, a model that scores texts, a name, or several; see `docs/policies.md`. `generator`
    draws the answers in place of the model's own decoding. `ref_model` is the reference in place of the model as
    training begins with it. `tools` are functions that the model may call while it answers. `rollout_func` and
    `environment_factory` are refused.
    """

    extremes: Mapping[str, Extreme] = MappingProxyType(
        {
            "completions/min_length": "min",
            "completions/max_length": "max",
            "completions/min_terminated_length": "min",
            "completions/max_terminated_length": "max",
        }
    )
    loss_tells = False  # it is 0 where the policy is that which has drawn, whatever the gradient
    config: ClassVar[type[PolicyConfig]]
    options: PolicyOptions

    def __init__(
        self,
        model: str | Model | None = None,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: TrainSource | None = None,
        eval_dataset: Sources | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        ref_model: str | Model | None = None,
        generator: Generator | None = None,
    ) -> None:
        _refuse(rollout_func=rollout_func, environment_factory=environment_factory)
        given = given_model(model)
        if ref_model is not None:
            ref_model = checked_model("ref_model", ref_model)
        args = as_config(args, given, self.config)
        args.settle_generations()
        self._tools = tools_of(args, tools)
        self.tools = [*self._tools.functions.values()]
        judges = args.reward_funcs if reward_funcs is None else reward_funcs
        if judges is None:
            raise TunesmithError(
                "reward_funcs is missing: a function that judges answers, or the name of one, such as exact_match"
            )
        self.rewards = Rewards(
            judges,
            weights=args.reward_weights,
            tokenizers=reward_processing_classes,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )
        self.options = self.take_settings(args)
        self._name_means()
        super().__init__(
            Given(
                model=given,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                quantization_config=quantization_config,
                peft_config=peft_config,
            ),
            cast(Any, self._read),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._check_prompts()
        self.reference = self._chosen_reference(ref_model)
        self._prepare_generations(args, generator)
        self._checked = self._warned = False
        self._noted: dict[str, list[float]] = {}

    def _name_means(self) -> None:
        """The names of what is logged: `means` over answers, of which those `counted` are over fewer or over tokens."""
        own = [f"rewards/{name}/mean" for name in self.rewards.names]
        self.counted = (
            *("reward", *OF_TOKENS, PARITY, "completions/mean_terminated_length", *own),
            *([FAILURES] if self.tools else []),
        )
        self.deviations = ("reward_std", *(f"rewards/{name}/std" for name in self.rewards.names))
        self.means = (
            *("reward_spread", "frac_reward_zero_std", *self.deviations),
            *("completions/mean_length", "completions/clipped_ratio"),
            *([CALLS] if self.tools else []),
            *self.counted,
        )

    def _prepare_generations(self, args: PolicyConfig, generator: Generator | None) -> None:
        """What draws answers and judges them, and the generation that is trained on."""
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        self.decoding = OwnDecoding(cast(Model, self.model), tokenizer, precision=self.accelerator.autocast)
        drawing = generator or (self._server() if args.use_vllm else self.decoding)
        self.judge = Judge(
            drawing,
            self.rewards,
            tokenizer,
            _sampling(args),
            self.total,
            self._conversing(args),
            ready=lambda: whole_weights(cast(nn.Module, self.model), args),
            guard=self._all_or_none,
        )
        parts = cast(int, args.steps_per_generation)
        together = math.gcd(parts, args.gradient_accumulation_steps)  # micro-batches that are in one step for sure
        self.deal = Deal(
            rank=args.process_index,
            processes=args.world_size,
            stretch=together * args.per_device_train_batch_size,
        )
        self.window = Window(parts, args.num_iterations, self.deal)
        self.keeper.add("window", self.window)

    @property
    def reward_processing_classes(self) -> list[Any]:
        """The tokenizer that was given for each of `reward_funcs`; None where the model's own is used, or none."""
        return self.rewards.tokenizers

    # What another one says

    def take_settings(self, args: Any) -> PolicyOptions:
        """What the loss is, by a checked config."""
        raise NotImplementedError(f"{type(self).__name__} must define take_settings")

    def _conversing(self, args: PolicyConfig) -> Conversing | None:
        """What draws answers turn by turn; None without tools."""
        if not self.tools:
            return None
        model, tokenizer = cast(Model, self.model), cast(PreTrainedTokenizerBase, self.processing_class)
        arguments = cast(Any, args.chat_template_kwargs)
        turns = ToolTurns(tokenizer, stop_ids(model, tokenizer), self._tools.schemas, arguments)
        most = args.max_tool_calling_iterations
        return Conversing(self._tools, turns, tokenizer, most=most, room=room_of(model))

    def _server(self) -> Generator:
        args, tokenizer = self._policy, cast(PreTrainedTokenizerBase, self.processing_class)
        server = Server(
            url=args.server.rstrip("/"),
            timeout=args.vllm_server_timeout,
            folder=Path(str(args.output_dir)) / "vllm",
            stops=stop_ids(cast(Model, self.model), tokenizer),
        )
        return VLLMServer(self.model, server, lambda: int(self.state.global_step), loads=args.process_index == 0)

    def _all_or_none(self) -> AbstractContextManager[None]:
        """Around what each process does by itself: where it fails on one, nobody waits for that one in vain."""
        return all_or_none(self.args.device, numbered=False) if self.args.world_size > 1 else nullcontext()

    def total(self, rewards_DR: Tensor) -> Tensor:
        """(D,) What the rewards of each answer count together; NaN where none applies."""
        raise NotImplementedError(f"{type(self).__name__} must define total")

    def advantages(self, answered: Answered, kl_D: Tensor | None) -> Tensor:
        """(D,) By how much each answer of a generation is better than the others of its group. `kl_D` is how far its
        log-probability is above the reference's, where there is one."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages")

    @property
    def _policy(self) -> PolicyConfig:
        return cast(PolicyConfig, self.args)

    # Before the first step

    def _read(self, args: PolicyConfig, tokenizer: PreTrainedTokenizerBase) -> Questions:
        if self.tools:
            check_tool_template(tokenizer)
        self._questions = Questions(args, tokenizer, self._tools.schemas)
        return self._questions

    def check_rows(self, dataset: Any) -> None:
        """Raises TunesmithError for columns that rewards miss."""
        for columns in self._questions.columns.values():
            self.rewards.check(sorted(columns))

    def batching(self, model: Model, args: Any, tokenizer: PreTrainedTokenizerBase, *, sized: bool) -> Batching:
        flat = ready_for_batches(model, flat=args.padding_free, routers=bool(self.router_coefficient))
        faster_layers(model, args)
        pad, multiple = cast(int, tokenizer.pad_token_id), int(args.pad_to_multiple_of or 1)
        padded = _AskingPadded(read=documents_of, pad_token_id=pad, multiple=multiple)
        if args.disable_dropout:
            without_dropout(model)
        return Batching(
            collator=_AskingFlat(share_prefix=args.share_prefix == "auto") if flat else padded,
            by_row=padded,
            columns=("number",),
        )

    def _check_prompts(self) -> None:
        """Raises TunesmithError for prompts that leave the model no room, and for too few of them."""
        args, room = self._policy, room_of(cast(Model, self.model))
        for question in self._questions.every:
            if room is not None and len(question.ids) >= room:
                raise TunesmithError(
                    f"{question.place}: the prompt has {len(question.ids)} tokens, and the model has room for {room}, "
                    "answer included; leave the row out"
                )
        count = len(cast(Dataset, self.train_dataset))
        if count < args.prompts_per_generation:
            raise TunesmithError(
                f"there are {count} prompts, and a generation has {args.prompts_per_generation} "
                f"({args.generation_batch_size} answers, {args.num_generations} to each); give more, or write a "
                "smaller generation_batch_size"
            )

    def _chosen_reference(self, given: str | Model | None) -> Reference | None:
        """Where the reference is; None where nothing is kept near to one."""
        args, model = self._policy, cast(Model, self.model)
        if not args.beta:
            if given is not None:
                raise TunesmithError("ref_model is given, and beta is 0, which compares with none; leave it out")
            return None
        if given is not None:
            return given_reference(given, model, args, flat=not self.loaders.batching.padded)
        if not starts_as_base(model):
            check_sharded(args)
        return reference_of(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `BaseTrainer`. Before the first step, ratios must be 1, and the reference what the model is."""
        self.window.begin()
        self._checked = bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # A step

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, **kwargs: Any) -> Any:  # type: ignore[override]
        """Of prompts: a generation at a time, of all processes, once for each micro-batch that is made of it."""
        self.take_up_states()
        args, training = self._policy, bool(kwargs.get("is_training"))
        seed = args.seed if args.data_seed is None else args.data_seed
        if training:
            repeats = cast(int, args.steps_per_generation) * args.num_iterations
            batches = Generations(
                len(dataset), args.prompts_per_generation, repeats=repeats, seed=seed, shuffled=args.shuffle_dataset
            )
        else:
            prompts = max(1, batch_size * args.world_size // self._group(training=False))
            batches = Generations(len(dataset), prompts, seed=None)
        loader = batch_loader(dataset.select_columns("number"), batches, self.data_collator, args, training=training)
        return register_sampler(self.loaders.of_this_process(loader))

    def _group(self, *, training: bool) -> int:
        args = self._policy
        return args.num_generations if training else (args.num_generations_eval or args.num_generations)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """All micro-batches of a step, for which answers are drawn where a generation is over."""
        asked, _ = super().get_batch_samples(*args, **kwargs)
        batches = []
        for prompts in asked:
            if self.window.is_over:
                self.window.fill(self._generation(prompts))
            trials = self.window.take()
            computes_all = self.options.beta or self.router_coefficient
            batches.append(self._batch(trials if computes_all else without_silent(trials)))
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if batch_samples and isinstance(batch_samples[0], Prompts):  # whose answers are not there yet
            return None
        return super()._get_num_items_in_batch(batch_samples, device)

    def _batch(self, trials: Sequence[Trial]) -> Batch:
        """A micro-batch of the trials; a blank where there are none, as for a process without a part of a batch."""
        collator = cast(Any, self.loaders.batching.collator)
        if trials:
            return cast(Batch, collator.batch([(trial,) for trial in trials]).to(self.args.device))
        blank = Trial(
            input_ids=self._questions.every[0].ids[:1],
            labels=[IGNORE_INDEX],
            rewards=(torch.nan,) * len(self.rewards.names),
            deviations=(torch.nan,) * len(self.deviations),
        )
        return cast(Batch, collator.batch([(blank,)]).as_blank().to(self.args.device))

    def _generation(self, prompts: Prompts) -> list[Trial]:
        """This process's answers to the prompts of a generation, as trials with advantages, for training."""
        args = self._policy
        answered = self._answered(prompts, training=True)
        trials = trials_of(answered, masks_cut=args.mask_truncated_completions)
        trials = self._scored(answered, trials, args.per_device_train_batch_size, training=True)
        if not self._checked:
            self._check_start(trials)
        self._checked = True
        return trials

    def _answered(self, prompts: Prompts, *, training: bool) -> Answered:
        """Answers to prompts. Their random numbers follow from `seed` and the number of the generation, or, in an
        evaluation, the place of the prompt."""
        args, group = self._policy, self._group(training=training)
        asked: list[Question] = [self._questions.every[number] for number in prompts.numbers]
        total = len(asked) * group
        deal = self.deal if training else replace(self.deal, stretch=math.ceil(total / args.world_size))
        numbers = deal.numbers(total)
        if training:
            seeds = [seed_of(args.seed, self.window.generations, number) for number in numbers]
        else:
            seeds = [seed_of(args.seed, asked[number // group].place, number % group) for number in numbers]
        if isinstance(server := self.judge.generator, VLLMServer):
            with self._all_or_none():  # one loads the adapters, for all
                server.load()
        answered = self.judge(asked, group, numbers, seeds, trainer_state=self.state, log_metric=self._note_metric)
        if training:
            entry = answered.best_and_worst(self.rewards.names)
            known = answered.totals[~answered.totals.isnan()]
            self._say_unjudged(answered)
            spread = float(answered.spreads.nan_to_num(nan=0.0).mean())
            reward = {"reward": float(known.mean()), "reward_spread": spread} if len(known) else {}
            self.journal.note_answers(entry, reward)
            if args.log_completions and self.is_world_process_zero():
                logger.warning("Best and worst of a group:\n%s", json.dumps(entry, indent=2, ensure_ascii=False))
        return answered

    def _say_unjudged(self, answered: Answered) -> None:
        """Warn, once, of an answer to which no reward applies."""
        if self._warned or not (unjudged := answered.totals.isnan().nonzero().flatten().tolist()):
            return
        self._warned, first = True, unjudged[0]
        if first not in answered.numbers:  # the process that has drawn it says so
            return
        logger.warning(
            "%s: no reward applies to %d of %d answers of a generation (all are None), the first %s. They teach "
            "nothing.",
            answered.questions[first // answered.group].place,
            len(unjudged),
            len(answered.totals),
            shorten(repr(answered.texts[answered.numbers.index(first)]), SHOWN),
        )

    def _note_metric(self, name: str, value: float) -> None:
        """A number of a reward function's, whose mean is logged."""
        self._noted.setdefault(name, []).append(float(value))

    def _scored(self, answered: Answered, trials: list[Trial], micro_batch: int, *, training: bool) -> list[Trial]:
        """With log-probabilities of the model that has drawn, where that may be another one by the time they are
        trained on, and of the reference; with advantages and divisors, which are those of the whole generation."""
        args = self._policy
        every = cast(int, args.steps_per_generation) * args.num_iterations
        stale = args.gradient_accumulation_steps % every != 0 or self.corrects
        model = cast(nn.Module, self.model)
        before = self._scores(trials, micro_batch, AsItIs(), model) if stale and training else None
        near = None if self.reference is None else self._scores(trials, micro_batch, self.reference, model)
        kl = None
        if self.reference_in_reward and near is not None:
            own = before or self._scores(trials, micro_batch, AsItIs(), model)
            own_kl = [float((one - two).sum()) for one, two in zip(own, near, strict=True)]
            kl = torch.tensor(in_order(answered.numbers, own_kl))
        advantages = self.advantages(answered, kl).tolist()
        parts = divisors(
            self.options.loss,
            in_order(answered.numbers, [trial.target_count for trial in trials]),
            micro_batch=micro_batch,
            longest=args.max_completion_length,
            level=self.options.level,
        )
        return [
            replace(
                trial,
                advantage=advantages[number],
                scale=parts[number].scale,
                share=parts[number].share,
                before=None if before is None else before[i],
                by_reference=None if near is None else near[i],
            )
            for i, (number, trial) in enumerate(zip(answered.numbers, trials, strict=True))
        ]

    @property
    def reference_in_reward(self) -> bool:
        """Whether moving away from the reference costs reward, rather than being a loss of its own."""
        return False

    @property
    def corrects(self) -> bool:
        """Whether what another generator says of its tokens counts in the loss."""
        return False

    def _scores(self, trials: Sequence[Trial], micro_batch: int, by: Reference, model: nn.Module) -> list[Tensor]:
        """What a model says of the trained tokens of each trial, each (S,), in main memory."""
        scores: list[Tensor] = []
        for start in range(0, max(1, len(trials)), max(1, micro_batch)):  # once at least: weights may be shared out
            batch = self._batch(trials[start : start + micro_batch])
            with torch.no_grad(), by.acting(model) as acting, self.accelerator.autocast():
                answer = self.predict_targets(acting, batch, batch.targets(), self._logprobs)
            outcome: TokenLogProbs = answer.outcome
            if not batch.blank:
                scores += [values.cpu().clone() for values in batch.by_document(outcome.logprobs)]
        return scores

    @property
    def _logprobs(self) -> Any:
        return partial(policy_logprobs, temperature=self._policy.temperature)

    def _check_start(self, trials: Sequence[Trial]) -> None:
        """Raises TunesmithError where the model, which no step has changed yet, is another one than that which has
        drawn the answers, or than its reference."""
        args, model = self._policy, cast(nn.Module, self.model)
        part = trials[: args.per_device_train_batch_size]
        own = self._scores(part, len(part), AsItIs(), model)
        near = EXACT.mean if args.precision == "fp32" else ROUNDED.mean
        compared = {
            "generator": (
                [trial.sampled for trial in part],
                near if self.judge.generator is self.decoding else ELSEWHERE,
                "give it the weights that are trained, and of a vLLM server, where temperature is not 1, "
                "--logprobs-mode processed_logprobs",
            )
        }
        if not isinstance(self.reference, GivenModel):
            others = [trial.by_reference for trial in part]
            compared["reference"] = (others, near, "give the model that the reference is to be as ref_model")
        for name, (others, most, hint) in compared.items():
            pairs = [(one, two) for one, two in zip(own, others, strict=True) if two is not None and len(two)]
            apart = torch.cat([torch.zeros(0), *(one - two for one, two in pairs)]).abs().nan_to_num(nan=0.0)
            sums = torch.tensor([float(apart.sum()), len(apart)], device=args.device)
            total, count = self.accelerator.reduce(sums, reduction="sum").tolist()  # so that all processes agree
            mean = total / max(1.0, count)
            if not mean <= most:
                raise TunesmithError(
                    f"before the first step, the model and its {name} differ by {mean:.4f} nats a token (at "
                    f"most {most:g} is rounding), so that ratios would not begin at 1; {hint}"
                )

    def batch_loss(self, model: nn.Module, batch: Batch, *, with_outputs: bool = False) -> BatchLoss:
        """The losses of the tokens of answers, each times the scale of its answer."""
        answer = self.predict_targets(model, batch, batch.targets(), self._logprobs, with_outputs=with_outputs)
        scored: TokenLogProbs = answer.outcome
        computed, device = cast(tuple[Trial, ...], batch.documents), scored.logprobs.device
        trials = [trial for one in computed for trial in one.every]
        drawn = self._drawn(scored.logprobs, computed)
        result = policy_losses(drawn, self.options)
        scale = torch.tensor([trial.scale for trial in computed], device=device)[drawn.owner]
        loss = (result.losses * scale).sum()
        told = self._of_answers(trials), self._of_tokens(scored, drawn, result)
        sums = {name: value.to(device) for of_some, _ in told for name, value in of_some.items()}
        counts = {name: count for _, of_some in told for name, count in of_some.items()}
        if answer.router_loss is not None:
            sums["aux_loss"] = answer.router_loss.detach() * len(trials)
            if model.training:
                loss = loss + self.router_coefficient * self.batch_weight(batch) * answer.router_loss
        return BatchLoss(
            loss=loss,
            count=len(trials),
            sums=sums,
            counts=counts,
            extremes=_extremes(trials, device),
            outputs=answer.outputs,
        )

    def _of_answers(self, trials: Sequence[Trial]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What is logged by answer: sums, and of those that are not over all answers, over how many they are."""
        ended = [trial.size for trial in trials if not trial.cut]
        known = [trial.reward for trial in trials if trial.reward == trial.reward]
        sums: dict[str, float] = {
            "reward": sum(known),
            "reward_spread": sum(trial.spread for trial in trials),
            "frac_reward_zero_std": sum(trial.spread == 0 for trial in trials),
            "completions/mean_length": sum(trial.size for trial in trials),
            "completions/clipped_ratio": sum(trial.cut for trial in trials),
            "completions/mean_terminated_length": sum(ended),
        }
        counts = {"reward": len(known), "completions/mean_terminated_length": len(ended)}
        for i, name in enumerate(self.deviations):
            sums[name] = sum(trial.deviations[i] for trial in trials)
        for i, name in enumerate(self.rewards.names):
            values = [trial.rewards[i] for trial in trials if trial.rewards[i] == trial.rewards[i]]
            sums[f"rewards/{name}/mean"], counts[f"rewards/{name}/mean"] = sum(values), len(values)
        if self.tools:
            sums[CALLS] = calls = sum(trial.calls for trial in trials)
            sums[FAILURES], counts[FAILURES] = sum(trial.failures for trial in trials), calls
        return {name: torch.tensor(float(value)) for name, value in sums.items()}, counts

    def _of_tokens(
        self, scored: TokenLogProbs, drawn: Drawn, result: TokenLosses
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What is logged by trained token: sums, and over how many tokens they are."""
        sums = {
            "entropy": scored.entropy.sum(),
            "clip_ratio/low_mean": result.low.sum(),
            "clip_ratio/high_mean": result.high.sum(),
            "clip_ratio/region_mean": (result.low | result.high).sum(),
        }
        kl = result.kl
        if kl is None and drawn.reference is not None:  # which costs reward, and is no loss
            kl = scored.logprobs.detach() - drawn.reference
        if kl is not None:
            sums["kl"] = kl.sum()
        counts = dict.fromkeys(sums, len(drawn.owner))
        if drawn.sampled is not None:
            apart = (scored.logprobs.detach() - drawn.sampled).abs()
            known = ~apart.isnan()
            sums[PARITY], counts[PARITY] = apart[known].sum(), int(known.sum())
        return sums, counts

    def _drawn(self, logprobs: Tensor, trials: Sequence[Trial]) -> Drawn:
        device = logprobs.device
        counts = [trial.target_count for trial in trials]
        owner = torch.repeat_interleave(torch.arange(len(trials)), torch.tensor(counts)).to(device)

        def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
            if all(part is None for part, count in zip(parts, counts, strict=True) if count):
                return None
            unknown = (torch.full((count,), torch.nan) for count in counts)
            return torch.cat([two if one is None else one for one, two in zip(parts, unknown, strict=True)]).to(device)

        before = joined([trial.before for trial in trials])
        drawn = Drawn(
            logprobs=logprobs,
            before=logprobs.detach() if before is None else before,
            owner=owner,
            advantages=torch.tensor([trial.advantage for trial in trials], device=device),
            reference=joined([trial.by_reference for trial in trials]),
            sampled=joined([trial.sampled for trial in trials]),
        )
        if not self.corrects or drawn.sampled is None:
            return drawn
        return replace(drawn, correction=self.correction(drawn))

    def correction(self, drawn: Drawn) -> Tensor:
        """(S,) What makes up for a generator of its own."""
        args: Any = self._policy
        mode = cast(Correction, args.vllm_importance_sampling_mode)
        lowest, highest = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        return sampler_correction(drawn, mode, lowest=lowest, highest=highest)

    def batch_weight(self, batch: Batch) -> Tensor:
        """What its answers add to the number that a step is divided by."""
        trials = cast(tuple[Trial, ...], batch.documents)
        shares = (trial.share for one in trials for trial in one.every)
        return torch.tensor(sum(shares), device=batch.input_ids.device)

    # An evaluation, and the log

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Draws answers to held-out prompts, and has them judged."""
        answered = self._answered(inputs, training=False)
        trials = trials_of(answered, masks_cut=False)
        trials = self._scored(answered, trials, len(answered.generated), training=False)
        return super().prediction_step(model, self._batch(trials), True, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what reward functions have noted, on all processes."""
        if "loss" in logs:
            noted: dict[str, list[float]] = {}
            for part in gather_object([self._noted]):
                for name, values in part.items():
                    noted.setdefault(name, []).extend(values)
            self._noted = {}
            logs |= {name: sum(values) / len(values) for name, values in noted.items()}
        super().log(logs, start_time)

    def predict(self, *_: Any, **__: Any) -> Any:
        raise TunesmithError("prompts have no answers to predict; evaluate(dataset) draws some and measures rewards")


def _extremes(trials: Sequence[Trial], device: torch.device) -> dict[str, Tensor]:
    """The least and the largest lengths of answers, and of those that came to their end."""
    lengths = {
        "": [trial.size for trial in trials],
        "terminated_": [trial.size for trial in trials if not trial.cut],
    }
    return {
        f"completions/{kind}_{of}length": torch.tensor(float(most(sizes)), device=device)
        for kind, most in (("min", min), ("max", max))
        for of, sizes in lengths.items()
        if sizes
    }


def _sampling(args: PolicyConfig) -> Sampling:
    return Sampling(
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )


def _refuse(*, rollout_func: Any, environment_factory: Any) -> None:
    """Raises TunesmithError for arguments of TRL's that are not there."""
    if rollout_func is not None:
        raise TunesmithError(
            "rollout_func is given, which is not there; give generator=, a function of prompts that returns answers "
            "(tunesmith.train.generator)"
        )
    if environment_factory is not None:
        raise TunesmithError(
            "environment_factory is given, which is not there; give functions as tools=, which all answers share: what "
            "one of them is about goes into their arguments"
        )
