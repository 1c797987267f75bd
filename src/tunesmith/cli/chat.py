"""`tunesmith chat`: talk to a run."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.complete import RUN, TRUST
from tunesmith.errors import TunesmithError
from tunesmith.terminal.output import finish, mode
from tunesmith.terminal.output import note as _say

if TYPE_CHECKING:
    from tunesmith.model.generate import Sampling

COMMANDS = "/reset starts anew, /exit or Ctrl-D leaves"


def chat(
    run: RUN,
    prompt: Annotated[str | None, typer.Option(help="Answer this, and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token. Higher: freer.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from this share of probability.")] = 1.0,
    keep_specials: Annotated[
        bool, typer.Option("--keep-specials", help="Let text that reads as a control token be one, if trained so.")
    ] = False,
    trust_remote_code: TRUST = False,
) -> None:
    """Talk to a run, to a model, or to the demo model.

    Example: tunesmith chat demo --prompt "Who wrote Emma?"
    """
    if mode().as_json and prompt is None:
        raise TunesmithError("--json is for one answer; give the question, --prompt TEXT")
    from tunesmith.data.prompts import form_of
    from tunesmith.model.generate import Sampling
    from tunesmith.model.load import load_run

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    model, tokenizer = load_run(run, trust_remote_code=trust_remote_code, progress=_say)
    if arguments := form_of(tokenizer).arguments:
        _say(f"The chat template is given {json.dumps(dict(arguments))}, as in training.")
    conversation = Conversation(model, tokenizer, system, sampling, keep_specials=keep_specials)
    if prompt is not None:
        answer = conversation.answer(prompt)
        finish({"run": run, "system": system, "prompt": prompt, "answer": answer}, lambda: None)
    else:
        _talk(run, conversation)


class Conversation:
    """The messages so far; `answer` adds two, and prints the second as it is generated."""

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None, sampling: "Sampling", *, keep_specials: bool = False
    ) -> None:
        self.has_roles = tokenizer.chat_template is not None
        if system is not None and not self.has_roles:
            raise TunesmithError("this model has no chat template, so there is no place for a system message")
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._keep_specials = keep_specials
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        self.messages = list(self._start)

    def answer(self, text: str) -> str:
        """Streams the answer to stdout, unless that is for JSON, and returns it. Text that fails, or is interrupted,
        leaves the conversation as it was."""
        from tunesmith.model.generate import stream

        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = stream(
                self._model, self._tokenizer, messages, _write, self._sampling, keep_specials=self._keep_specials
            )
        finally:
            _write("\n")
        if self.has_roles:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


def _talk(run: str, conversation: Conversation) -> None:
    """Lines from stdin until its end. Ctrl-C stops an answer, and at the prompt the conversation."""
    memory = (
        "" if conversation.has_roles else " It has no chat template: it goes on with each text, and keeps no memory."
    )
    _say(f"{run}: {COMMANDS}.{memory}")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            typer.echo()
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            _say(f"unknown command {text.split()[0]}: {COMMANDS}")
        elif text:
            try:
                conversation.answer(text)
            except KeyboardInterrupt:
                _say("stopped; this turn is forgotten")
            except TunesmithError as error:  # the conversation has become too long, say: it can go on after a /reset
                _say(f"error: {error} ({COMMANDS})")


def _write(text: str) -> None:
    if not mode().as_json:
        typer.echo(text, nl=False)
