"""A GGUF file is the model that it was written from, or it isn't written at all."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.conftest import CHATML
from tests.models import tiny
from tests.ship.folders import byte_tokenizer, piece_tokenizer, save
from tunesmith.errors import TunesmithError
from tunesmith.ship import gguf_weights
from tunesmith.ship.gguf import NEW_TOKENS, compare_logits, export_gguf
from tunesmith.ship.merge import Trace

FULL: dict[str, Any] = {
    "layer_types": ["full_attention", "full_attention"],
    "use_sliding_window": False,
    "sliding_window": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "gpt-2", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", "smollm", {"tie_word_embeddings": True, "rope_theta": 5000.0}),
    "llama-biases": ("llama", "llama-bpe", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", "gpt-2", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama3": ("llama", "llama-bpe", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", "qwen2", FULL | {"tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", "qwen2", FULL | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "qwen2", FULL | {"tie_word_embeddings": True}),
}


def folder_of(tmp_path: Path, family: str = "llama", **settings: Any) -> Path:
    name, pre, own = FAMILIES[family]
    return save(tmp_path / "source", name, byte_tokenizer(pre), **own | settings)


def field(path: Path, name: str) -> Any:
    found = GGUFReader(path).get_field(name)
    return None if found is None else found.contents()


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def is_empty(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_does_the_same_after_reading_it_back(tmp_path: Path, family: str) -> None:
    done = export_gguf(str(folder_of(tmp_path, family)), tmp_path / "out", quant="f32")
    assert done.gguf == tmp_path / "out" / "model.gguf"
    assert done.size == done.gguf.stat().st_size
    assert done.checked[0].startswith("tokens equal: ")
    assert done.checked[1].startswith("tensors equal but for rounding: ")
    assert done.checked[2].startswith("greedy tokens equal: 64 of 64; largest difference of logits: ")
    unread = {"llama-biases": "attention_bias, mlp_bias", "llama3": "the scaling of positions", "qwen3": "head_dim"}
    said = f"transformers doesn't read {unread.get(family)}; compared in the file itself"
    assert list(done.checked[3:]) == ([said] if family in unread else [])
    names = tensors(done.gguf)
    assert ("output.weight" in names) == ("tied" not in family and family != "qwen3")
    assert ("rope_freqs.weight" in names) == (family == "llama3")
    assert sorted(path.name for path in done.gguf.parent.iterdir()) == ["Modelfile", "model.gguf"]


def test_what_transformers_reads_is_the_model_without_our_own_check(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    done = export_gguf(str(folder), tmp_path / "tiny.gguf", quant="f32", check=False)
    assert done.checked == ()
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(read(ids).logits, source(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    turns = [{"role": "user", "content": "the cat sat"}]
    expected, found = (each.apply_chat_template(turns, return_dict=False) for each in (byte_tokenizer(), tokenizer))
    assert found == expected
    assert tokenizer.eos_token == "<|im_end|>"
    assert (tmp_path / "tiny.Modelfile").read_text().startswith("FROM ./tiny.gguf\n")


def test_rows_of_q_and_k_become_neighbours() -> None:
    """Two heads of four rows: the first half of each with the second, one by one."""
    rows = np.arange(8)
    assert gguf_weights.interleave(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    matrix = np.stack([rows, rows + 10], axis=1)
    assert gguf_weights.interleave(matrix, 2).tolist() == [[i, i + 10] for i in [0, 2, 1, 3, 4, 6, 5, 7]]


def test_positions_are_scaled_by_the_factors_of_llama_cpp(tmp_path: Path) -> None:
    """theta 10000 over 8 dimensions: wavelengths 6.3, 63, 628 and 6283 for a context of 32 before."""
    done = export_gguf(str(folder_of(tmp_path, "llama3")), tmp_path / "out", check=False)
    assert tensors(done.gguf)["rope_freqs.weight"].data.tolist() == pytest.approx([1.0, 4.0, 4.0, 4.0])


@pytest.mark.parametrize(("quant", "kind"), [("f16", "F16"), ("q8_0", "Q8_0")])
def test_matrices_are_stored_as_wanted_and_vectors_exactly(tmp_path: Path, quant: str, kind: str) -> None:
    folder = folder_of(tmp_path)
    done = export_gguf(str(folder), tmp_path / "out", quant=quant)
    assert "greedy tokens equal: " in done.checked[2]
    found = tensors(done.gguf)
    assert found["token_embd.weight"].tensor_type.name == kind
    assert found["blk.0.attn_norm.weight"].tensor_type == GGMLQuantizationType.F32
    down = found["blk.1.ffn_down.weight"]  # its rows of 48 don't fill blocks of 32
    assert down.tensor_type == GGMLQuantizationType.F16
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    exact = weights["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.array_equal(down.data, exact.astype(np.float16))
    embeddings = weights["model.embed_tokens.weight"].numpy()
    read = gguf.quants.dequantize(found["token_embd.weight"].data, found["token_embd.weight"].tensor_type)
    step = np.abs(embeddings).reshape(len(embeddings), -1, 32).max(-1, keepdims=True) / 127
    assert (
        np.abs(read - embeddings).reshape(len(embeddings), -1, 32) <= 0.57 * step
    ).all()  # half a step, and the step itself is an f16
    assert field(done.gguf, "general.file_type") == {"f16": 1, "q8_0": 7}[quant]


def test_pieces_of_sentencepiece_are_read_back(tmp_path: Path) -> None:
    tokenizer = piece_tokenizer(add_bos_token=True, chat_template="{{ bos_token }}" + CHATML)
    done = export_gguf(str(save(tmp_path / "source", "llama", tokenizer)), tmp_path / "out", quant="f32")
    assert done.checked[0].startswith("tokens equal: ")
    assert field(done.gguf, "tokenizer.ggml.model") == "llama"
    assert field(done.gguf, "tokenizer.ggml.add_bos_token") is True
    assert "<s>" not in (tmp_path / "out" / "Modelfile").read_text()


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, max_position_embeddings=64)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: owner/base\n---\n# A model\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    path = export_gguf(str(folder), tmp_path / "out", check=False).gguf
    expected = {
        "general.architecture": "llama",
        "general.name": "source",
        "general.license": "mit",
        "general.base_model.0.name": "base",
        "general.base_model.0.repo_url": "https://huggingface.co/owner/base",
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": 1,
        "llama.context_length": 64,
        "llama.attention.head_count_kv": 2,
        "llama.vocab_size": 290,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }
    assert {name: field(path, name) for name in expected} == expected
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 64\n' in modelfile


def test_embeddings_beyond_the_tokenizer_are_unused_tokens(tmp_path: Path) -> None:
    done = export_gguf(str(folder_of(tmp_path, vocab_size=320)), tmp_path / "out", quant="f32")
    assert field(done.gguf, "tokenizer.ggml.tokens")[290:292] == ["[PAD290]", "[PAD291]"]
    assert field(done.gguf, "tokenizer.ggml.token_type")[290:] == [gguf.TokenType.UNUSED] * 30


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    run = tmp_path / "run" / "checkpoint-3"  # a run's folder stands for its newest checkpoint
    model.save_pretrained(run)
    byte_tokenizer().save_pretrained(run)
    export_gguf(str(tmp_path / "run"), tmp_path / "out", quant="f32")
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, run).eval()(ids).logits
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(read(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]


def test_weights_in_several_files_are_found(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert "64 of 64" in export_gguf(str(folder), tmp_path / "out", quant="f32").checked[2]


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0"])
def test_a_file_that_does_something_else_is_not_left_behind(
    tmp_path: Path, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of q and k left as they are: all shapes are right, and so is every metadatum."""
    folder = folder_of(tmp_path)
    monkeypatch.setattr(gguf_weights, "interleave", lambda values, heads: values)
    with pytest.raises(
        TunesmithError, match=r"blk.0.attn_q.weight in the file does not hold model.layers.0.self_attn.q_"
    ):
        export_gguf(str(folder), tmp_path / "new" / "out", quant=quant)
    assert not (tmp_path / "new").exists()


