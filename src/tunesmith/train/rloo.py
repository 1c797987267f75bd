"""REINFORCE leave-one-out: an answer is as good as its reward is above the mean of the others of its group."""

from typing import cast

from torch import Tensor

from tunesmith.objectives.policy import PolicyOptions, leave_one_out, total_rewards
from tunesmith.settings.policy import RLOOConfig
from tunesmith.train.policy import PolicyTrainer
from tunesmith.train.rollouts import Answered


class RLOOTrainer(PolicyTrainer):
    """REINFORCE leave-one-out (arXiv:2402.14740), with the arguments of TRL's trainer of the same name.

    The arguments are those of `GRPOTrainer`. With `beta`, an answer's reward is less by beta times how far its
    log-probability is above the reference's.

    Raises TunesmithError for what would train wrongly, before any weight is loaded where it shows in the data.
    """

    _tag_names = ("tunesmith", "rloo")
    kind = "rloo"
    config = RLOOConfig

    def take_settings(self, args: RLOOConfig) -> PolicyOptions:
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        return PolicyOptions(loss="grpo", level="product", epsilon=args.epsilon, epsilon_high=high)

    def total(self, rewards_DR: Tensor) -> Tensor:
        total, bounds = total_rewards(rewards_DR, self.rewards.weights), cast(RLOOConfig, self.args).reward_clip_range
        return total if bounds is None else total.clamp(*bounds)

    def advantages(self, answered: Answered, kl_D: Tensor | None) -> Tensor:
        args = cast(RLOOConfig, self.args)
        rewards = answered.totals if kl_D is None else answered.totals - args.beta * kl_D
        return leave_one_out(rewards.view(-1, answered.group), normalized=args.normalize_advantages).reshape(-1)

    @property
    def reference_in_reward(self) -> bool:
        return self.reference is not None
