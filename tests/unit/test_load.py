"""A loaded model is its own, only safetensors of its own folder are read, and malformed files end in one message."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from headstart.assemble.pair import open_pair
from headstart.checks.run import run_preflight
from headstart.config.schema import ModelConfig
from headstart.errors import HeadstartError, ModelError
from headstart.evaluation.run import evaluate
from headstart.models.load import load_model, load_tokenizer
from headstart.testing import random_model, word_tokenizer, write_checkpoint
from support import make_config, write_pair

CPU = torch.device("cpu")


def test_trained_weights_survive_an_overwritten_checkpoint(tmp_path: Path) -> None:
    student, _ = write_pair(tmp_path)
    model = load_model(ModelConfig(path=str(student)), torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    trained = [parameter.clone() for parameter in model.parameters()]
    file = student / "model.safetensors"
    file.write_bytes(file.read_bytes())  # truncates it first, as a copy over it does
    assert all(torch.equal(p, t) for p, t in zip(model.parameters(), trained, strict=True))


def write_shards(folder: Path) -> Path:
    random_model("llama", 46).save_pretrained(folder, max_shard_size="20KB")
    word_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    return change


INDEX = "model.safetensors.index.json"


def name_shard(name: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = name
        (folder / INDEX).write_text(json.dumps(index))

    return change


class Opened(Exception):
    """A pickle was read."""


SHARDS = [
    "pytorch_model.bin",
    "weights.pt",
    "weights.pth",
    "weights.ckpt",
    "weights.pkl",
    "weights.safetensors.bin",
    "weights",
    "",
    "../other/model.safetensors",
    "/tmp/model.safetensors",
    "sub/model.safetensors",
    "..",
    ".safetensors/../weights.bin",
    None,
    7,
    ["model.safetensors"],
]


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_names_safetensors_of_its_own_folder(
    tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by tokenizer and model alike, so by every command, before a weight is opened."""
    source = ModelConfig(path=str(write_shards(tmp_path / "model")))
    load_model(source, CPU)
    name_shard(name)(tmp_path / "model")
    torch.save({"model.norm.weight": torch.ones(32)}, tmp_path / "model" / "pytorch_model.bin")

    def fail(*_: Any, **__: Any) -> None:
        raise Opened

    monkeypatch.setattr(torch, "load", fail)
    for load in (lambda: load_tokenizer(source), lambda: load_model(source, CPU)):
        with pytest.raises(ModelError, match=r"names .* as weights\. Only safetensors") as error:
            load()
        assert INDEX in str(error.value)
        assert str(tmp_path / "model") in str(error.value)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../model.safetensors", "weights.bin", 3])
def test_a_configuration_names_safetensors_of_its_own_folder(tmp_path: Path, name: Any) -> None:
    student, _ = write_pair(tmp_path)
    change_json("config.json", transformers_weights=name)(student)
    with pytest.raises(ModelError, match=r"config\.json names .* as weights"):
        load_model(ModelConfig(path=str(student)), CPU)


