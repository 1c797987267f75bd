"""Answers from a vLLM server, over its HTTP interface: the trainer's adapters go there as files, tokens come back.

The server holds the base model, and loads adapters while it runs:

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 64

It must see the folder of the run. Endpoints: `/health`, `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`, and
`/v1/completions` with `return_token_ids`. Written by vLLM's documentation.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from peft import PeftModel

from tunesmith.errors import TunesmithError
from tunesmith.model.generate import Sampling
from tunesmith.text import shorten
from tunesmith.train.generator import Generated

BETWEEN = 0.5
"""Seconds between two questions whether the server is up."""
ANSWERING = 3600.0
"""Seconds that answers may take."""
SHOWN = 300
"""Characters of the server's word in an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Where it is, the seconds to wait until it is up, the folder that both see, and the tokens that end an answer."""

    url: str
    timeout: float
    folder: Path
    stops: Sequence[int]


class VLLMServer:
    """Draws answers with the adapters of `model` as they are; `version` tells when they have changed. Of several
    processes that draw with the same adapters, one `loads` them, before the others ask.

    Raises TunesmithError where the server does not come up or says no, with its word.
    """

    def __init__(self, model: Any, server: Server, version: Callable[[], int], *, loads: bool = True) -> None:
        if not isinstance(model, PeftModel):
            raise TunesmithError(
                "use_vllm is True, and all weights are trained, which no server takes over HTTP; train LoRA adapters "
                "(peft_config, --lora), or leave use_vllm out"
            )
        self._model, self._server, self._version, self._loads = model, server, version, loads
        self._loaded: str | None = None

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generated]:
        self.load()
        answer = self._post(
            "/v1/completions",
            {
                "model": self._name,
                "prompt": [list(ids) for ids in prompts],
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "min_p": sampling.min_p or 0.0,
                "repetition_penalty": sampling.repetition_penalty,
                "stop_token_ids": list(self._server.stops),
                "logprobs": 0,
                "return_token_ids": True,
                "skip_special_tokens": False,
            },
            ANSWERING,
        )
        choices = sorted(answer.get("choices", []), key=lambda choice: choice["index"])
        if len(choices) != len(prompts):
            raise TunesmithError(f"{self._server.url} answered {len(choices)} of {len(prompts)} prompts")
        return [self._generated(choice) for choice in choices]

    def _generated(self, choice: Mapping[str, Any]) -> Generated:
        ids = choice.get("token_ids")
        if ids is None:
            raise TunesmithError(
                f"{self._server.url} returns no token_ids: its vLLM is too old to know return_token_ids"
            )
        told = choice.get("logprobs") or {}
        logprobs = [float("nan") if value is None else float(value) for value in told.get("token_logprobs") or []]
        ended = choice.get("finish_reason") == "stop"
        ids = [int(i) for i in ids]
        if ended and (not ids or ids[-1] not in self._server.stops):
            reason = choice.get("stop_reason")
            ids.append(reason if isinstance(reason, int) else self._server.stops[0])
            logprobs.append(float("nan"))
        known = logprobs if len(logprobs) == len(ids) else None
        return Generated(ids=ids, finish="stop" if ended else "length", logprobs=known)

    @property
    def _name(self) -> str:
        """The name under which the server has the adapters as they are now."""
        return f"tunesmith-{self._version()}"

    def load(self) -> None:
        """Let the server have the adapters as they are now, where it is this process that loads them."""
        name, before = self._name, self._loaded
        if not self._loads or before == name:
            return
        self._wait()
        folder = self._server.folder / name
        self._model.save_pretrained(str(folder))
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())}, ANSWERING)
        self._loaded = name
        if before is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": before}, ANSWERING)
            shutil.rmtree(self._server.folder / before, ignore_errors=True)

    def _wait(self) -> None:
        """Until the server is up."""
        until = time.monotonic() + self._server.timeout
        while True:
            try:
                with urlopen(f"{self._server.url}/health", timeout=10):
                    return
            except OSError as error:
                if time.monotonic() >= until:
                    raise TunesmithError(
                        f"no vLLM server answers at {self._server.url} within {self._server.timeout:g} s ({error}); "
                        "start it with `vllm serve`, or write vllm_server_base_url"
                    ) from error
            time.sleep(BETWEEN)

    def _post(self, path: str, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        request = Request(
            f"{self._server.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urlopen(request, timeout=timeout) as response:
                text = response.read().decode()
        except HTTPError as error:
            word = shorten(error.read().decode(errors="replace"), SHOWN)
            raise TunesmithError(f"{self._server.url}{path} says {error.code}: {word}") from error
        except (URLError, TimeoutError) as error:
            raise TunesmithError(f"{self._server.url}{path} does not answer: {error}") from error
        try:
            found = json.loads(text)
        except ValueError:
            found = {}  # /v1/load_lora_adapter answers in words
        return found if isinstance(found, dict) else {}
