"""What the passes of a model hold in memory, from shapes alone.

The fast decoder is counted tensor by tensor. For a model's own forward, which every family writes in its own way, it is
linear layers, norms and attention masks: no less than torch allocates but for a few percent, and up to 1.4 times it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from headstart.models.apart import parts_on
from headstart.models.causal import SLIDING, CausalModel, setting
from headstart.models.lora import is_adapter, unwrap
from headstart.models.packed import APART
from headstart.models.stepper import product
from headstart.ranks.sharding import division_of
from headstart.records import Rollout

NORM = 8
"""Bytes that a norm keeps per element where PyTorch composes it: its input in float32, and what it is scaled to."""
DROPPED = {"cuda": 5, "cpu": 8}
"""Bytes of an adapter's input where dropout changes it: what is left of it in float32, and which elements are."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Bytes that passes of one model hold, by token, by place and by pair."""

    packs: bool
    apart: bool
    """Whether prompts and completions are two passes, by the fast decoder."""
    parts: bool
    """Whether attention needs no padding of prompts, and of long completions neither masks nor copies of prompts
    (`models/apart.py`)."""
    view: Literal["student", "teacher"]
    layers: int
    hidden: int
    """One hidden state."""
    token: float
    """Kept of a token by all linear layers, norms and gates. A linear layer with trained weights keeps its input; its
    output is kept by the gate, the attention or the norm behind it."""
    place: float
    """Kept of a place by the attention of all layers: queries and outputs. In `token` where nothing is apart."""
    uneven: float
    """Kept of a token once more, without padding, where pieces are of different length."""
    passing: float
    """Of a token, alive at once in a pass that keeps nothing: one layer's widest activations."""
    mask: int
    """Of a pair of a token and one it may attend to: whether it does, and as a number, once where layers share it."""
    scores: int
    """Of a pair by eager attention in all layers: capped scores and their softmax."""
    keys: int
    """Keys and values of one token in all layers."""
    copied: int
    """The same of a prompt's token beside each of its completions; on a GPU repeated for every head."""
    pixel: float = 0.0
    """Kept of a number of an image by what makes features of it; each prompt's images once."""

    @classmethod
    def of(
        cls,
        model: CausalModel,
        view: Literal["student", "teacher"],
        device: str | None = None,
        *,
        whole: bool = True,
        checkpointing: bool = False,
    ) -> Passes:
        """`device` is where the model will compute, for one without weights (on the meta device)."""
        base = unwrap(model.model)
        config, size = base.config.get_text_config(), int(model.dtype.itemsize)
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
        every = setting(config, "num_attention_heads") or 0  # Mamba has none
        heads = setting(config, "num_key_value_heads") or every
        head = head_width(config) * size
        whole = whole and division_of(model.model) is None
        apart = model.packs and model.fast is not None and whole and not checkpointing
        queries, keys = every * head, 2 * heads * head
        body = model.language
        linears = [m for m in body.modules() if isinstance(m, nn.Linear)]
        widest = max((m.out_features for m in linears), default=width) * size
        device = device or model.device.type
        token, uneven = _fast(model, size, device) if apart else (_plain(body, size, width, device), 0.0)
        eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
        repeats = every if device == "cuda" else heads
        return cls(
            packs=model.packs,
            apart=apart,
            parts=model.packs and parts_on(device) and SLIDING not in model.layer_kinds,
            view=view,
            layers=layers,
            hidden=width * size,
            token=token,
            place=layers * 2 * queries if apart else 0.0,
            uneven=uneven,
            passing=3 * width * size + 3 * widest + 2 * queries + keys if apart else 3 * widest + 2 * width * NORM,
            mask=1 + size * (1 if model.packs else layers),
            scores=layers * every * 8 if eager else 0,
            keys=layers * keys,
            copied=layers * 2 * repeats * head,
            pixel=_pixel(model.backbone, body, size, device),
        )

    def forward(self, rollouts: Sequence[Rollout]) -> float:
        """A pass that keeps nothing but, where they are apart, the prompts' keys and values for the completions."""
        prompts, _, own, _, pairs, copies = self._extent(rollouts)
        tokens = max(prompts, own) if self.apart else prompts + own
        attention = pairs * self.mask + (pairs * self.scores + copies * self.copied) / self.layers
        return self.between(rollouts) + attention + tokens * self.passing

    def between(self, rollouts: Sequence[Rollout]) -> float:
        """Keys and values that a prompts' pass of its own leaves for the completions'."""
        return float(self._extent(rollouts)[0] * self.keys) if self.apart else 0.0

    def training(self, rollouts: Sequence[Rollout], *, checkpointing: bool) -> tuple[float, float, float]:
        """What a pass keeps until it has run backwards: for prompts, if they have a pass of their own, which goes back
        last, and for the rest; and what one layer holds beside them."""
        prompts, prompt_places, own, places, pairs, copies = self._extent(rollouts)
        kept = own * self.token + places * (self.place + self.keys) + copies * self.copied
        kept += pairs * self.scores + (own < places) * own * self.uneven + self._numbers(rollouts) * self.pixel
        if self.apart:
            return self.prompts(rollouts), pairs * self.mask + kept, max(prompts, own) * self.passing
        kept += prompts * self.token + prompt_places * self.keys
        if checkpointing:  # a layer keeps its input alone; one at a time is computed again
            return 0.0, pairs * self.mask + (prompts + own) * self.layers * self.hidden, kept / self.layers
        return 0.0, pairs * self.mask + kept, (prompts + own) * self.passing

    def prompts(self, rollouts: Sequence[Rollout]) -> float:
        """What a prompts' pass of its own keeps. In the last layer tokens stop at keys and values, but for the last."""
        prompts, places, *_ = self._extent(rollouts)
        through, padded = (self.layers - 1) / self.layers, prompts < places
        again = (
            self.parts or padded
        ) * self.uneven * through + padded * self.keys  # outputs of several calls are joined
        attention = places * (self.place * through + self.keys)
        return prompts * (self.token * through + 2 * self.hidden + again) + attention

    def _numbers(self, rollouts: Sequence[Rollout]) -> int:
        """Pixel values of the different images that the prompts show."""
        views = (r.prompt.images if self.view == "student" else r.prompt.teacher_images for r in rollouts)
        return sum({shown.key: shown.numbers for shown in views if shown is not None}.values())

    def _extent(self, rollouts: Sequence[Rollout]) -> tuple[int, int, int, int, int, int]:
        """Tokens in the linear layers and places in the attention, of prompts and of completions; pairs of a completion
        token and one it may see, where there is a mask; prompt tokens copied to the completions they belong to."""
        prompts = {
            r.prompt.index: len(r.prompt.token_ids if self.view == "student" else r.prompt.teacher_token_ids)
            for r in rollouts
        }
        own = [
            r.aligned.ids if r.aligned is not None and self.view == "teacher" else r.completion_ids for r in rollouts
        ]
        B, U, P, N = len(rollouts), len(prompts), max(prompts.values()), max(len(ids) for ids in own)
        if not self.packs:
            return B * P, B * P, B * N, B * N, B * (P + N) ** 2, 0
        total, tokens = sum(prompts.values()), sum(len(ids) for ids in own) - B  # the last token predicts nothing
        if self.parts and P + N - 1 > APART:
            return total, total, tokens, tokens, 0, 0
        return total, total if self.parts else U * P, tokens, B * (N - 1), B * (N - 1) * (P + N - 1), B * P


