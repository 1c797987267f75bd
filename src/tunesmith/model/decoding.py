"""Answers token by token, in a batch that stays full.

A step of generation reads all weights, whatever the number of rows, so on a CPU a token costs the less the more rows
there are. Rows that have finished leave at once, and waiting prompts take their places. What prompts begin with in
common is computed once. Only the last token of a prompt gets logits.

Rows end in one column; padding is on their left, and the mask hides it:

    columns   0 1 2 3 4 5 6            row 1 has finished: the last row takes its place
    row 0     a b c d e f              row 0   a b c d e f
    row 1     - - g h i j      ->      row 1   - k l m n o
    row 2     - k l m n o

Any causal transformer can be run so whose cache is keys and values of tokens (`can_decode`).

Shapes: B rows, T tokens, W columns, K key/value heads, H head size, V vocabulary.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin

from tunesmith.model.attention import KNOWN_LAYERS

ROWS = 16
"""Answers at a time where nobody says how many."""
ROWS_ON_CPU = 64
"""There, where a step's time is that of reading the weights; as many of them as CACHE holds."""
CACHE = 2**30
"""Bytes of keys and values."""
ENTER = 4
"""Prompts enter when this share of the rows (1/4) is free: each time, the cache is written anew."""
PREFILL = 256, 4096
"""Tokens of prompts in one call: from so many on, a call ends where the next prompt would be padding by a tenth; and
the most."""
WORTH = 64
"""So many tokens a common beginning must save: it is a call of its own."""
SPARE = 64
"""Columns that a cache is given at a time, at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt, and how many tokens its answer may have. `index` is the caller's number for it."""

    index: int
    ids: Sequence[int]
    limit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """The answer to the request `index`, without its stop token. `ended`: it had one, which is `stop`. `logprobs` of
    all its tokens, the stop token included, in nats, where they were asked for."""

    index: int
    ids: list[int]
    ended: bool
    stop: int | None = None
    logprobs: list[float] | None = None


Pick: TypeAlias = Callable[[Tensor, Sequence[Sequence[int]], Sequence[int]], Tensor]
"""Chooses tokens (B,) by fp32 logits (B, V), which stay as they are, all tokens of each row so far, and the `index` of
each row's request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Requests whose first `common` tokens are the same, the longest first."""

    common: int
    members: list[Request]


