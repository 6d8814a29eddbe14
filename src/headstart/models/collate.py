"""Rollouts -> tensors, from the student's or the teacher's view of the prompt; and -> text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import torch

from headstart.models.packed import pack
from headstart.records import Rollout, RolloutBatch

_NAMES = r"(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think)"
_OPENING, _CLOSING = (rf"(?:<{slash}{_NAMES}>|\[{slash}THINK\]|◁{slash}think▷)" for slash in ("", "/"))
_OPENED = re.compile(rf"{_OPENING}\s*\Z", re.IGNORECASE)
TAG = re.compile(
    rf"{_OPENING}|{_CLOSING}|\[(?:TOOL_CALLS|CALL_ID|ARGS)\]|</?tool_call>|<\|(?:tool_call_\w+|python_tag)\|>",
    re.IGNORECASE,
)


def collate(
    rollouts: Sequence[Rollout],
    view: Literal["student", "teacher"],
    pad_id: int,
    device: torch.device,
    *,
    packed: bool = False,
) -> RolloutBatch:
    """Prompts padded on the left to P, completions on the right to N; padding is never attended to.

    The completion is the same in both views, and only the prompt in front of it differs, unless the rollouts are
    aligned: then the teacher's view holds its own tokens, and both views have a row for each scored token. See
    `RolloutBatch` for a worked example. Tensors are made on the CPU and moved to `device` once. `packed` adds the same
    tokens without padding, for a model that can take them (`CausalModel.packs`).
    """
    prompts = [r.prompt.token_ids if view == "student" else r.prompt.teacher_token_ids for r in rollouts]
    completions = [r.completion_ids if r.aligned is None or view == "student" else r.aligned.ids for r in rollouts]
    P = max(len(p) for p in prompts)
    N = max(len(ids) for ids in completions)
    input_ids_BT = torch.full((len(rollouts), P + N), pad_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros((len(rollouts), P + N), dtype=torch.int64)
    for b, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        real = slice(P - len(prompt), P + len(ids))
        input_ids_BT[b, real] = torch.tensor((*prompt, *ids), dtype=torch.int64)
        attention_mask_BT[b, real] = 1
    position_ids_BT = (attention_mask_BT.cumsum(dim=1) - 1).clamp_min(0)
    completion_mask_BN = attention_mask_BT[:, P:].bool()
    row_M, position_M = completion_mask_BN.nonzero(as_tuple=True)
    tokens_M = input_ids_BT[:, P:][completion_mask_BN]
    packing = pack(prompts, completions, device) if packed else None
    if any(r.aligned is not None for r in rollouts):
        scored_M = _scored(rollouts, view, [len(ids) for ids in completions])
        row_M, position_M, tokens_M = row_M[scored_M], position_M[scored_M], tokens_M[scored_M]
        if packing is not None:
            packing = replace(packing, predicts_M=packing.predicts_M[scored_M.to(device)])
    return RolloutBatch(
        input_ids_BT=input_ids_BT.to(device),
        attention_mask_BT=attention_mask_BT.to(device),
        position_ids_BT=position_ids_BT.to(device),
        completion_mask_BN=completion_mask_BN.to(device),
        tokens_M=tokens_M.to(device),
        position_M=position_M.to(device),
        row_M=row_M.to(device),
        packing=packing,
    )


def _scored(rollouts: Sequence[Rollout], view: Literal["student", "teacher"], lengths: Sequence[int]) -> torch.Tensor:
    """Which of all completion tokens in row order have a row of scores, int64."""
    places: list[int] = []
    for rollout, start in zip(rollouts, accumulate(lengths, initial=0), strict=False):
        own = rollout.aligned.teacher_rows if rollout.aligned is not None and view == "teacher" else rollout.rows
        places += [start + row for row in own]
    return torch.tensor(places, dtype=torch.int64)


def completion_text(tokenizer: Any, rollout: Rollout) -> str:
    """The response as it reads after its prompt, without its stop token and other special tokens.

    Where the prompt ends with the opening tag of a thought (DeepSeek-R1, QwQ), in both views, the text begins with it:
    else nothing would tell graders that a response which was cut inside that thought holds no answer.
    """
    ids, prompt = rollout.completion_ids[:-1] if rollout.stopped else rollout.completion_ids, rollout.prompt
    ends = [
        tokenizer.decode(list(p[-16:]), skip_special_tokens=False) for p in (prompt.token_ids, prompt.teacher_token_ids)
    ]
    opened = [_OPENED.search(end) for end in ends]
    return (opened[0][0] if opened[0] and opened[1] else "") + _text_after(tokenizer, prompt.token_ids, ids)


def token_texts(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """Each token as it reads after the one before, so that joined they read like the text, spaces included.

    `before` are the tokens in front of `ids`, such as the prompt's.
    """
    texts = [_text_after(tokenizer, before, ids[:1], special=True)] if ids else []
    for last, token in pairwise(ids):
        first, both = tokenizer.decode([last]), tokenizer.decode([last, token])
        # Half of a multi-byte character changes what the token before reads like; then the token stands alone.
        texts.append(both[len(first) :] if both.startswith(first) else tokenizer.decode([token]))
    return texts


def _text_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int], *, special: bool = False) -> str:
    """What `ids` add to the text of the tokens before them: alone, SentencePiece's first token loses its space."""
    if getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", tokenizer) is None:
        before = ()  # tokens are joined by spaces, which belong to none of them
    known = hasattr(tokenizer, "added_tokens_decoder")
    hidden = _hidden(tokenizer, len(tokenizer)) if known and not special else frozenset()
    # Clean-up takes away spaces that the model wrote. Tokenizers that never do it need not know the argument.
    exact = {"clean_up_tokenization_spaces": False} if getattr(tokenizer, "clean_up_tokenization_spaces", False) else {}

    def text(some: Sequence[int]) -> str:
        shown = [i for i in some if i not in hidden]
        return cast(str, tokenizer.decode(shown, skip_special_tokens=not (known or special), **exact))

    kept = 8  # the last few tokens; more where those are blank or hold part of a character
    while kept < len(before) and (not (front := text(before[-kept:])).strip() or "\ufffd" in front):
        kept *= 8
    front, whole = text(before[-kept:]), text([*before[-kept:], *ids])
    same = next((i for i, pair in enumerate(zip(front, whole, strict=False)) if pair[0] != pair[1]), len(front))
    return whole[same:]


@lru_cache(maxsize=8)
def _hidden(tokenizer: Any, size: int) -> frozenset[int]:
    """Special tokens that are no part of a text: all but the tags of thoughts and calls. `size` = len(tokenizer)."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, token in added if token.special and not TAG.fullmatch(token.content))
