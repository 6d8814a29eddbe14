"""Models that see: what we compute with images in a batch is what the model's own forward computes of one alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headstart.assemble.pair import Pair
from headstart.config.models import ModelConfig
from headstart.diagnosis.probes import finish
from headstart.errors import DataError, ModelError, TemplateError
from headstart.models import images
from headstart.models.causal import Sight
from headstart.models.image_text import ImageTextModel
from headstart.models.load import load_model, load_tokenizer
from headstart.models.passes import Passes
from headstart.models.templates import View
from headstart.pictures import Picture
from headstart.records import Problem, Prompt, Rollout, Sampling
from headstart.rollout.engine import InProcessEngine
from headstart.rollout.proof import prove_images
from headstart.teacher.local import LocalTeacher
from small_image_models import FAMILIES, png, reading_tokenizer, save_image_model

GREEDY = Sampling(temperature=0.0, top_p=1.0)
SIZES: tuple[tuple[tuple[int, int], ...], ...] = (((20, 30),), (), ((44, 16), (12, 12)), ((30, 30),), ())
ASKED = ("what is in the grid", "two", "is one red", "left", "what is the green one in the grid")


def shown(size: tuple[int, int], seed: int) -> Picture:
    data = png(*size, seed)
    return Picture(hashlib.sha256(data).hexdigest()[:16], data, f"{seed}.png")


PROBLEMS = [
    Problem(
        f"p{n}",
        ({"role": "user", "content": text},),
        images=tuple(shown(size, 10 * n + k) for k, size in enumerate(sizes)),
    )
    for n, (sizes, text) in enumerate(zip(SIZES, ASKED, strict=True))
]


@dataclass(frozen=True)
class Seer:
    """A model in float64, taken apart and as it is, with prompts that it is shown."""

    model: ImageTextModel
    tokenizer: Any
    prompts: Sequence[Prompt]

    def own(self, prompt: Prompt, tail: Sequence[int]) -> Tensor:
        """Logits that predict `tail`, `[n, V]`, by the model's own forward of this one text, without padding."""
        ids = torch.tensor([[*prompt.token_ids, *tail]])
        inputs: dict[str, Tensor] = {}
        if prompt.images is not None:
            inputs |= prompt.images.pixels
            for name, kind in prompt.images.kinds.items():
                inputs[name] = torch.cat([kind, kind.new_zeros(ids.shape[1] - len(kind))])[None]
        logits: Tensor = self.model.model(input_ids=ids, use_cache=False, **inputs).logits
        return logits[0, len(prompt.token_ids) - 1 : -1]


def make(folder: Path, family: str, seed: int = 0) -> Seer:
    tokenizer = reading_tokenizer(save_image_model(folder, family, seed))
    loaded = load_model(ModelConfig(path=str(folder)), torch.device("cpu"), sees=True).double()
    reader = images.reader_of(tokenizer)
    assert reader is not None
    model = ImageTextModel(loaded, len(tokenizer), 0, reader=reader)
    read = View(tokenizer).readings(PROBLEMS)
    prompts = [Prompt(n, f"p{n}", r.ids, r.ids, r.images, r.images) for n, r in enumerate(read)]
    return Seer(model, tokenizer, prompts)


@pytest.fixture(scope="module", params=FAMILIES)
def seer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seer:
    return make(tmp_path_factory.mktemp(request.param) / "model", request.param)


def rollouts_of(seer: Seer) -> list[Rollout]:
    """Completions of different length, two for the first prompt."""
    words = [i for i in range(3, 15) if i not in seer.model.placeholders]
    tails = [tuple(words[(5 * n + k) % len(words)] for k in range(1 + (3 * n) % 5)) for n in range(6)]
    return [Rollout(seer.prompts[max(0, n - 1)], n, tail, False) for n, tail in enumerate(tails)]


def test_scores_are_those_of_the_model_alone(seer: Seer) -> None:
    rollouts = rollouts_of(seer)
    with seer.model.sampling_mode():
        ours = seer.model.head(seer.model.completion_hidden(seer.model.batch(rollouts, "student")))
        own = torch.cat([seer.own(r.prompt, r.completion_ids) for r in rollouts])
        blind = seer.own(replace(seer.prompts[0], images=None), rollouts[0].completion_ids)
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-9)
    assert float((blind - own[: len(blind)]).abs().max()) > 1e-2, "the image changes nothing, so nothing was tested"


