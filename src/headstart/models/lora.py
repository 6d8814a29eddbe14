"""Door to peft: adapters are added, merged and saved here and nowhere else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from headstart.config.schema import LoraTuning
from headstart.errors import HeadstartError, ModelError
from headstart.losses.products import LowRank
from headstart.models.quiet import quiet
from headstart.progress import doing


def unwrap(model: Any) -> Any:
    """The transformers model inside a peft wrapper, its adapted layers included; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


@doing("adding LoRA matrices")
def add_lora(model: Any, tuning: LoraTuning, seed: int) -> Any:
    """`model` with trainable low-rank adapters (and nothing else trainable), initialised from `seed` alone.

    A tied weight is untied where it gets an adapter, with a warning. Raises ModelError when `tuning.targets` names no
    module of the model.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = tuning.targets if isinstance(tuning.targets, str) else list(tuning.targets)
    config = LoraConfig(
        r=tuning.r,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})
    with torch.random.fork_rng(devices=_cuda_devices()), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft warns of is refused here, or said by preflight
        torch.manual_seed(seed)
        try:
            made = get_peft_model(model, config)
        except ValueError as error:
            if "lora_dropout" in str(error):
                why = "takes in fused experts, beside which peft puts no dropout; set tuning.dropout=0"
            else:
                why = f"fits no layer of the student; its linear layers: {', '.join(names)}"
            raise ModelError(f"tuning.targets {targets!r} {why}") from error
    _untie(made, f"tuning.targets {targets!r}")
    return made


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's: those stay whole where a model is sharded."""
    return ".lora_" in name


def adapted(model: Any) -> dict[str, nn.Parameter]:
    """Name of each module with an adapter -> the weight that the adapter changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight
        for name, module in model.named_modules()
        # Trained rows of an embedding are the same in all its uses.
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "trainable_tokens_delta")
    }


def _untie(model: Any, what: str) -> None:
    """A copy of its own for every adapted weight that another module uses too (a tied head or embedding): an adapter
    changes one use, and merged into a shared weight it would change them all."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = name.removeprefix("base_model.model.").removesuffix(".weight").replace(".base_layer", "")
        names.setdefault(id(parameter), []).append(plain)
    for name, weight in adapted(model).items():
        uses, own = names[id(weight)], name.removeprefix("base_model.model.")
        if len(uses) > 1:
            uses.remove(own)
            model.get_submodule(name).get_base_layer().weight = nn.Parameter(
                weight.detach().clone(), weight.requires_grad
            )
            config = unwrap(model).config
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
            warnings.warn(
                f"{what} puts an adapter on {own}, one weight with {' and '.join(uses)} (tied): it gets a copy "
                f"of its own ({weight.numel():,} parameters) and the model is written untied; leave it out to avoid it",
                stacklevel=3,
            )


def merge_adapter(model: Any, path: str) -> Any:
    """`model` with the adapter at `path` merged into its weights. Raises ModelError when it cannot be loaded."""
    from peft import PeftConfig, PeftModel
    from transformers.utils import cached_file

    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir()):
        raise ModelError(f"no adapter folder at {path!r}; give a folder or a hub name")
    source = str(folder) if folder.is_dir() else path
    try:
        with quiet(), warnings.catch_warnings():
            file = cached_file(source, "adapter_model.safetensors", _raise_exceptions_for_missing_entries=False)
            if file is None:
                raise ModelError(
                    f"the adapter folder {path!r} holds no adapter_model.safetensors; only safetensors are read (a "
                    "pickle can run code). Give the folder of a peft adapter"
                )
            with safe_open(file, framework="pt") as opened:
                longest = max(n for key in opened.keys() for n in opened.get_slice(key).get_shape())  # noqa: SIM118
            config = PeftConfig.from_pretrained(source)
            rank = max([getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()])
            if rank > longest:  # peft makes the adapter before it looks at its weights
                raise ValueError(f"adapter_config.json names rank {rank:,}, its weights have at most {longest:,}")
            warnings.filterwarnings("error", "Found missing adapter keys")
            made = PeftModel.from_pretrained(model, source)
            _untie(made, f"the adapter {path!r}")
            return made.merge_and_unload()
    except (HeadstartError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the adapter {path!r} cannot be loaded onto this model: {reason}. Check that it was made for this model"
        ) from error


def merge(model: Any) -> Any:
    """The plain transformers model with its adapter folded into the weights; a model without adapter as it is."""
    return model.merge_and_unload() if unwrap(model) is not model else model


def remove_adapter(model: Any, *, merged: bool) -> None:
    """Leave the plain model inside `model` as it was, in place, with what the adapter learned (`merged`) or without."""
    base = unwrap(model)
    if base is not model:
        model.merge_and_unload() if merged else model.unload()
        base.__dict__.pop("peft_config", None)


def low_rank(module: Any) -> LowRank | None:
    """The product that `module` is: a plain projection with one plain LoRA adapter of its type. Else None."""
    if not hasattr(module, "lora_variant"):
        return None
    from peft.tuners.lora.layer import Linear

    base, active = module.get_base_layer(), module.active_adapters
    if type(module) is not Linear or type(base) is not nn.Linear or len(active) != 1 or active[0] not in module.lora_A:
        return None
    name = active[0]
    A, B, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    odd = module.disable_adapters or module.merged or module.fan_in_fan_out or name in module.lora_variant
    alike = A.bias is None and B.bias is None and A.weight.dtype == B.weight.dtype == base.weight.dtype
    if odd or not alike or base.weight.requires_grad or not isinstance(drop, nn.Identity | nn.Dropout):
        return None
    dropout = drop.p if module.training and isinstance(drop, nn.Dropout) else 0.0
    return LowRank(base.weight, base.bias, A.weight, B.weight, float(module.scaling[name]), dropout)


def folded_weights(model: Any) -> dict[str, Tensor]:
    """The state of the plain model with the adapter folded in: copies where it changes a weight, which stays as it is.
    Merging in place and taking it back would round the frozen weights a little more at each turn."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    state, deltas = unwrap(model).state_dict(keep_vars=True), {}
    modules = dict(model.named_modules())
    for name, weight in adapted(model).items():
        layer: BaseTunerLayer = modules[name]
        deltas[id(weight)] = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]
    plain = {name.replace(".base_layer.", "."): w for name, w in state.items() if ".lora_" not in name}
    return {n: sum(deltas.get(id(w), ()), w.detach()).to(w.dtype) for n, w in plain.items()}


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter alone, in peft's format, as safetensors."""
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
