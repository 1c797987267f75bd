"""What every test shares: no network, the real data where there is some, and a home folder of its own on request."""

import os
from pathlib import Path

import pytest

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data sets are mapped in forked workers

REPO = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `realdata` every test that reads the shared data, so that no mark can be forgotten."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.realdata)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets: `$TUNESMITH_SHARED_DATA`, or `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("TUNESMITH_SHARED_DATA") or REPO.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder; set TUNESMITH_SHARED_DATA to the folder that holds it")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that `TUNESMITH_HOME` names for one test. Without it, the user's own cache is used: the demo
    model is converted into it once, which takes about ten seconds."""
    folder = tmp_path / "tunesmith-home"
    folder.mkdir()
    monkeypatch.setenv("TUNESMITH_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_prepared_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test prepares its data itself, and leaves none in the user's cache."""
    monkeypatch.setattr("tunesmith.data.cache.home", lambda: tmp_path / "prepared-home")


@pytest.fixture(autouse=True)
def fp32_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees a processor without fast bfloat16 and with a good BLAS, so that results don't depend on the
    machine that runs them."""
    import tunesmith.model.linear
    import tunesmith.settings.config

    monkeypatch.setattr(tunesmith.model.linear, "_chosen", False)
    monkeypatch.setattr(tunesmith.settings.config, "measure", lambda device: {"fp32": 100.0, "bf16": 10.0, "fp16": 0.0})


@pytest.fixture(autouse=True)
def no_page_of_each_run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report of a run takes longer than most runs of the tests; those marked `reports` get it,
    and what pages show."""
    import tunesmith.trainers

    if not any(map(request.node.get_closest_marker, ("reports", "documented"))):
        monkeypatch.setattr(tunesmith.trainers.Published, "draw_page", None)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a two-layer Llama with random weights and a byte-level tokenizer with the ChatML template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
