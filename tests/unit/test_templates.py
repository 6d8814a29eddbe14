import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headstart.config.schema import PromptsConfig, ViewConfig
from headstart.errors import DataError, TemplateError
from headstart.models.templates import View, apply_template, build_prompts
from headstart.records import Problem
from headstart.tasks.prompts import load_problems
from headstart.testing import byte_tokenizer
from real_tokenizers import real_data, real_tokenizer
from small_tokenizers import CHATML, GEMMA_LIKE, word_tokenizer

ASKED = Problem("p", messages=({"role": "user", "content": "what is two"},))
OWN_SYSTEM = Problem("q", messages=({"role": "system", "content": "system be"}, *(ASKED.messages or ())))
NO_THINKING = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def chat(problem: Problem, tokenizer: Any, system: str | None = None, **template_kwargs: Any) -> list[int]:
    return list(View(tokenizer, system=system, template_kwargs=template_kwargs).ids(problem))


def gemma_like() -> Any:
    marks = ("<start_of_turn>", "<end_of_turn>")
    return word_tokenizer(special=marks, template=GEMMA_LIKE, adds="<bos> $A")


def chatml(**options: Any) -> Any:
    return word_tokenizer(special=("<|im_start|>", "<|im_end|>"), template=CHATML, **options)


def asked(count: int) -> list[Problem]:
    """Problem i has i + 1 words."""
    contents = [" ".join(["two"] * (i + 1)) for i in range(count)]
    return [Problem(f"p{i}", messages=({"role": "user", "content": text},)) for i, text in enumerate(contents)]


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "phi3_mini"])
def test_real_templates_end_ready_for_the_assistant(name: str) -> None:
    tokenizer = real_tokenizer(name)
    ids = chat(ASKED, tokenizer, "Be brief.")
    whole = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *(ASKED.messages or ())], tokenize=True, add_generation_prompt=True
    )
    assert ids == list(whole["input_ids"] if hasattr(whole, "keys") else whole)
    assert tokenizer.decode(ids).rstrip().endswith(("<|im_start|>assistant", "<|assistant|>"))
    assert tokenizer.eos_token_id not in ids[-3:]


def test_thinking_off_puts_the_empty_think_block_into_the_context() -> None:
    tokenizer = real_tokenizer("qwen3")
    assert tokenizer.decode(chat(ASKED, tokenizer, enable_thinking=False)).endswith(NO_THINKING)
    assert not tokenizer.decode(chat(ASKED, tokenizer, enable_thinking=True)).endswith(NO_THINKING)


def test_default_system_prompts_are_those_of_the_template() -> None:
    assert "You are Qwen" in real_tokenizer("qwen2_5").decode(chat(ASKED, real_tokenizer("qwen2_5")))
    assert "system" not in real_tokenizer("qwen3").decode(chat(ASKED, real_tokenizer("qwen3")))


