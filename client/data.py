"""Rows to token examples: plain text, prompt and response, chat messages, or text with a label.

No row is ever part of an error message: messages name the row's number and its column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.client.rows import Row
from lamina.protos.config import DataConfig
from lamina.protos.errors import DataError

Ids = NDArray[np.int32]
_AT_A_TIME = 64


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One training example.

    Attributes:
        tokens: (length,) int32.
        targets: (length,) bool; whether each token is predicted from those before it. The first never is.
        label: Class index, or -1 for causal-lm.
        row: Number of the row that it is of: a long text gives several examples.
        user: Whose row, by `data.user_column`; empty where there is none.
    """

    tokens: Ids
    targets: NDArray[np.bool_]
    label: int = -1
    row: int = 0
    user: str = ""


@dataclass(frozen=True)
class Encoder:
    """How rows become examples.

    Attributes:
        tokenizer: A transformers tokenizer.
        config: Columns, template and what carries loss.
        task: `causal-lm` or `sequence-classification`.
        labels: Ordered label list.
        max_length: Most tokens of an example.
        each_alone: Whether a row with a label that is not in the list gives nothing, as example-dp needs: labels are the
            coordinator's to name, and an error would tell it whether any row has another.
    """

    tokenizer: Any
    config: DataConfig
    task: str
    labels: tuple[str, ...]
    max_length: int
    each_alone: bool = False

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Examples of all rows; a long plain text gives several windows, each token in exactly one.

        Args:
            rows: Rows that have the configured columns.

        Returns:
            Examples with at least one target (or a label).

        Raises:
            DataError: If a label is not in the list, or messages are malformed.
        """
        if self.task == "sequence-classification":
            made = self._labelled(rows)
        elif self.config.messages_column:
            made = [[self._chat(row[self.config.messages_column], number)] for number, row in enumerate(rows, 1)]
        elif self.config.prompt_column:
            made = [[example] for example in self._responses(rows)]
        else:
            made = self._windows(rows)
        column = self.config.user_column
        return [
            replace(example, row=number, user=str(row.get(column, "")) if column else "")
            for number, (row, some) in enumerate(zip(rows, made, strict=True))
            for example in some
            if example.label >= 0 or example.targets.any()
        ]

    def _tokens(self, texts: Sequence[str], **how: Any) -> list[Ids]:
        """Some texts at a time, as a tokenizer's answer takes a hundred times the memory of its ids."""
        found: list[Ids] = []
        for start in range(0, len(texts), _AT_A_TIME):
            some = [_encodable(text) for text in texts[start : start + _AT_A_TIME]]
            encoded = self.tokenizer(some, **{"add_special_tokens": False, "verbose": False, **how})["input_ids"]
            found.extend(np.asarray(ids, np.int32) for ids in encoded)
        return found

    def _end(self) -> Ids:
        end = self.tokenizer.eos_token_id
        return np.asarray([] if end is None else [int(end)], np.int32)

    def _windows(self, rows: Sequence[Row]) -> list[list[Example]]:
        examples = []
        for ids in self._tokens([str(row[self.config.text_column]) for row in rows]):
            whole = np.concatenate([ids, self._end()])
            windows = [whole[start : start + self.max_length] for start in range(0, len(whole), self.max_length)]
            examples.append([_example(window, np.arange(len(window)) > 0) for window in windows if len(window) >= 2])
        return examples

    def _responses(self, rows: Sequence[Row]) -> list[Example]:
        prompts = [self.config.template.replace("{prompt}", str(row[self.config.prompt_column])) for row in rows]
        responses = self._tokens([str(row[self.config.response_column]) for row in rows])
        examples = []
        for prompt, response in zip(self._tokens(prompts), responses, strict=True):
            ids = np.concatenate([prompt, response, self._end()])[: self.max_length]
            positions = np.arange(len(ids))
            examples.append(
                _example(ids, positions > 0 if self.config.loss_on == "all" else positions >= max(1, len(prompt)))
            )
        return examples

    def _chat(self, messages: Any, number: int) -> Example:
        if not isinstance(messages, list) or not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            column = self.config.messages_column
            raise DataError(
                f"data.messages_column={column}: expected a list of objects with role and content, both text, in every "
                f"row, got another thing in row {number}."
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "data.messages_column: expected a tokenizer with a chat template. Use prompt and response columns."
            )
        ids, targets = render_chat(self.tokenizer, messages)
        if self.config.loss_on == "all":
            targets = np.ones(len(ids), bool)
        targets[:1] = False
        return _example(ids[: self.max_length], targets[: self.max_length])

    def _labelled(self, rows: Sequence[Row]) -> list[list[Example]]:
        index = {label: number for number, label in enumerate(self.labels)}
        texts = [str(row[self.config.text_column]) for row in rows]
        encoded = self._tokens(texts, add_special_tokens=True, truncation=True, max_length=self.max_length)
        examples = []
        for number, (row, ids) in enumerate(zip(rows, encoded, strict=True), 1):
            label = index.get(str(row[self.config.label_column]))
            if label is None and not self.each_alone:
                raise DataError(
                    f"data.label_column={self.config.label_column}: the label of row {number} is not in data.labels "
                    f"({len(self.labels)} labels). Add it there, or leave data.labels empty in a simulation."
                )
            examples.append([] if label is None else [Example(ids, np.zeros(len(ids), bool), label)])
        return examples


def _encodable(text: str) -> str:
    """The text with lone surrogates, which no tokenizer can encode, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _example(ids: Sequence[int] | Ids, targets: NDArray[np.bool_]) -> Example:
    return Example(np.array(ids, np.int32), np.asarray(targets, bool))  # a copy: a window keeps no whole text alive


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], NDArray[np.bool_]]:
    """Tokens of a conversation, and which of them the assistant wrote.

    Found by rendering growing prefixes, so that it works with any template that renders prefixes as prefixes.

    Args:
        tokenizer: With a chat template.
        messages: Objects with role and content.

    Returns:
        Ids (length,), and bool (length,), true on assistant content and the tokens that end its turn.

    Raises:
        DataError: If the template does not render prefixes as prefixes.
    """

    def rendered(some: Sequence[Mapping[str, Any]], generation: bool) -> list[int]:
        text = (
            tokenizer.apply_chat_template(list(some), tokenize=False, add_generation_prompt=generation) if some else ""
        )
        return [int(token) for token in tokenizer(_encodable(text), add_special_tokens=False)["input_ids"]]

    ids = rendered(messages, False)
    targets = np.zeros(len(ids), bool)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, stop = rendered(messages[:turn], True), rendered(messages[: turn + 1], False)
        if ids[: len(start)] != start or ids[: len(stop)] != stop:
            raise DataError(
                "data.messages_column: the tokenizer's chat template rewrites earlier turns. Use loss_on=all."
            )
        targets[len(start) : len(stop)] = True
    return ids, targets


def examples_of(encoder: Encoder, rows: Sequence[Row], where: str, split: str) -> list[Example]:
    """The examples of some rows, at least one.

    Args:
        encoder: Makes them.
        rows: The rows.
        where: Whose, for the message.
        split: Of what use, for the message.

    Returns:
        Examples.

    Raises:
        DataError: If there is none.
    """
    examples = encoder.examples(rows)
    if not examples:
        raise DataError(
            f"{where}: expected examples for {split}, its rows give none of at least two tokens. "
            "Check the columns and train.max_length."
        )
    return examples