def test_safetensors_of_another_name_are_read(tmp_path: Path) -> None:
    student, _ = write_pair(tmp_path)
    (student / "model.safetensors").rename(student / "weights.safetensors")
    change_json("config.json", transformers_weights="weights.safetensors")(student)
    load_model(ModelConfig(path=str(student)), CPU)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_no_model(tmp_path: Path, whole: bool) -> None:
    """transformers would follow it to the model that it names, or put it on this one and read its pickle."""
    student, _ = write_pair(tmp_path)
    (student / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else", "peft_type": "LORA"}')
    torch.save({}, student / "adapter_model.bin")
    if not whole:
        (student / "config.json").unlink()
    for load in (lambda c: load_tokenizer(c), lambda c: load_model(c, CPU)):
        with pytest.raises(ModelError, match="holds a peft adapter; give its base model as path"):
            load(ModelConfig(path=str(student)))


def test_the_hub_cache_is_checked_too(tmp_path: Path) -> None:
    """A hub name whose snapshot (links into blobs, as the cache has them) is whole loads; its index is checked."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    blobs = write_shards(repository / "blobs")
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    program = (
        "import sys, torch\n"
        "from headstart.config.schema import ModelConfig as C; from headstart.errors import ModelError\n"
        "from headstart.models.load import load_model, load_tokenizer\n"
        "for line in sys.stdin:\n"
        "  try: load_tokenizer(C(path='owner/name')); load_model(C(path='owner/name'), torch.device('cpu'))\n"
        "  except ModelError as error: print(error, flush=True)\n"
        "  else: print('loaded', flush=True)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    pipe, command = subprocess.PIPE, [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:

        def loaded() -> str:
            assert process.stdin
            assert process.stdout
            process.stdin.write("again\n")
            process.stdin.flush()
            return process.stdout.readline()

        assert loaded() == "loaded\n"
        name_shard("pytorch_model.bin")(blobs)
        assert f"owner/name: {INDEX} names 'pytorch_model.bin' as weights" in loaded()
        (snapshot / "adapter_config.json").write_text("{}")
        assert "owner/name holds a peft adapter" in loaded()


def header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def in_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: header(folder / "model.safetensors", change)


def raw(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def change_vocabulary(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"] |= values
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return change


DEEP = "[" * 100_000 + "]" * 100_000
NORM = "model.norm.weight"
CONFIG = [
    *({"hidden_size": value} for value in (0, -32, 33, 10**9, 2**24, 10**400, "32", None, [32], 1.5, True)),
    *({"vocab_size": value} for value in (0, -1, 45, 10**9, 2**62, 10**30, "46")),
    *({"num_hidden_layers": value} for value in (0, -1, 3, 100, 10**9, 2.5, "2")),
    *({"num_attention_heads": value} for value in (0, -4, 3, 10**9, "4")),
    *({"head_dim": value} for value in (0, -8, 2**24, 10**9)),
    {"intermediate_size": 10**9},
    {"num_labels": 10**9},
    {"pad_token_id": 10**9},
    {"eos_token_id": "<end>"},
    {"eos_token_id": [1, None, {}]},
    {"rms_norm_eps": "small"},
    {"model_type": "zork"},
    {"model_type": 3},
    {"model_type": "bert"},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": "x"},
    {"quantization_config": {}},
    {"attn_implementation": "someone/kernel"},
    {"model_type": "zork", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}},
]
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
TEXTS = ["", "[]", "3", "null", '"x"', "{", '{"a": 1', DEEP, f'{{"a": {DEEP}}}', "\ufeff{}", '{"a": NaN}', b"\xff\xfe{"]
MALFORMED: list[tuple[str, str, Callable[[Path], object]]] = [
    *((f"config {values}"[:60], "config.json", change_json("config.json", **values)) for values in CONFIG),
    *((f"{name} {text[:12]!r}", name, raw(name, text)) for name in JSON_FILES for text in TEXTS),
    *(
        (f"{name} {number[:12]}", name, raw(name, f'{{"hidden_size": {number}}}'))
        for name in JSON_FILES[:3]
        for number in ("1e999", "-1e999", "1" * 5000)
    ),
    *(
        (f"{name} cut", name, cut(name, size))
        for name in (*JSON_FILES, "model.safetensors")
        for size in (1, 100)
        if (name, size) != ("generation_config.json", 100)
    ),
    ("vocabulary id 2**32", "tokenizer", change_vocabulary(w39=2**32)),
    ("vocabulary id -1", "tokenizer", change_vocabulary(w39=-1)),
    ("vocabulary id text", "tokenizer", change_vocabulary(w39="45")),
    ("vocabulary id hole", "tokenizer", change_vocabulary(w39=2**32 - 1)),
    ("no vocabulary", "tokenizer", change_json("tokenizer.json", model={"type": "WordLevel"})),
    ("no model", "tokenizer", change_json("tokenizer.json", model=None)),
    ("unknown normalizer", "tokenizer", change_json("tokenizer.json", normalizer={"type": "Zork"})),
    ("no tokenizer", "tokenizer", lambda f: [p.unlink() for p in f.glob("tokenizer*")]),
    ("length list", "tokenizer", change_json("tokenizer_config.json", model_max_length=[])),
    ("unk empty", "tokenizer", change_json("tokenizer_config.json", unk_token="")),
    ("eos text", "generation_config.json", change_json("generation_config.json", eos_token_id="<end>")),
    ("eos dict", "generation_config.json", change_json("generation_config.json", eos_token_id={"a": 1})),
    ("eos nested", "generation_config.json", change_json("generation_config.json", eos_token_id=[[1]])),
    *(
        (f"header length {size}", "model.safetensors", raw("model.safetensors", size.to_bytes(8, "little") + b"{}"))
        for size in (0, 3, 10**6, 2**32, 2**60, 2**64 - 1)
    ),
    ("header empty", "model.safetensors", in_header(lambda h: h.clear())),
    ("header overlap", "model.safetensors", in_header(lambda h: h[NORM].update(data_offsets=[0, 128]))),
    ("header offsets", "model.safetensors", in_header(lambda h: h[NORM].update(data_offsets=[2**60, 2**61]))),
    ("header shape", "model.safetensors", in_header(lambda h: h[NORM].update(shape=[2**40]))),
    ("header dtype", "model.safetensors", in_header(lambda h: h[NORM].update(dtype="F33"))),
    ("header type", "model.safetensors", in_header(lambda h: h.update({NORM: 3}))),
    ("weight renamed", "config.json", in_header(lambda h: h.update({"other": h.pop(NORM)}))),
    ("weight transposed", "config.json", in_header(lambda h: h[NORM].update(shape=[2, 16]))),
    ("no weights", "safetensors", lambda f: (f / "model.safetensors").unlink()),
    ("index list", INDEX, raw(INDEX, "[]")),
    ("index map list", INDEX, raw(INDEX, '{"weight_map": ["a"]}')),
    ("index deep", INDEX, raw(INDEX, DEEP)),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_config(folder)
    return folder


@pytest.mark.parametrize(("named", "change"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED])
def test_a_malformed_file_is_one_message(
    pair: Path, tmp_path: Path, named: str, change: Callable[[Path], object]
) -> None:
    """In one line that names the checkpoint and the file, within seconds, without much memory."""
    broken = Path(shutil.copytree(pair / "student", tmp_path / "broken"))
    change(broken)
    config = make_config(pair, f"student.path={broken}", f"teacher.path={broken}")
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(HeadstartError) as error:
        open_pair(config)
    message = str(error.value)
    assert named in message
    assert str(broken) in message or "tokenizer" in message
    assert "\n" not in message
    assert len(message) < 1000
    assert time.perf_counter() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "KiB"


EDITS = [
    change_json("config.json", time_step_limit=[0.0, float("inf")]),  # Mamba
    change_json("config.json", some_new_key=10**12, routed_scaling_factor=2.5, sliding_window=None),
    change_json(
        "config.json", max_position_embeddings=10**6, rope_parameters={"rope_type": "default", "rope_theta": 1e7}
    ),
    change_json("config.json", auto_map={"AutoConfig": "code.Config"}),  # a known model needs none of its code
    change_json("config.json", quantization_config=None),
    change_json("tokenizer_config.json", model_max_length=int(1e30)),
    change_json("generation_config.json", eos_token_id=[1, 2], pad_token_id=None),
    change_json("tokenizer_config.json", tokenizer_class="NotInTransformers"),
    raw("code.py", "raise SystemExit(1)"),
    raw("pytorch_model.bin", b"never read"),
    raw("training_args.bin", b"never read"),
    lambda folder: (folder / "generation_config.json").unlink(),
]


@pytest.mark.parametrize("change", EDITS)
def test_what_checkpoints_have_is_no_fault(pair: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    fine = Path(shutil.copytree(pair / "student", tmp_path / "fine"))
    change(fine)
    load_tokenizer(ModelConfig(path=str(fine)))
    model = load_model(ModelConfig(path=str(fine)), CPU)
    own = AutoModelForCausalLM.from_pretrained(pair / "student")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), own.parameters(), strict=True))


def test_shards_missing_and_shards_whole(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "model")
    model = load_model(ModelConfig(path=str(folder)), CPU)
    own = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), own.parameters(), strict=True))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(ModelError, match=rf"{shard.name}: .* A safetensors file is damaged"):
        load_model(ModelConfig(path=str(folder)), CPU)
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load_model(ModelConfig(path=str(folder)), CPU)


def test_an_unexpected_weight_is_left_out(tmp_path: Path) -> None:
    """As transformers does: checkpoints hold heads and buffers that the causal language model has no use for."""
    student, _ = write_pair(tmp_path)
    weights = load_file(student / "model.safetensors")
    save_file({**weights, "score.weight": torch.ones(2, 2)}, student / "model.safetensors", metadata={"format": "pt"})
    load_model(ModelConfig(path=str(student)), CPU)


def test_every_command_goes_through_the_same_checks(tmp_path: Path) -> None:
    from headstart.diagnosis.run import diagnose
    from headstart.distillation.run import distill

    config = make_config(tmp_path, "evaluation={task: {type: tiny}}")
    shutil.rmtree(tmp_path / "student")
    write_checkpoint(tmp_path / "student", random_model("llama", 46, seed=1), word_tokenizer())
    raw(INDEX, '{"weight_map": {"a": "evil.bin"}}')(tmp_path / "student")
    for command in (
        lambda: distill(config, out=tmp_path / "run"),
        lambda: diagnose(config, out=tmp_path / "diagnosis"),
        lambda: evaluate(config, out=tmp_path / "evaluation"),
    ):
        with pytest.raises(ModelError, match=r"names 'evil\.bin' as weights"):
            command()
    assert any("'evil.bin'" in f.message for f in run_preflight(config).findings if f.severity == "blocking")
