"""Files to rows and rows to examples: every format, every truncation, what carries loss, and no row in any message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lamina.client.data import Encoder, Example, render_chat
from lamina.client.loading import load_tokenizer
from lamina.client.rows import FILE_COLUMN, check_columns, load_rows, text_columns
from lamina.protos.config import DataConfig
from lamina.protos.errors import DataError
from tests import texts
from tests.models import TINY

ROWS = [{"text": f"{texts.SECRET} first", "label": "a"}, {"text": f"{texts.SECRET} second\nline", "label": "b"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(TINY))


def encoder(
    tokenizer: Any, task: str = "causal-lm", labels: tuple[str, ...] = (), max_length: int = 64, **more: Any
) -> Encoder:
    return Encoder(tokenizer, DataConfig(**more), task, labels, max_length)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    ".jsonl": texts.write_jsonl,
    ".csv": texts.write_csv,
    ".parquet": write_parquet,
}


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_a_file_gives_its_rows(tmp_path: Path, suffix: str) -> None:
    file = WRITERS[suffix](tmp_path / f"rows{suffix}", ROWS)
    assert load_rows(str(file), DataConfig()) == ROWS


def test_a_directory_gives_all_rows_and_where_they_are_from(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "sub/b.csv", "c.PARQUET"):
        WRITERS[Path(name).suffix.lower()](tmp_path / name, ROWS)
    (tmp_path / "ignored.md").write_text("not a data file")
    rows = load_rows(str(tmp_path), DataConfig())
    assert [row[FILE_COLUMN] for row in rows] == ["a.jsonl"] * 2 + ["c.PARQUET"] * 2 + ["sub/b.csv"] * 2
    assert [{k: v for k, v in row.items() if k != FILE_COLUMN} for row in rows] == ROWS * 3


def test_a_text_file_keeps_every_paragraph(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "word " * 60 for i in range(40)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    rows = load_rows(str(tmp_path / "book.txt"), DataConfig(text_column="body"))
    assert len(rows) > 3
    assert "\n\n".join(row["body"] for row in rows) == "\n\n".join(paragraphs)


def test_a_byte_order_mark_and_blank_lines_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,y\n", encoding="utf-8-sig")
    assert load_rows(str(tmp_path / "a.csv"), DataConfig()) == [{"text": "x", "label": "y"}]
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n  \n{"text": "y"}', encoding="utf-8")
    assert len(load_rows(str(tmp_path / "a.jsonl"), DataConfig())) == 2


def test_a_jsonl_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n', encoding="utf-8-sig")
    assert load_rows(str(tmp_path / "a.jsonl"), DataConfig()) == [{"text": "x"}]


@pytest.mark.parametrize("suffix", list(WRITERS))
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.99])
def test_a_truncated_file_is_named_and_shows_no_text(tmp_path: Path, suffix: str, kept: float) -> None:
    rows = [{"text": f'{texts.SECRET} "quoted" {i}', "label": "a"} for i in range(40)]
    file = WRITERS[suffix](tmp_path / f"rows{suffix}", rows)
    content = file.read_bytes()
    cut = int(len(content) * kept)
    # Never at the end of a line, where the rest would be a whole, shorter file.
    while content[cut - 1 : cut] in (b"\n", b"\r") or content[cut : cut + 1] in (b"\n", b"\r", b",", b"a"):
        cut -= 1
    file.write_bytes(content[:cut])
    with pytest.raises(DataError) as caught:
        load_rows(str(file), DataConfig())
    assert str(file) in str(caught.value)
    assert texts.SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'["xyzzy"]\n'),
        ("a.jsonl", b'{"text": "xyzzy"}\nxyzzy\n'),
        ("a.jsonl", b'{"text": "xyzzy \xff"}\n'),
        ("a.csv", b"text,label\nxyzzy\n"),
        ("a.csv", b"text,label\nxyzzy,b,c\n"),
        ("a.csv", b'text,label\n"xyzzy,b\n'),
        ("a.csv", b'text,label\n"xyzzy"z,b\n'),
        ("a.csv", b"text,label\nxyzzy \xe9,b\n"),
        ("a.txt", b"xyzzy \xe9"),
        ("a.parquet", b"xyzzy"),
        ("a.parquet", b""),
        ("a.parquet", b"PAR1" + b"xyzzy" * 20 + b"PAR1"),
    ],
)
def test_a_malformed_file_is_named_and_shows_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(str(tmp_path / name), DataConfig())
    assert name in str(caught.value)
    assert texts.SECRET not in str(caught.value)


@pytest.mark.parametrize("source", ["/nowhere/a.jsonl", "./nowhere", "nowhere.csv", "~/nowhere.parquet", "notes.JSONL"])
def test_a_missing_file_is_not_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="Check the path"):
        load_rows(source, DataConfig())


def test_an_unreachable_hub_id_is_a_data_error() -> None:
    with pytest.raises(DataError, match="hub id that can be reached"):
        load_rows("nobody/no-such-data", DataConfig())


def test_a_directory_without_data_and_a_foreign_suffix_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match="found none"):
        load_rows(str(tmp_path), DataConfig())
    with pytest.raises(DataError, match=r"'\.xlsx'"):
        load_rows(str(tmp_path / "a.xlsx"), DataConfig())


@pytest.mark.parametrize("rows", [[{"text": f"{texts.SECRET}"}, {"note": texts.SECRET}], [{"text": None, "note": "x"}]])
def test_a_missing_column_names_row_and_columns_but_no_value(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError) as caught:
        check_columns(rows, ["text"], "data.source=notes.jsonl")
    message = str(caught.value)
    assert "no column 'text' in row" in message
    assert "notes.jsonl" in message
    assert texts.SECRET not in message


@pytest.mark.parametrize("folder", [False, True])
def test_a_csv_file_without_a_header_shows_no_row(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "visits.csv").write_text(f"2021-03-01,Jane,{texts.SECRET}\n2021-03-02,John,well\n")
    source = str(tmp_path if folder else tmp_path / "visits.csv")
    with pytest.raises(DataError) as caught:
        check_columns(load_rows(source, DataConfig()), ["text"], f"data.source={source}")
    message = str(caught.value)
    assert "no column 'text' in row 1. The first row has 3 columns; in a CSV file the first line names them." in message
    assert not any(word in message for word in ("2021", "Jane", texts.SECRET))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_keys_that_are_names_are_told_and_others_counted(tmp_path: Path, suffix: str) -> None:
    for keys, told in [(("note", "label"), "Columns of the first row: label, note."), (("Jane Jones", "b"), "has 2")]:
        file = WRITERS[suffix](tmp_path / f"rows{suffix}", [dict.fromkeys(keys, "x")])
        with pytest.raises(DataError) as caught:
            check_columns(load_rows(str(file), DataConfig()), ["text"], f"data.source={file}")
        assert told in str(caught.value)
        assert "Jane" not in str(caught.value)


def test_no_rows_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="found none"):
        check_columns([], ["text"], "data.source=empty.jsonl")


@pytest.mark.parametrize(
    ("settings", "task", "columns"),
    [
        ({}, "causal-lm", ["text"]),
        ({"prompt_column": "q", "response_column": "a"}, "causal-lm", ["q", "a"]),
        ({"messages_column": "m"}, "causal-lm", ["m"]),
        ({"label_column": "category"}, "sequence-classification", ["text", "category"]),
    ],
)
def test_the_columns_that_are_read(settings: dict[str, Any], task: str, columns: list[str]) -> None:
    assert text_columns(DataConfig(**settings), task) == columns


# Examples -------------------------------------------------------------------------------------------------------------


def scored(example: Example) -> list[int]:
    return [int(token) for token in example.tokens[example.targets]]


@pytest.mark.parametrize("max_length", [2, 3, 7, 64])
def test_windows_hold_each_token_once(tokenizer: Any, max_length: int) -> None:
    rows = [{"text": note["text"]} for note in texts.notes()[:12]]
    whole = [tokenizer(row["text"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    found = encoder(tokenizer, max_length=max_length).examples(rows)
    # A last window of one token has nothing to predict it from, and is left out.
    kept = [ids[:-1] if len(ids) % max_length == 1 else ids for ids in whole]
    assert [int(t) for example in found for t in example.tokens] == [t for ids in kept for t in ids]
    for example in found:
        assert 2 <= len(example.tokens) <= max_length
        assert not example.targets[0]
        assert example.targets[1:].all()


def test_loss_falls_on_the_response_and_its_end(tokenizer: Any) -> None:
    rows = [{"q": "How many?", "a": " Three."}, {"q": "", "a": "Yes"}]
    made = encoder(tokenizer, prompt_column="q", response_column="a", template="Q: {prompt}\nA:").examples(rows)
    for row, example in zip(rows, made, strict=True):
        prompt = tokenizer(f"Q: {row['q']}\nA:")["input_ids"]
        answer = [*tokenizer(row["a"])["input_ids"], tokenizer.eos_token_id]
        assert example.tokens.tolist() == prompt + answer
        assert scored(example) == answer


def test_loss_on_all_covers_the_prompt_too(tokenizer: Any) -> None:
    rows = [{"q": "How many?", "a": " Three."}]
    (made,) = encoder(tokenizer, prompt_column="q", response_column="a", loss_on="all").examples(rows)
    assert made.targets.tolist() == [False] + [True] * (len(made.tokens) - 1)


def test_a_prompt_that_fills_the_window_gives_no_example(tokenizer: Any) -> None:
    rows = [{"q": "word " * 100, "a": "x"}, {"q": "a", "a": "b"}]
    assert len(encoder(tokenizer, prompt_column="q", response_column="a", max_length=16).examples(rows)) == 1


def test_a_prompt_with_braces_is_written_as_it_is(tokenizer: Any) -> None:
    rows = [{"q": "{prompt} {0} {x}", "a": "y"}]
    (made,) = encoder(tokenizer, prompt_column="q", response_column="a", template="<{prompt}>").examples(rows)
    assert tokenizer.decode(made.tokens).startswith("<{prompt} {0} {x}>y")


def test_the_assistant_alone_carries_loss_in_a_chat(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One and one?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "And one?"},
        {"role": "assistant", "content": "Three."},
    ]
    # Written by hand from the shipped template: `role: content<|end|>\n`, scored from after `assistant:` to the newline.
    parts = [
        ("system: Be brief.<|end|>\nuser: One and one?<|end|>\nassistant:", False),
        (" Two.<|end|>\n", True),
        ("user: And one?<|end|>\nassistant:", False),
        (" Three.<|end|>\n", True),
    ]
    ids, targets = render_chat(tokenizer, messages)
    assert tokenizer.decode(ids) == "".join(text for text, _ in parts)
    wanted = [scored for text, scored in parts for _ in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert targets.tolist() == wanted
    (example,) = encoder(tokenizer, messages_column="m").examples([{"m": messages}])
    assert example.tokens.tolist() == ids
    assert np.array_equal(example.targets, targets)


@pytest.mark.parametrize(
    "messages", ["hello", [{"role": "user"}], [["user", "hi"]], {"role": "user", "content": "x"}, [1]]
)
def test_malformed_messages_are_a_data_error_without_their_text(tokenizer: Any, messages: Any) -> None:
    with pytest.raises(DataError) as caught:
        encoder(tokenizer, messages_column="m").examples([{"m": messages}])
    assert "role and content" in str(caught.value)


@pytest.mark.parametrize("content", [4711, 4711.5, None, ["4711"], {"text": "4711"}])
def test_a_message_whose_content_is_no_text_names_its_row_alone(tokenizer: Any, content: Any) -> None:
    rows = [{"m": [{"role": "user", "content": "hi"}]}, {"m": [{"role": "assistant", "content": content}]}]
    with pytest.raises(DataError, match="got another thing in row 2") as caught:
        encoder(tokenizer, messages_column="m").examples(rows)
    assert "4711" not in str(caught.value)


def test_chat_without_an_assistant_turn_gives_no_example(tokenizer: Any) -> None:
    assert encoder(tokenizer, messages_column="m").examples([{"m": [{"role": "user", "content": "hi"}]}]) == []


def test_labels_follow_the_configured_order(tokenizer: Any) -> None:
    rows = [{"text": "a", "label": name} for name in ("card", "login", "refund")]
    made = encoder(tokenizer, "sequence-classification", ("refund", "card", "login")).examples(rows)
    assert [example.label for example in made] == [1, 2, 0]


def test_an_unknown_label_names_the_row_but_not_the_label(tokenizer: Any) -> None:
    rows = [{"text": "a", "label": "card"}, {"text": texts.SECRET, "label": texts.SECRET}]
    with pytest.raises(DataError) as caught:
        encoder(tokenizer, "sequence-classification", ("refund", "card")).examples(rows)
    assert "row 2" in str(caught.value)
    assert texts.SECRET not in str(caught.value)


def test_text_that_is_no_valid_unicode_is_a_data_error_or_encoded(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "lone \ud800 surrogate"}) + "\n")
    try:
        encoder(tokenizer).examples(load_rows(str(file), DataConfig()))
    except DataError as error:
        assert "surrogate" not in str(error)  # noqa: PT017 - either outcome is good