def test_greedy_sampling_is_generate(seer: Seer) -> None:
    rollouts = InProcessEngine(seer.model, (2,)).generate(
        seer.prompts, samples=1, max_tokens=9, sampling=GREEDY, key=(0, "test", 0), batch_size=3
    )
    for prompt, rollout in zip(seer.prompts, rollouts, strict=True):
        given: dict[str, Any] = {"input_ids": torch.tensor([prompt.token_ids])}
        if prompt.images is not None:
            given |= {**prompt.images.pixels, **{n: k[None] for n, k in prompt.images.kinds.items()}}
        never = list(seer.model.never)
        made = seer.model.model.generate(
            **given, do_sample=False, max_new_tokens=9, eos_token_id=2, pad_token_id=0, suppress_tokens=never
        )
        assert rollout.completion_ids == tuple(made[0, len(prompt.token_ids) :].tolist())
    assert len({rollout.completion_ids for rollout in rollouts}) > 2


def test_the_gradient_is_that_of_a_loop(seer: Seer) -> None:
    """Of a weighted sum of log-probabilities, with respect to every weight, those of the image encoder included."""
    rollouts, model = rollouts_of(seer), seer.model.model

    def gradient(logprobs: Sequence[Tensor]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        values = torch.cat([*logprobs])
        torch.autograd.backward((values * torch.linspace(1, 2, len(values), dtype=values.dtype)).sum())
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def picked(logits_NV: Tensor, ids: Sequence[int]) -> Tensor:
        return logits_NV.log_softmax(-1)[range(len(ids)), list(ids)]

    batch = seer.model.batch(rollouts, "student")
    ours = gradient([picked(seer.model.head(seer.model.completion_hidden(batch)), batch.tokens_M.tolist())])
    loop = gradient([picked(seer.own(r.prompt, r.completion_ids), r.completion_ids) for r in rollouts])
    assert ours.keys() == loop.keys()
    assert any("vision" in name or "visual" in name for name in ours)
    for name, found in ours.items():
        gap, size = float((found - loop[name]).norm()), float(loop[name].norm())
        assert gap <= 1e-6 * size + 1e-9, f"{name}: {gap} of {size}"  # norms are in float32


def test_an_image_is_processed_once_and_encoded_once_a_pass(seer: Seer, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, encoded, opened = seer.model.reader, [], []
    original, open_image = seer.model.backbone.get_image_features, images._opened

    def counting(**inputs: Any) -> Any:
        encoded.append(inputs)
        return original(**inputs)

    counting.__signature__ = signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(seer.model.backbone, "get_image_features", counting)
    monkeypatch.setattr(images, "_opened", lambda *given: opened.append(given) or open_image(*given))
    with seer.model.sampling_mode():
        seer.model.completion_hidden(seer.model.batch(rollouts_of(seer), "student"))
    assert (len(encoded), len(opened)) == (3, 0), "three different prompts with images, the first one twice"
    before = seer.prompts[0].images.pixels["pixel_values"]
    monkeypatch.setattr(images, "KEPT", 0)
    reader.read(seer.prompts[2].images.text, PROBLEMS[2].images, "other")
    again = [seer.prompts[n].images.pixels["pixel_values"] for n in (2, 0)]
    assert opened, "what was let go of is processed again"
    assert torch.equal(again[1], before)


def test_prompts_go_on_in_text_that_was_written(seer: Seer) -> None:
    """As in a diagnosis, which continues the beginning of a response."""
    begun = Rollout(seer.prompts[2], 0, (5, 7, 9, 4), False)
    (longer,) = finish([(3, begun)], lambda prompts: [Rollout(p, 0, (6,), False) for p in prompts])
    assert longer.completion_ids == (5, 7, 9, 6)
    prompt = replace(seer.prompts[2], token_ids=(*seer.prompts[2].token_ids, 5, 7, 9))
    with seer.model.sampling_mode():
        whole = seer.model.head(seer.model.completion_hidden(seer.model.batch([longer], "student")))
        found = seer.model.batch([Rollout(prompt, 0, (6,), False), Rollout(seer.prompts[1], 0, (3,), False)], "student")
        cut = seer.model.head(seer.model.completion_hidden(found))
    torch.testing.assert_close(cut[0], whole[3], rtol=0, atol=1e-9)


def test_placeholders_are_never_sampled(seer: Seer) -> None:
    assert seer.model.never

    def sampled() -> set[int]:
        rollouts = InProcessEngine(seer.model, (2,)).generate(
            seer.prompts, samples=40, max_tokens=6, sampling=Sampling(3.0, 1.0), key=(0, "never", 0)
        )
        return {token for rollout in rollouts for token in rollout.completion_ids}

    assert not sampled() & set(seer.model.never)
    never, seer.model.never = seer.model.never, ()
    try:
        assert sampled() & set(never), "they would be sampled"
    finally:
        seer.model.never = never


def test_a_placeholder_in_a_completion_takes_no_image(seer: Seer) -> None:
    stray = Rollout(seer.prompts[0], 0, (5, min(seer.model.never), 7), False)
    padded = replace(stray, completion_ids=(5, 0, 7))
    beside = Rollout(seer.prompts[2], 0, (5, 6), False)
    with seer.model.sampling_mode():
        found, fed = (
            seer.model.completion_hidden(seer.model.batch([first, beside], "student")) for first in (stray, padded)
        )
    torch.testing.assert_close(found, fed, rtol=0, atol=1e-12)


def test_the_proof_on_loading_finds_what_is_wrong(seer: Seer, monkeypatch: pytest.MonkeyPatch) -> None:
    prove_images(seer.model, seer.tokenizer, "a model")
    right = seer.model.seen

    def refused(change: Callable[[Sight], Sight], when: str) -> None:
        monkeypatch.setattr(seer.model, "seen", lambda *given: change(right(*given)))
        with pytest.raises(ModelError, match=f"a model: [a-zA-Z0-9_]+ cannot be shown images here: {when}"):
            prove_images(seer.model, seer.tokenizer, "a model")

    def without(name: str) -> Callable[[Sight], Sight]:
        return lambda sight: replace(sight, inputs={n: x for n, x in sight.inputs.items() if n != name})

    refused(without("mm_encoder_outputs"), "beside other prompts")
    if "token_type_ids" in seer.prompts[0].images.kinds:  # tokens of an image see those behind them
        refused(without("token_type_ids"), "beside other prompts")
    if hasattr(seer.model.backbone, "get_rope_index"):
        refused(lambda s: replace(s, shift_B=s.shift_B * 0), "after a decoding step")
        refused(
            lambda s: replace(s, inputs={**s.inputs, "position_ids": s.inputs["position_ids"].flip(0)}),
            "beside other prompts",
        )


def test_positions_behind_an_image_are_shifted(tmp_path: Path) -> None:
    """Qwen2.5-VL counts an image of h x w tokens as max(h, w) positions."""
    seer = make(tmp_path / "model", "qwen2_5_vl")
    prompts = [seer.prompts[0], seer.prompts[1]]
    P = max(len(p.token_ids) for p in prompts)
    ids = torch.tensor([[0] * (P - len(p.token_ids)) + list(p.token_ids) for p in prompts])
    sight = seer.model.seen([p.images for p in prompts], ids, (ids > 0).long())
    rows, columns = (int(x) // 2 for x in seer.prompts[0].images.pixels["image_grid_thw"][0, 1:])
    assert rows * columns > 4
    assert sight.shift_B.tolist() == [max(rows, columns) - rows * columns, 0]
    assert sight.inputs["position_ids"].shape == (3, 2, P)


def test_two_sides_with_different_numbers_of_image_tokens(tmp_path: Path) -> None:
    paths = [save_image_model(tmp_path / f, f, n) for n, f in enumerate(("qwen2_5_vl", "idefics3"))]
    configs = [ModelConfig(path=str(path), dtype="float32") for path in paths]
    models = [load_model(config, torch.device("cpu"), sees=True) for config in configs]
    processors = [images.load_processor(str(path)) for path in paths]
    pair = Pair(*models, *processors, config={"prompts": {"images": "files"}})
    prompts = pair.prompts(PROBLEMS)
    assert all(len(p.token_ids) != len(p.teacher_token_ids) for p in prompts if p.images)
    rollouts = pair.sample(prompts, max_tokens=5, sampling=Sampling(1.0, 1.0))
    assert isinstance(pair.teacher, ImageTextModel)
    found = LocalTeacher(pair.teacher).score(rollouts).logits(slice(None))
    theirs = Seer(pair.teacher, pair.teacher_tokenizer, [p.as_teacher() for p in prompts])
    with torch.no_grad():
        own = [theirs.own(p, r.completion_ids) for p, r in zip(theirs.prompts, rollouts, strict=True)]
    torch.testing.assert_close(found, torch.cat(own)[:, : pair.vocabulary.size], rtol=0, atol=2e-4)
    answered = pair.sample(prompts, max_tokens=5, sampling=GREEDY, who="teacher")
    assert [r.prompt for r in answered] == list(prompts)


def test_images_are_compared_by_what_they_are(tmp_path: Path) -> None:
    tokenizer = reading_tokenizer(save_image_model(tmp_path / "model", "idefics3"))
    asked = {"role": "user", "content": "what is two"}
    problems = [Problem("a", (asked,), images=(shown((9, 9), seed),)) for seed in (1, 1, 2)]
    a, b, c = (Prompt(0, "", r.ids, r.ids, r.images) for r in View(tokenizer).readings(problems))
    assert a == b
    assert a != c
    assert len({a, b, c}) == 2
    assert a.token_ids == c.token_ids


def test_what_cannot_be_shown_is_refused_in_words(tmp_path: Path) -> None:
    folder = save_image_model(tmp_path / "model", "idefics3")
    tokenizer = reading_tokenizer(folder)
    asked = {"role": "user", "content": "what is two"}
    path = tmp_path / "x.png"
    path.write_bytes(b"no image")
    broken = Picture(hashlib.sha256(b"no image").hexdigest()[:16], path, "x.png")
    with pytest.raises(DataError, match=r"problem 'q': the image 'x.png' is none that can be read"):
        View(tokenizer).readings([Problem("q", (asked,), images=(broken,))])
    path.write_bytes(b"another one")
    with pytest.raises(DataError, match=r"'x\.png' has changed since it was first read"):
        View(tokenizer).readings([Problem("q", (asked,), images=(broken,))])
    with pytest.raises(DataError, match="problem 'q' holds the student's placeholder of an image"):
        View(tokenizer).readings([Problem("q", ({"role": "user", "content": "what <image>"},))])
    plain = load_tokenizer(ModelConfig(path=str(folder)))
    with pytest.raises(TemplateError, match=r"was loaded without a processor: set prompts\.images=files"):
        View(plain).readings([Problem("q", (asked,), images=(shown((9, 9), 0),))])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {% endfor %}"
    with pytest.raises(TemplateError, match="Check that the chat template has a place for images"):
        View(tokenizer).readings([Problem("q", (asked,), images=(shown((9, 9), 0),))])


def test_the_memory_formula_counts_what_is_kept_of_images(seer: Seer) -> None:
    """No less than PyTorch keeps for the backward pass of the image encoder but for a few percent, and at most twice
    that; once for an image, however many rollouts show it."""
    passes, shown_, kept = Passes.of(seer.model, "student"), seer.prompts[2].images, dict[int, int]()
    weights = {p.untyped_storage().data_ptr() for p in seer.model.model.parameters()}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        features = seer.model._features([shown_])
    assert features
    assert 0.95 * sum(kept.values()) <= passes.pixel * shown_.numbers <= 2 * sum(kept.values())
    rollouts = [Rollout(seer.prompts[2], n, (5, 6), False) for n in range(3)]
    blind = [replace(r, prompt=replace(r.prompt, images=None)) for r in rollouts]
    more = passes.training(rollouts, checkpointing=False)[1] - passes.training(blind, checkpointing=False)[1]
    assert more == pytest.approx(passes.pixel * shown_.numbers)
