"""What a step is measured on: random pairs of real architectures and prompts of random words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD = 0


@dataclass(frozen=True)
class Shape:
    """A Qwen3-layout model with tied heads. `kv_heads` divides `heads`."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    def model(self, vocabulary: int, seed: int, device: str, dtype: torch.dtype) -> Any:
        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,  # nobody stops: everybody does the same work
        )
        torch.manual_seed(seed)
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
        return model.to(dtype).eval()


def small(hidden: int) -> Shape:
    return Shape(hidden, 4, 4, 2, hidden // 4, 3 * hidden)


# Qwen3's own sizes.
QWEN_06 = Shape(1024, 28, 16, 8, 128, 3072)
QWEN_17 = Shape(2048, 28, 16, 8, 128, 6144)
QWEN_4 = Shape(2560, 36, 32, 8, 128, 9728)
QWEN_8 = Shape(4096, 36, 32, 8, 128, 12288)


@dataclass(frozen=True)
class Workload:
    """One optimizer step: `prompts` prompts with `samples` rollouts each of exactly `tokens` tokens."""

    name: str
    student: Shape
    teacher: Shape
    vocabulary: int
    prompts: int = 16
    samples: int = 1
    tokens: int = 100
    lora: int | None = None
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @cached_property
    def texts(self) -> list[str]:
        """Prompts of 81 to 122 words for four steps; a step takes the next ones."""
        random = Random(0)
        return [
            " ".join(f"t{random.randrange(2, self.vocabulary)}" for _ in range(random.randint(81, 122)))
            for _ in range(4 * self.prompts)
        ]

    def models(self) -> tuple[Any, Any]:
        """Student and teacher with random weights, the same at every call."""
        student = self.student.model(self.vocabulary, 1, self.device, self.dtype)
        return student, self.teacher.model(self.vocabulary, 2, self.device, self.dtype).requires_grad_(False)

    def lengths(self, step: int) -> list[int]:
        """Tokens of a step's prompts."""
        return [len(text.split()) for text in self.step_texts(step)]

    def step_texts(self, step: int) -> list[str]:
        start = step % 4 * self.prompts
        return self.texts[start : start + self.prompts]


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
_C1 = Workload("C1", small(128), small(256), 4096)
_WORKLOADS = (
    _C1,
    Workload("C2", small(128), small(256), 4096, prompts=4, samples=4),
    Workload("C3", small(256), small(512), QWEN_IDS),
    Workload("C4-512", small(128), small(256), 4096, tokens=512),
    Workload("C4-1024", small(128), small(256), 4096, tokens=1024),
    Workload("C6", small(128), small(256), 4096, lora=16),
    Workload("G1", QWEN_06, QWEN_4, QWEN_IDS, device="cuda"),
    Workload("G2", QWEN_17, QWEN_8, QWEN_IDS, device="cuda"),
    Workload("G3", QWEN_17, QWEN_8, QWEN_IDS, samples=4, device="cuda"),
    Workload("G4", QWEN_17, QWEN_8, QWEN_IDS, prompts=64, samples=4, device="cuda"),
    Workload("G5", QWEN_17, QWEN_8, QWEN_IDS, samples=4, tokens=1024, device="cuda"),
    Workload("G6", QWEN_17, QWEN_8, QWEN_IDS, lora=16, device="cuda"),
)
WORKLOADS = {work.name: work for work in _WORKLOADS}
