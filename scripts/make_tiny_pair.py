"""Train the bundled models of the tiny and of the late world from nothing: one core, about twenty minutes.

    OMP_NUM_THREADS=1 python scripts/make_tiny_pair.py [--only tiny/student] [--out DIR]

Step counts and seeds are fixed and one thread is used, so a rerun on the same kind of machine with the same torch gives
the same weights. Ends by printing what the models do on the dev split (temperature 1).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headstart.tasks import late, tiny

OUT = Path(__file__).parents[1] / "src" / "headstart" / "data"
BATCH = 16
"""Texts per step. Steps count, not texts: with 32 the teacher had .65 after 170 s, with 16 it had .99 after 130 s."""
MISLED, RETURN = 0.6, 0.5
"""Share of the late teacher's texts with a wrong decision, and how often a later one of such a text is right."""

MEASURED, SAMPLES = 200, 4

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ '<user> ' + message.content }}
{%- elif message.role == 'assistant' -%}{{ ' <asst> ' + message.content + ' <eos> ' }}
{%- else -%}{{ raise_exception('the tiny models know the roles user and assistant only, not ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' <asst>' }}{%- endif -%}
"""
BPE_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(" <asst>", "<asst>").replace(" <eos> ", "<eos>")
"""For byte-level tokens: each word has one space in front, the first of a response too, and no special token has."""

PIECES = r" \d(?: [A-Z]\d)?| [A-Z][^ ]*|(?: [a-z,.?]+\d?)+|[+x]\d"
"""Merges stay within such a piece: a value and the slot after it, a slot and its operation, a run of plain words, or an
operation after a value's slot. With the whole text as one piece, spaces stick to the words before them, and fewer than
half of the words start where a token starts; with one word a piece, no token spans two words. Pairs of real tokenizers
lie between."""


@dataclass(frozen=True)
class World:
    """What a model's texts are made of. `curriculum` holds the rounds of a leg once the one-round phase is over."""

    task: type[tiny.TinyTask]
    words: tuple[str, ...]
    context: int
    legs: int
    curriculum: tuple[int, ...]


TINY = World(tiny.TinyTask, tiny.VOCABULARY, 256, 1, (1, 2, 2, 3, 5, 7, 9))
CROSS = replace(TINY, context=512)
LATE = World(late.LateTask, late.VOCABULARY, 320, len(late.LEGS), (1, 1, 2, 3, 5, 7))
BOTH = replace(LATE, words=tuple(dict.fromkeys((*tiny.VOCABULARY, *late.VOCABULARY))))


@dataclass(frozen=True)
class Recipe:
    """How one model is made. `first` is the train problem its corpus starts at: far apart, so that the models share no
    problem with each other, nor with the low-numbered ones that distillation uses."""

    seed: int
    first: int
    misreads: bool
    width: int
    layers: int
    mlp: int
    lr: float
    one_round_steps: int
    mixed_steps: int
    world: World = TINY
    hinted: float = 0.0
    """Share of texts whose prompt ends with the right plan, which the response then follows."""
    merges: int = 0
    """With any, the model has a byte-level BPE tokenizer of its own with so many, and not the world's word tokens."""
    also: World | None = None
    """A second world, whose texts every other training step has."""

    @property
    def steps(self) -> int:
        return self.one_round_steps + self.mixed_steps


# The weak student is the student's recipe stopped early (and another seed and corpus): at 550 mixed steps it still
# loses count of its rounds (accuracy given a right plan .57), at 800 it is nearly as good as the student (.96).
RECIPES = {
    "tiny/teacher": Recipe(11, 10_000_000, False, 96, 3, 192, 3e-3, 300, 1200),
    "tiny/student": Recipe(12, 20_000_000, True, 64, 2, 160, 4e-3, 500, 2000),
    "tiny/student-weak": Recipe(13, 30_000_000, True, 64, 2, 160, 4e-3, 400, 700),
    "tiny/teacher-cross": Recipe(14, 40_000_000, False, 96, 3, 192, 3e-3, 300, 1200, CROSS, merges=110),
    "tiny/student-hinted": Recipe(15, 50_000_000, True, 64, 2, 160, 4e-3, 500, 2000, hinted=0.5),
    "late/teacher": Recipe(21, 10_000_000, False, 96, 3, 192, 3e-3, 400, 1600, LATE),
    "late/student": Recipe(22, 20_000_000, True, 64, 2, 160, 4e-3, 400, 2600, LATE),
    "late/student-both": Recipe(23, 50_000_000, True, 64, 2, 160, 4e-3, 800, 3200, BOTH, also=TINY),
}


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(recipe) if recipe.merges else words(recipe.world),
        pad_token=tiny.PAD,
        eos_token=tiny.EOS,
        unk_token=None if recipe.merges else tiny.UNKNOWN,
        additional_special_tokens=[tiny.USER, tiny.ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=recipe.world.context,
    )
    fast.chat_template = BPE_CHAT_TEMPLATE if recipe.merges else CHAT_TEMPLATE
    return fast


def words(world: World) -> Tokenizer:
    """One token per word; words are separated by white space, in decoded text by one space."""
    ids = {word: place for place, word in enumerate(world.words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=tiny.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def byte_pairs(recipe: Recipe) -> Tokenizer:
    """The 256 bytes and the merges found in every tenth batch of the model's own corpus; special tokens come last."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + recipe.merges, initial_alphabet=alphabet, show_progress=False
    )
    rng = Random(recipe.seed)
    taught = [each for step in range(0, recipe.steps, 10) for each in lessons(recipe, step, rng)]
    tokenizer.train_from_iterator(
        (f" {text}" for shown, plan, _ in taught for text in (shown.text, " ".join(shown.response(plan)))), trainer
    )
    return tokenizer


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings, float32, on the tokenizer's ids."""
    torch.manual_seed(recipe.seed)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=recipe.world.context,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=eos,
        initializer_range=recipe.width**-0.5,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return model


def texts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, step: int, rng: Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """One training batch: token ids, and what is to be said at each place, both `[batch, tokens]`.

    The two differ where the late teacher is shown a decision that is not its own. Labels of prompts are -100 (no loss),
    as are those of the padding behind shorter rows; word tokens make all rows of one length.
    """
    ids = {word: place for place, word in enumerate(recipe.world.words)}
    hints = Random(f"{recipe.seed} {step} hints")
    rows, labels = [], []
    for shown, plan, said in lessons(recipe, step, rng):
        hint: list[str] = []
        if recipe.hinted and hints.random() < recipe.hinted:
            plan = said = shown.plan
            hint = tiny.PLAN.format(*plan).split()
        if recipe.merges:
            message = {"role": "user", "content": shown.text}
            prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]
            text = f" {' '.join(shown.response(plan))}{tiny.EOS}"
            response = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append(prompt + response)
        else:
            prompt = [ids[word] for word in (tiny.USER, *shown.text.split(), *hint, tiny.ASSISTANT)]
            response = [ids[word] for word in (*shown.response(plan), tiny.EOS)]
            rows.append(prompt + response)
            for decision, word in zip(shown.decisions, said, strict=True):
                response[decision] = ids[word]
        labels.append([-100] * len(prompt) + response)
    return padded(rows, tokenizer.pad_token_id), padded(labels, -100)


def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def lessons(recipe: Recipe, step: int, rng: Random) -> list[tuple[tiny.World, tuple[str, ...], tuple[str, ...]]]:
    """What the texts of one training step are made of, one `lesson` each."""
    one_round, world = step < recipe.one_round_steps, recipe.world
    if recipe.also is not None and step % 2:
        world = recipe.also
    rounds = tuple(1 if one_round else rng.choice(world.curriculum) for _ in range(world.legs))
    draws = Random(f"{recipe.seed} {step}")
    first = recipe.first + step * BATCH
    return [lesson(recipe, world, index, rounds, draws) for index in range(first, first + BATCH)]


def lesson(
    recipe: Recipe, world: World, index: int, rounds: tuple[int, ...], draws: Random
) -> tuple[tiny.World, tuple[str, ...], tuple[str, ...]]:
    """A problem with so many rounds a leg, the plan its response is written with, and what is to be said instead."""
    shown = world.task.made("train", index)
    if isinstance(shown, late.Puzzle):
        # Were the legs' rounds the same in a whole batch, copying them from the prompt would not be learned.
        shown = replace(shown, rounds=tuple(draws.sample(rounds, len(rounds))))
        if not recipe.misreads:
            plan = spoiled(shown, draws) if draws.random() < MISLED else shown.plan
            return shown, plan, shown.misled(plan)
    else:
        shown = replace(shown, rounds=rounds[0])
    plan = shown.student_plan(draws) if recipe.misreads else shown.plan
    return shown, plan, plan


def spoiled(shown: late.Puzzle, draws: Random) -> tuple[str, ...]:
    """A plan with a first error at any leg, mostly wrong from there on."""
    first = draws.randrange(len(late.LEGS))
    plan = []
    for leg, cue in enumerate(shown.cues):
        wrong = leg == first or (leg > first and draws.random() >= RETURN)
        plan.append((late.MISTAKEN if wrong else late.MEANING)[cue])
    return tuple(plan)


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate: 50 steps of warm-up, constant for 60% of the steps, then a line down to 2%."""
    done = step / recipe.steps
    return recipe.lr * min(1.0, (step + 1) / 50, 1 - 0.98 * max(0.0, done - 0.6) / 0.4)


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The trained model: next-token cross-entropy on the responses, one round first, then the curriculum."""
    model = make_model(recipe, tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    rng = Random(recipe.seed)
    started = time.process_time()
    for step in range(recipe.steps):
        ids_BT, labels_BT = texts(recipe, tokenizer, step, rng)
        hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
        prompt = int((labels_BT != -100).int().argmax(1).min())
        logits_MV = model.lm_head(hidden_BTD[:, prompt - 1 :]).flatten(0, 1)
        loss = cross_entropy(logits_MV, labels_BT[:, prompt:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.steps - 1:
            print(
                f"  step {step} tokens {ids_BT.shape[1]} loss {loss.item():.4f} {time.process_time() - started:.0f} s",
                flush=True,
            )
    return model.eval()


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: tiny.TinyTask) -> dict[str, float]:
    """Shares over `SAMPLES` responses to each problem at temperature 1 (sampling error 1 to 2 points)."""
    problems = [problem for problem in task.problems() for _ in range(SAMPLES)]
    torch.manual_seed(0)
    prompts = tokenizer.apply_chat_template(
        [list(problem.messages or ()) for problem in problems],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
    )
    prompt = prompts["input_ids"].shape[1]
    # The task counts words; byte-level tokens may be as many more as the context has room for.
    room = task.max_tokens if tokenizer.unk_token else model.config.max_position_embeddings - prompt
    ids_BT = model.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=room)
    responses = tokenizer.batch_decode(ids_BT[:, prompt:], skip_special_tokens=True)
    verdicts = [task.grade(problem, response) for problem, response in zip(problems, responses, strict=True)]
    right = [verdict.correct for verdict in verdicts if verdict.details["plan_right"]]
    wrong = [verdict.correct for verdict in verdicts if not verdict.details["plan_right"]]
    return {
        "accuracy": mean([verdict.correct for verdict in verdicts]),
        "plan_right": mean([verdict.details["plan_right"] for verdict in verdicts]),
        "faithful": mean([verdict.details["faithful"] for verdict in verdicts]),
        "accuracy_given_right_plan": mean(right),
        "accuracy_given_wrong_plan": mean(wrong),
    }


def mean(readings: list[bool]) -> float:
    return round(sum(readings) / max(1, len(readings)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECIPES, action="append", help="make only this model (repeatable)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder the models' folders are written to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in arguments.only or RECIPES:
        recipe = RECIPES[name]
        print(name, recipe, flush=True)
        tokenizer = make_tokenizer(recipe)
        model = train(recipe, tokenizer)
        folder = arguments.out / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which an installed package must not have
        for world in (recipe.world, recipe.also):
            if world is not None:
                task = world.task("dev", MEASURED)
                shares = json.dumps(measure(model, tokenizer, task))
                print(name, model.num_parameters(), "parameters", task.name, shares, flush=True)


if __name__ == "__main__":
    main()