def head_width(config: Any) -> int:
    """Size of one attention head."""
    return setting(config, "head_dim") or int(config.hidden_size) // (setting(config, "num_attention_heads") or 1)


def _fast(model: CausalModel, size: int, device: str) -> tuple[float, float]:
    """`token` and `uneven` of the fast decoder: see `decoder._Layer` and the gradients in `fused`."""
    token = uneven = 0.0
    norm = size if size == 4 or device == "cuda" else NORM
    for layer in model.layers:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        token += 2 * (norm * q.in_features + size * mlp.gate_proj.out_features)  # both norms; gate and up
        if hasattr(attention, "q_norm"):
            token += norm * (q.out_features + k.out_features)
        # Norm and gate are made again where their gradient is written down with that of the products.
        for modules in ((q, k, v), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
            token += sum(_inputs(modules, size, device, ours=True, again=True))
        same, copies = _inputs((o,), size, device, ours=True)
        token, uneven = token + copies, uneven + same  # without padding it is what the attention keeps already
    return token, uneven


def _plain(backbone: nn.Module, size: int, width: int, device: str) -> float:
    """`token` of a model's own forward. That an input of several linear layers counts as often stands for what
    attention and activations keep beside them."""
    kinds = [type(module).__name__.lower() for module in backbone.modules()]
    norms, written = (sum(word in kind for kind in kinds) for word in ("norm", "newgelu"))  # GELU in many operations
    plain = [m for name, m in backbone.named_modules() if isinstance(m, nn.Linear) and not is_adapter(name)]
    adapted = [m for m in backbone.modules() if hasattr(m, "lora_A")]
    widest = max((m.out_features for m in plain), default=width)
    kept = NORM * width * norms + size * (written * widest + sum(m.out_features for m in plain))
    return kept + sum(sum(_inputs((module,), size, device)) for module in (*plain, *adapted))


def _pixel(backbone: nn.Module, body: nn.Module, size: int, device: str) -> float:
    """`Passes.pixel`: what one patch keeps in the parts of `backbone` beside the language model `body`, over the
    numbers in a patch. 0 where there are none, or nothing of them is trained."""
    eyes = nn.ModuleList(part for part in backbone.children() if part is not body) if body is not backbone else None
    if eyes is None or not any(p.requires_grad for p in eyes.parameters()):
        return 0.0
    patches = next((m for m in eyes.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    if patches is None:
        return 0.0
    return _plain(eyes, size, patches.out_channels, device) / patches.weight[0].numel()


def _inputs(
    modules: Sequence[Any], size: int, device: str, *, ours: bool = False, again: bool = False
) -> tuple[float, float]:
    """Bytes of one token's common input of `modules` that are kept as it is, and of what adapters keep beside it: what
    dropout leaves or which numbers, float32 copies, low ranks. `ours`: by our own products (`losses/products.py`) where
    the modules are plain, which may make their input `again`."""
    adapters = [(module, a) for module in modules for a in getattr(module, "lora_A", {}).values()]
    drops = any(d.p > 0 for m, _ in adapters for d in m.lora_dropout.values() if isinstance(d, nn.Dropout))
    ours = ours and all(product(module) is not None for module in modules)
    copy = int(drops) if ours else DROPPED[device] if drops else 4 if size != 4 else 0
    # An adapter of fused experts has no weight of its own, and stands before frozen ones.
    trained = any(weight.requires_grad for m in modules if (weight := getattr(m, "weight", None)) is not None)
    same = trained or (adapters and (ours or not copy))
    made = again and ours and device == "cpu" and size >= 4
    beside = sum(copy * a.in_features + 4 * a.out_features for _, a in adapters)
    return float(modules[0].in_features * size if same and not made else 0), float(beside)
