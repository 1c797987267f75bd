"""GRPOConfig and RLOOConfig: what runs do that learn from rewards of the answers they draw, with TRL's names."""
# ruff: noqa: RUF009  (`setting` is `dataclasses.field` with a line of help)

import logging
from dataclasses import dataclass, fields
from math import ceil
from typing import Any, ClassVar, Literal

from tunesmith.errors import TunesmithError
from tunesmith.settings.config import Config, accept_older_names, setting

logger = logging.getLogger(__name__)
PolicyLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
RatioLevel = Literal["token", "sequence"]
RewardScaling = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
SamplerCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

OF_ROWS_WITH_ANSWERS = {
    **dict.fromkeys(("packing", "eval_packing"), "answers to one prompt share a row already"),
    **dict.fromkeys(
        ("overlong", "turns", "prompt_mismatch", "marks", "drop_reasoning", "allow_no_eos"),
        "rows have no answer to learn: the model draws its own",
    ),
    "max_length": "write max_completion_length for the most tokens of an answer; a prompt is never cut",
    "max_tokens_per_batch": "a micro-batch is per_device_train_batch_size answers, whose lengths nobody knows before",
    "train_sampling_strategy": "prompts are shuffled, or in order with shuffle_dataset: false",
    "label_smoothing_factor": "it is of supervised fine-tuning",
    "neftune_noise_alpha": "noise on the embeddings would tell the model from the one that draws the answers",
    "dataset_kwargs": "prompts are prepared as they are drawn",
    "dataset_num_proc": "prompts are prepared in no time",
    **dict.fromkeys(("shuffle_buffer_size", "stream_parts"), "prompts of a stream are all read when a run begins"),
    "dataloader_drop_last": "prompts that don't fill a generation are left out of a pass anyway",
}
"""Settings of all runs that would say nothing here, and why."""
NOT_HERE = {
    "ds3_gather_for_generation": (True, "DeepSpeed's third stage does not draw answers here"),
    "cache_implementation": (None, "answers are decoded in a cache of our own"),
    "use_transformers_continuous_batching": (False, "finished answers leave the batch here in any case"),
    "transformers_continuous_batching_config": (None, "finished answers leave the batch here in any case"),
    "generation_kwargs": (
        None,
        "only temperature, top_p, top_k, min_p and repetition_penalty are known, which have names of their own",
    ),
    "sync_ref_model": (False, "the reference stays what training begins with"),
    "ref_model_mixup_alpha": (0.6, "the reference stays what training begins with"),
    "ref_model_sync_steps": (512, "the reference stays what training begins with"),
    "log_multimodal": (True, "there is only text here"),
    "log_completions_hub_repo": (None, "answers are kept in the run's folder, in answers.jsonl"),
    "num_completions_to_print": (None, "answers are kept in the run's folder, in answers.jsonl"),
    "log_unique_prompts": (False, "answers are kept in the run's folder, in answers.jsonl"),
    "top_entropy_quantile": (1.0, "a quantile is of a micro-batch, which is divided where memory asks for that"),
    "entropy_coef": (0.0, "the entropy has no gradient here"),
    "use_adaptive_entropy": (False, "the entropy has no gradient here"),
    "vllm_model_impl": ("vllm", "it is an option of the server: vllm serve --model-impl"),
    "vllm_enable_sleep_mode": (False, "it is an option of the server"),
    "vllm_structured_outputs_regex": (None, "the trainer's log-probabilities know no such rule"),
    "vllm_gpu_memory_utilization": (0.3, "it is an option of the server: vllm serve --gpu-memory-utilization"),
    "vllm_max_model_length": (None, "it is an option of the server: vllm serve --max-model-len"),
    "vllm_tensor_parallel_size": (1, "it is an option of the server: vllm serve --tensor-parallel-size"),
    "vllm_group_port": (51216, "weights go to the server as adapters, in files"),
}
"""Settings of TRL that are taken at the value that changes nothing, and refused at others: that value, and why."""


