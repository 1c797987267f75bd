"""Group relative policy optimization and its kin: answers to one prompt are compared with each other."""

import logging
from typing import Any, cast

from torch import Tensor

from tunesmith.errors import TunesmithError
from tunesmith.objectives.policy import (
    PolicyOptions,
    decoupled_advantages,
    group_advantages,
    total_rewards,
)
from tunesmith.settings.policy import GRPOConfig
from tunesmith.train.policy import PolicyTrainer
from tunesmith.train.rollouts import Answered

logger = logging.getLogger(__name__)
SUMMED = ("bnpo", "dr_grpo", "dapo", "cispo")
"""Losses that add up tokens, whichever answers they are of."""


class GRPOTrainer(PolicyTrainer):
    """Reinforcement learning from rewards, with the arguments of TRL's trainer of the same name.

    `model` is a name, a folder, "demo", or a loaded causal language model, with or without adapters. `reward_funcs`
    judges answers: a function `f(prompts, completions, completion_ids, **columns)`, a sequence classifier, a name, or
    several of them. Rows have a `prompt`, a text or messages; other columns go to the functions. `tools` are functions
    that the model may call while it answers. `generator` draws answers in place of the model's own decoding;
    `ref_model` is the reference in place of the model as training begins with it. See `docs/policies.md`.

    Raises TunesmithError for what would train wrongly, before any weight is loaded where it shows in the data.
    """

    _tag_names = ("tunesmith", "grpo")
    kind = "grpo"
    config = GRPOConfig

    def take_settings(self, args: GRPOConfig) -> PolicyOptions:
        if args.cast_lm_head_to_fp32 and args.precision != "fp32":
            raise TunesmithError(
                f"cast_lm_head_to_fp32 is True, and precision {args.precision}, in which the head computes here; leave "
                "it out, or write precision: fp32"
            )
        if args.importance_sampling_level == "sequence" and args.loss_type in SUMMED:
            logger.warning(
                "importance_sampling_level is sequence, and loss_type %s, a sum over tokens, weights each sequence by "
                "its completion length; GSPO is loss_type: grpo.",
                args.loss_type,
            )
        return PolicyOptions(
            loss=args.loss_type,
            level=args.importance_sampling_level,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            delta=args.delta,
            beta=args.beta,
            use_bias_correction_kl=args.use_bias_correction_kl,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            vespo_k_pos=args.vespo_k_pos,
            vespo_lambda_pos=args.vespo_lambda_pos,
            vespo_k_neg=args.vespo_k_neg,
            vespo_lambda_neg=args.vespo_lambda_neg,
            off_policy_mask_threshold=args.off_policy_mask_threshold,
        )

    def total(self, rewards_DR: Tensor) -> Tensor:
        return total_rewards(rewards_DR, self.rewards.weights)

    def advantages(self, answered: Answered, kl_D: Tensor | None) -> Tensor:
        args = cast(GRPOConfig, self.args)
        if args.multi_objective_aggregation == "normalize_then_sum":
            grouped = answered.rewards.view(-1, answered.group, answered.rewards.shape[-1])
            return decoupled_advantages(grouped, self.rewards.weights).reshape(-1)
        return group_advantages(answered.totals_PG, cast(Any, args.scale_rewards)).reshape(-1)

    @property
    def corrects(self) -> bool:
        args = cast(GRPOConfig, self.args)
        return args.use_vllm and args.vllm_importance_sampling_correction
