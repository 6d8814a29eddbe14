"""Memory by configurations alone: the same formula as of loaded models, exact counts, and the smallest world."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from headstart.assemble.pair import open_pair
from headstart.checks import run
from headstart.checks.plan import MOST, Outlines, World, plan
from headstart.checks.run import run_preflight
from headstart.cli.main import app
from headstart.config.loader import load
from headstart.config.schema import Config
from headstart.errors import ConfigError, ModelError
from headstart.models.layout import Weights
from headstart.models.load import load_outline
from headstart.models.memory import GIB, NEAR, MicroMemory
from headstart.testing import Architecture
from support import make_config

REPOSITORY = Path(__file__).parents[2]
RECIPE = "recipe:math-32b"
LARGE = [f"{who}.path={REPOSITORY}/recipes/shapes/{name}" for who, name in
         (("student", "qwen2.5-32b"), ("teacher", "qwen2.5-72b"))]  # fmt: skip
LORA = "tuning={type: lora, r: 4}"
CUDA = torch.device("cuda")
NODE = World(1, 8, 80.0)


def large(*overrides: str) -> Config:
    return load(RECIPE, [*LARGE, *overrides])


@cache
def outlined(*overrides: str) -> Outlines:
    """Building 32B and 72B takes seconds, also without memory."""
    return Outlines(large(*overrides))


# --- the same formula, from shapes without memory --------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [LORA, "tuning.type=full", "tuning={type: lora, targets: [q_proj, lm_head]}"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "gemma2", "gemma3", "cohere"])
@pytest.mark.filterwarnings("ignore:tuning.targets")
def test_outlines_are_counted_like_loaded_models(tmp_path: Path, architecture: Architecture, tuning: str) -> None:
    """peft's own rule finds the targets, and tied weights count once, in both."""
    config = make_config(tmp_path, tuning, architecture=architecture)
    pair, outlines = open_pair(config), Outlines(config, "cpu")
    loaded = MicroMemory.of(pair.student, [pair.teacher], config)
    student = outlines.student(config.tuning.type, config.student.dtype)
    assert {p.device.type for p in [*student.model.parameters(), *outlines.teachers[0].model.parameters()]} == {"meta"}
    assert MicroMemory.of(student, outlines.teachers, config, device="cpu") == loaded
    found = outlines.plan(World(gib=1.0), 10)
    assert found.trained_parameters == sum(p.numel() for p in pair.student.trainable().values())
    assert found.memory.weights * GIB == loaded.weights


