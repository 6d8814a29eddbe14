"""scripts/prune_layers.py: what it writes is the model without these layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import prune_layers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from headstart.testing import word_tokenizer

IDS = torch.arange(2, 9)[None]


def checkpoint(folder: Path, tied: bool) -> Any:
    """A Qwen2 of five layers, the last two with a window of four tokens, and its tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=3,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = word_tokenizer([f"w{i}" for i in range(30)])
    words.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_model_without_the_layers(tmp_path: Path, tied: bool) -> None:
    model = checkpoint(tmp_path / "whole", tied)
    prune_layers.main([str(tmp_path / "whole"), str(tmp_path / "out"), "--drop", "1", "3"])
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in (0, 2, 4))
    model.config.layer_types = [model.config.layer_types[i] for i in (0, 2, 4)]
    expected = model(IDS, use_cache=False).logits
    assert torch.equal(pruned(IDS, use_cache=False).logits, expected)
    assert (pruned.lm_head.weight is pruned.model.embed_tokens.weight) == tied
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert pruned.dtype == torch.bfloat16
    # A step with the cache goes on where the others stopped.
    first = pruned(IDS[:, :4], use_cache=True)
    rest = pruned(IDS[:, 4:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, expected[:, 4:], atol=0.02, rtol=0.02)
    whole, copied = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("whole", "out"))
    assert copied("w3 w5")["input_ids"] == whole("w3 w5")["input_ids"]


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        (["5"], "no layer 5: the model has 5 layers, 0 to 4"),
        (["-1"], "no layer -1"),
        (["0", "1", "2", "3", "4"], "all 5 layers would be dropped"),
    ],
)
def test_layers_that_cannot_go(tmp_path: Path, capsys: pytest.CaptureFixture[str], drop: list[str], said: str) -> None:
    checkpoint(tmp_path / "whole", tied=True)
    with pytest.raises(SystemExit):
        prune_layers.main([str(tmp_path / "whole"), str(tmp_path / "out"), "--drop", *drop])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "whole", tied=True)
    for checkpoint_folder, out, said in (("whole", "whole", "exists already"), ("none", "out", "no folder with a")):
        with pytest.raises(SystemExit):
            prune_layers.main([str(tmp_path / checkpoint_folder), str(tmp_path / out), "--drop", "1"])
        assert said in capsys.readouterr().err