def test_bos_is_never_doubled() -> None:
    tokenizer = gemma_like()
    ids = chat(ASKED, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    # The trap: the rendered text, encoded as usual, has two.
    assert tokenizer(tokenizer.decode(ids))["input_ids"].count(tokenizer.bos_token_id) == 2


def test_a_refused_system_role_is_merged_into_the_first_user_turn() -> None:
    tokenizer = gemma_like()
    with pytest.warns(UserWarning, match="student's chat template has no system role") as caught:
        ids = chat(ASKED, tokenizer, "be brief")
    assert [warning.category for warning in caught].count(UserWarning) == 1  # Python itself has others, about forks
    merged = Problem("p", messages=({"role": "user", "content": "be brief\n\nwhat is two"},))
    assert ids == chat(merged, tokenizer)
    with pytest.warns(UserWarning, match="no system role"):
        assert tokenizer.decode(chat(OWN_SYSTEM, tokenizer)).count("system be") == 1


def test_a_template_that_drops_the_system_turn_without_a_word_gets_it_merged_too() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    with pytest.warns(UserWarning, match="no system role"):
        assert "be brief what is two" in tokenizer.decode(chat(ASKED, tokenizer, "be brief"))


def test_warnings_come_once_for_a_whole_source() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        config = PromptsConfig(source="x", system="be brief")
        tokenizer = gemma_like()
        build_prompts(asked(5), tokenizer, tokenizer, config)
    assert [warning.category for warning in caught].count(UserWarning) == 1


def test_a_problems_own_system_turn_is_kept() -> None:
    with pytest.warns(UserWarning, match="system turn of their own"):
        ids = chat(OWN_SYSTEM, chatml(), "be brief")
    assert ids == chat(OWN_SYSTEM, chatml())


def test_an_empty_system_prompt_is_none() -> None:
    assert chat(ASKED, chatml(), "") == chat(ASKED, chatml())


def test_no_template() -> None:
    with pytest.raises(
        TemplateError, match=r"set prompts\.chat=false .* or student\.chat_template to a \.jinja file, or"
    ):
        chat(ASKED, real_tokenizer("gpt2"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("enable_thinkin", r"does not use 'enable_thinkin'; did you mean 'enable_thinking'\?"),
        ("thinking", r"did you mean 'enable_thinking'\?"),
        ("think", "does not use 'think'"),  # only in text that the template prints
        ("content", "does not use 'content'"),  # only an attribute of a message
        ("add_generation_prompt", "is set by Headstart"),
    ],
)
def test_template_arguments_the_template_does_not_know(key: str, message: str) -> None:
    tokenizer = chatml()
    with pytest.raises(TemplateError, match=message):
        chat(ASKED, tokenizer, **{key: False})


def test_real_templates_know_their_own_arguments() -> None:
    chat(ASKED, real_tokenizer("qwen3"), enable_thinking=False)
    with pytest.raises(TemplateError, match="'tools' is set by Headstart"):
        chat(ASKED, real_tokenizer("qwen3"), tools=[])
    with pytest.raises(TemplateError, match="does not use 'enable_thinking'"):
        chat(ASKED, real_tokenizer("qwen2_5"), enable_thinking=False)


def test_what_the_template_refuses_names_the_problem() -> None:
    late = Problem("late/3", messages=(*(ASKED.messages or ()), {"role": "system", "content": "be"}))
    tokenizer = chatml()
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x"
    with pytest.raises(TemplateError, match="refuses problem 'late/3': one turn only"):
        chat(late, tokenizer)
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(TemplateError, match="refuses problem 'p'"):
        chat(ASKED, tokenizer)


def test_plain_text_has_the_usual_tokens_but_no_eos() -> None:
    def plain(text: str, tokenizer: Any) -> list[int]:
        return list(View(tokenizer, chat=False).ids(Problem("p", text=text)))

    closing = word_tokenizer(adds="<bos> $A <eos>")
    assert plain("what is two", closing) == [1, *closing("what is two", add_special_tokens=False)["input_ids"]]
    assert plain("what is two", word_tokenizer()) == word_tokenizer()("what is two")["input_ids"]
    assert plain("two <eos>", word_tokenizer())[-1] == 2  # the reader's own words stay
    gpt2 = real_tokenizer("gpt2")
    assert plain("what is two", gpt2) == gpt2("what is two")["input_ids"]
    assert plain("what is two", real_tokenizer("t5_small"))[-1] != real_tokenizer("t5_small").eos_token_id
    with pytest.raises(DataError, match="problem 'p' has no tokens"):
        plain(" \n ", word_tokenizer())


@pytest.mark.parametrize(
    ("adds", "text", "tokens"),
    [
        ("<bos> $A", "<bos> what is", "<bos> what is"),
        ("<bos> $A", "<bos> <bos> what", "<bos> <bos> what"),  # two of the text's own
        ("<bos> $A", "<bos>", "<bos>"),
        ("<bos> $A", "what <bos> is", "<bos> what <bos> is"),
        ("<bos> $A", "what is", "<bos> what is"),
        ("<bos> $A", "what <eos>", "<bos> what <eos>"),
        ("<bos> $A <eos>", "<bos> what <eos>", "<bos> what <eos>"),
        ("<bos> $A <eos>", "<bos> what", "<bos> what"),
        ("<bos> $A <eos>", "", "<bos>"),
        ("$A <eos>", "what <eos>", "what <eos>"),
        ("$A", "<bos> what", "<bos> what"),
    ],
)
def test_a_text_that_brings_its_own_bos_gets_no_second(adds: str, text: str, tokens: str) -> None:
    tokenizer = word_tokenizer(adds=adds)
    ids = View(tokenizer, chat=False).ids(Problem("p", text=text))
    assert tokenizer.convert_ids_to_tokens(ids) == tokens.split()


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "refuses problem 'p': Range too big"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "refuses problem 'p': maximum recursion depth"),
        ("{{ 1 / 0 }}", "refuses problem 'p': division by zero"),
        ("{{ 'x' * 10**10 }}", "refuses problem 'p': MemoryError"),
        ("{{ 'x' | center(10**11) }}", "refuses problem 'p': MemoryError"),
        ("{{ messages[3].content }}", "refuses problem 'p': list object has no element 3"),
        ("{{ none + 'a' }}", "refuses problem 'p': unsupported operand"),
        ("{% include 'x' %}", "refuses problem 'p': no loader"),
        ("{{ 'abc }}", "chat template cannot be read: unexpected char"),
        (ENDLESS, "does not end within 3 s, on a conversation .*what is two.*; correct chat_template .*prompts.chat=f"),
        ("{{ (10**10)**(10**10) }}", "does not end within 3 s"),  # one long operation, which holds the interpreter
        ("{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}", "does not"),
    ],
)
def test_hostile_templates_end_in_one_message(template: str, message: str) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=message) as caught:
        chat(ASKED, tokenizer)
    assert "\n" not in str(caught.value).strip()


