"""Answers of several turns, between which functions are called: only what the model drew is trained."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.data.call_forms import FORMS
from tests.models import gradient_error, gradients
from tests.train.runs import largest_difference, weights_of
from tunesmith import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, TunesmithError
from tunesmith.data.batches import Batch
from tunesmith.model.generate import Sampling
from tunesmith.train.generator import Generated
from tunesmith.train.meter import BatchLoss
from tunesmith.train.policy import Prompts
from tunesmith.train.rollouts import Trial
from tunesmith.train.tools import Tools

TEMPLATE = (Path(__file__).resolve().parents[2] / "recipes" / "tools.jinja").read_text()
ROWS: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "answer": i + 1} for i in range(4)]
END = "<|im_end|>"


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


async def later(text: str) -> str:
    """Says a text.

    Args:
        text: What is said.
    """
    return f"{text} <|im_end|>"


def fail() -> None:
    """Fails."""
    raise KeyError("nothing there")


def now() -> int:
    """Tells the time."""
    return 7


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def between(*results: str) -> str:
    """What the template writes behind the end of a turn with calls."""
    told = "".join(f"<|im_start|>user\n<tool_response>{text}</tool_response>{END}\n" for text in results)
    return f"\n{told}<|im_start|>assistant\n"


def failed(text: str) -> str:
    return str({"error": text})


class Script:
    """A generator of the texts `first`, one after another; behind the result `then` has, of that text; else of "So."
    The text `cut` is cut off."""

    def __init__(self, tokenizer: Any, *first: str, then: dict[str, str] | None = None, cut: str = "") -> None:
        self.tokenizer, self.first, self.then, self.cut = tokenizer, first, then or {}, cut
        self.asked: list[Sequence[Sequence[int]]] = []

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]:
        self.asked.append(prompts)
        answers = []
        for i, prompt in enumerate(prompts):
            text = self.tokenizer.decode(prompt)
            said = self.first[i % len(self.first)]
            if "<tool_response>" in text or "<|im_start|>tool\n" in text:
                said = next((turn for result, turn in self.then.items() if text.endswith(between(result))), "So.")
            ids = self.tokenizer(said + END * (said != self.cut), add_special_tokens=False)["input_ids"]
            done = said != self.cut and len(ids) <= sampling.max_new_tokens
            answers.append(Generated(ids=ids[: sampling.max_new_tokens], finish="stop" if done else "length"))
        return answers


@pytest.fixture
def trainer_of(model_of: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes a trainer on ROWS that calls functions; what it does not know is a setting."""
    tokenizer.chat_template = TEMPLATE

    def make(kind: Any = GRPOTrainer, folder: str = "run", **given: Any) -> Any:
        own = {"model", "reward_funcs", "tools", "generator", "rollout_func", "environment_factory", "train_dataset"}
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
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 400,
            "beta": 0.0,
            "self_test": "off",
        }
        defaults = {"train_dataset": ROWS, "processing_class": tokenizer, "reward_funcs": right, "tools": [add]}
        if "model" not in arguments:
            arguments["model"] = model_of("llama", max_position_embeddings=2048)
        config = GRPOConfig if kind is GRPOTrainer else RLOOConfig
        return kind(**defaults | arguments, args=config(**common | given))

    return make


SEEN: list[list[dict[str, Any]]] = []


