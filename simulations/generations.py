"""A few held-out prompts continued by the base and by the trained adapter, for a person to read in the report."""

from __future__ import annotations

from typing import Any

from lamina.client.evaluate import continuation
from lamina.client.model import put
from lamina.protos.adapter import Adapter
from lamina.protos.config import Config
from lamina.simulations.prepare import Prepared

_NEW_TOKENS = 48


def generations(prepared: Prepared, adapter: Adapter, config: Config) -> list[dict[str, Any]]:
    """Continuations before and after, one held-out example each of some clients spread over the cohort.

    Args:
        prepared: Base and data.
        adapter: The global adapter.
        config: How many, and which clients.

    Returns:
        Objects with client, prompt, reference, before and after.
    """
    clients = list(prepared.held_out)
    chosen = clients[:: max(1, len(clients) // config.data.generate)][: config.data.generate]
    decode = prepared.base.tokenizer.decode
    found: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    for client in chosen:
        example = max(prepared.held_out[client][:20], key=lambda one: len(one.tokens))
        tokens = example.tokens.tolist()
        first = int(example.targets.argmax())
        cut = first if first > 1 else max(1, len(tokens) // 2)
        prompts.append(tokens[:cut])
        reference = decode(tokens[cut : cut + _NEW_TOKENS], skip_special_tokens=True)
        prompt = decode(tokens[:cut], skip_special_tokens=True)
        found.append({"client": prepared.names[client], "prompt": prompt, "reference": reference})
    for key, one in (("before", Adapter()), ("after", adapter)):
        put(prepared.base, one, None, trainable=False)
        for entry, prompt_ids in zip(found, prompts, strict=True):
            entry[key] = continuation(prepared.base, prompt_ids, _NEW_TOKENS)
    return found