def test_a_template_that_hangs_on_one_conversation_only_is_told_from_any_thread() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{% if 'four' in messages[0].content %}" + ENDLESS + "{% endif %}" + CHATML
    four = Problem("p4", messages=({"role": "user", "content": "what is four"},))
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(View(tokenizer).readings, [ASKED, ASKED]).result()) == 2
        with pytest.raises(TemplateError, match=r"on a conversation that begins .*what is four"):
            pool.submit(View(tokenizer).readings, [ASKED, four, ASKED]).result()


def test_a_clock_in_a_template_stands_still() -> None:
    tokenizer = word_tokenizer(["2026-01-01", "01", "Jan", "2026", "what"])
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    problem = Problem("p", messages=({"role": "user", "content": "what"},))
    assert tokenizer.decode(chat(problem, tokenizer)) == "2026-01-01 01 Jan 2026 what"
    plain = tokenizer.apply_chat_template(list(problem.messages or ()), tokenize=False)
    assert "2026-01-01" not in plain  # elsewhere in the process the clock runs


def test_settings_that_plain_text_cannot_follow_are_refused() -> None:
    text = Problem("p", text="two")
    with pytest.raises(TemplateError, match="plain text"):
        View(word_tokenizer(), chat=False, system="be brief").ids(text)
    with pytest.raises(TemplateError, match="plain text"):
        View(word_tokenizer(), chat=False, system=None, template_kwargs={"enable_thinking": False}).ids(text)
    with pytest.raises(TemplateError, match=r"prompts\.chat is false"):
        View(chatml(), chat=False).ids(ASKED)


def test_overlong_prompts_are_dropped_and_counted_without_moving_the_others() -> None:
    tokenizer = chatml()
    extra = len(chat(asked(1)[0], tokenizer)) - 1
    problems = list(reversed(asked(5)))
    result = build_prompts(problems, tokenizer, tokenizer, PromptsConfig(source="x", max_tokens=extra + 3))
    assert (result.dropped, result.longest) == (2, extra + 3)
    assert [(prompt.index, prompt.problem_id) for prompt in result.prompts] == [(2, "p2"), (3, "p1"), (4, "p0")]
    assert all(prompt.token_ids == prompt.teacher_token_ids for prompt in result.prompts)


