"""The client of a vLLM server, with a stand-in on loopback that speaks its interface and answers with a real model."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from tests.forked import together
from tests.models import tiny
from tunesmith import GRPOConfig, GRPOTrainer, TunesmithError
from tunesmith.model.generate import Sampling
from tunesmith.train.generator import OwnDecoding
from tunesmith.train.vllm_server import Server, VLLMServer

ROWS = [{"prompt": [{"role": "user", "content": f"{word}?"}]} for word in ("One", "Two", "Three", "Four")]


class StandIn:
    """`/health`, `/v1/completions` and the endpoints of adapters, of a tiny model."""

    def __init__(self, tokenizer: Any) -> None:
        self.base, self.tokenizer, self.asked = tiny("llama", len(tokenizer)), tokenizer, list[tuple[str, Any]]()
        self.adapted: dict[str, Any] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200 if self.path == "/health" else 404, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body))
                if self.path == "/v1/load_lora_adapter":
                    fresh = tiny("llama", len(tokenizer))
                    outer.adapted[body["lora_name"]] = PeftModel.from_pretrained(fresh, body["lora_path"])
                    self.answer(200, {})
                elif self.path == "/v1/unload_lora_adapter":
                    del outer.adapted[body["lora_name"]]
                    self.answer(200, {})
                elif body["model"] not in outer.adapted:
                    self.answer(404, {"message": f"The model `{body['model']}` does not exist."})
                else:
                    self.answer(200, {"choices": outer.choices(body)})

            def answer(self, code: int, body: Any) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def choices(self, body: Any) -> list[dict[str, Any]]:
        assert body["return_token_ids"]
        sampling = Sampling(
            max_new_tokens=body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"], top_k=0
        )
        drawn = OwnDecoding(self.adapted[body["model"]], self.tokenizer)(body["prompt"], sampling)
        listed = [
            {
                "index": i,
                "text": "",
                "token_ids": answer.ids,
                "finish_reason": answer.finish,
                "logprobs": {"token_logprobs": answer.logprobs},
            }
            for i, answer in enumerate(drawn)
        ]
        return listed[::-1]


@pytest.fixture
def stand_in(tokenizer: Any) -> Iterator[StandIn]:
    server = StandIn(tokenizer)
    yield server
    server.http.shutdown()
    server.http.server_close()


def settings(url: str, folder: Path, *, rows: int = 8) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        precision="fp32",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=rows,
        num_generations=4,
        max_completion_length=6,
        self_test="off",
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        vllm_server_timeout=5,
    )


def vowels(completions: list[Any], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in answer[0]["content"]) for answer in completions]


def test_a_server_draws_with_the_adapters_of_each_step(stand_in: StandIn, tokenizer: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama", len(tokenizer)), LoraConfig(target_modules=["q_proj"]))
    trainer = GRPOTrainer(model, vowels, settings(stand_in.url, tmp_path), ROWS, processing_class=tokenizer)
    trainer.train()
    assert [path for path, _ in stand_in.asked] == [
        *("/v1/load_lora_adapter", "/v1/completions"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"),
    ]
    assert [*stand_in.adapted] == ["tunesmith-1"]
    assert [path.name for path in (tmp_path / "vllm").iterdir()] == ["tunesmith-1"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["sampling/sampling_logp_difference/mean"] < 1e-4 for entry in logged)


def _train(folder: Path, tokenizer: Path, url: str) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    model = get_peft_model(tiny("llama", len(loaded)), LoraConfig(target_modules=["q_proj"]))
    GRPOTrainer(model, vowels, settings(url, folder, rows=4), ROWS, processing_class=loaded).train()


@pytest.mark.processes
def test_of_two_processes_one_loads_the_adapters_and_each_asks(
    stand_in: StandIn, tiny_model: Path, tmp_path: Path
) -> None:
    together(2, _train, tmp_path, tiny_model, stand_in.url)
    load, unload, ask = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/completions"
    assert [path for path, _ in stand_in.asked] == [load, ask, ask, load, unload, ask, ask]
    assert [len(body["prompt"]) for path, body in stand_in.asked if path == ask] == [4] * 4


def test_what_the_server_says_is_in_the_error(stand_in: StandIn, tokenizer: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama", len(tokenizer)), LoraConfig(target_modules=["q_proj"]))
    server = Server(url=stand_in.url, timeout=5, folder=tmp_path, stops=[2])
    client = VLLMServer(model, server, lambda: 0)
    client([[5, 6]], Sampling(max_new_tokens=2, temperature=1.0))
    stand_in.adapted.clear()
    with pytest.raises(TunesmithError, match=r"/v1/completions says 404: .*does not exist"):
        client([[5, 6]], Sampling(max_new_tokens=2, temperature=1.0))
    nowhere = VLLMServer(model, Server(url="http://127.0.0.1:9", timeout=0, folder=tmp_path, stops=[2]), lambda: 0)
    with pytest.raises(TunesmithError, match="no vLLM server answers at"):
        nowhere([[5]], Sampling())


def test_all_weights_do_not_go_over_http(tokenizer: Any, tmp_path: Path) -> None:
    model, args = tiny("llama", len(tokenizer)), settings("http://127.0.0.1:9", tmp_path)
    with pytest.raises(TunesmithError, match="train LoRA adapters"):
        GRPOTrainer(model, vowels, args, ROWS, processing_class=tokenizer)