def test_a_tie_is_no_fault_and_another_token_is_one() -> None:
    """One prompt with the next tokens 2, 2, 2, ...: the file says 1, by less and by more than rounding explains."""
    logits = torch.zeros(NEW_TOKENS + 1, 4)
    logits[:, 1], logits[:, 2] = 9.99, 10.0
    expected = [Trace(ids=(0,) + (2,) * NEW_TOKENS, start=1, logits=logits)]
    found = logits.clone()
    found[3, 1] = 10.01
    said = "greedy tokens equal: 15 of 16; largest difference of logits: 2.0e-03 of the largest"
    assert compare_logits(expected, [found], "f16") == f"{said} (1 tied)"
    assert compare_logits(expected, [found], "q8_0") == said
    with pytest.raises(
        TunesmithError, match="the f32 file does not do what the model does: greedy tokens equal: 15 of"
    ):
        compare_logits(expected, [found], "f32")
    logits[3, 1], found[3, 1] = 9.8, 10.1
    with pytest.raises(TunesmithError, match="the f16 file does not do what the model does"):
        compare_logits(expected, [found], "f16")
    with pytest.raises(TunesmithError, match="largest difference of logits: nan"):
        compare_logits(expected, [found * float("nan")], "q8_0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM can't be exported to GGUF; these can: Llama"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "scaled by 'yarn'.*by 'llama3'"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu', not 'silu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "its weights are quantized"),
        ({"num_hidden_layers": 3}, "lacks 9 of 30 tensors: model.layers.2.self_attn.q_proj.weight"),
        ({"intermediate_size": 64}, r"has the shape \(48, 32\); config.json makes it \(64, 32\)"),
        ({"vocab_size": 280}, "config.json makes it"),
    ],
)
def test_settings_that_the_file_cannot_have_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TunesmithError, match=message):
        export_gguf(str(folder), tmp_path / "out")
    assert is_empty(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}, "a sliding window"),
        ("qwen3", {"attention_bias": True}, "its attention has biases"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "scaled by 'llama3' .of qwen2, those not scaled can be exported"),
    ],
)
def test_what_llama_cpp_leaves_out_in_a_family_is_refused(
    tmp_path: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TunesmithError, match=message):
        export_gguf(str(folder_of(tmp_path, family, **settings)), tmp_path / "out")


