"""DPOConfig, KTOConfig and RewardConfig: what runs on pairs, and on judged answers, do, with TRL's names."""
# ruff: noqa: RUF009  (`setting` is `dataclasses.field` with a line of help)

from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.errors import TunesmithError
from tunesmith.settings.config import Config, Overlong, accept_older_names, setting

KTOLoss = Literal["kto", "apo_zero_unpaired"]
OLDER_LOSSES = {"aot_pair": "aot"}
"""What TRL once called a loss."""


@dataclass
class AnswersConfig(Config):
    """What runs share that learn from whole answers rather than from tokens."""

    disable_dropout: bool = setting(True, "Train without dropout, so that answers are comparable.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_ignored()

    def _refuse_ignored(self) -> None:
        """Settings of all runs that would say nothing here."""
        if self.label_smoothing_factor:
            raise TunesmithError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, which is of supervised fine-tuning; "
                f"{self._smoothing}"
            )
        if self.neftune_noise_alpha is not None:
            raise TunesmithError(
                "neftune_noise_alpha is set: noise on the embeddings would tell apart what is compared; leave it out"
            )
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches:
            raise TunesmithError(
                "accelerator_config: dispatch_batches deals the rows of a batch out to processes, and a pair has two; "
                "set it to false"
            )
        if self.overlong == "split":
            raise TunesmithError("overlong is split, and a pair can't be split; write truncate, drop or error")
        if self.packing and self.packing_strategy != "bfd":
            raise TunesmithError(
                f"packing_strategy is {self.packing_strategy}, which cuts examples, and a pair is packed whole; "
                "write bfd"
            )

    @property
    def _smoothing(self) -> str:
        """What to write in place of label_smoothing_factor."""
        return "leave it out"


@dataclass
class PreferenceConfig(AnswersConfig):
    """What runs share that compare a model with its reference."""

    learning_rate: float = setting(1e-6, "Peak learning rate; LoRA wants about ten times more.")
    beta: float = setting(0.1, "How close to stay to the reference: higher is closer; the weight of the odds in orpo.")
    # The reference
    precompute_ref_log_probs: bool = setting(
        False, "Compute what the reference says once, before training, and keep it in the cache."
    )
    precompute_ref_batch_size: int | None = setting(None, "Pairs at a time in that; unset, per_device_eval_batch_size.")

    def _refuse_ignored(self) -> None:
        super()._refuse_ignored()
        if self.precompute_ref_batch_size is not None and self.precompute_ref_batch_size < 1:
            raise TunesmithError(
                f"precompute_ref_batch_size is {self.precompute_ref_batch_size}; write 1 or more, or leave it out"
            )

    @property
    def _smoothing(self) -> str:
        return "write label_smoothing for a share of wrong preferences"


