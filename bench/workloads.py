"""What a step is measured on: random pairs of real architectures and prompts of random words, or checkpoints from
folders and real questions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD = 0
LAYOUTS: dict[str, tuple[Any, Any]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
QUESTIONS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"
"""Texts for checkpoints from folders; one JSON object with a `question` a line."""


@dataclass(frozen=True)
class Shape:
    """A model of one of LAYOUTS: Qwen3 has norms of queries and keys, Qwen2 biases of q, k and v. `kv_heads` divides
    `heads`; a head that is not `tied` has weights beside the embedding's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layout: str = "qwen3"
    tied: bool = True

    def model(self, vocabulary: int, seed: int, device: str, dtype: torch.dtype) -> Any:
        make_config, make_model = LAYOUTS[self.layout]
        config = make_config(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,  # nobody stops: everybody does the same work
        )
        torch.manual_seed(seed)
        with torch.device(device):
            model = make_model(config)
        return model.to(dtype).eval()

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a checkpoint, from its configuration."""
        heads = config.num_attention_heads
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.intermediate_size,
            config.model_type,
            config.tie_word_embeddings,
        )


def small(hidden: int) -> Shape:
    return Shape(hidden, 4, 4, 2, hidden // 4, 3 * hidden)


# Published sizes.
QWEN_06 = Shape(1024, 28, 16, 8, 128, 3072)
QWEN_17 = Shape(2048, 28, 16, 8, 128, 6144)
QWEN_4 = Shape(2560, 36, 32, 8, 128, 9728)
QWEN_8 = Shape(4096, 36, 32, 8, 128, 12288)
SMOL_135 = Shape(576, 30, 9, 3, 64, 1536, "llama")
QWEN2_05 = Shape(896, 24, 14, 2, 64, 4864, "qwen2")


@dataclass(frozen=True)
class Workload:
    """One optimizer step: `prompts` prompts with `samples` rollouts each of exactly `tokens` tokens.

    `teacher_vocabulary` is another tokenizer's, where the teacher has one.
    """

    name: str
    student: Shape
    teacher: Shape
    vocabulary: int
    prompts: int = 16
    samples: int = 1
    tokens: int = 100
    lora: int | None = None
    device: str = "cpu"
    prompt_words: tuple[int, int] = (81, 122)
    teacher_vocabulary: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def judged_ids(self) -> int:
        """Ids that the teacher's head has."""
        return self.teacher_vocabulary or self.vocabulary

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer(self.vocabulary)

    @cached_property
    def teacher_tokenizer(self) -> Any:
        """The student's own object where there is one tokenizer."""
        return tokenizer(self.teacher_vocabulary) if self.teacher_vocabulary else self.tokenizer

    @cached_property
    def texts(self) -> list[str]:
        """Prompts, by default of 81 to 122 words, for four steps; a step takes the next ones."""
        random = Random(0)
        return [
            " ".join(f"t{random.randrange(2, self.vocabulary)}" for _ in range(random.randint(*self.prompt_words)))
            for _ in range(4 * self.prompts)
        ]

    @cached_property
    def prompt_ids(self) -> list[tuple[int, ...]]:
        """The student's tokens of `texts`."""
        return [tuple(self.tokenizer(text)["input_ids"]) for text in self.texts]

    def teacher_ids(self) -> list[tuple[int, ...]]:
        """The teacher's tokens of the same prompts."""
        if self.teacher_tokenizer is self.tokenizer:
            return self.prompt_ids
        return [tuple(self.teacher_tokenizer(text)["input_ids"]) for text in self.texts]

    def models(self) -> tuple[Any, Any]:
        """Student and teacher with random weights, the same at every call."""
        student = self.student.model(self.vocabulary, 1, self.device, self.dtype)
        return student, self.teacher.model(self.judged_ids, 2, self.device, self.dtype).requires_grad_(False)

    def lengths(self, step: int) -> list[int]:
        """Tokens of a step's prompts."""
        return [len(ids) for ids in self.prompt_ids[self._places(step)]]

    def step_texts(self, step: int) -> list[str]:
        return self.texts[self._places(step)]

    def _places(self, step: int) -> slice:
        start = step % 4 * self.prompts
        return slice(start, start + self.prompts)