def right(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """How long an answer is, and what it says."""
    SEEN[:] = completions
    lengths, says = map(len, completion_ids), (answer[-1]["content"] for answer in completions)
    return [length / 100 + (text == "2") for length, text in zip(lengths, says, strict=True)]


def drawn(trainer: Any) -> list[Trial]:
    trainer.model.train()
    trials: list[Trial] = trainer._generation(Prompts(numbers=(0, 1)))
    return trials


def parts(tokenizer: Any, trial: Trial) -> list[tuple[str, bool]]:
    """The text of a trial behind its prompt, cut where training begins and ends."""
    found: list[tuple[list[int], bool]] = []
    for token, label in zip(trial.input_ids, trial.labels, strict=True):
        trained = label != -100
        assert label in (-100, token)
        if not found or found[-1][1] != trained:
            found.append(([], trained))
        found[-1][0].append(token)
    return [(tokenizer.decode(ids), trained) for ids, trained in found][1:]


# What is drawn, and what of it is trained


def test_only_what_the_model_drew_is_trained(trainer_of: Any, tokenizer: Any) -> None:
    first, second = f"I add.\n{call('add', a=1, b=1)}", call("add", a=2, b=3) + call("later", text="Hi")
    script = Script(tokenizer, "2", first, then={"2": second})
    trainer = trainer_of(tools=[add, later], generator=script)
    trials = drawn(trainer)
    assert parts(tokenizer, trials[0]) == [(f"2{END}", True)]
    assert parts(tokenizer, trials[1]) == [
        (f"{first}{END}", True),
        (between("2"), False),
        (f"{second}{END}", True),
        (between("5", f"Hi {END}"), False),
        (f"So.{END}", True),
    ]
    # The end token in a result is ordinary text, and what was asked is what is trained on, token by token.
    assert trials[1].input_ids.count(tokenizer.eos_token_id) == 8  # the system, the user, three turns, three results
    assert [len(prompts) for prompts in script.asked] == [8, 4, 4]
    assert trials[1].input_ids[: len(script.asked[2][0])] == script.asked[2][0]
    assert "You may call these tools" in tokenizer.decode(script.asked[0][0])
    assert (trials[1].size, trials[1].calls, trials[1].failures, trials[1].cut) == (trials[1].target_count, 3, 0, False)
    assert SEEN[1] == [
        {"role": "assistant", "content": "I add.\n", "tool_calls": [asked("add", a=1, b=1)]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "", "tool_calls": [asked("add", a=2, b=3), asked("later", text="Hi")]},
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "tool", "name": "later", "content": f"Hi {END}"},
        {"role": "assistant", "content": "So."},
    ]


@pytest.mark.parametrize(
    ("form", "text", "told"),
    [
        ("mistral", '[TOOL_CALLS]later[CALL_ID]abcdefgh1[ARGS]{"text": "12"}', "tool\n12 <|im_end|>"),
        ("llama", '{"name": "later", "parameters": {"text": "12"}}', "tool\n12 <|im_end|>"),
        ("coder", "<tool_call>\n<function=add>\n<parameter=a>\n12\n</parameter>\n<parameter=b>\n3\n</parameter>\n"
         "</function>\n</tool_call>", "tool\n15"),
        ("coder", "<tool_call>\n<function=later>\n<parameter=text>\n12\n</parameter>\n</function>\n</tool_call>",
         "tool\n12 <|im_end|>"),
    ],
)  # fmt: skip
def test_calls_are_made_in_the_form_of_the_template(
    form: str, text: str, told: str, trainer_of: Any, tokenizer: Any
) -> None:
    tokenizer.chat_template = FORMS[form]
    script = Script(tokenizer, text)
    drawn(trainer_of(tools=[add, later], generator=script))
    said = tokenizer.decode(script.asked[1][0])
    assert said.endswith(f"<|im_start|>assistant\n{text}{END}\n<|im_start|>{told}{END}\n<|im_start|>assistant\n")
    own = {"id": "abcdefgh1"} if form == "mistral" else {}
    [called] = SEEN[0][0]["tool_calls"]
    assert called == {"type": "function", "function": called["function"]} | own


def asked(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("said", "result"),
    [
        (call("fail"), failed("'nothing there'")),
        (call("none_such", a=1), failed("Tool none_such not found.")),
        (call("add", a=1), failed("add() missing 1 required positional argument: 'b'")),
        (call("add", a="1", b=2), failed('can only concatenate str (not "int") to str')),
        (call("later"), failed("later() missing 1 required positional argument: 'text'")),
    ],
)
def test_what_fails_is_a_result_with_the_error(said: str, result: str, trainer_of: Any, tokenizer: Any) -> None:
    trials = drawn(trainer_of(tools=[add, later, fail], generator=Script(tokenizer, said)))
    assert parts(tokenizer, trials[0])[1:] == [(between(result), False), (f"So.{END}", True)]
    assert (trials[0].calls, trials[0].failures) == (1, 1)


@pytest.mark.parametrize(
    "said", ["No call.", call("add", a=1, b=2) + " and more", "<tool_call>{}</tool_call>", call("add")[:-5]]
)
def test_what_is_no_call_ends_the_answer(said: str, trainer_of: Any, tokenizer: Any) -> None:
    trials = drawn(trainer_of(generator=Script(tokenizer, said)))
    assert parts(tokenizer, trials[0]) == [(said + END, True)]
    assert SEEN[0] == [{"role": "assistant", "content": said}]


