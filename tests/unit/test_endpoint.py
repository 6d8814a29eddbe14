"""Replies of model servers, read as scores: what is taken, and what is refused in words."""

from __future__ import annotations

import base64
import io
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from headstart.errors import ServerError
from headstart.teacher.endpoint import Endpoint, per_row_body, read_echo, read_top
from headstart.teacher.scorers import Capabilities, Level, actual

PROMPT, COMPLETION = [5, 6], [7, 8, 9]
IDS = [*PROMPT, *COMPLETION]
ASKED = np.array([[3, 4, 7], [8, 8, -1], [1, 2, 9]])


def npy(array: Any) -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array, dtype=np.float32), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


class Replies:
    """A Client that has one reply after another."""

    received = 0

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)

    def post(self, path: str, body: Any) -> Any:
        return self.replies.pop(0)

    def submit(self, path: str, body: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.post(path, body))
        return future


def scored(level: Level, *replies: Any, width: int | None = None) -> Any:
    client: Any = Replies(*replies)
    return Endpoint(client, Capabilities(level, "m", width)).score(PROMPT, COMPLETION, ASKED)


ROWS = [[-1.0, -2.0, -3.0], [-0.5, -0.5, -np.inf], [-4.0, -5.0, -6.0]]
GOOD = {"prompt_token_id_logprobs": npy(ROWS), "prompt_token_ids": IDS}


def test_the_last_id_of_a_row_is_the_token_that_stands_there() -> None:
    expected = [[False, False, True], [False, True, False], [False, False, True]]
    assert actual(ASKED).tolist() == expected
    assert not actual(np.full((2, 3), -1)).any()


def test_rows_are_sent_ragged_and_read_back_in_place() -> None:
    body = per_row_body("m", IDS, np.vstack([ASKED, [[-1, -1, -1]]]), 1)["sampling_params"]
    assert body["prompt_logprob_token_ids"] == [[3, 4, 7], [8, 8], [1, 2, 9], [-1]]
    assert body["prompt_logprob_start"] == 1
    assert scored("per_row", GOOD).tolist() == ROWS


def test_a_reply_without_scores_is_asked_for_again_a_few_times() -> None:
    empty = {"prompt_token_id_logprobs": None, "prompt_token_ids": IDS}
    assert scored("per_row", empty, empty, GOOD).tolist() == ROWS
    with pytest.raises(ServerError, match="after 3 tries"):
        scored("per_row", empty, empty, empty)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_token_ids": [5, 6, 7, 8, 1]}, "other tokens"),
        ({"prompt_token_ids": None}, "other tokens"),
        ({"prompt_token_id_logprobs": npy(ROWS[:2])}, r"2 rows .* 3 x 3"),
        ({"prompt_token_id_logprobs": npy(np.array(ROWS)[:, :2])}, "3 rows"),
        ({"prompt_token_id_logprobs": npy(np.nan * np.array(ROWS))}, "NaN"),
        ({"prompt_token_id_logprobs": npy(9 + np.array(ROWS))}, "logits"),
        ({"prompt_token_id_logprobs": npy(ROWS)[:40]}, "no array"),
    ],
)
def test_rows_that_cannot_be_right_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ServerError, match=words) as caught:
        scored("per_row", GOOD | change)
    assert caught.value.remedy


def entry(logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": "x"}


TOP = [
    None,
    {"6": entry(-1.0, 1)},
    {"7": entry(-3.0, 9), "3": entry(-1.0, 1), "4": entry(-9999.0, 2)},
    {"8": entry(-0.5, 9)},
    {"9": entry(-6.0, 1), "1": entry(-7.0, 2)},
]


def completion(rows: Any) -> dict[str, Any]:
    return {"choices": [{"prompt_logprobs": rows, "prompt_token_ids": IDS}]}


def test_the_most_probable_ids_are_read_and_the_others_not_known() -> None:
    found = scored("top_k", completion(TOP), width=2)
    # 8 is only there because it was sampled: its first place, in the support, does not count.
    np.testing.assert_equal(found, np.array([[-1, -np.inf, -3], [np.nan, -0.5, -np.inf], [-7, np.nan, -6]]))
    np.testing.assert_equal(scored("full", completion(TOP))[1], np.array([-0.5, -0.5, -np.inf]))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (TOP[:-1], "4 rows"),
        ("gone", "no rows"),
        ([*TOP[:-1], {"1": entry(-1.0, 1)}], r"lacks the token .* \(id 9, row 2\)"),
        ([*TOP[:-1], None], "lacks the token"),
        ([*TOP[:-1], {"9": entry("much", 1)}], "'much'"),  # type: ignore[arg-type]
        ([*TOP[:-1], {"9": entry(12.0, 1)}], "logits"),
    ],
)
def test_completions_that_cannot_be_right_are_refused(rows: Any, words: str) -> None:
    with pytest.raises(ServerError, match=words):
        scored("full", completion(rows))


def test_an_echo_gives_the_sampled_tokens() -> None:
    said = {"tokens": [f"token_id:{i}" for i in (*IDS, 4)], "token_logprobs": [None, -1.0, -2.0, -3.0, -4.0, -9.0]}
    found = read_echo({"choices": [{"logprobs": said}]}, IDS, ASKED, 1)
    np.testing.assert_equal(found, np.array([[np.nan, np.nan, -2], [np.nan, -3, -np.inf], [np.nan, np.nan, -4]]))
    for change, words in (
        ({"tokens": ["token_id:1"] * 6}, "other tokens"),
        ({"token_logprobs": [None, -1.0]}, "2 echoed"),
        ({"token_logprobs": [None, -1.0, None, -3.0, -4.0]}, "lacks the token"),
    ):
        with pytest.raises(ServerError, match=words):
            read_echo({"choices": [{"logprobs": said | change}]}, IDS, ASKED, 1)
    with pytest.raises(ServerError, match="no completion"):
        read_top({"choices": []}, IDS, ASKED, 1, 2)
