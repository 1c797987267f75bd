"""Distillation against all logits at once, and what a run with a teacher does: answers, the cache, resume, memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from tests.models import gradient_error, gradients, tiny
from tests.train.runs import largest_difference, weights_of
from tests.train.test_preference import moved
from tunesmith import DistillationConfig, DistillationTrainer, GKDConfig, GKDTrainer, TunesmithError
from tunesmith.data.batches import Batch, groups_of
from tunesmith.model import ways
from tunesmith.model.generate import Sampling, answer_ids
from tunesmith.train.distillation import Written, answer_start

_WORDS = ["yes", "no", "maybe so", "it is", "not at all, no", "of course", "why"]
ROWS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"Is it {word}, or " + "very " * (i % 3) + "so?"}],
        "completion": [{"role": "assistant", "content": word}],
    }
    for i, word in enumerate(_WORDS)
]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


def teacher_of(name: str, size: int, **settings: Any) -> Any:
    """Another model than the student: wider, and elsewhere."""
    wider = {"hidden_size": 48, "intermediate_size": 64} if name == "llama" else {}
    model = tiny(name, size, **wider | settings)
    moved(model)
    return model.eval()


@pytest.fixture
def distill_of(model_of: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., DistillationTrainer]:
    """Makes a trainer on ROWS; what it does not know is a setting."""

    def make(
        name: str = "llama", folder: str = "run", kind: Any = DistillationTrainer, **given: Any
    ) -> DistillationTrainer:
        own = {"model", "teacher_model", "peft_config", "train_dataset", "eval_dataset", "compute_metrics"}
        arguments = {key: given.pop(key) for key in [*given] if key in own}
        common: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "report_to": "none",
            "use_cpu": True,
            "precision": "fp32",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 4,
            "self_test": "off",
        }
        config = GKDConfig if kind is GKDTrainer else DistillationConfig
        if kind is DistillationTrainer:
            common |= {"lmbda": 0.0, "beta": 0.0}
        arguments = {"model": None, "train_dataset": ROWS, "processing_class": tokenizer} | arguments
        arguments["model"] = arguments["model"] or model_of(name)
        if "teacher_model" not in arguments and "teacher_model_name_or_path" not in given:
            arguments["teacher_model"] = teacher_of(name, len(tokenizer))
        made: DistillationTrainer = kind(**arguments, args=config(**common | given))
        return made

    return make


def learned(trainer: DistillationTrainer) -> list[Any]:
    """Trains, and gives the documents that were learned."""
    plain, seen = trainer.batch_loss, list[Batch]()

    def noted(model: Any, batch: Batch, **given: Any) -> Any:
        seen.append(batch)
        return plain(model, batch, **given)

    trainer.batch_loss = noted  # type: ignore[method-assign]
    trainer.train()
    return [document for batch in seen for document in batch.documents]


def expected_loss(student: Any, teacher: Any, documents: list[Any], beta: float, temperature: float) -> Tensor:
    """The sum over all scored tokens, each document alone, with the whole logits of both models."""
    losses = []
    for document in documents:
        ids = torch.tensor([document.input_ids])
        places = torch.tensor([i - 1 for i, label in enumerate(document.labels) if label != -100])
        log_q = (student(input_ids=ids).logits[0, places].float() / temperature).log_softmax(dim=-1)
        with torch.no_grad():
            log_p = (teacher(input_ids=ids).logits[0, places].float() / temperature).log_softmax(dim=-1)
        p, q = log_p.exp(), log_q.exp()
        log_m = (beta * p + (1 - beta) * q).log()
        forward, backward = (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()
        between = beta * (p * (log_p - log_m)).sum() + (1 - beta) * (q * (log_q - log_m)).sum()
        losses.append(forward if beta == 0 else backward if beta == 1 else between)
    return torch.stack(losses).sum()


BATCHES: dict[str, dict[str, Any]] = {
    "flat": {"share_prefix": "off"},
    "shared": {"train_dataset": [*ROWS, ROWS[2] | {"completion": ROWS[3]["completion"]}]},
    "packed": {"packing": True, "max_length": 120},
    "padded": {"padding_free": False},
}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_those_of_each_document_alone(
    batches: str, beta: float, name: str, distill_of: Any
) -> None:
    trainer = distill_of(name, beta=beta, temperature=1.5, **BATCHES[batches])
    model: Any = trainer.model
    dataset: Any = trainer.train_dataset
    documents = [document for row in dataset for group in groups_of(row) for document in group]
    batch: Any = trainer.data_collator(list(dataset))
    trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(1)).backward()
    found = gradients(model)
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(1))
    expected = expected_loss(model, trainer.teacher, documents, beta, 1.5)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert gradient_error(found, gradients(model)) < 1e-4


def test_a_kept_teacher_says_what_it_said_and_is_gone(distill_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 5
    first = distill_of(teacher_top_k=size, supervised_weight=0.3, eval_dataset=ROWS[:3], eval_strategy="epoch")
    assert first.teacher is None
    first.train()
    monkeypatch.setattr("tunesmith.train.distillation.top_logprobs", None)  # all is in the cache
    packed = distill_of(
        folder="packed", teacher_top_k=size, supervised_weight=0.3, eval_dataset=ROWS[:3], eval_strategy="epoch"
    )
    packed.train()
    assert largest_difference(weights_of(first.model), weights_of(packed.model)) == 0.0
    assert "eval_divergence" in first.state.log_history[-2]
    with pytest.raises(TunesmithError, match="give them to the trainer as eval_dataset"):
        first.evaluate([ROWS[0] | {"completion": [{"role": "assistant", "content": "another"}]}])


def test_all_but_one_of_the_likeliest_tokens_are_as_good_as_all(distill_of: Any, tokenizer: Any) -> None:
    whole = distill_of(folder="whole")
    most = distill_of(folder="most", teacher_top_k=len(tokenizer) - 1)
    losses = []
    for trainer in (whole, most):
        batch: Any = trainer.data_collator(list(trainer.train_dataset))
        losses.append(float(trainer.compute_loss(trainer.model, batch).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_its_teacher_stays_as_it_is(beta: float, distill_of: Any, model_of: Any) -> None:
    ways.force(False)
    try:
        trainer = distill_of(teacher_model=model_of("llama"), beta=beta, lmbda=0.5, max_new_tokens=4)
        before = {name: value.clone() for name, value in weights_of(trainer.model).items()}
        trainer.train()
    finally:
        ways.force(None)
    assert trainer.state.log_history[0]["loss"] == 0.0
    assert largest_difference(before, weights_of(trainer.model)) == 0.0


def test_a_student_learns_from_its_teacher(distill_of: Any) -> None:
    trainer = distill_of(max_steps=30, learning_rate=3e-3, per_device_train_batch_size=7)
    trainer.train()
    losses = [entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry]
    assert losses[-1] < 0.3 * losses[0]


def test_micro_batches_accumulate_to_the_same_step(distill_of: Any) -> None:
    settings = {
        "lmbda": 0.5,
        "seq_kd": True,
        "max_new_tokens": 6,
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    whole = distill_of(folder="whole", per_device_train_batch_size=6, **settings)
    parts = distill_of(folder="parts", per_device_train_batch_size=2, gradient_accumulation_steps=3, **settings)
    for trainer in (whole, parts):
        trainer.train()
    assert largest_difference(weights_of(whole.model), weights_of(parts.model)) < 2e-5
    assert whole.state.log_history[0]["loss"] == pytest.approx(parts.state.log_history[0]["loss"], rel=1e-5)


def test_the_student_answers_all_prompts_of_a_step_itself(distill_of: Any) -> None:
    trainer = distill_of(lmbda=1.0, beta=1.0, max_new_tokens=5, max_steps=1)
    documents = learned(trainer)
    assert all(isinstance(document, Written) for document in documents)
    prompts = {tuple(document.input_ids[: answer_start(document)]) for document in documents}
    rows: Any = trainer.train_dataset
    own = [document for row in rows for group in groups_of(row) for document in group]
    assert prompts <= {tuple(document.input_ids[: answer_start(document)]) for document in own}
    for document in documents:
        answer = document.labels[answer_start(document) :]
        assert 1 <= len(answer) <= 5
        assert answer == document.input_ids[answer_start(document) :]
        assert getattr(document, "ended", None) or len(answer) == 5
    logged = trainer.state.log_history[0]
    mean = sum(document.target_count for document in documents) / len(documents)
    assert logged["completions/mean_length"] == pytest.approx(mean)
    assert 0 <= logged["completions/clipped_ratio"] <= 1


def test_the_teacher_answers_what_the_student_does_not(distill_of: Any, tokenizer: Any) -> None:
    trainer = distill_of(lmbda=0.0, seq_kd=True, max_new_tokens=5, max_steps=1, temperature=1e-4)
    documents = learned(trainer)
    prompts = [document.input_ids[: answer_start(document)] for document in documents]
    likeliest = {
        done.index: done.ids for done in answer_ids(trainer.teacher, tokenizer, prompts, Sampling(max_new_tokens=5))
    }
    for i, document in enumerate(documents):
        assert document.input_ids[len(prompts[i]) :][: len(likeliest[i])] == likeliest[i]


def test_a_resumed_run_draws_the_same_answers(distill_of: Any) -> None:
    settings = {"lmbda": 0.6, "max_new_tokens": 6, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = distill_of(folder="whole", **settings)
    whole.train()
    resumed = distill_of(folder="resumed", **settings)
    resumed.train(str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert largest_difference(weights_of(whole.model), weights_of(resumed.model)) == 0.0


def test_a_step_out_of_memory_is_done_in_parts(distill_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"lmbda": 0.5, "max_new_tokens": 6, "max_steps": 2}
    whole, parts = distill_of(folder="whole", **settings), distill_of(folder="parts", **settings)
    whole.train()
    plain, sizes = parts.batch_loss, list[int]()

    def scarce(model: Any, batch: Batch, **given: Any) -> Any:
        if len(batch.documents) > 2:
            raise MemoryError
        sizes.append(len(batch.documents))
        return plain(model, batch, **given)

    monkeypatch.setattr(parts, "batch_loss", scarce)
    parts.train()
    assert max(sizes) <= 2
    assert largest_difference(weights_of(whole.model), weights_of(parts.model)) < 2e-5


def test_adapters_and_answers_of_their_own(distill_of: Any) -> None:
    trainer = distill_of(kind=GKDTrainer, peft_config=LORA, max_new_tokens=4)
    assert trainer.options.temperature == 1.0
    assert trainer.settings.temperature == 0.9
    trainer.train()
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_metrics_get_the_logits_of_the_student(distill_of: Any) -> None:
    shapes = []

    def measured(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"measured": 1.0}

    trainer = distill_of(eval_dataset=ROWS[:3], compute_metrics=measured)
    assert trainer.evaluate()["eval_measured"] == 1.0
    assert shapes[0][0] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 1.5}, "lmbda is 1.5; write a number from 0 to 1"),
        ({"lmbda": 0.5, "teacher_top_k": 8}, "Write lmbda: 0 and seq_kd: false"),
        ({"lmbda": 1.0, "supervised_weight": 0.5}, "Lower lmbda"),
        ({"lmbda": 1.0, "seq_kd": True}, "the student writes all answers"),
        ({"loss_type": "dft"}, "beta says what is learned"),
        ({"label_smoothing_factor": 0.1}, "the teacher says how sure"),
        ({"temperature": 0.0}, "write a number above 0"),
        ({"teacher_top_k": 100_000}, "write fewer"),
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "this one is loaded already"),
        ({"lmbda": 1.0, "train_dataset": [{"text": "no prompt in this row"}]}, "a row has no prompt"),
    ],
)
def test_what_can_not_be_meant_is_refused(settings: dict[str, Any], message: str, distill_of: Any) -> None:
    with pytest.raises(TunesmithError, match=message):
        distill_of(**settings)


def test_teachers_with_other_tokens_are_refused_by_name(
    distill_of: Any, model_of: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = model_of("llama")
    with pytest.raises(TunesmithError, match="give another model"):
        distill_of(model=model, teacher_model=model)
    with pytest.raises(TunesmithError, match="teacher_model is int; give a name"):
        distill_of(teacher_model=5)
    with pytest.raises(TunesmithError, match="no teacher: write teacher_model_name_or_path"):
        distill_of(teacher_model=None)
    with pytest.raises(TunesmithError, match=r"has 300 embeddings and the student \d+"):
        distill_of(teacher_model=teacher_of("llama", 300))
    other = tmp_path / "other"
    model_of("llama").save_pretrained(other)
    tokenizer.save_pretrained(other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    assert '"a":' in text
    assert '"b":' in text
    swapped = text.replace('"a":', '"first":').replace('"b":', '"a":').replace('"first":', '"b":')
    (other / "tokenizer.json").write_text(swapped, encoding="utf-8")
    with pytest.raises(TunesmithError, match="other has another vocabulary than the student: 2 ids differ"):
        distill_of(teacher_model_name_or_path=str(other))


def test_a_teacher_by_name_may_have_padded_embeddings(distill_of: Any, tokenizer: Any, tmp_path: Path) -> None:
    padded = tmp_path / "padded"
    teacher_of("llama", len(tokenizer) + 7).save_pretrained(padded)
    tokenizer.save_pretrained(padded)
    trainer = distill_of(teacher_model_name_or_path=str(padded))
    trainer.train()
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_names_of_trl_are_understood(tmp_path: Path) -> None:
    theirs: dict[str, Any] = {"max_completion_length": 7}
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **theirs)
    assert (args.max_new_tokens, args.beta, args.lmbda, args.temperature) == (7, 1.0, 1.0, 1.0)
    gkd = GKDConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (gkd.max_new_tokens, gkd.beta, gkd.lmbda, gkd.temperature, gkd.seq_kd) == (128, 0.5, 0.5, 0.9, False)
    with pytest.raises(TunesmithError, match="the same setting"):
        DistillationConfig(output_dir=str(tmp_path), max_new_tokens=7, use_cpu=True, **theirs)
