"""What every test shares: no network, the real data where there is some, a home folder of its own on request, and a
tokenizer, small models with it, and short runs on the CPU.

Heavy libraries are imported by the fixtures that need them."""

import gc
import inspect
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunesmith import SFTConfig, SFTTrainer

# Before any test module imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data sets are mapped in forked workers

# A shell has its background jobs ignore Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing of what is imported is garbage. Looking for it takes a fifth of the time, and again half a second in each
    run, which collects garbage when it starts."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: what gzip writes holds the second in which it was written, and each process of
    a run has to collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `realdata` every test that reads the shared data, so that no mark can be forgotten. Files with slow tests
    come first: where processes share the files, none is left alone with a long one at the end."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.realdata)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


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


@pytest.fixture(scope="session", autouse=True)
def tables_of_gguf_are_made_once() -> None:
    """`transformers` makes the table of an architecture's tensors anew for each module of a model that it reads."""
    import gguf

    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)


@pytest.fixture(autouse=True)
def no_prepared_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test prepares its data itself, and leaves none in the user's cache."""
    monkeypatch.setattr("tunesmith.data.cache.home", lambda: tmp_path / "prepared-home")


@pytest.fixture(autouse=True)
def fp32_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees a processor without fast bfloat16 and with a good BLAS, so that results don't depend on the
    machine that runs them."""
    import tunesmith.model.precision
    import tunesmith.model.ways

    monkeypatch.setattr(tunesmith.model.ways, "_forced", False)
    monkeypatch.setattr(tunesmith.model.precision, "measure", lambda device: {"fp32": 100.0, "bf16": 10.0, "fp16": 0.0})


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
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    '{% for call in message.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", '
    "\"arguments\": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
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


@pytest.fixture
def tokenizer(tiny_model: Path) -> "PreTrainedTokenizerBase":
    """A byte-level tokenizer with the ChatML template: a character of ASCII is a token. The trainer may change it."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer


@pytest.fixture
def model_of(tokenizer: "PreTrainedTokenizerBase") -> "Callable[..., PreTrainedModel]":
    """Makes a model of the named architecture for the vocabulary of `tokenizer`."""
    from tests.models import tiny

    def make(name: str = "llama", **settings: Any) -> "PreTrainedModel":
        return tiny(name, len(tokenizer), **settings)

    return make


@pytest.fixture
def config(tmp_path: Path) -> "Callable[..., SFTConfig]":
    """Makes the settings of a run of one step in fp32 on the CPU, that reports to nobody and saves nothing.

    Gradients are not clipped, which would hide a loss of the wrong size.
    """
    from tunesmith import SFTConfig

    def make(**settings: Any) -> "SFTConfig":
        common: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 8,
        }
        return SFTConfig(**common | settings)

    return make


@pytest.fixture
def trainer_of(
    model_of: "Callable[..., PreTrainedModel]",
    tokenizer: "PreTrainedTokenizerBase",
    config: "Callable[..., SFTConfig]",
) -> "Callable[..., SFTTrainer]":
    """Makes a trainer on PAIR_ROWS; arguments that the trainer doesn't have are settings of the run."""
    from tests.train.runs import PAIR_ROWS
    from tunesmith import SFTTrainer

    own = inspect.signature(SFTTrainer.__init__).parameters

    def make(name: str = "llama", **arguments: Any) -> "SFTTrainer":
        settings = {key: arguments.pop(key) for key in list(arguments) if key not in own}
        defaults = {"model": None, "args": None, "train_dataset": PAIR_ROWS, "processing_class": tokenizer}
        arguments = defaults | arguments
        arguments["model"] = arguments["model"] or model_of(name)
        arguments["args"] = arguments["args"] or config(**settings)
        return SFTTrainer(**arguments)

    return make
