"""Small random checkpoints of real architectures, word and byte tokenizers, a scripted engine and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from headstart.interfaces import Draws, RolloutEngine, Teacher
from headstart.models.quiet import quiet
from headstart.records import Prompt, Rollout
from headstart.rollout.decoding import token_limits

Architecture = Literal["qwen2", "qwen3", "llama", "gemma2", "gemma3", "cohere", "phi"]
ARCHITECTURES: tuple[Architecture, ...] = ("qwen2", "qwen3", "llama", "gemma2", "gemma3", "cohere", "phi")
SPECIALS = ("<pad>", "<end>", "<unk>", "<system>", "<user>", "<assistant>")
WORDS = tuple(f"w{i}" for i in range(40))
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT_WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
)


def word_tokenizer(words: Sequence[str] = WORDS, *, system_role: bool = True) -> Any:
    """A tokenizer of whole words: pad 0, `<end>` 1 (the stop token), unk 2, role markers, then `words`.

    `system_role=False` gives a chat template that refuses system messages, as Gemma 2's does.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: i for i, word in enumerate([*SPECIALS, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_template(tokenizer, system_role)


def byte_tokenizer(*, system_role: bool = True) -> Any:
    """Like `word_tokenizer`, with the 256 bytes instead of words: for qwen2.

    transformers reads the tokenizer of every qwen2 checkpoint as Qwen's byte-level one, whatever its files say.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {token: i for i, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return _with_template(tokenizer, system_role)


def _with_template(tokenizer: Any, system_role: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = CHAT if system_role else CHAT_WITHOUT_SYSTEM
    return fast


def random_model(
    architecture: Architecture,
    vocabulary: int,
    *,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    scale: float = 0.3,
    eos_id: int = 1,
) -> Any:
    """A causal language model with random float32 weights of standard deviation `scale` (so that its distributions
    are far from uniform) and `vocabulary` head rows. The caller's random state is left as it was."""
    import transformers as hf

    shared: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": scale,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": eos_id,
    }
    gemma = {"head_dim": hidden // 4, "sliding_window": 8, "query_pre_attn_scalar": hidden // 4}
    match architecture:
        case "qwen2":
            config, kind = hf.Qwen2Config(**shared, tie_word_embeddings=False), hf.Qwen2ForCausalLM
        case "qwen3":
            config, kind = hf.Qwen3Config(**shared, head_dim=hidden // 4, tie_word_embeddings=True), hf.Qwen3ForCausalLM
        case "llama":
            config, kind = hf.LlamaConfig(**shared, tie_word_embeddings=True), hf.LlamaForCausalLM
        case "gemma2":
            config, kind = hf.Gemma2Config(**shared, **gemma, final_logit_softcapping=5.0), hf.Gemma2ForCausalLM
        case "gemma3":
            config, kind = hf.Gemma3TextConfig(**shared, **gemma), hf.Gemma3ForCausalLM
        case "cohere":
            config, kind = hf.CohereConfig(**shared, logit_scale=0.25), hf.CohereForCausalLM
        case "phi":
            config, kind = hf.PhiConfig(**shared), hf.PhiForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for name, parameter in model.named_parameters():
            if name.endswith("lm_head.bias"):
                torch.nn.init.normal_(parameter)  # zero by default, which would hide a forgotten bias
    if architecture in ("gemma2", "gemma3"):
        # Gemma multiplies its embeddings by sqrt(hidden): its tied head would repeat the last token for ever.
        model.get_input_embeddings().weight.data.mul_(0.3)
    model.generation_config.eos_token_id = eos_id
    model.generation_config.pad_token_id = 0
    return model.eval()


def write_checkpoint(folder: Path, model: Any, tokenizer: Any) -> Path:
    """`model` and `tokenizer` in Hugging Face format in `folder`, which is returned."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


class ScriptedEngine(RolloutEngine):
    """A RolloutEngine that returns scripted completions: by problem id, cut at `max_tokens`. No model.

    `script` maps a problem id to its completions, one for each sample (the last one repeats); a completion that ends in
    a stop id has stopped. `calls` keeps what was asked: (problem ids, samples, max_tokens, key).
    """

    def __init__(self, script: Mapping[str, Sequence[Sequence[int]]], stop_ids: Sequence[int] = (1,)) -> None:
        self.script, self.stop_ids = script, tuple(stop_ids)
        self.calls: list[tuple[tuple[str, ...], int, int | tuple[int, ...], tuple[int, str, int]]] = []

    def generate(self, prompts: Sequence[Prompt], **draws: Unpack[Draws]) -> list[Rollout]:
        assert not draws.get("candidates"), "a script knows no distribution"
        samples, max_tokens, key = draws["samples"], draws["max_tokens"], draws["key"]
        limits = token_limits(max_tokens, prompts)
        asked = max_tokens if isinstance(max_tokens, int) else tuple(max_tokens)
        self.calls.append((tuple(p.problem_id for p in prompts), samples, asked, key))
        rollouts = []
        for prompt, limit in zip(prompts, limits, strict=True):
            scripted = self.script[prompt.problem_id]
            for sample in range(samples):
                ids = tuple(scripted[min(sample, len(scripted) - 1)])[:limit]
                rollouts.append(Rollout(prompt, sample, ids, bool(ids) and ids[-1] in self.stop_ids))
                if "finished" in draws:
                    draws["finished"](rollouts[-1])
        return rollouts


class ScriptedTeacher(Teacher):
    """A Teacher whose logits are a function of the completion so far: `logits(prefix) -> [V]`. No model.

    `prefix` holds the completion ids before the position that is judged. `scored` keeps the rollouts it was given.
    """

    def __init__(self, logits: Callable[[tuple[int, ...]], Sequence[float]]) -> None:
        self.logits = logits
        self.scored: list[Rollout] = []

    def score(self, rollouts: Sequence[Rollout], prefill: Any = None) -> ScriptedScores:
        self.scored += rollouts
        rows = [self.logits(r.completion_ids[:place]) for r in rollouts for place in range(len(r.completion_ids))]
        return ScriptedScores(torch.tensor([list(row) for row in rows], dtype=torch.float32))


class ScriptedScores:
    """Logits `[M, V]` that exist already; fits LogitSource."""

    def __init__(self, logits_MV: torch.Tensor) -> None:
        self._logits_MV = logits_MV

    def logits(self, rows: slice | torch.Tensor) -> torch.Tensor:
        return self._logits_MV[rows]
