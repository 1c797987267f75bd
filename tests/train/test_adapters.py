"""Training with every kind of adapter: loss falls, and what is saved gives the same model to whoever loads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType
from peft.import_utils import is_torchao_available
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models import tiny
from tests.train.runs import END, PAIR_ROWS, token_losses
from tunesmith.errors import TunesmithError
from tunesmith.model.adapters import trainable
from tunesmith.model.generate import generate
from tunesmith.model.load import load_run

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "lora": LoraConfig(target_modules="all-linear"),
    "rslora": LoraConfig(target_modules="all-linear", use_rslora=True),
    "dora": LoraConfig(target_modules="all-linear", use_dora=True),
    "pissa": LoraConfig(r=4, target_modules=LAYERS, init_lora_weights="pissa"),
    "pissa by a random method": LoraConfig(
        r=4,
        target_modules=LAYERS,
        init_lora_weights="pissa_niter_4",  # type: ignore[arg-type]
    ),
    "olora": LoraConfig(r=4, target_modules=LAYERS, init_lora_weights="olora"),
    "ranks by layer": LoraConfig(
        r=4, target_modules=LAYERS, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 16}, layers_to_transform=[1]
    ),
    "pissa beside what is trained whole": LoraConfig(
        r=4,
        target_modules=LAYERS,
        init_lora_weights="pissa_niter_4",  # type: ignore[arg-type]
        use_rslora=True,
        use_dora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"k_proj": 16},
        modules_to_save=["norm"],
        trainable_token_indices=[40, 41],
    ),
    "biases": LoraConfig(target_modules=["q_proj"], bias="all"),
    "head": LoraConfig(target_modules=LAYERS, modules_to_save=["lm_head"]),
    "ia3": peft.IA3Config(),
    "loha": peft.LoHaConfig(target_modules=LAYERS),
    "lokr": peft.LoKrConfig(target_modules=LAYERS),
    "oft": peft.OFTConfig(target_modules=LAYERS, oft_block_size=8),
    "boft": peft.BOFTConfig(target_modules=LAYERS, boft_block_size=4),
    "hra": peft.HRAConfig(target_modules=LAYERS),
    "vera": peft.VeraConfig(target_modules=["q_proj", "o_proj"]),
    "randlora": peft.RandLoraConfig(target_modules=LAYERS, r=4),
    "fourierft": peft.FourierFTConfig(target_modules=LAYERS, n_frequency=50),
    "waveft": peft.WaveFTConfig(target_modules=LAYERS, n_frequency=50),
    "shira": peft.ShiraConfig(target_modules=LAYERS, r=4),
    "vblora": peft.VBLoRAConfig(target_modules=LAYERS, num_vectors=16, vector_length=16, topk=2),
    "c3a": peft.C3AConfig(target_modules=LAYERS, block_size=8),
    "road": peft.RoadConfig(target_modules=LAYERS, group_size=8),
    "delora": peft.DeloraConfig(target_modules=LAYERS),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "tokens": peft.TrainableTokensConfig(token_indices=list(range(3, 130)), target_modules=["embed_tokens"]),
    "prompt tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix tuning": peft.PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
}
IDS = torch.arange(10, 30)[None]


@pytest.fixture
def base(model_of: Callable[..., PreTrainedModel], tokenizer: Any, tmp_path: Path) -> str:
    """The folder of a small model."""
    folder = str(tmp_path / "base")
    model_of("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits[:, -IDS.shape[1] :]  # behind virtual tokens
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_is_the_same_when_loaded(kind: str, base: str, trainer_of: Callable[..., Any]) -> None:
    settings = {"max_steps": 3, "learning_rate": 3e-2, "optim": "adamw_torch", "lr_scheduler_type": "constant"}
    trainer = trainer_of(model=base, peft_config=KINDS[kind], **settings)
    frozen = {name: value.clone() for name, value in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1e-3
    trainer.save_model()
    # As a stranger: plain `peft` on the base model from its own files.
    stranger = AutoModelForCausalLM.from_pretrained(base)
    assert all(torch.equal(value, frozen[name]) for name, value in stranger.named_parameters())
    loaded = PeftModel.from_pretrained(stranger, trainer.args.output_dir)
    tolerance = 1e-5 * float(logits(trainer.model).abs().max())
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=tolerance)
    assert float((logits(loaded) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["pissa by a random method", "olora"])
def test_what_moved_base_weights_is_saved_as_plain_lora_of_twice_the_rank(
    kind: str, base: str, trainer_of: Callable[..., Any]
) -> None:
    trainer = trainer_of(model=base, peft_config=KINDS[kind], max_steps=2)
    trainer.train()
    for _ in range(2):  # saving changes nothing of the model
        trainer.save_model()
        saved = json.loads((Path(trainer.args.output_dir) / "adapter_config.json").read_text())
        assert (saved["r"], saved["init_lora_weights"]) == (8, True)
    assert trainer.model.peft_config["default"].r == 4


@pytest.mark.parametrize("way", ["trainer", "model"])
@pytest.mark.parametrize("kind", ["pissa", "pissa by a random method", "olora"])
def test_adapters_are_saved_for_the_base_whatever_the_folder_is_called_and_whoever_saves(
    kind: str, way: str, base: str, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = trainer_of(model=base, peft_config=KINDS[kind], max_steps=2)
    trainer.train()
    for name in ("checkpoint-final", "my-checkpoint-final"):
        folder = str(tmp_path / name)
        if way == "trainer":
            trainer.save_model(folder)
        else:
            trainer.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=2e-5)


def test_of_several_adapters_the_one_with_a_start_is_saved_for_the_base(
    base: str, trainer_of: Callable[..., Any]
) -> None:
    whole: Any = AutoModelForCausalLM.from_pretrained(base)
    model: Any = peft.get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("second", KINDS["pissa by a random method"])
    model.set_adapter("second")
    trainer = trainer_of(model=model, max_steps=2)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder / "second"))
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=2e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2


def test_a_start_that_was_prepared_from_data_is_saved_for_the_base(
    base: str, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="corda")
    config.corda_config = CordaConfig(corda_method="kpm")
    preprocess_corda(model, config, run_model=lambda: model(input_ids=torch.arange(3, 120)[None]))
    trainer = trainer_of(model=model, peft_config=config, max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), trainer.args.output_dir)
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=2e-5)


def test_a_checkpoint_of_adapters_that_belong_onto_moved_weights_is_not_loaded_as_a_model(
    base: str, trainer_of: Callable[..., Any]
) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(model=base, peft_config=KINDS["pissa by a random method"], **settings)
    trainer.train()
    with pytest.raises(TunesmithError, match=r"init_lora_weights='pissa_niter_4'.*go on with the run"):
        load_run(str(Path(trainer.args.output_dir) / "checkpoint-2"))


def test_who_may_read_saved_weights_says_the_umask(base: str, trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(model=base, peft_config=KINDS["lora"], **settings)
    trainer.train()
    trainer.save_model()
    run = Path(trainer.args.output_dir)
    weights = {file.relative_to(run).as_posix(): file.stat().st_mode & 0o777 for file in run.rglob("*.safetensors")}
    plain = (run / "adapter_config.json").stat().st_mode & 0o777
    names = ["adapter_model", "checkpoint-1/adapter_model", "checkpoint-1/optimizer", "checkpoint-1/random"]
    assert weights == {f"{name}.safetensors": plain for name in names}


def test_a_resumed_pissa_run_ends_where_an_uninterrupted_one_does(base: str, trainer_of: Callable[..., Any]) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "peft_config": KINDS["pissa"]}
    whole = trainer_of(model=base, **settings)
    whole.train()
    resumed = trainer_of(model=base, **settings)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=0, atol=0)


def test_virtual_tokens_leave_the_loss_at_the_rows_tokens(
    trainer_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(peft_config=KINDS["prompt tuning"], eval_dataset=PAIR_ROWS, learning_rate=0.0)
    assert "the adapters put tokens of their own in front of each row" in caplog.text
    expected = torch.cat(_behind_virtual_tokens(trainer.model, trainer.eval_dataset)).mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-5)
    found = trainer.predict(PAIR_ROWS)
    assert found.predictions.shape[:2] == found.label_ids.shape


def _behind_virtual_tokens(model: Any, dataset: Any) -> list[torch.Tensor]:
    """The losses of supervised tokens, each row alone, behind the prompt that `peft` makes."""

    class Behind(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=use_cache)
            output.logits = output.logits[:, -input_ids.shape[1] :]
            return output

    return token_losses(Behind(), dataset)


@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning", "prefix tuning"])
def test_a_run_with_virtual_tokens_answers_with_them(
    kind: str, base: str, tokenizer: Any, trainer_of: Callable[..., Any]
) -> None:
    trainer = trainer_of(model=base, peft_config=KINDS[kind], max_steps=2, learning_rate=0.3)
    trainer.train()
    trainer.save_model()
    model: Any = load_run(trainer.args.output_dir)[0]
    torch.testing.assert_close(logits(model), logits(trainer.model), rtol=0, atol=1e-5)
    prompt = [{"role": "user", "content": "a"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    start = len(ids)
    for _ in range(6):  # the likeliest token, by the whole model each time
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert END not in ids[start : start + 2]
    expected = tokenizer.decode([*ids[start:], END][: [*ids[start:], END].index(END)], skip_special_tokens=True)
    answers = generate(model, tokenizer, [prompt, [{"role": "user", "content": "a longer one"}]], max_new_tokens=6)
    assert answers[0] == expected
    with model.disable_adapter():
        assert generate(model, tokenizer, [prompt], max_new_tokens=6)[0] != expected


# Embeddings and head


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=" and ".join)
def test_embeddings_stay_tied_when_both_ends_are_trained_and_else_part(
    whole: list[str], tied: bool, tokenizer: Any, tmp_path: Path, trainer_of: Callable[..., Any]
) -> None:
    folder = str(tmp_path / "base")
    tiny("llama", len(tokenizer), tie_word_embeddings=tied).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = LoraConfig(target_modules=LAYERS, modules_to_save=whole)
    trainer = trainer_of(model=folder, peft_config=config, max_steps=3, optim="sgd", learning_rate=0.5)
    trainer.train()
    model = trainer.model.get_base_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    both = len(whole) == 2
    first, second = _weight(embedding), _weight(head)
    assert (first is second) == (tied and both)
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(_weight(original.get_input_embeddings()), first) != ("embed_tokens" in whole)
    assert torch.equal(_weight(original.get_output_embeddings()), second) != ("lm_head" in whole)
    trainer.save_model()
    loaded, _ = load_run(trainer.args.output_dir)
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=1e-6)


def _weight(layer: Any) -> torch.Tensor:
    whole = getattr(layer, "modules_to_save", None)
    weight: torch.Tensor = (layer if whole is None else whole["default"]).weight
    return weight


# Saved adapters, several adapters


def test_a_run_starts_from_saved_adapters_at_step_zero(
    base: str, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    first = trainer_of(model=base, peft_config=KINDS["lora"], max_steps=3, output_dir=str(tmp_path / "first"))
    first.train()
    first.save_model()
    again = trainer_of(model=str(tmp_path / "first"), max_steps=2, output_dir=str(tmp_path / "again"))
    torch.testing.assert_close(logits(again.model), logits(first.model), rtol=0, atol=1e-6)
    again.model.train()
    again.train()
    assert again.state.global_step == 2
    again.save_model()
    saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == base
    assert float((logits(again.model) - logits(first.model)).abs().max()) > 1e-4
    with pytest.raises(TunesmithError, match="holds adapters, and peft_config asks for new ones; merge them first"):
        trainer_of(model=str(tmp_path / "first"), peft_config=KINDS["lora"])


def test_the_base_model_of_saved_adapters_is_found_from_anywhere(
    base: str, trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = peft.get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LoraConfig(target_modules=["q_proj"]))
    for arguments in ({"model": "base", "peft_config": KINDS["lora"]}, {"model": loaded}):
        trainer = trainer_of(**arguments, output_dir="run")
        trainer.save_model()
        saved = json.loads(Path("run/adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == base
    monkeypatch.chdir("/")
    load_run(str(tmp_path / "run"))


def test_of_several_adapters_the_active_one_is_trained(base: str, trainer_of: Callable[..., Any]) -> None:
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=LAYERS, r=4))
    model.add_adapter("second", LoraConfig(target_modules=LAYERS, r=2))
    model.set_adapter("second")
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = trainer_of(model=model, max_steps=2)
    trainer.train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(".second." in name for name in changed)
    trainer.save_model()
    saved = load_file(Path(trainer.args.output_dir) / "second" / "adapter_model.safetensors")
    assert all(value.shape[0] == 2 for name, value in saved.items() if "lora_A" in name)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "..", "a/b"])
def test_names_of_adapters_stay_in_the_runs_folder(name: str, base: str, trainer_of: Callable[..., Any]) -> None:
    whole: Any = AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModelForCausalLM(whole, LoraConfig(target_modules=["q_proj"]), adapter_name="fine")
    model.peft_config[name] = model.peft_config["fine"]
    with pytest.raises(TunesmithError, match="an adapter is named"):
        trainer_of(model=model)


# LoRA+


def test_lora_plus_steps_b_further_than_a(base: str, trainer_of: Callable[..., Any]) -> None:
    config = LoraConfig(target_modules=LAYERS, init_lora_weights=False)

    def rates(**settings: Any) -> dict[float, set[str]]:
        trainer = trainer_of(model=base, peft_config=config, lr_scheduler_type="constant", **settings)
        trainer.train()
        names = {id(value): name for name, value in trainer.model.named_parameters()}
        found: dict[float, set[str]] = {}
        for group in trainer.optimizer.param_groups:
            kinds = {"B" if "lora_B" in names[id(value)] else "A" for value in group["params"]}
            found.setdefault(group["lr"], set()).update(kinds)
        return found

    assert rates(learning_rate=0.01, loraplus_lr_ratio=16.0) == {0.01: {"A"}, 0.16: {"B"}} | (
        {1e-6: set()}  # LoRA on embeddings, of which there is none
    )
    assert rates(learning_rate=0.01) == {0.01: {"A", "B"}}
    optimizer = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(TunesmithError, match="loraplus_lr_ratio and an optimizer of yours"):
        trainer_of(model=base, peft_config=config, loraplus_lr_ratio=16.0, optimizer_cls_and_kwargs=optimizer)
    with pytest.raises(TunesmithError, match="loraplus_lr_ratio is set, but no LoRA adapters are trained"):
        trainer_of(model=base, loraplus_lr_ratio=16.0)


# What is said, and refused


def test_the_share_that_is_trained_is_said(base: str, trainer_of: Callable[..., Any], caplog: Any) -> None:
    caplog.set_level("INFO")
    trainer = trainer_of(model=base, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    found = trainable(trainer.model)
    assert found.trained == 2 * 2 * 4 * 32  # layers, matrices, rank, width
    assert found.trained_bytes == 4 * found.trained
    assert f"trains 512 of {found.parameters:,} parameters" in caplog.text


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (peft.AdaLoraConfig(target_modules=LAYERS, total_step=9), "ADALORA can't be trained here: it moves ranks"),
        (peft.MissConfig(target_modules=LAYERS), "MISS can't be trained here: it was never tried"),
        (LoraConfig(target_modules=["q_proj", "qroj"]), r"target_modules has 'qroj', .* did you mean 'q_proj'.*it has"),
        (LoraConfig(target_modules=r"model\.layer\..*"), "matches the full name of no module, such as lm_head"),
        (LoraConfig(target_modules=LAYERS, modules_to_save=["head"]), "modules_to_save has 'head', which the model"),
        (LoraConfig(target_modules=LAYERS, layers_to_transform=[1, 2]), "has 2; the model's layers are 0 to 1"),
        (LoraConfig(target_modules=LAYERS, rank_pattern={"qq": 2}), "rank_pattern has 'qq', which matches nothing"),
        (LoraConfig(target_modules=LAYERS, alora_invocation_tokens=[5]), "alora_invocation_tokens switches the adapt"),
        (LoraConfig(target_parameters=["experts.weight"]), "target_parameters has 'experts.weight', which the model"),
        (LoraConfig(target_modules=LAYERS, task_type="SEQ_CLS"), "task_type is SEQ_CLS"),
        (LoraConfig(target_modules=LAYERS, layer_replication=[(0, 2), (0, 2)]), "layer_replication makes another"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_would_train_nothing_or_something_else_is_refused(
    adapters: Any, message: str, trainer_of: Callable[..., Any]
) -> None:
    with pytest.raises(TunesmithError, match=message):
        trainer_of(peft_config=adapters)


def test_a_start_that_rounds_the_base_weights_is_refused(trainer_of: Callable[..., Any]) -> None:
    config = LoraConfig(target_modules=LAYERS)
    config.init_lora_weights = "loftq"  # which needs scipy, where it is given to the constructor
    with pytest.raises(TunesmithError, match=r"'loftq' rounds the base weights.*quantize: 4bit"):
        trainer_of(peft_config=config)


def test_what_peft_itself_stumbles_over_is_an_error_that_names_it(trainer_of: Callable[..., Any]) -> None:
    config = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights="pissa")
    with pytest.raises(TunesmithError, match=r"peft can't make these adapters for GptOssForCausalLM \(AttributeError"):
        trainer_of("gpt_oss", peft_config=config)


def test_a_library_that_is_too_old_for_peft_is_named_with_the_ways_on(
    trainer_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    metadata = tmp_path / "torchao-0.10.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    is_torchao_available.cache_clear()  # it was asked before, without this folder; that it raises is not kept
    with pytest.raises(TunesmithError, match=r"version of torchao\. Found version 0\.10\.0.*pip uninstall NAME"):
        trainer_of(peft_config=LoraConfig(target_modules="all-linear"))


def test_experts_are_adapted_by_the_names_of_their_parameters(trainer_of: Callable[..., Any]) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, target_modules=[], target_parameters=names)
    trainer = trainer_of("gpt_oss", peft_config=config, max_steps=4, learning_rate=3e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