@dataclass
class DPOConfig(PreferenceConfig):
    """Settings of direct preference optimization and its kin.

    Every field of `transformers.TrainingArguments` is a field here and means the same. Other defaults than there:
    `learning_rate` 1e-6, `logging_steps` 10, `bf16` None: `precision` decides.

    `max_length` is for each answer with its prompt; what is too much goes from the prompt's front. A value that can't
    be what the user meant raises TunesmithError when the config is made, or where it is one of the loss, the trainer.
    """

    # The loss
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "sigmoid (DPO) | hinge | ipo | exo_pair | nca_pair | robust | bco_pair | sppo_hard | aot | "
            "aot_unpaired | apo_zero | apo_down | discopop | sft | sigmoid_norm | simpo | cpo | orpo, or several."
        },
    )
    loss_weights: list[float] | None = setting(None, "The weight of each of several losses; unset, 1.")
    label_smoothing: float = setting(0.0, "The share of pairs that are taken to be the wrong way around; below 0.5.")
    f_divergence_type: str = setting(
        "reverse_kl", "What keeps near the reference: reverse_kl | forward_kl | js_divergence | alpha_divergence."
    )
    f_alpha_divergence_coef: float = setting(0.5, "The alpha of alpha_divergence.")
    ld_alpha: float | None = setting(
        None, "LD-DPO: the weight, from 0 to 1, of an answer's tokens beyond the length of the shorter one."
    )
    use_weighting: bool = setting(False, "WPO: pairs count by how likely their answers are to the model.")
    discopop_tau: float = setting(0.05, "The temperature of discopop.")
    simpo_gamma: float = setting(0.5, "The margin of rewards that simpo asks for.")
    cpo_alpha: float = setting(1.0, "How much cpo also learns the chosen answer.")

    reference_free: bool = setting(False, "Take a reference to which all answers are equally likely.")

    def __post_init__(self) -> None:
        super().__post_init__()
        names: Any = self.loss_type
        names = names.split(",") if isinstance(names, str) else list(names)
        self.loss_type = [OLDER_LOSSES.get(name.strip(), name.strip()) for name in names if name.strip()]
        if not self.loss_type:
            raise TunesmithError("loss_type is empty; write sigmoid for DPO")
        self._check_weights()

    @property
    def losses(self) -> tuple[tuple[str, float], ...]:
        """The names of the losses with their weights."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return tuple(zip(self.loss_type, weights, strict=True))

    def _check_weights(self) -> None:
        if self.loss_weights is None:
            return
        try:
            self.loss_weights = [float(number) for number in self.loss_weights]
        except (TypeError, ValueError):
            raise TunesmithError(
                f"loss_weights is {self.loss_weights!r}; write a list of numbers, one for each loss_type"
            ) from None
        if len(self.loss_weights) != len(self.loss_type):
            raise TunesmithError(
                f"loss_weights has {len(self.loss_weights)} numbers, and loss_type {len(self.loss_type)} names; write "
                "one weight for each"
            )


accept_older_names(DPOConfig)


@dataclass
class KTOConfig(PreferenceConfig):
    """Settings of KTO: answers that are good or bad, one for each prompt.

    Every field of `transformers.TrainingArguments` is a field here and means the same. Other defaults than there:
    `learning_rate` 1e-6, `logging_steps` 10, `bf16` None: `precision` decides.
    """

    loss_type: KTOLoss = setting("kto", "kto (arXiv:2402.01306) | apo_zero_unpaired (arXiv:2408.06266).")
    desirable_weight: float = setting(1.0, "The weight of good answers.")
    undesirable_weight: float = setting(1.0, "The weight of bad answers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise TunesmithError(f"{name} is {getattr(self, name)}; write a number above 0, such as 1")
        if self.loss_type != "kto":
            return
        if self.precompute_ref_log_probs:
            raise TunesmithError(
                "precompute_ref_log_probs: kto measures how far the model is from its reference on answers to other "
                "prompts of each micro-batch, which nobody knows before; leave it out, or take loss_type: "
                "apo_zero_unpaired"
            )
        if self.per_device_train_batch_size == 1 and self.max_tokens_per_batch is None and not self.packing:
            raise TunesmithError(
                "per_device_train_batch_size is 1, and kto measures how far the model is from its reference on answers "
                "to other prompts of the micro-batch; write 2 or more, or take loss_type: apo_zero_unpaired"
            )


accept_older_names(KTOConfig)


@dataclass
class RewardConfig(AnswersConfig):
    """Settings of a reward model, which learns from pairs to score answers.

    Every field of `transformers.TrainingArguments` is a field here and means the same. Other defaults than there:
    `learning_rate` 1e-4, `logging_steps` 10, `bf16` None: `precision` decides.

    Pairs of which a side is over `max_length` are dropped; with `overlong: truncate`, what is too much goes from the
    front that both sides share.
    """

    learning_rate: float = setting(1e-4, "Peak learning rate.")
    overlong: Overlong = setting("drop", "Pairs over max_length: drop | truncate (from the prompt's front) | error.")
    center_rewards_coefficient: float | None = setting(
        None, "The weight of (reward of chosen + reward of rejected)^2, which keeps rewards around 0; such as 0.01."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center_rewards_coefficient is not None and not self.center_rewards_coefficient >= 0:
            raise TunesmithError(
                f"center_rewards_coefficient is {self.center_rewards_coefficient}; write a weight from 0 on, such as "
                "0.01, or leave it out"
            )

    def _refuse_ignored(self) -> None:
        super()._refuse_ignored()
        for name, neutral, reason in (
            ("sample_prompts", 0, "a reward model writes no answers"),
            ("router_aux_loss_coef", None, "a reward has no loss for the balance of experts"),
            ("allow_no_eos", False, "a reward model writes no texts that could fail to end"),
            ("turns", "auto", "a conversation is scored as one text"),
            ("prompt_mismatch", "error", "a conversation is scored as one text"),
            ("marks", "verified", "a conversation is scored at its end"),
        ):
            if getattr(self, name) != neutral:
                raise TunesmithError(f"{name} is {getattr(self, name)!r}, and {reason}; leave it out")


accept_older_names(RewardConfig)