@dataclass
class PolicyConfig(Config):
    """What runs share that draw answers, have them judged, and learn from that."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*Config._VALID_DICT_FIELDS, "reward_funcs"]  # type: ignore[misc]

    learning_rate: float = setting(1e-6, "Peak learning rate; LoRA wants about ten times more.")
    remove_unused_columns: bool = setting(False, "Without effect here: rewards see all columns of a row.")
    max_length: int | None = setting(None, "Not of these runs: max_completion_length is.")
    shuffle_dataset: bool = setting(True, "Shuffle the prompts anew in each pass; false: take them in order.")
    disable_dropout: bool = setting(False, "Train without dropout, which makes ratios noisy.")
    # Answers
    num_generations: int = setting(8, "Answers to each prompt: a group.")
    num_generations_eval: int | None = setting(None, "Answers to each prompt in an evaluation; unset, num_generations.")
    max_completion_length: int = setting(512, "Most tokens of an answer.")
    generation_batch_size: int | None = setting(
        None, "Answers drawn at a time, by all processes; unset, those of steps_per_generation micro-batches."
    )
    steps_per_generation: int | None = setting(
        None, "Micro-batches that share a generation; unset, gradient_accumulation_steps."
    )
    temperature: float = setting(1.0, "How much chance decides; the log-probabilities are at it, too.")
    top_p: float = setting(1.0, "Draw among the likeliest tokens with this probability together.")
    top_k: int = setting(0, "Draw among so many likeliest tokens; 0: all.")
    min_p: float | None = setting(None, "Draw among tokens at least this share as likely as the likeliest.")
    repetition_penalty: float = setting(1.0, "Above 1, tokens that are there already become less likely.")
    use_vllm: bool = setting(False, "Let a vLLM server draw the answers.")
    vllm_mode: str = setting("colocate", "Write server: TRL's colocate, an engine in this process, is not there.")
    vllm_server_base_url: str | None = setting(None, "Where the server is; unset, vllm_server_host and its port.")
    vllm_server_host: str = setting("0.0.0.0", "The server's host.")
    vllm_server_port: int = setting(8000, "The server's port.")
    vllm_server_timeout: float = setting(240.0, "Seconds to wait for the server to be up.")
    tools: list[str] | str | None = setting(
        None, "Functions that the model may call while it answers: `module:function` or `file.py:function`."
    )
    max_tool_calling_iterations: int | None = setting(
        None, "So often an answer may call tools and go on; unset, as long as max_completion_length lasts."
    )
    # Rewards
    reward_funcs: dict[str, Any] | list[str] | str | None = setting(
        None,
        "What judges answers: names of built-in rewards, `module:function` or `file.py:function`; as an object, each "
        "with its arguments.",
        # TRL's scripts have an argument of this name beside their config, and a parser takes each name once.
        parsed=False,
    )
    reward_weights: list[float] | None = setting(None, "The weight of each reward; unset, 1.")
    # The loss
    beta: float = setting(0.0, "How close to stay to the reference; 0: there is none.")
    num_iterations: int = setting(1, "How often each generation is trained on.")
    epsilon: float = setting(0.2, "How far below 1 a ratio is followed.")
    epsilon_high: float | None = setting(None, "How far above 1; unset, epsilon. DAPO writes 0.28; of cispo, a bound.")
    mask_truncated_completions: bool = setting(False, "Do not learn from answers that were cut off.")
    # TRL's, of which only the value that changes nothing is taken
    ds3_gather_for_generation: bool = setting(True, "TRL's; leave it.")
    cache_implementation: str | None = setting(None, "TRL's; leave it.")
    generation_kwargs: dict[str, Any] | str | None = setting(None, "TRL's; leave it: each has a name of its own.")
    use_transformers_continuous_batching: bool = setting(False, "TRL's; leave it.")
    transformers_continuous_batching_config: dict[str, Any] | str | None = setting(None, "TRL's; leave it.")
    sync_ref_model: bool = setting(False, "TRL's; leave it.")
    ref_model_mixup_alpha: float = setting(0.6, "TRL's; leave it.")
    ref_model_sync_steps: int = setting(512, "TRL's; leave it.")
    log_completions: bool = setting(False, "Show the best and the worst answer of a group of each generation.")
    log_multimodal: bool = setting(True, "TRL's; leave it.")
    num_completions_to_print: int | None = setting(None, "TRL's; leave it.")
    log_unique_prompts: bool = setting(False, "TRL's; leave it.")
    vllm_model_impl: str = setting("vllm", "TRL's; leave it: an option of the server.")
    vllm_enable_sleep_mode: bool = setting(False, "TRL's; leave it: an option of the server.")
    vllm_structured_outputs_regex: str | None = setting(None, "TRL's; leave it.")
    vllm_gpu_memory_utilization: float = setting(0.3, "TRL's; leave it: an option of the server.")
    vllm_max_model_length: int | None = setting(None, "TRL's; leave it: an option of the server.")
    vllm_tensor_parallel_size: int = setting(1, "TRL's; leave it: an option of the server.")
    vllm_group_port: int = setting(51216, "TRL's; leave it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_ignored()
        if self.dataloader_num_workers:
            logger.warning(
                "dataloader_num_workers is %d, and there is nothing to read ahead: all prompts are there when a run "
                "begins. No process is started.",
                self.dataloader_num_workers,
            )
            self.dataloader_num_workers, self.dataloader_prefetch_factor = 0, None
            self.dataloader_persistent_workers, self.dataloader_multiprocessing_context = False, None
        self._check_functions()
        if self.num_generations < 2:
            raise TunesmithError(
                f"num_generations is {self.num_generations}; an answer is better or worse than others to its prompt: "
                "write 2 or more"
            )
        if self.num_generations_eval is not None and self.num_generations_eval < 1:
            raise TunesmithError(f"num_generations_eval is {self.num_generations_eval}; write 1 or more")
        for name, least in (("max_completion_length", 1), ("num_iterations", 1)):
            if getattr(self, name) < least:
                raise TunesmithError(f"{name} is {getattr(self, name)}; write {least} or more")
        if self.max_tool_calling_iterations is not None and self.max_tool_calling_iterations < 1:
            raise TunesmithError(
                f"max_tool_calling_iterations is {self.max_tool_calling_iterations}; write 1 or more, or leave it out: "
                "max_completion_length is a limit, too"
            )
        if not self.temperature > 0:
            raise TunesmithError(
                f"temperature is {self.temperature}; all answers to a prompt would be the same, and none better than "
                "another. Write 1"
            )
        if self.beta < 0:
            raise TunesmithError(f"beta is {self.beta}; write 0 for no reference, or a number above")
        if not 0 <= self.epsilon < 1:
            raise TunesmithError(f"epsilon is {self.epsilon}; write a share from 0 up to 1, such as 0.2")
        if self.epsilon_high is not None and self.epsilon_high < 0:
            raise TunesmithError(f"epsilon_high is {self.epsilon_high}; write 0 or more, such as 0.28")

    @property
    def server(self) -> str:
        """Where the vLLM server is."""
        return self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"

    @property
    def prompts_per_generation(self) -> int:
        assert self.generation_batch_size is not None
        return self.generation_batch_size // self.num_generations

    @property
    def prompts_per_run(self) -> int:
        """As many prompts as `max_steps` steps ask, if none is asked twice."""
        assert self.steps_per_generation is not None
        used = self.steps_per_generation * self.num_iterations
        return ceil(self.max_steps * self.gradient_accumulation_steps / used) * self.prompts_per_generation

    def _refuse_ignored(self) -> None:
        defaults = {item.name: item.default for item in fields(self)}
        for name, reason in OF_ROWS_WITH_ANSWERS.items():
            if getattr(self, name) != defaults[name]:
                raise TunesmithError(f"{name} is {getattr(self, name)!r}, and {reason}; leave it out")
        for name, (neutral, reason) in NOT_HERE.items():
            if getattr(self, name, neutral) != neutral:
                raise TunesmithError(f"{name} is {getattr(self, name)!r}: {reason}; leave it out")
        if self.rehearse == "always":
            raise TunesmithError("rehearse is 'always', and how long answers become nobody knows before; leave it out")
        if self.auto_find_batch_size:
            raise TunesmithError(
                "auto_find_batch_size is True, which would take groups apart; leave it out: a micro-batch that does "
                "not fit is split, with the same gradients"
            )
        if self.use_vllm and self.shard != "none":
            raise TunesmithError(
                f"use_vllm is True, and shard is {self.shard}: the server takes whole adapters, and each process has a "
                "part of them; leave shard out"
            )
        if self.vllm_mode not in ("server", "colocate"):
            raise TunesmithError(f"vllm_mode is {self.vllm_mode!r}; write server")
        if self.use_vllm and self.vllm_mode == "colocate":
            raise TunesmithError(
                "vllm_mode is 'colocate', an engine in this process, which is not there; start `vllm serve`, and write "
                "vllm_mode: server"
            )

    def _check_functions(self) -> None:
        for name in ("reward_funcs", "tools"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [part.strip() for part in value.split(",") if part.strip()])
        if self.reward_weights is None:
            return
        try:
            self.reward_weights = [float(number) for number in self.reward_weights]
        except (TypeError, ValueError):
            raise TunesmithError(
                f"reward_weights is {self.reward_weights!r}; write a list of numbers, one for each reward"
            ) from None

    def settle_generations(self) -> None:
        """`generation_batch_size` and `steps_per_generation` say the same, of all processes; a generation has whole
        groups. A trainer calls it, because a config may be made before the processes are started.

        Raises TunesmithError where these settings contradict each other.
        """
        rows, each = self.per_device_train_batch_size * self.world_size, "per_device_train_batch_size"
        if self.world_size > 1:
            each += f" x {self.world_size} processes"
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            if self.generation_batch_size != rows * self.steps_per_generation:
                raise TunesmithError(
                    f"generation_batch_size is {self.generation_batch_size}, and steps_per_generation "
                    f"{self.steps_per_generation} x {rows} answers of a micro-batch ({each}); keep one of them"
                )
        elif self.generation_batch_size is not None:
            if self.generation_batch_size % rows:
                raise TunesmithError(
                    f"generation_batch_size is {self.generation_batch_size}; write a multiple of {each}, {rows}"
                )
            self.steps_per_generation = self.generation_batch_size // rows
        else:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = rows * self.steps_per_generation
        if self.generation_batch_size % self.num_generations:
            raise TunesmithError(
                f"{self.generation_batch_size} answers are drawn at a time ({each} x steps_per_generation), which is "
                f"no multiple of num_generations, {self.num_generations}; write per_device_train_batch_size: "
                f"{self.num_generations}, or another multiple"
            )


@dataclass
class GRPOConfig(PolicyConfig):
    """Settings of GRPO and its kin: answers are compared with others to the same prompt.

    Every field of `transformers.TrainingArguments` is a field here and means the same. Other defaults than there:
    `learning_rate` 1e-6, `logging_steps` 10, `bf16` None: `precision` decides. `per_device_train_batch_size` counts
    answers, as in TRL.
    """

    loss_type: PolicyLoss = setting(
        "dapo", "grpo | bnpo | dr_grpo | dapo | cispo | sapo | luspo | vespo; see docs/policies.md."
    )
    importance_sampling_level: RatioLevel = setting("token", "A ratio for each token | sequence: for an answer (GSPO).")
    scale_rewards: RewardScaling = setting(
        "group", "Divide by the deviation of rewards: group | batch | none (Dr. GRPO)."
    )
    multi_objective_aggregation: Aggregation = setting(
        "sum_then_normalize", "Several rewards: sum_then_normalize | normalize_then_sum (GDPO)."
    )
    delta: float | None = setting(None, "Bounds the ratio of bad answers, above 1 + epsilon_high.")
    sapo_temperature_pos: float = setting(1.0, "The temperature of sapo for good answers.")
    sapo_temperature_neg: float = setting(1.05, "The temperature of sapo for bad answers.")
    vespo_k_pos: float = setting(2.0, "The exponent of vespo for good answers.")
    vespo_lambda_pos: float = setting(3.0, "The decay of vespo for good answers.")
    vespo_k_neg: float = setting(3.0, "The exponent of vespo for bad answers.")
    vespo_lambda_neg: float = setting(2.0, "The decay of vespo for bad answers.")
    use_bias_correction_kl: bool = setting(True, "Multiply what beta keeps near by the ratio (DeepSeek-V3.2).")
    off_policy_mask_threshold: float | None = setting(
        None, "Do not learn from bad answers that the model has left by so many nats a token."
    )
    vllm_importance_sampling_correction: bool = setting(True, "Weigh answers by how likely they are here and there.")
    vllm_importance_sampling_mode: SamplerCorrection = setting(
        "sequence_mask", "token_truncate | token_mask | sequence_truncate | sequence_mask."
    )
    vllm_importance_sampling_clip_max: float | None = setting(3.0, "The highest such weight.")
    vllm_importance_sampling_clip_min: float | None = setting(None, "The lowest such weight.")
    cast_lm_head_to_fp32: bool = setting(False, "The head computes in fp32; only with precision: fp32.")
    top_entropy_quantile: float = setting(1.0, "TRL's; leave it.")
    entropy_coef: float = setting(0.0, "TRL's; leave it.")
    use_adaptive_entropy: bool = setting(False, "TRL's; leave it.")
    entropy_coef_min: float = setting(0.0, "TRL's; leave it.")
    entropy_coef_max: float = setting(1.0, "TRL's; leave it.")
    entropy_coef_delta: float = setting(0.005, "TRL's; leave it.")
    entropy_target: float = setting(0.2, "TRL's; leave it.")
    log_completions_hub_repo: str | None = setting(None, "TRL's; leave it.")

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        super().__post_init__()
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise TunesmithError(
                f"delta is {self.delta}, which would bound good answers, too; write more than 1 + epsilon_high"
            )
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            raise TunesmithError("loss_type: luspo is of whole answers; write importance_sampling_level: sequence")


accept_older_names(GRPOConfig)


@dataclass
class RLOOConfig(PolicyConfig):
    """Settings of RLOO: the mean reward of the others of a group is an answer's baseline.

    Every field of `transformers.TrainingArguments` is a field here and means the same. Other defaults than there:
    `learning_rate` 1e-6, `logging_steps` 10, `bf16` None: `precision` decides. `per_device_train_batch_size` counts
    answers, as in TRL.
    """

    num_generations: int = setting(2, "Answers to each prompt: a group.")
    beta: float = setting(0.05, "What moving away from the reference costs of the reward; 0: there is none.")
    normalize_advantages: bool = setting(False, "Scale the advantages of a generation to mean 0 and deviation 1.")
    reward_clip_range: list[float] | None = setting(None, "The lowest and the highest reward that counts.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_clip_range is not None:
            bounds: Any = self.reward_clip_range
            if len(bounds) != 2 or not float(bounds[0]) < float(bounds[1]):
                raise TunesmithError(f"reward_clip_range is {bounds!r}; write [lowest, highest]")
            self.reward_clip_range = [float(bounds[0]), float(bounds[1])]


accept_older_names(RLOOConfig)