def can_decode(model: PreTrainedModel) -> bool:
    """Whether the model's cache is one of keys and values of tokens, that rows can leave and enter. Others go through
    `transformers`: those with a state, an encoder, or inputs of their own; and those whose positions turn otherwise
    the longer a row is, in which the rows of a batch aren't independent."""
    config = model.config.get_text_config(decoder=True)
    takes = inspect.signature(model.forward).parameters
    if (
        getattr(model.config, "is_encoder_decoder", False)
        or getattr(model, "_is_stateful", False)
        or getattr(type(model), "prepare_inputs_for_generation", None)
        is not GenerationMixin.prepare_inputs_for_generation
        or not {"input_ids", "attention_mask", "past_key_values"} <= takes.keys()
        or model.is_remote_code()
        or _is_spread(model)
    ):
        return False
    if _rope_types(getattr(config, "rope_parameters", None)) & {"dynamic", "longrope"}:
        return False
    if set(getattr(config, "layer_types", None) or []) - KNOWN_LAYERS or getattr(config, "attention_chunk_size", None):
        return False
    return {type(layer) for layer in DynamicCache(config=config).layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def _is_spread(model: PreTrainedModel) -> bool:
    """Whether weights are spread over processes, of which each must make as many calls as the others then: by FSDP2,
    as long as they are not gathered, or by DeepSpeed."""
    return any(hasattr(weight, "full_tensor") or hasattr(weight, "ds_id") for weight in model.parameters())


def _rope_types(parameters: Any) -> set[str]:
    """Of all layers: some models have one set of parameters for each type of layer."""
    if not isinstance(parameters, dict):
        return set()
    own = {parameters["rope_type"]} if isinstance(parameters.get("rope_type"), str) else set()
    return own.union(*(_rope_types(value) for value in parameters.values()))


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    requests: Sequence[Request],
    stops: Sequence[int],
    pick: Pick,
    *,
    rows: int | None = None,
    streamer: BaseStreamer | None = None,
    scored_at: float | None = None,
) -> Iterator[Done]:
    """Answers as they finish. `rows`: how many at a time, ROWS if unset, or more on a CPU. `streamer` gets the tokens
    of a single request, as from `transformers`. `scored_at`: answers have the log-probabilities of their tokens at this
    temperature.

    `can_decode(model)` must hold, and the model be in evaluation mode.
    """
    waiting = _Waiting(model, requests)
    largest = max((len(request.ids) + request.limit for request in requests), default=0)
    batch = _Rows(model, largest)
    ends = frozenset(stops)
    size = rows or ROWS
    if streamer is not None:
        streamer.put(torch.tensor([list(requests[0].ids)]))
    while waiting or batch.requests:
        free = size - len(batch.requests)
        if waiting and free >= max(1, size // ENTER):
            batch.join(waiting.entering(free))
            if rows is None and size == ROWS and model.device.type == "cpu":
                size = max(ROWS, min(ROWS_ON_CPU, CACHE // (batch.bytes_per_column() * largest)))
                continue  # more enter before the first step
        tokens = pick(batch.logits, batch.rows, [request.index for request in batch.requests])
        if streamer is not None:
            streamer.put(tokens.cpu())
        yield from batch.note(tokens, ends, scored_at)
        if batch.requests:
            batch.step()
    if streamer is not None:
        streamer.end()


def _spare(width: int) -> int:
    """Columns that a cache of `width` is given to grow: it is copied when they are full."""
    return max(SPARE, width // 2)


class _Layer(DynamicLayer):
    """Keys and values of one layer in memory that is written in place: `transformers` copies all of it for each token.

    The buffers are (B or more, K, W or more, H); what is behind the B rows and `length` columns is never read. A layer
    with a window keeps all columns too, and its mask has the window.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def fill(self, parts: Sequence[tuple[Tensor, Tensor]], width: int, spare: int) -> None:
        """Rows of several parts (B, K, W, H) one below the other, their last columns in one, zeros on their left, and
        memory for `spare` more columns."""
        rows = sum(len(keys) for keys, _ in parts)
        buffers = []
        for tensors in zip(*parts, strict=True):
            heads, _, size = tensors[0].shape[1:]
            buffer = tensors[0].new_empty(rows, heads, width + spare, size)
            row = 0
            for tensor in tensors:
                into = buffer[row : row + len(tensor)]
                # Padding is masked, but NaN times nothing is NaN.
                into[:, :, : width - tensor.shape[2]] = 0
                into[:, :, width - tensor.shape[2] : width] = tensor
                row += len(tensor)
            buffers.append(buffer)
        self._hold(buffers[0], buffers[1], width, rows)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, _, more, _ = key_states.shape
        start, stop = self.length, self.length + more
        if self.buffers is None:
            self._hold(key_states, value_states, stop, rows)  # the first columns: buffers enough until there are more
            return key_states, value_states
        if stop > self.buffers[0].shape[2]:
            old = self.buffers[0][:rows, :, :start], self.buffers[1][:rows, :, :start]
            self.fill([old], start, more + _spare(start))
        keys, values = self.buffers
        keys[:rows, :, start:stop], values[:rows, :, start:stop] = key_states, value_states
        self._hold(keys, values, stop, rows)
        return self.keys, self.values

    def _hold(self, keys: Tensor, values: Tensor, width: int, rows: int) -> None:
        self.buffers, self.length, self.is_initialized = (keys, values), width, True
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[:rows, :, :width], values[:rows, :, :width]

    def drop(self, row: int, last: int) -> None:
        """The `last` row takes the place of `row`."""
        assert self.buffers is not None
        if row < last:
            for buffer in self.buffers:
                buffer[row, :, : self.length] = buffer[last, :, : self.length]
        self.keys, self.values = (buffer[:last, :, : self.length] for buffer in self.buffers)

    def clear(self) -> None:
        """Its memory is needed no more."""
        self.keys = self.values = torch.empty(0)
        self.buffers = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length


class _Cache(Cache):
    """A model's cache, whose layers are known."""

    def __init__(self, layers: int) -> None:
        self.own = [_Layer() for _ in range(layers)]
        super().__init__(layers=list(self.own))


@dataclass(kw_only=True, slots=True)
class _Part:
    """Rows that were computed in one call: their requests, the columns of padding in front of each, the cache of W
    columns, and logits (B, V)."""

    requests: list[Request]
    padding: list[int]
    cache: _Cache
    logits: Tensor


class _Model:
    """A causal model, of which one asks the logits of the last tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._layers = len(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)
        takes = inspect.signature(model.forward).parameters
        self._places = "position_ids" in takes
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def cache(self) -> _Cache:
        return _Cache(self._layers)

    def logits(self, ids_BT: Tensor, mask_BW: Tensor | None, positions_BT: Tensor, cache: _Cache) -> Tensor:
        """fp32 (B, V) of the last tokens, whose row the `cache` continues. No mask: no padding."""
        where = {"position_ids": positions_BT} if self._places else {}
        outputs = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BW,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **where,
            **self._last,
        )
        return outputs.logits[:, -1].to(device=self.model.device, dtype=torch.float32)


class _Waiting:
    """Requests that were not begun yet."""

    def __init__(self, model: PreTrainedModel, requests: Sequence[Request]) -> None:
        self._model = _Model(model)
        self._families = deque(families(requests))
        self._front: _Cache | None = None

    def __bool__(self) -> bool:
        return bool(self._families)

    def entering(self, count: int) -> list[_Part]:
        """The next `count` requests, their prompts computed."""
        parts = []
        while count and self._families:
            family = self._families[0]
            members = _one_call(family, count)
            parts.append(self._computed(family, members))
            count -= len(members)
            del family.members[: len(members)]
            if not family.members:
                self._families.popleft()
                self._front = None
        return parts

    def _computed(self, family: Family, members: list[Request]) -> _Part:
        if family.common and self._front is None:
            self._front = self._model.cache()
            ids = family.members[0].ids[: family.common]
            self._run([ids], [0], len(ids), self._front)
        width = max(len(request.ids) for request in members)
        padding = [width - len(request.ids) for request in members]
        cache = self._model.cache()
        if self._front is not None:
            self._begin(cache, padding, family.common, width - family.common)
        logits = self._run([request.ids for request in members], padding, width - family.common, cache)
        return _Part(requests=members, padding=padding, cache=cache, logits=logits)

    def _begin(self, cache: _Cache, padding: Sequence[int], common: int, spare: int) -> None:
        """The first `common` columns of rows: their padding, and behind it as much of the front as fits. The rest of
        the front of a padded row is computed again, in the columns behind.

        front a b c, rows a b c d e f and a b c g     columns  a b c | d e f
                                                               - - a | b c g
        """
        assert self._front is not None
        for layer, front in zip(cache.own, self._front.own, strict=True):
            filled = []
            for tensor in (front.keys, front.values):
                rows = tensor.new_zeros(len(padding), *tensor.shape[1:])
                for row, left in zip(rows, padding, strict=True):
                    if left < common:
                        row[:, left:] = tensor[0, :, : common - left]
                filled.append(rows)
            layer.fill([(filled[0], filled[1])], common, spare)

    def _run(self, rows: Sequence[Sequence[int]], padding: Sequence[int], last: int, cache: _Cache) -> Tensor:
        """Logits behind the rows, of which the `cache` has all but the `last` columns."""
        device = self._model.model.device
        filled = [[0] * left + [*ids] for left, ids in zip(padding, rows, strict=True)]
        ids_BT = torch.tensor([ids[-last:] for ids in filled], device=device)
        columns = torch.arange(len(filled[0]), device=device)
        left_B1 = torch.tensor(padding, device=device)[:, None]
        positions_BW = (columns - left_B1).clamp_(min=0)
        mask_BW = (columns >= left_B1).long() if any(padding) else None
        return self._model.logits(ids_BT, mask_BW, positions_BW[:, -last:], cache)


def _one_call(family: Family, count: int) -> list[Request]:
    """The first members of a family that go into one call: lengths so much alike that little is padding."""
    enough, most = PREFILL
    longest = len(family.members[0].ids) - family.common
    tokens, number = 0, 0
    for request in family.members[:count]:
        own = len(request.ids) - family.common
        if number and ((number + 1) * longest > most or (tokens >= enough and own < 0.9 * longest)):
            break
        tokens += own
        number += 1
    return family.members[:number]


class _Rows:
    """The answers that are under way, and the logits of the next token of each. There are never more than `most`
    columns, for which the model has room."""

    def __init__(self, model: PreTrainedModel, most: int) -> None:
        self._model, self._most = _Model(model), most
        self.requests: list[Request] = []
        self._answers: list[list[int]] = []
        self._logprobs: list[list[float]] = []
        self._padding: list[int] = []
        self._width = 0
        self._cache = self._model.cache()
        self.logits = torch.empty(0)
        self._tokens = self._mask = self._positions = torch.empty(0)

    def join(self, parts: Sequence[_Part]) -> None:
        """Further rows, below those that are there."""
        together = [self._part(), *parts] if self.requests else [*parts]
        self.logits = torch.cat([part.logits for part in together])
        for kept in (self._answers, self._logprobs):
            kept += [[] for part in parts for _ in part.requests]
        self._assemble(together)

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        """All tokens of each row, made where they are asked for."""
        return _Tokens(self.requests, self._answers)

    def _part(self) -> _Part:
        return _Part(requests=self.requests, padding=self._padding, cache=self._cache, logits=self.logits)

    def _assemble(self, parts: Sequence[_Part]) -> None:
        """One cache of those of all `parts`, without columns that are padding in all rows."""
        spare = [min(part.padding) for part in parts]
        widths = [part.cache.get_seq_length() - left for part, left in zip(parts, spare, strict=True)]
        self._width = max(widths)
        cache = self._model.cache()
        for index, layer in enumerate(cache.own):
            layers = [part.cache.own[index] for part in parts]
            pairs = zip(layers, spare, strict=True)
            filled = [(old.keys[:, :, left:], old.values[:, :, left:]) for old, left in pairs]
            layer.fill(filled, self._width, _spare(self._width))
            for old in layers:  # memory for one layer at a time
                old.clear()
        self._padding = [
            self._width - width + before - left
            for part, width, left in zip(parts, widths, spare, strict=True)
            for before in part.padding
        ]
        self.requests = [request for part in parts for request in part.requests]
        self._cache = cache
        device = self.logits.device
        left_B = torch.tensor(self._padding, device=device)
        self._positions = self._width - left_B
        self._mask = (torch.arange(self._width, device=device) >= left_B[:, None]).long()

    def note(self, tokens_B: Tensor, ends: frozenset[int], scored_at: float | None) -> Iterator[Done]:
        """Takes in the next token of each row; rows that end with it leave."""
        self._tokens = tokens_B
        if scored_at is not None:
            logits = self.logits if scored_at == 1 else self.logits / scored_at
            own = logits.gather(1, tokens_B[:, None])[:, 0] - logits.logsumexp(dim=-1)
            for logprobs, value in zip(self._logprobs, own.tolist(), strict=True):
                logprobs.append(value)
        leaving = []
        for row, token in enumerate(tokens_B.tolist()):
            answer = self._answers[row]
            ended = token in ends
            if not ended:
                answer.append(token)
            if ended or len(answer) == self.requests[row].limit:
                leaving.append(row)
                yield Done(
                    index=self.requests[row].index,
                    ids=answer,
                    ended=ended,
                    stop=token if ended else None,
                    logprobs=None if scored_at is None else self._logprobs[row],
                )
        for row in reversed(leaving):
            self._drop(row)

    def _drop(self, row: int) -> None:
        last = len(self.requests) - 1
        lists: tuple[list[Any], ...] = (self.requests, self._answers, self._logprobs, self._padding)
        for one in lists:
            one[row] = one[last]
            one.pop()
        for layer in self._cache.own:
            layer.drop(row, last)
        if row < last:
            for tensor in (self._tokens, self._positions, self._mask):
                tensor[row] = tensor[last]
        self._tokens, self._positions, self._mask = (x[:last] for x in (self._tokens, self._positions, self._mask))

    def step(self) -> None:
        """Computes the tokens that were noted: logits of those that follow."""
        spare = min(self._padding)
        if spare > self._width // 4 or (spare and self._width >= self._most):
            self._assemble([self._part()])
        mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self.logits = self._model.logits(
            self._tokens[:, None], mask if any(self._padding) else None, self._positions[:, None], self._cache
        )
        self._mask = mask
        self._positions += 1
        self._width += 1

    def bytes_per_column(self) -> int:
        """Of one row's keys and values in all layers."""
        columns = [tensor[0, :, 0] for layer in self._cache.own for tensor in (layer.keys, layer.values)]
        return max(1, sum(column.nbytes for column in columns))


class _Tokens(Sequence[Sequence[int]]):
    """The tokens of rows: of their prompts, and of their answers so far."""

    def __init__(self, requests: Sequence[Request], answers: Sequence[Sequence[int]]) -> None:
        self._requests, self._answers = requests, answers

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, row: Any) -> Any:
        return [*self._requests[row].ids, *self._answers[row]]


def families(requests: Sequence[Request]) -> list[Family]:
    """Requests by what they begin with in common, so that computing that once saves the most tokens.

    Sorted, those that begin alike are neighbours. What neighbours share makes a tree, which is built from the left with
    a stack: a branch becomes a family where that saves more than the families within it.
    """
    order = sorted(requests, key=lambda request: [*request.ids])
    stack: list[_Branch] = [_Branch(common=0, start=0)]
    for i in range(1, len(order) + 1):
        common = _common(order[i - 1].ids, order[i].ids) if i < len(order) else -1
        below = _Branch(common=0, start=i - 1)
        while stack and stack[-1].common > common:
            branch = stack.pop()
            branch.take(below)
            branch.close(i)
            below = branch
        if stack and stack[-1].common == common:
            stack[-1].take(below)
        elif common >= 0:
            stack.append(_Branch(common=common, start=below.start, saved=below.saved, chosen=below.chosen))
    chosen = below.chosen if order else []
    within = {i for _, start, stop in chosen for i in range(start, stop)}
    found = [Family(common=common, members=order[start:stop]) for common, start, stop in chosen]
    found.append(Family(common=0, members=[request for i, request in enumerate(order) if i not in within]))
    for family in found:
        family.members.sort(key=lambda request: -len(request.ids))
    # The longest first: what doesn't fit in memory fails at once.
    return sorted((one for one in found if one.members), key=lambda one: -len(one.members[0].ids))


@dataclass(kw_only=True, slots=True)
class _Branch:
    """Sorted requests from `start` on that have `common` tokens; the families (common, start, stop) within it, and how
    many tokens these save."""

    common: int
    start: int
    saved: int = 0
    chosen: list[tuple[int, int, int]] = field(default_factory=list)

    def take(self, below: "_Branch") -> None:
        self.saved += below.saved
        self.chosen = self.chosen + below.chosen

    def close(self, stop: int) -> None:
        """No request from `stop` on belongs to it."""
        saved = self.common * (stop - self.start - 1) - WORTH
        if saved > self.saved:
            self.saved, self.chosen = saved, [(self.common, self.start, stop)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with, one of each left over."""
    shorter = min(len(one), len(other)) - 1
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