def test_a_turn_that_is_cut_off_calls_nothing(trainer_of: Any, tokenizer: Any) -> None:
    said = call("add", a=1, b=2)
    trials = drawn(trainer_of(generator=Script(tokenizer, said, cut=said)))
    assert parts(tokenizer, trials[0]) == [(said, True)]
    assert (trials[0].calls, trials[0].cut) == (0, True)


def test_calls_have_a_limit(trainer_of: Any, tokenizer: Any) -> None:
    again = call("add", a=1, b=1)
    trials = drawn(trainer_of(generator=Script(tokenizer, again, then={"2": again}), max_tool_calling_iterations=2))
    assert [trained for _, trained in parts(tokenizer, trials[0])] == [True, False] * 2 + [True]
    assert (trials[0].calls, trials[0].cut) == (2, False)
    assert SEEN[0][-1]["tool_calls"] == [asked("add", a=1, b=1)]


def test_an_answer_with_its_results_is_as_long_as_it_may_be(trainer_of: Any, tokenizer: Any) -> None:
    said = call("add", a=1, b=1)
    turn, results = len(said) + 1, len(tokenizer(between("2"), add_special_tokens=False)["input_ids"])
    for most, kinds, cut in (
        (turn + results, [True], False),  # there is no room for a token behind the results
        (turn + results + 2, [True, False, True], True),
        (turn + results + 4, [True, False, True], False),
    ):
        trials = drawn(trainer_of(generator=Script(tokenizer, said), max_completion_length=most))
        assert [trained for _, trained in parts(tokenizer, trials[0])] == kinds
        assert trials[0].cut == cut


# Gradients


def padded_loss(model: Any, trials: list[Trial], mask: Tensor, *, whole: bool) -> Tensor:
    """GRPO's loss over the tokens of a generation, or RLOO's over whole answers, of padded rows (B, T) with a mask
    (B, T - 1)."""
    longest = max(len(trial.input_ids) for trial in trials)
    ids = torch.tensor([trial.input_ids + [0] * (longest - len(trial.input_ids)) for trial in trials])
    seen = torch.tensor([[1] * len(t.input_ids) + [0] * (longest - len(t.input_ids)) for t in trials])
    logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1]
    logps = logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    old = torch.zeros_like(logps)
    for row, kept, trial in zip(old, mask, trials, strict=True):
        row[kept.bool()] = trial.before
    advantages = torch.tensor([trial.advantage for trial in trials])[:, None]
    log_ratio = (logps - old) * mask
    ratio = log_ratio.sum(dim=1, keepdim=True).exp() if whole else log_ratio.exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return losses.mean() if whole else (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_the_gradient_is_that_of_padded_rows_with_a_mask(kind: Any, trainer_of: Any, tokenizer: Any) -> None:
    said = (call("add", a=1, b=1), "2", call("none"), "Two or so")
    trainer = trainer_of(kind, generator=Script(tokenizer, *said, then={"2": "2"}), num_iterations=2)
    trials = drawn(trainer)
    assert len({trial.advantage for trial in trials}) > 2
    # The mask by the texts, not by the labels.
    longest = max(len(trial.input_ids) for trial in trials)
    mask = torch.zeros(len(trials), longest - 1)
    for row, trial in zip(mask, trials, strict=True):
        text = tokenizer.decode(trial.input_ids)
        at = text.index("<|im_start|>assistant\n")
        for piece in text[at:].split("<|im_start|>assistant\n")[1:]:
            turn = piece[: piece.index(END)] + END
            at = text.index(turn, at)
            before, through = text[:at], text[: at + len(turn)]
            start, stop = (len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, through))
            row[start - 1 : stop - 1] = 1
            at += len(turn)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.005)
    batch = trainer._batch(trials)
    assert batch.computed_tokens < sum(len(trial.input_ids) for trial in trials)  # prompts are there once
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    ours = gradients(trainer.model)
    expected = padded_loss(trainer.model, trials, mask, whole=kind is RLOOTrainer)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert gradient_error(ours, gradients(trainer.model)) < 1e-5