def test_what_a_device_does_to_the_weights(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert load_outline(config.student, CUDA).dtype == torch.bfloat16
    assert load_outline(config.student, torch.device("cpu")).dtype == torch.float32
    half = config.student.model_copy(update={"dtype": "float16"})
    assert load_outline(half, torch.device("cpu")).dtype == torch.float16


def parameters(hidden: int, between: int, layers: int, heads: int, groups: int, vocabulary: int) -> int:
    """Of an untied Qwen2: embedding and head, and in a layer q k v with bias, o, three of the MLP, two norms."""
    keys = hidden // heads * groups
    attention = 2 * hidden * hidden + 2 * hidden * keys + hidden + 2 * keys
    return 2 * vocabulary * hidden + hidden + layers * (attention + 3 * hidden * between + 2 * hidden)


SIZES = {"qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064), "qwen2.5-72b": (8192, 29568, 80, 64, 8, 152064)}


@pytest.mark.parametrize(
    ("name", "count"), [*((n, parameters(*s)) for n, s in SIZES.items()), ("qwen2.5-1.5b", 1_543_714_304)]
)
def test_real_shapes_have_their_published_number_of_parameters(name: str, count: int) -> None:
    outline = load_outline(large(f"student.path={REPOSITORY}/recipes/shapes/{name}").student, CUDA)
    assert sum(p.numel() for p in outline.parameters()) == count


# --- sharded ---------------------------------------------------------------------------------------------------------


def test_a_rank_of_a_sharded_pair_holds_its_part() -> None:
    """Frozen weights in two bytes, trained ones as float32 masters with float32 gradients; adapters on every rank."""
    outlines, count = outlined(), parameters(*SIZES["qwen2.5-32b"])
    lora, full = outlines.student("lora", "auto"), outlines.student("full", "auto")
    adapter = sum(p.numel() for p in lora.trainable().values())
    buffers = sum(b.numel() * b.element_size() for b in lora.model.buffers())
    for ranks in (2, 8, 64):
        frozen, masters = Weights.of(lora, ranks), Weights.of(full, ranks)
        assert frozen.resident - buffers == pytest.approx(2 * count / ranks + 4 * adapter, rel=1e-9)
        assert frozen.gradients == 4 * adapter
        assert frozen.backward == 0
        assert masters.resident - buffers == pytest.approx(4 * count / ranks, rel=1e-9)
        assert masters.gradients == pytest.approx(4 * count / ranks, rel=1e-9)
        assert frozen.whole == masters.whole == 2 * count
    layer = (count - 2 * 152064 * 5120 - 5120) // 64
    assert frozen.gathered == masters.gathered == 2 * (2 * 152064 * 5120 + 5120 + 2 * layer)


def test_a_tied_head_is_gathered_for_the_loss_as_well(tmp_path: Path) -> None:
    tied, untied = (Outlines(make_config(tmp_path / a, architecture=a)).student("full", "auto")
                    for a in ("qwen3", "qwen2"))  # fmt: skip
    for model in (tied, untied):
        head = model.model.get_output_embeddings().weight.numel()
        layers = sum(p.numel() for layer in model.layers for p in layer.parameters())
        norm = model.backbone.norm.weight.numel()
        assert Weights.of(model, 2).gathered == 2 * (2 * head + norm + layers)
    assert Weights.of(tied, 2).whole == 2 * sum(p.numel() for p in tied.model.parameters())


def test_the_student_is_gathered_whole_only_where_it_fits() -> None:
    def copied(world: World) -> float:
        items = outlined("sharding.type=fsdp").plan(world, 200).memory.items
        assert items is not None
        return items.generation_copy

    assert copied(NODE) == 0
    assert copied(World(4, 8, 140.0)) * GIB == pytest.approx(2 * parameters(*SIZES["qwen2.5-32b"]), rel=1e-6)


def test_what_servers_do_takes_no_memory_here() -> None:
    """Rollouts sampled elsewhere leave no KV cache, a teacher at a URL no weights and no scoring pass."""
    rollouts = "rollout={engine: server, urls: [http://a:8000], sync_dir: /shared}"
    teacher = "teacher={type: server, urls: [http://b:8000]}"
    here = outlined().plan(NODE, 200).memory
    served = Outlines(large(rollouts)).plan(NODE, 200).memory
    assert here.rollout > 0 == served.rollout
    assert (served.items.kv_cache, served.items.sampling, served.items.generation_copy) == (0, 0, 0)  # type: ignore[union-attr]
    assert (served.student, served.weights) == (here.student, here.weights)
    alone = Outlines(load(RECIPE, [LARGE[0], teacher, "divergence.support={type: top_k, k: 64}"]))
    memory = alone.plan(NODE, 200).memory
    assert memory.items is not None
    assert (memory.items.teacher_weights, memory.items.teacher_scoring) == (0, 0)
    assert {row.teacher for row in alone.smallest(NODE, 200)} == {"url"}


def test_a_sharded_teacher_is_frozen_half_precision() -> None:
    """72B over 8 ranks: 18 GB each, not 36."""
    items = outlined("sharding.type=fsdp").plan(NODE, 200).memory.items
    assert items is not None
    assert items.teacher_weights * GIB == pytest.approx(2 * parameters(*SIZES["qwen2.5-72b"]) / 8, rel=1e-6)


# --- the smallest world ----------------------------------------------------------------------------------------------


def test_the_smallest_world_fits_and_the_one_before_does_not() -> None:
    config = large()
    found = {(s.tuning, s.teacher): s for s in plan(config, NODE).smallest}
    assert {case: str(s.world) for case, s in found.items()} == {
        ("lora", "beside"): "4 x 80 GiB",
        ("lora", "url"): "2 x 80 GiB",
        ("full", "beside"): "2 nodes x 8 x 80 GiB",
        ("full", "url"): "2 nodes x 8 x 80 GiB",
    }
    outlines, worlds = Outlines(config), list(NODE.smaller())
    for (tuning, teacher), smallest in found.items():
        assert smallest.world is not None
        assert smallest.peak <= NEAR * 80
        before = worlds[worlds.index(smallest.world) - 1]
        memory = outlines.memory(before, before.ranks, config.prompts.max_tokens, tuning, teacher, "auto")
        assert memory.peak > NEAR * 80


def test_what_fits_nowhere_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.checks.plan.MOST", 2)
    assert {s.world for s in plan(large(), World(1, 1, 1.0)).smallest} == {None}


def test_worlds_in_order() -> None:
    assert [w.ranks for w in World(3, 8).smaller()] == [1, 2, 4, *range(8, 8 * MOST + 1, 8)]
    assert World.parse("nodes=4,gpus=8,gib=79.5") == World(4, 8, 79.5)
    assert World.parse("gpus=2") == World(1, 2, 80.0)
    for wrong in ("", "gpus", "gpus=0", "gpus=2.5", "gib=-1", "gib=nan", "racks=2", "gpus=8;gib=80"):
        with pytest.raises(ConfigError, match="--plan: found"):
            World.parse(wrong)


def test_a_horizon_without_a_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"horizon\.tokens=N"):
        Outlines(large("horizon={type: custom, path: my_package.horizons:MyHorizon}"))


# --- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["preflight", RECIPE, *arguments])


def test_the_table_needs_no_weights(tmp_path: Path) -> None:
    found = command("--plan", "nodes=1,gpus=8,gib=80", *LARGE, "--out", str(tmp_path))
    assert found.exit_code == 2
    for text in ("(32.8B)", "(72.7B)", "every rank holds both", "does not fit", "2 x 80 GiB", "at a URL", "KV cache"):
        assert text in found.output, text
    assert (tmp_path / "diagnose/plan.json").is_file()


def test_a_hub_model_without_a_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="or give a folder"):
        plan(load(RECIPE), NODE)


# --- before every preflight ------------------------------------------------------------------------------------------


def test_what_cannot_fit_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    monkeypatch.setattr(run, "_open", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(run, "free_bytes", lambda *_: 1000)
    finding = next(f for f in run_preflight(config).findings if f.check == "memory before loading")
    assert finding.severity == "blocking"
    assert "--plan" in (finding.remedy or "")


def test_a_rank_has_its_share_of_a_cpu(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    finding = next(f for f in run_preflight(config, quick=True).findings if f.check == "memory before loading")
    assert finding.severity == "ok"
    assert finding.figures["ranks"] == 1
    assert (
        finding.figures["weights"] * GIB
        == MicroMemory.of(*(lambda p: (p.student, [p.teacher]))(open_pair(config)), config).weights
    )