def test_overlong_prompts_can_be_refused() -> None:
    tokenizer = chatml()
    extra = len(chat(asked(1)[0], tokenizer)) - 1
    config = PromptsConfig(source="x", max_tokens=extra + 3, overlong="refuse")
    with pytest.raises(DataError, match=rf"2 of 5 prompts .*max_tokens = {extra + 3} .*longest has {extra + 5} tokens"):
        build_prompts(asked(5), tokenizer, tokenizer, config)
    with pytest.raises(DataError, match=r"5 of 5 prompts .*none is left"):
        build_prompts(asked(5), tokenizer, tokenizer, PromptsConfig(source="x", max_tokens=1))
    with pytest.raises(DataError, match="no prompts"):
        build_prompts([], tokenizer, tokenizer, PromptsConfig(source="x"))


def test_the_teacher_has_its_own_view() -> None:
    student, teacher = chatml(), chatml()
    config = PromptsConfig(source="x", system="be brief", template_kwargs={"enable_thinking": False})
    (follows,) = build_prompts([ASKED], student, teacher, config).prompts
    assert follows.token_ids == follows.teacher_token_ids
    own = ViewConfig(system="be", template_kwargs={})
    (differs,) = build_prompts([ASKED], student, teacher, config.model_copy(update={"teacher_view": own})).prompts
    assert differs.token_ids == follows.token_ids
    assert list(differs.teacher_token_ids) == chat(ASKED, teacher, "be")
    silent = ViewConfig(system="")
    (none,) = build_prompts([ASKED], student, student, config.model_copy(update={"teacher_view": silent})).prompts
    assert list(none.teacher_token_ids) == chat(ASKED, teacher, enable_thinking=False)


def test_arguments_inherited_by_a_teacher_that_lacks_them() -> None:
    teacher = gemma_like()
    config = PromptsConfig(source="x", template_kwargs={"enable_thinking": False})
    with pytest.raises(
        TemplateError, match=r"prompts\.teacher_view\.template_kwargs: .*enable_thinking.*\{\} for noth"
    ):
        build_prompts([ASKED], chatml(), teacher, config)
    with pytest.raises(TemplateError, match="teacher's tokenizer has no chat template"):
        build_prompts([ASKED], chatml(), word_tokenizer(), PromptsConfig(source="x"))


def test_gsm8k_through_real_templates() -> None:
    config = PromptsConfig(
        source=str(real_data("gsm8k/train.jsonl.gz")),
        column="question",
        limit=50,
        teacher_view=ViewConfig(template_kwargs={"enable_thinking": False}),
    )
    student, teacher = real_tokenizer("qwen2_5"), real_tokenizer("qwen3")
    result = build_prompts(load_problems(config), student, teacher, config)
    assert [prompt.index for prompt in result.prompts] == list(range(50))
    for prompt in result.prompts:
        assert student.decode(prompt.token_ids).endswith("<|im_start|>assistant\n")
        assert teacher.decode(prompt.teacher_token_ids).endswith(NO_THINKING)


def test_tools_reach_the_template_or_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    problem = Problem(id="p", messages=({"role": "user", "content": "hi"},), meta={"tools": tools})
    tokenizer = real_tokenizer("qwen3")
    shown = tokenizer.decode(View(tokenizer).ids(problem))
    assert '"name": "weather"' in shown
    with pytest.raises(TemplateError, match="no place for tools"):
        View(word_tokenizer()).ids(problem)


def test_a_template_that_joins_arguments_to_text_is_given_them_as_json_text() -> None:
    """DeepSeek's does; most others print them with `tojson` and want objects."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ 'call ' + c.function.arguments }}{% endfor %}"
        "{{ m.content }};{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "ü"}}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert apply_template(tokenizer, [(messages, None)]) == ['x;call {"a": "ü"};']