@dataclass(frozen=True)
class Checkpoints(Workload):
    """The same with published weights and questions as they are asked: `student_path` and `teacher_path` are folders.

    A student that is its own teacher has no gradient to compare, so its weights get noise of 2%.
    """

    student_path: Path = Path()
    teacher_path: Path = Path()

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.student_path, padding_side="left")

    @cached_property
    def teacher_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.teacher_path) if self.teacher_vocabulary else self.tokenizer

    @cached_property
    def texts(self) -> list[str]:
        """Chat prompts of 81 to 122 tokens in the student's template."""
        return [text for text, _ in self._both]

    def teacher_ids(self) -> list[tuple[int, ...]]:
        return [tuple(self.teacher_tokenizer(text)["input_ids"]) for _, text in self._both]

    @cached_property
    def _both(self) -> list[tuple[str, str]]:
        """Every prompt in the student's and in the teacher's template. Raises FileNotFoundError without QUESTIONS."""
        least, most = self.prompt_words
        rendered = []
        for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
            talk = [{"role": "user", "content": json.loads(line)["question"]}]
            student, teacher = (
                words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
                for words in (self.tokenizer, self.teacher_tokenizer)
            )
            if least <= len(self.tokenizer(student)["input_ids"]) <= most:
                rendered.append((student, teacher))
        return rendered[: 4 * self.prompts]

    def models(self) -> tuple[Any, Any]:
        student, teacher = (self._model(path) for path in (self.student_path, self.teacher_path))
        if self.student_path == self.teacher_path:
            torch.manual_seed(1)
            with torch.no_grad():
                for weight in student.parameters():
                    weight.mul_(1 + 0.02 * torch.randn_like(weight))
        return student, teacher.requires_grad_(False)

    def _model(self, path: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)
        # Nobody stops, and nobody samples as the checkpoint proposes.
        model.config.eos_token_id = None
        model.generation_config = GenerationConfig(pad_token_id=PAD)
        return model.to(self.device).eval()


def tokenizer(vocabulary: int) -> Any:
    """Whole words `t2`, `t3`, ...: a text of n words is n tokens."""
    ids = {"<pad>": PAD, "<eos>": 1, **{f"t{i}": i for i in range(2, vocabulary)}}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


QWEN_IDS = 151_936
SMOL_IDS = 49_152
_C1 = Workload("C1", small(128), small(256), 4096)
_R1 = Workload("R1s", SMOL_135, SMOL_135, SMOL_IDS)
_R2 = Workload("R2s", replace(QWEN2_05, layers=22), QWEN2_05, QWEN_IDS, prompts=8, tokens=50, lora=32)
_WORKLOADS = (
    _C1,
    replace(_C1, name="C2", prompts=4, samples=4),
    Workload("C3", small(256), small(512), QWEN_IDS),
    replace(_C1, name="C4-512", tokens=512),
    replace(_C1, name="C4-1024", tokens=1024),
    replace(_C1, name="C6", lora=16),
    Workload("C7", small(256), small(512), SMOL_IDS, teacher_vocabulary=QWEN_IDS),
    _R1,
    _R2,
    replace(_R1, name="R1L", lora=32),
    # Long prompts that eight rollouts share, and short ones.
    replace(_C1, name="P1000", prompts=4, samples=8, prompt_words=(1000, 1000)),
    replace(_C1, name="P30", prompt_words=(30, 30)),
    # How a step grows with N: few prompts, so that the longest takes a minute or two.
    *(replace(_C1, name=f"N{n}", prompts=4, tokens=n) for n in (128, 512, 2048, 4096)),
    # What `bench.gpu --rehearse` runs.
    Workload("T1", small(32), small(64), 64, prompts=4, tokens=6),
    Workload("T6", small(32), small(64), 64, prompts=4, tokens=6, lora=4),
    Workload("G1", QWEN_06, QWEN_4, QWEN_IDS, device="cuda"),
    Workload("G2", QWEN_17, QWEN_8, QWEN_IDS, device="cuda"),
    Workload("G3", QWEN_17, QWEN_8, QWEN_IDS, samples=4, device="cuda"),
    Workload("G4", QWEN_17, QWEN_8, QWEN_IDS, prompts=64, samples=4, device="cuda"),
    Workload("G5", QWEN_17, QWEN_8, QWEN_IDS, samples=4, tokens=1024, device="cuda"),
    Workload("G6", QWEN_17, QWEN_8, QWEN_IDS, lora=16, device="cuda"),
)
WORKLOADS = {work.name: work for work in _WORKLOADS}
FROM_FOLDERS: dict[str, dict[str, Any]] = {
    "R1": {"prompts": 16, "tokens": 100},
    "R2": {"prompts": 8, "tokens": 50, "lora": 32},
    "R3": {"prompts": 8, "tokens": 50},
}
"""Rows for `--student` and `--teacher`: SmolLM2-135M <- itself, a pruned Qwen 0.5B with LoRA <- the whole one, SmolLM2
<- Qwen with two tokenizers."""


def from_folders(name: str, student: Path | None, teacher: Path | None) -> Checkpoints:
    """One of FROM_FOLDERS. Raises LookupError with the reason why it cannot be measured."""
    if student is None or teacher is None:
        raise LookupError(f"{name} needs folders: --student DIR --teacher DIR")
    missing = [str(path) for path in (student / "config.json", teacher / "config.json", QUESTIONS) if not path.exists()]
    if missing:
        raise LookupError(f"{name} needs {', '.join(missing)}")
    own, judge = AutoConfig.from_pretrained(student), AutoConfig.from_pretrained(teacher)
    words = [(path / "tokenizer.json").read_bytes() for path in (student, teacher)]
    two = words[0] != words[1]
    if two != (name == "R3"):
        raise LookupError(f"{name} is for {'one tokenizer' if two else 'two tokenizers'}; these folders have another")
    return Checkpoints(
        name,
        Shape.of(own),
        Shape.of(judge),
        own.vocab_size,
        **FROM_FOLDERS[name],
        teacher_vocabulary=judge.vocab_size if two else None,
        student_path=student,
        teacher_path=teacher,
    )
