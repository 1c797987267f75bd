"""DistillationConfig and GKDConfig: what runs that learn from a teacher do, with TRL's names."""
# ruff: noqa: RUF009  (`setting` is `dataclasses.field` with a line of help)

from dataclasses import dataclass
from typing import Any, ClassVar

from tunesmith.errors import TunesmithError
from tunesmith.settings.config import SFTConfig, accept_older_names, setting
from tunesmith.types import TrainOn


@dataclass
class DistillationConfig(SFTConfig):
    """Settings of distillation: a student that learns to predict what its teacher predicts.

    Every field of `SFTConfig` is a field here and means the same. Other defaults than there: `learning_rate` 1e-6.
    `max_completion_length` is TRL's name for `max_new_tokens`.

    A value that can't be what the user meant raises TunesmithError when the config is made.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]
        *SFTConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
    ]

    learning_rate: float = setting(1e-6, "Peak learning rate; LoRA wants about ten times more.")
    # The teacher
    teacher_model_name_or_path: str | None = setting(
        None, "The teacher: a name on the hub, or a folder, with the student's vocabulary."
    )
    teacher_model_revision: str | None = setting(None, "Which version of a teacher on the hub.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "Arguments of `from_pretrained` for a teacher given by name, e.g. {dtype: bfloat16}."
    )
    teacher_top_k: int | None = setting(
        None,
        "Compute the teacher's so many likeliest tokens once, before training, and keep them in the cache; needs "
        "lmbda: 0. Unset: the teacher's whole distribution, in every step.",
    )
    # The answers
    lmbda: float = setting(
        1.0, "The share of answers that the student writes itself, as it is then; 0 takes those of the data."
    )
    seq_kd: bool = setting(False, "The teacher writes the answers that the student does not.")
    max_new_tokens: int = setting(512, "Most tokens of an answer that is written in training.")
    # The loss
    beta: float = setting(
        1.0,
        "The divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalized JSD.",
    )
    temperature: float = setting(1.0, "Of the answers that are written, and of both distributions in the loss.")
    supervised_weight: float = setting(
        0.0, "The share, from 0 to 1, of the loss of the data's own answers that is their cross-entropy."
    )
    disable_dropout: bool = setting(False, "Train without dropout.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lmbda", "beta", "supervised_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise TunesmithError(f"{name} is {getattr(self, name)}; write a number from 0 to 1")
        if self.max_new_tokens < 1:
            raise TunesmithError(f"max_new_tokens is {self.max_new_tokens}; an answer has at least 1")
        if not 0 < self.temperature < float("inf"):
            raise TunesmithError(f"temperature is {self.temperature}; write a number above 0, such as 1")
        if not isinstance(self.teacher_model_init_kwargs, dict | None):
            raise TunesmithError(
                f"teacher_model_init_kwargs is {self.teacher_model_init_kwargs!r}; write an object, e.g. {{key: value}}"
            )
        self._check_top_k()
        self._refuse_ignored()

    @property
    def loss_temperature(self) -> float:
        """The temperature of both distributions in the loss."""
        return self.temperature

    @property
    def writes_answers(self) -> bool:
        """Whether answers are written in training, by the student or its teacher."""
        return self.lmbda > 0 or self.seq_kd

    def _check_top_k(self) -> None:
        if self.teacher_top_k is None:
            return
        if self.teacher_top_k < 1:
            raise TunesmithError(f"teacher_top_k is {self.teacher_top_k}; write 1 or more, such as 32")
        if self.writes_answers:
            name = f"lmbda is {self.lmbda}" if self.lmbda else "seq_kd is true"
            raise TunesmithError(
                f"teacher_top_k computes what the teacher says of the data's answers before training, and {name}: "
                "answers are written in training, which it can't know. Write lmbda: 0 and seq_kd: false, or leave "
                "teacher_top_k out"
            )

    def _refuse_ignored(self) -> None:
        """Settings of supervised runs that would say nothing, or contradict."""
        if self.loss_type != "nll":
            raise TunesmithError(f"loss_type is {self.loss_type}, and beta says what is learned here; leave it out")
        if self.label_smoothing_factor:
            raise TunesmithError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, and the teacher says how sure the student "
                "should be; leave it out"
            )
        if self.supervised_weight and (self.lmbda == 1 or self.seq_kd):
            raise TunesmithError(
                f"supervised_weight is {self.supervised_weight}, for the data's own answers, and none of them is "
                f"learned: lmbda is {self.lmbda}, seq_kd is {str(self.seq_kd).lower()}. Lower lmbda, or leave "
                "supervised_weight out"
            )
        if self.seq_kd and self.lmbda == 1:
            raise TunesmithError(
                "seq_kd is true, and the student writes all answers (lmbda: 1); lower lmbda, or leave seq_kd out"
            )
        if self.writes_answers and (self.fsdp or self.deepspeed):
            raise TunesmithError(
                "fsdp and deepspeed share weights out over processes, which write answers of different lengths; write "
                "lmbda: 0 and seq_kd: false"
            )


@dataclass
class GKDConfig(DistillationConfig):
    """Settings of generalized knowledge distillation with the defaults of TRL's config of the same name.

    `temperature` is of the answers that are written alone: the loss compares distributions at temperature 1, as there.
    Of conversations, the last answer is learned unless `train_on` says otherwise.
    """

    learning_rate: float = setting(2e-5, "Peak learning rate; LoRA wants about ten times more.")
    lmbda: float = setting(0.5, "The share of answers that the student writes itself, as it is then.")
    max_new_tokens: int = setting(128, "Most tokens of an answer that is written in training.")
    beta: float = setting(0.5, "As in DistillationConfig.")
    temperature: float = setting(0.9, "Of the answers that are written.")
    disable_dropout: bool = setting(True, "Train without dropout.")

    @property
    def loss_temperature(self) -> float:
        return 1.0

    @property
    def resolved_train_on(self) -> TrainOn | None:
        return super().resolved_train_on or "last_assistant"


accept_older_names(DistillationConfig)
accept_older_names(GKDConfig)
