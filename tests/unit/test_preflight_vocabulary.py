from pathlib import Path

import pytest

from headstart.checks.run import run_preflight
from headstart.checks.vocabulary import prompt_ids, same_text_other_id, tokenizer_size, vocabulary
from headstart.testing import CHAT, WORDS, random_model, word_tokenizer, write_checkpoint
from preflight_pairs import Side, loaded, of, write_sides
from real_tokenizers import real_tokenizer
from small_tokenizers import piece_tokenizer
from support import make_config, write_prompts

BASE = len(word_tokenizer())
MARKED = "<mark> " + CHAT


def test_an_equal_pair_is_ok(tmp_path: Path) -> None:
    pair, prompts = loaded(write_sides(tmp_path, Side(), Side(seed=2)))
    assert [f.severity for f in vocabulary(pair)] == ["ok"]
    assert prompt_ids(pair, prompts.prompts).severity == "ok"


def test_a_padded_head_is_a_note_with_its_width(tmp_path: Path) -> None:
    pair, _ = loaded(write_sides(tmp_path, Side(), Side(rows=BASE + 18)))
    (finding,) = vocabulary(pair)
    assert finding.severity == "note"
    assert finding.figures == {
        "shared_ids": BASE,
        "student_tokenizer_ids": BASE,
        "teacher_tokenizer_ids": BASE,
        "student_head_rows": BASE,
        "teacher_head_rows": BASE + 18,
    }


def test_added_tokens_with_other_ids_are_named(tmp_path: Path) -> None:
    pair, _ = loaded(write_sides(tmp_path, Side(special=("<a>", "<b>", "<c>")), Side(special=("<a>", "<c>", "<b>"))))
    finding = vocabulary(pair)[-1]
    assert finding.severity == "warning"
    assert finding.figures == {"different": 2, "examples": [("<b>", BASE + 1, BASE + 2), ("<c>", BASE + 2, BASE + 1)]}
    assert f"'<b>': {BASE + 1} / {BASE + 2}" in finding.message


def test_prompt_ids_without_an_embedding_block(tmp_path: Path) -> None:
    """The template of the student prints an added token for which its checkpoint has no row."""
    side = Side(template=MARKED, special=("<mark>",), rows=BASE)
    with pytest.warns(UserWarning, match="cannot be produced"):
        pair, prompts = loaded(write_sides(tmp_path, side, Side(special=("<mark>",))))
    finding = prompt_ids(pair, prompts.prompts)
    assert finding.severity == "blocking"
    assert finding.figures["student_beyond_embedding"] == [BASE]
    assert f"no embedding for ({BASE}; it has {BASE} rows)" in finding.message


def test_prompt_ids_of_one_model_alone_are_a_note(tmp_path: Path) -> None:
    pair, prompts = loaded(write_sides(tmp_path, Side(), Side(template=MARKED, special=("<mark>",))))
    finding = prompt_ids(pair, prompts.prompts)
    assert finding.severity == "note"
    assert finding.figures["teacher_own"] == [BASE]
    assert finding.figures["student_own"] == []


def test_another_tokenizer_is_aligned_and_everything_is_checked(tmp_path: Path) -> None:
    """The same words in reverse order: every one has another id."""
    write_prompts(tmp_path)
    Side().write(tmp_path / "student")
    write_checkpoint(tmp_path / "teacher", random_model("llama", BASE), word_tokenizer(WORDS[::-1]))
    result = run_preflight(make_config(tmp_path))
    (finding,) = of(result, "vocabulary")
    assert (finding.severity, finding.figures["shared_tokens"]) == ("note", 43)
    (alignment,) = of(result, "alignment")
    assert (alignment.figures["scored"], alignment.figures["one_to_one"], alignment.figures["dropped"]) == (1.0, 1.0, 0)
    done = {f.check: f.severity for f in result.findings}
    assert done["stop tokens"] == done["self-test"] == done["teacher determinism"] == done["engine log-probs"] == "ok"


def test_a_tokenizer_without_bytes_blocks_and_the_student_is_still_checked(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    Side().write(tmp_path / "student")
    write_checkpoint(tmp_path / "teacher", random_model("llama", BASE), piece_tokenizer())
    result = run_preflight(make_config(tmp_path))
    (refusal,) = of(result, "vocabulary")
    assert result.exit_code == 2
    assert refusal.severity == "blocking"
    assert "WordPiece tokenizer" in refusal.message
    done = {f.check: f.severity for f in result.findings}
    assert done["engine log-probs"] == done["gradients"] == done["prompt length"] == "ok"
    assert "chat template" not in done


def test_same_text_other_id() -> None:
    assert same_text_other_id({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 5, "d": 1}) == [("b", 1, 5)]
    assert same_text_other_id({}, {"a": 1}) == []


@pytest.mark.parametrize(("name", "size"), [("qwen3", 151_669), ("qwen2_5", 151_665), ("gpt2", 50_257)])
def test_tokenizer_size_of_real_families(name: str, size: int) -> None:
    tokenizer = real_tokenizer(name)
    assert tokenizer_size(tokenizer) == size == max(tokenizer.get_vocab().values()) + 1