def test_values_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(TunesmithError, match=r"lm_head.weight has values up to 1e\+05, more than f16 holds"):
        export_gguf(str(folder), tmp_path / "out", check=False)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(TunesmithError, match="values that are not finite"):
        export_gguf(str(folder), tmp_path / "out", quant="f32", check=False)
    assert is_empty(tmp_path / "out")


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    for name, output in (("model.gguf", ""), ("Modelfile", ""), ("x.Modelfile", "x.gguf"), ("y.gguf", "y.gguf")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(TunesmithError, match=f"{name} is there already; name another --output"):
            export_gguf("owner/nowhere", tmp_path / output)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TunesmithError, match=r"is a file; name a folder, or a file that ends in .gguf"):
        export_gguf("owner/nowhere", tmp_path / "file")


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path)
    full = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(TunesmithError, match=r"model.gguf takes 64 MB, but only 1 MB are free in"):
        export_gguf(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match="owner/nowhere could not be loaded"):
        export_gguf("owner/nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TunesmithError, match=r"is no model: it has no config.json"):
        export_gguf(str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(TunesmithError, match="quant is 'q4_0'; write f32, f16, q8_0; did you mean 'q8_0'"):
        export_gguf("demo", tmp_path / "out", quant="q4_0")


def test_the_gguf_is_written_where_no_modelfile_can_be(tmp_path: Path) -> None:
    counted = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ loop.index }}\n{{ m['content'] }}{% endfor %}"
    tokenizer: PreTrainedTokenizerBase = byte_tokenizer(chat_template=counted)
    done = export_gguf(str(save(tmp_path / "source", "llama", tokenizer)), tmp_path / "out", check=False)
    assert done.modelfile is None
    assert done.notes[0].startswith("there is no Modelfile: the chat template writes '<|im_start|>user 1\\n' before")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert AutoConfig.from_pretrained(tmp_path / "out", gguf_file="model.gguf").num_hidden_layers == 2


def test_a_tiny_model_is_what_the_other_tests_think_it_is() -> None:
    """Grouped heads, and every norm and bias random: what is left out or confused shows."""
    model = tiny("qwen3", **FULL)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    norm = model.model.layers[0].self_attn.q_norm.weight
    assert norm.std() > 0.01