def test_out_of_memory_divides_a_group_with_the_same_gradients(trainer_of: Any, tokenizer: Any) -> None:
    script = Script(tokenizer, call("add", a=1, b=1), "2", call("none"), "Two or so", then={"2": "2"})
    # One plain step of length 1, so that weights differ as gradients do; Adam would divide rounding by next to nothing.
    settings = {"generator": script, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
    whole, split = trainer_of(folder="whole", **settings), trainer_of(folder="split", **settings)
    before = weights_of(whole)
    right_one, sizes = split.batch_loss, list[int]()

    def small(model: Any, batch: Batch, **arguments: Any) -> BatchLoss:
        if len(batch.documents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.documents))
        loss: BatchLoss = right_one(model, batch, **arguments)
        return loss

    split.batch_loss = small
    whole.train()
    split.train()
    assert sizes
    assert largest_difference(weights_of(whole), before) > 0.01
    assert largest_difference(weights_of(split), weights_of(whole)) < 1e-6


# A run


def test_a_run_says_how_often_functions_were_called(trainer_of: Any, tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(generator=Script(tokenizer, call("add", a=1, b=1), "No", call("no"), call("add", a=3, b=4)))
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["tools/call_frequency"] == 0.75
    assert logged["tools/failure_frequency"] == pytest.approx(1 / 3)
    line = json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[0])
    texts = [line[name]["text"] for name in ("best", "worst")]
    assert texts == [f"assistant: {call('no')}\n\ntool: {failed('Tool no not found.')}\n\nassistant: So.", "No"]
    assert "eval_tools/call_frequency" in trainer.evaluate(ROWS[:2])


def resumable(folder: str, model: str, **given: Any) -> Any:
    """A generation is used in four steps, so the third is within one."""
    args = GRPOConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=True,
        precision="fp32",
        disable_tqdm=True,
        max_steps=6,
        logging_steps=3,
        learning_rate=1e-4,
        beta=0.1,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        num_iterations=2,
        num_generations=4,
        max_completion_length=170,
        self_test="off",
        **given,
    )
    return GRPOTrainer(model, right, args, train_dataset=ROWS, tools=[now])


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A tiny model that has learned to call `now`, and to answer then, under a short template."""
    folder = tmp_path_factory.mktemp("caller")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE.replace(TEMPLATE[TEMPLATE.index("You may") : TEMPLATE.index("<|im_end|>")], "T")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    schemas: Any = Tools([now]).schemas
    turn = f"{call('now')}{END}"
    texts = []
    for row, said in zip(ROWS, ("1", "22", "3", "44"), strict=True):
        asked = tokenizer.apply_chat_template(row["prompt"], tools=schemas, add_generation_prompt=True, tokenize=False)
        texts.append(f"{asked}{turn}{between('7')}{said}{END}")
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    ids = inputs["input_ids"]
    labels = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : len(tokenizer(asked, add_special_tokens=False)["input_ids"])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_calls_is_trained_and_resumed_with_the_same_bits(caller: Path, tmp_path: Path) -> None:
    """With the trainer's own decoding, whose log-probabilities are compared before the first step. The checkpoint is
    within a generation, which was drawn in several rounds."""
    whole = resumable(str(tmp_path / "whole"), str(caller), save_strategy="no")
    whole.train()
    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    assert all(entry["tools/call_frequency"] > 0.2 for entry in logged)
    resumable(str(tmp_path / "part"), str(caller), save_steps=3).train()
    resumed = resumable(str(tmp_path / "part"), str(caller), save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert largest_difference(weights_of(resumed), weights_of(whole)) == 0.0
    assert resumed.state.log_history[-2] == whole.state.log_history[-2]


# What is refused


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"rollout_func": print}, "give generator="),
        ({"environment_factory": print}, "give functions as tools="),
        ({"tools": add}, "write a list of functions"),
        ({"tools": [add, add]}, "two functions called 'add'"),
        ({"tools": [lambda x: x]}, "can't be shown to the model.*Write type hints"),
        ({"tools": ["add"]}, "'add' is no function; write `module:function`"),
        ({"tools": None, "max_tool_calling_iterations": 2}, "there are no tools"),
        ({"max_tool_calling_iterations": 0}, "write 1 or more"),
        ({"train_dataset": [{"prompt": "1 + 1 ="}] * 4}, "row 0: 'prompt' is a text, and tools"),
        ({"use_vllm": True, "vllm_mode": "server"}, "one limit for all; leave use_vllm out"),
    ],
)
def test_what_can_not_be_is_refused(given: dict[str, Any], problem: str, trainer_of: Any) -> None:
    with pytest.raises(TunesmithError, match=problem):
        trainer_of(**given)
