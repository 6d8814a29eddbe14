"""A tiny visual world: the three cues of the tiny world's problems are shown in a picture of 3 x 3 cells.

    python examples/grid_world.py grid            # two models, prompts, a test and run files, a few minutes on one core
    headstart distill grid/esr.yaml --out runs/grid

Row r of the picture holds cue r: which column has a coloured cell, and in which of three colours, are its number among
nine; the rest is grey, and all of it is noisy. The plan of a response depends on the picture, and its long execution on
the text. The models are the bundled tiny pair with image encoders (Idefics3), trained on from there apart, on corpora
of their own, the student's with its misreadings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import transformers as hf
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy

from headstart.models.images import load_processor
from headstart.models.load import resolve
from headstart.tasks import tiny

CELL, BATCH = 8, 16
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))
CURRICULUM = (1, 1, 2, 3, 7, 9)
TEMPLATE = (
    "{% for message in messages %}{{ '<user> ' }}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}{{ ' <asst>' }}"
)


@dataclass(frozen=True)
class Side:
    """How one model is made: the bundled model it grows from, and its lessons."""

    name: str
    start: str
    misreads: bool
    seed: int
    first: int
    steps: int


SPECIAL = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
SIDES = (
    Side("teacher", "tiny:teacher", False, 31, 50_000_000, 500),
    Side("student", "tiny:student", True, 32, 60_000_000, 900),
)


def drawn(puzzle: tiny.Puzzle, seed: int) -> Image.Image:
    """The picture of a puzzle's cues, 24 x 24 pixels."""
    rng = np.random.default_rng(seed)
    cells = np.full((3, 3, 3), 128.0)
    for row, cue in enumerate(puzzle.cues):
        cells[row, tiny.CUES.index(cue) // 3] = COLOURS[tiny.CUES.index(cue) % 3]
    pixels = cells.repeat(CELL, 0).repeat(CELL, 1) + rng.normal(0, 25, (3 * CELL, 3 * CELL, 3)) + rng.normal(0, 15, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def question(puzzle: tiny.Puzzle) -> str:
    """The user's message, with a mark where the picture stands."""
    return " ".join((*tiny.slots(puzzle.operations), "? <image>", str(puzzle.start), f"n{puzzle.rounds}"))


def make_tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(tiny.VOCABULARY)}, unk_token=tiny.UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": tiny.PAD, "eos_token": tiny.EOS, "unk_token": tiny.UNKNOWN}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.add_special_tokens({"additional_special_tokens": [tiny.USER, tiny.ASSISTANT, *SPECIAL]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_of(side: Side, tokenizer: Any) -> Any:
    """The bundled model's layers with an untrained image encoder in front."""
    torch.manual_seed(side.seed)
    old = hf.AutoModelForCausalLM.from_pretrained(resolve(side.start), dtype=torch.float32)
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = {name: getattr(old.config, name) for name in (*kept, "rms_norm_eps", "initializer_range", "eos_token_id")}
    text |= {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 320,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.Idefics3Config(
        text_config={**text, "model_type": "llama", "pad_token_id": 0},
        vision_config={**vision, "image_size": 3 * CELL, "patch_size": CELL // 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = hf.Idefics3ForConditionalGeneration(config)
    body = model.model.text_model
    weights = {n.removeprefix("model."): w for n, w in old.state_dict().items() if n.startswith("model.")}
    embedding = weights.pop("embed_tokens.weight")
    missing, unexpected = body.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    body.embed_tokens.weight.data[: len(embedding)] = embedding
    model.tie_weights()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = text["eos_token_id"], 0
    return model


def make_processor(folder: Path, tokenizer: Any) -> Any:
    """Written beside the model, and as it is read from there."""
    tokenizer.save_pretrained(folder)
    edge = {"longest_edge": 3 * CELL}
    hf.Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False).save_pretrained(folder)
    settings = {"processor_class": "Idefics3Processor", "image_seq_len": 9}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return load_processor(str(folder))


def lessons(side: Side, step: int) -> list[tuple[tiny.Puzzle, Sequence[str]]]:
    """Puzzles with one number of rounds, and the plans that their responses are written with."""
    draws = Random(f"{side.seed} {step}")
    rounds = draws.choice(CURRICULUM)
    shown = [replace(tiny.puzzle("train", side.first + BATCH * step + k), rounds=rounds) for k in range(BATCH)]
    return [(puzzle, puzzle.student_plan(draws) if side.misreads else puzzle.plan) for puzzle in shown]


def texts(side: Side, step: int, tokenizer: Any, processor: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of one training step, and the ids of the responses, `[batch, tokens]`."""
    prompts, images, rest = [], [], []
    for k, (puzzle, plan) in enumerate(lessons(side, step)):
        before, after = ({"type": "text", "text": text} for text in question(puzzle).split("<image>"))
        turns = [{"role": "user", "content": [before, {"type": "image"}, after]}]
        prompts.append(tokenizer.apply_chat_template(turns, tokenize=False))
        images.append([drawn(puzzle, side.first + BATCH * step + k)])
        rest.append(tokenizer.convert_tokens_to_ids([*puzzle.response(plan), tiny.EOS]))
    inputs = dict(processor(text=prompts, images=images, add_special_tokens=False, return_tensors="pt"))
    response_BN = torch.tensor(rest)
    ids_BT = torch.cat([inputs.pop("input_ids"), response_BN[:, :-1]], dim=1)
    return {"input_ids": ids_BT, **{name: x for name, x in inputs.items() if name.startswith("pixel")}}, response_BN


def trained(side: Side, folder: Path) -> None:
    """Write the model: next-token cross-entropy on its corpus's responses, all weights, the encoder's included."""
    tokenizer = make_tokenizer()
    model = model_of(side, tokenizer).train()
    model.config.save_pretrained(folder)
    processor = make_processor(folder, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    started, decisions = time.process_time(), list(tiny.DECISIONS)
    for step in range(side.steps):
        inputs, response_BN = texts(side, step, tokenizer, processor)
        logits = model(**inputs, use_cache=False).logits[:, -response_BN.shape[1] :]
        loss = cross_entropy(logits.flatten(0, 1), response_BN.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = 2e-3 * min(1.0, (step + 1) / 30, 1 - 0.98 * max(0.0, step / side.steps - 0.5) / 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == side.steps - 1:
            plans = cross_entropy(logits[:, decisions].flatten(0, 1), response_BN[:, decisions].flatten())
            said = f"loss {loss:.4f}, at decisions {plans:.3f}, {time.process_time() - started:.0f} s"
            print(f"{side.name} step {step}: {said}", flush=True)
    model.eval().save_pretrained(folder)


def rows(split: str, count: int, folder: Path) -> Path:
    """A JSONL file of questions about pictures beside it."""
    lines = []
    (folder / split).mkdir(exist_ok=True)
    for index in range(count):
        puzzle = tiny.puzzle(split, index)
        drawn(puzzle, index).save(folder / split / f"{index}.png")
        lines.append(
            {
                "id": f"grid/{split}/{index}",
                "question": question(puzzle),
                "image": f"{split}/{index}.png",
                "answer": puzzle.answer,
            }
        )
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_files(folder: Path, train: Path, dev: Path) -> None:
    columns = {"column": "question", "image_column": "image", "answer_column": "answer"}
    task = {"type": "jsonl", "path": str(dev), **columns, "grader": "number"}
    base: dict[str, Any] = {
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "tuning": {"type": "full"},
        "prompts": {"source": str(train), **columns},
        "rollout": {"temperature": 1.0, "top_p": 1.0},
        "evaluation": {"task": task, "samples": 2, "max_tokens": 200, "temperature": 1.0, "top_p": 1.0},
    }
    arms = {
        "esr": {"horizon": {"type": "fixed", "tokens": 16}, "optimizer": {"lr": 3e-4}, "training": {"steps": 60}},
        "full": {"horizon": {"type": "full", "max_tokens": 200}, "optimizer": {"lr": 1e-3}, "training": {"steps": 40}},
    }
    for name, arm in arms.items():
        arm["training"]["prompts_per_step"] = 8
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | arm, sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=[side.name for side in SIDES], help="train this model alone")
    given = parser.parse_args()
    folder: Path = given.folder
    for side in SIDES:
        if given.only in (None, side.name):
            (folder / side.name).mkdir(parents=True, exist_ok=True)
            trained(side, folder / side.name)
    run_files(folder, rows("train", 1024, folder), rows("dev", 96, folder))


if __name__ == "__main__":
    main()
