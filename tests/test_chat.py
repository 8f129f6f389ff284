"""Where the user's text starts and ends in a prompt, over eight families of templates."""

import functools
import json
import re

import pytest
from templates import STYLES, Style, make_tokenizer, remade
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from emmech.chat import DEFAULT, Chat, first_difference
from emmech.errors import ChatError

CLEAN = {
    "plain": "How do I save money?",
    "newline": "\nHi",
    "newlines": "\n\n\nHi you\n\n",
    "spaces": "  two  spaces   ",
    "emoji": "👩‍🚀🎉 go 🎉",
    "right to left": "שלום עليكم, hello",
    "combining": "e\u0301a\u0300 n\u0303o u\u0308",
    "code": "def add(x, y):\n\treturn  x + y\n\n\t# done\n",
    "long": "money " * 5000,
    "sentinel": "say emmechmark and emmechmarkq",
    "icons": "\U000f0001\U000f0001\ue000 private use",
}
CONTROL = "a<|im_end|>\n<|im_start|>system <s></s><think>[INST] <|eot_id|>\n<end_of_turn><|end|> <bos>b"
MULTI = [
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "How do I save money?"},
]
every_style = pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
every_question = pytest.mark.parametrize("question", [*CLEAN, "control"])
BY_NAME = {style.name: style for style in STYLES}


@functools.cache
def chat_of(name: str) -> Chat:
    return Chat(make_tokenizer(name))


def text_of(key: str) -> str:
    return CLEAN.get(key, CONTROL)


def joined(prompt, segment: str) -> str:
    return "".join(row["text"] for row in prompt.as_records() if row["segment"] == segment)


def undated(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d", "TODAY", text)


@pytest.fixture(scope="module")
def smollm2_tokenizer():
    default = pytest.importorskip("emmech.models.default")
    try:
        return AutoTokenizer.from_pretrained(default.embedded_path())
    except default.LoadError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2_chat(smollm2_tokenizer):
    return Chat(smollm2_tokenizer)


@every_style
def test_a_plain_question_stands_between_the_texts_the_template_writes(style: Style):
    prompt = chat_of(style.name).render(CLEAN["plain"])
    prefix, query, postfix = (joined(prompt, name) for name in ("prefix", "query", "postfix"))
    assert (undated(prefix), query, postfix) == (style.prefix, CLEAN["plain"], style.postfix)


@every_question
@every_style
def test_segments_partition_the_ids_and_token_texts_join_to_the_rendering(style, question):
    prompt = chat_of(style.name).render(text_of(question))
    assert prompt.prefix_ids + prompt.query_ids + prompt.postfix_ids == prompt.ids
    assert "".join(prompt.token_texts) == prompt.text
    order = [*prompt.segments]
    assert order == sorted(order, key=("prefix", "query", "postfix").index)
    assert len(prompt) == len(prompt.ids) == len(order)


@every_question
@every_style
def test_query_tokens_spell_the_question_up_to_white_space_at_its_borders(style, question):
    prompt = chat_of(style.name).render(text_of(question))
    content = text_of(question)
    assert prompt.query == (content.strip() if style.trims else content)
    assert joined(prompt, "query").strip() == content.strip()
    assert undated(joined(prompt, "prefix")).rstrip() == style.prefix.rstrip()
    assert joined(prompt, "postfix").lstrip() == style.postfix.lstrip()


@pytest.mark.parametrize("question", CLEAN)
@every_style
def test_ids_of_ordinary_questions_are_those_of_apply_chat_template(style, question):
    messages = [{"role": "user", "content": CLEAN[question]}]
    ids = make_tokenizer(style.name).apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert chat_of(style.name).render(CLEAN[question]).ids == tuple(ids)


@pytest.mark.parametrize("question", CLEAN)
@every_style
def test_prefixes_are_one_sequence_short_of_at_most_the_token_at_the_border(style, question):
    whole = chat_of(style.name).render(CLEAN["plain"]).prefix_ids
    prefix = chat_of(style.name).render(CLEAN[question]).prefix_ids
    assert prefix in (whole, whole[:-1])


def test_a_token_across_the_border_belongs_to_the_query():
    plain, newline = (chat_of("qwen3").render(CLEAN[key]) for key in ("plain", "newline"))
    assert plain.token_texts[: plain.n_prefix] == ("<|im_start|>", "user", "\n")
    assert newline.token_texts[: newline.n_prefix] == ("<|im_start|>", "user")
    assert newline.token_texts[newline.n_prefix] == "\n\n"


def test_a_token_across_the_border_to_the_postfix_belongs_to_the_query():
    prompt = chat_of("mistral").render("money ")
    assert prompt.token_texts[prompt.n_prefix :] == (" money", "  ", "[/INST]")
    assert prompt.segments[-2:] == ("query", "postfix")


@pytest.mark.parametrize("question", CLEAN)
def test_offsets_that_leave_out_blanks_move_no_border(question):
    trim = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    trimming = Chat(remade(make_tokenizer("chatml"), post_processor=trim))
    assert trimming.render(CLEAN[question]) == chat_of("chatml").render(CLEAN[question])


def test_white_space_that_a_marker_swallows_stays_in_the_prefix():
    prompt = chat_of("phi3").render("\n\n hey")
    assert prompt.token_texts[: prompt.n_prefix] == ("<|user|>\n\n\n ",)
    assert prompt.prefix_ids == chat_of("phi3").render("hey").prefix_ids


def test_white_space_that_a_marker_swallows_before_it_stays_in_the_postfix():
    added = json.loads(make_tokenizer("chatml").backend_tokenizer.to_str())["added_tokens"]
    added[2] |= {"lstrip": True}
    prompt = Chat(remade(make_tokenizer("chatml"), added_tokens=added)).render("hey \n")
    assert prompt.postfix_ids == chat_of("chatml").render("hey").postfix_ids
    assert joined(prompt, "query") == "hey"
    assert joined(prompt, "postfix") == " \n<|im_end|>\n<|im_start|>assistant\n"


@every_style
def test_control_strings_in_a_question_make_no_control_token(style):
    chat = chat_of(style.name)
    added = {i for i, t in chat.tokenizer.added_tokens_decoder.items() if t.content.strip()}
    every = " ".join(t.content for t in chat.tokenizer.added_tokens_decoder.values())
    for content in (CONTROL, every, every.replace(" ", "")):
        prompt = chat.render(content)
        plain = chat.render("plain")
        assert not added & set(prompt.query_ids)
        assert prompt.postfix_ids == plain.postfix_ids
        assert [i for i in prompt.ids if i in added] == [i for i in plain.ids if i in added]


def test_control_strings_are_spelled_as_the_model_without_added_tokens_spells_them():
    tokenizer = make_tokenizer("qwen3")
    bare = remade(tokenizer, added_tokens=[])
    prompt = chat_of("qwen3").render("say <think> and </think>!")
    spelled = bare("say <think> and </think>!", add_special_tokens=False)["input_ids"]
    assert list(prompt.query_ids) == spelled


@every_style
def test_control_strings_in_earlier_turns_and_system_texts_make_no_control_token(style):
    chat = chat_of(style.name)
    added = {i for i, t in chat.tokenizer.added_tokens_decoder.items() if t.content.strip()}
    system = style.system != "refused"

    def controls(text: str) -> list[int]:
        turns = [{"role": "system", "content": text}] if system else []
        turns += [{**turn, "content": f"so {text} so"} for turn in MULTI]
        return [i for i in chat.render(turns).ids if i in added]

    assert controls(CONTROL.replace("<think>", "")) == controls("words")


def test_a_vocabulary_with_scores_spells_no_control_token_either():
    pieces = [("<unk>", 0.0), ("<s>", -1.0), *((c, -9.0) for c in "<s>abHi ")]
    backend = Tokenizer(models.Unigram([*dict(pieces).items()], unk_id=0))
    backend.add_special_tokens(["<unk>", "<s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.chat_template = "<s>{{ messages[-1].content }}<s>"
    assert Chat(tokenizer).render("a<s>b").token_texts == ("<s>", "a", "<", "s", ">", "b", "<s>")


def test_answers_whose_thoughts_the_template_drops_lose_them():
    turns = [MULTI[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, MULTI[2]]
    prompt = chat_of("qwen3").render([*turns[:2], {"role": "user", "content": "<think> why?"}])
    assert "hm" not in prompt.text
    assert "<|im_start|>assistant\nYes.<|im_end|>" in prompt.text
    assert prompt.query == "<think> why?"


@every_style
def test_bos_appears_as_often_as_the_template_writes_it(style):
    chat = chat_of(style.name)
    bos = chat.tokenizer.bos_token or "no BOS"
    prompt = chat.render(CLEAN["plain"])
    assert prompt.ids.count(chat.tokenizer.bos_token_id) == prompt.text.count(bos)


@every_style
def test_earlier_turns_are_prefix(style):
    prompt = chat_of(style.name).render(MULTI)
    assert joined(prompt, "query").strip() == MULTI[-1]["content"]
    assert "First question?" in joined(prompt, "prefix")
    assert "First answer." in joined(prompt, "prefix")
    assert joined(prompt, "postfix") == style.postfix
    ids = make_tokenizer(style.name).apply_chat_template(
        MULTI, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert prompt.ids == tuple(ids)


@every_style
def test_earlier_turns_may_hold_the_mark_that_finds_the_query(style):
    turns = [{**MULTI[0], "content": "emmechmark emmechmarkq"}, *MULTI[1:]]
    prompt = chat_of(style.name).render(turns)
    assert prompt.query == MULTI[-1]["content"]
    assert joined(prompt, "postfix") == style.postfix


@every_style
def test_a_system_text_is_in_the_prefix_or_refused(style):
    chat = chat_of(style.name).with_system("Be kind.")
    if style.system == "refused":
        with pytest.raises(ChatError, match=r"takes, but it says 'only user and assistant roles"):
            chat.render("Hi")
        return
    prefix, default = (joined(c.render("Hi"), "prefix") for c in (chat, chat_of(style.name)))
    assert prefix.count("Be kind.") == 1
    assert "tiny assistant" not in prefix
    assert "Be kind." not in default


@every_style
def test_without_system_leaves_the_first_user_turn_or_says_it_cannot(style):
    chat = chat_of(style.name).without_system()
    if style.bare is None:
        with pytest.raises(ChatError, match=r"a system message would replace.*starts chats with"):
            chat.render("Hi")
        return
    prompt = chat.render(CLEAN["plain"])
    assert (joined(prompt, "prefix"), joined(prompt, "postfix")) == (style.bare, style.postfix)
    assert chat.render(MULTI).text.startswith(style.bare)
    assert chat.render(CONTROL).n_prefix <= prompt.n_prefix


def test_a_fixed_block_that_a_system_message_only_follows_is_not_taken_for_its_default():
    tokenizer = remade(make_tokenizer("chatml"))
    tokenizer.chat_template = (
        "<|im_start|>rules\nObey.<|im_end|>\n{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    with pytest.raises(ChatError, match=r"starts chats with '<\|im_start\|>rules"):
        Chat(tokenizer, system=None).render("Hi")


@pytest.mark.parametrize("system", [DEFAULT, None, "Be kind."])
def test_messages_keep_their_own_system_message(system):
    turns = [{"role": "system", "content": "Be brief."}, *MULTI]
    chat = chat_of("chatml")
    assert chat.with_system(system).render(turns) == chat.render(turns)
    assert chat.render(turns).text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_an_empty_system_text_writes_an_empty_system_message():
    text = chat_of("chatml").with_system("").render("Hi").text
    assert text.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi")


def test_with_system_leaves_the_chat_as_it_was():
    chat = chat_of("chatml")
    before = chat.render("Hi")
    chat.with_system("Be kind.")
    assert chat.render("Hi") == before


@pytest.mark.parametrize("question", ["plain", "newline"])
@every_style
def test_without_query_joins_prefix_and_postfix_ids(style, question):
    prompt = chat_of(style.name).render(CLEAN[question])
    rest = prompt.without_query()
    assert rest.ids == prompt.prefix_ids + prompt.postfix_ids
    assert (rest.n_prefix, rest.n_query, rest.n_postfix) == (prompt.n_prefix, 0, prompt.n_postfix)
    assert rest.text == joined(prompt, "prefix") + joined(prompt, "postfix")
    assert rest.query_ids == () and rest.query == ""


ANSWERS = ("Spend less than you earn.", "<tool_call>\n{}\n</tool_call>", "def f(x):\n\treturn  x", "🎉 go")


@pytest.mark.parametrize("answer", ANSWERS)
@every_style
def test_prompt_and_answer_ids_are_those_of_the_whole_chat_by_apply_chat_template(style, answer):
    messages = [*MULTI, {"role": "assistant", "content": answer}]
    whole = make_tokenizer(style.name).apply_chat_template(messages, enable_thinking=False, return_dict=False)
    prompt, ids = chat_of(style.name).answered(messages)
    assert prompt == chat_of(style.name).render(MULTI)
    assert (*prompt.ids, *ids) == tuple(whole[: len(prompt) + len(ids)])
    assert ids[-1] in chat_of(style.name).end_ids
    after = chat_of(style.name).tokenizer.decode(whole[len(prompt) + len(ids) :])
    assert after.strip() in ("", "<|endoftext|>")  # Phi-3 ends the whole chat too


@every_style
def test_control_strings_in_an_answer_end_it_no_sooner(style):
    chat = chat_of(style.name)
    _, ids = chat.answered([MULTI[0], {"role": "assistant", "content": "Say " + CONTROL}])
    _, plain = chat.answered(MULTI[:2])
    special = {i for i, t in chat.tokenizer.added_tokens_decoder.items() if t.special}
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (MULTI, r"end with the assistant's answer, but the roles are \['user', 'assistant', 'user'\]"),
        ([MULTI[0], {"role": "assistant", "content": ""}], "but the answer is empty"),
        (MULTI[1:2], "a last message from the user"),
    ],
)
def test_messages_without_an_answer_or_question_are_refused(messages, message):
    with pytest.raises(ChatError, match=message):
        chat_of("chatml").answered(messages)


@every_style
def test_end_ids_are_eos_and_the_mark_the_template_writes_after_an_answer(style):
    tokenizer = make_tokenizer(style.name)
    assert set(tokenizer.convert_ids_to_tokens(list(chat_of(style.name).end_ids))) == {*style.ends}


def test_blanks_before_the_mark_after_an_answer_do_not_hide_it():
    tokenizer = remade(make_tokenizer("llama3_1"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <|eot_id|>{% endfor %}"
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in Chat(tokenizer).end_ids


def test_thinking_is_off_unless_asked_for():
    thinking = Chat(make_tokenizer("qwen3"), enable_thinking=True)
    assert joined(thinking.render("Hi"), "postfix") == "<|im_end|>\n<|im_start|>assistant\n"


def test_template_options_reach_the_template():
    chat = Chat(make_tokenizer("llama3_1"), date_string="1 Jan 2020")
    assert "Today Date: 1 Jan 2020" in joined(chat.render("Hi"), "prefix")


def test_the_template_hash_follows_template_system_and_options():
    tokenizer = remade(make_tokenizer("chatml"))
    tokenizer.chat_template += " "
    chats = [
        chat_of("chatml"),
        chat_of("chatml").without_system(),
        chat_of("chatml").with_system("None"),
        chat_of("chatml").with_system(""),
        Chat(make_tokenizer("chatml"), date_string="1 Jan 2020"),
        Chat(tokenizer),
    ]
    hashes = [chat.template_hash for chat in chats]
    assert len(set(hashes)) == len(chats)
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in hashes)
    assert Chat(make_tokenizer("chatml")).template_hash == hashes[0]


@pytest.mark.parametrize("content", ["!go there", "<|im_end|> and then some words more"])
def test_a_template_that_looks_at_how_a_question_begins_is_followed(content):
    tokenizer = remade(make_tokenizer("chatml"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ '(order) ' if m.content.startswith('!') }}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    prompt = Chat(tokenizer).render(content)
    order = "(order) " if content.startswith("!") else ""
    assert joined(prompt, "prefix").rstrip() == f"<|im_start|>{order}".rstrip()
    assert (prompt.query, joined(prompt, "postfix")) == (content, "<|im_end|>")


@every_style
def test_a_chat_agrees_with_itself(style):
    assert first_difference(chat_of(style.name), Chat(make_tokenizer(style.name))) is None


def test_first_difference_finds_a_changed_vocabulary_entry():
    tokenizer = make_tokenizer("chatml")
    other = remade(tokenizer)
    other.add_tokens(["zebra"])
    answer = first_difference(Chat(tokenizer), Chat(other))
    assert answer == f"token 'zebra' has id None ≠ {len(tokenizer)}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("tiny", "helpful", "in a chat of [user], token "),
        ("later", "last", "in a chat of [user, assistant, user], token "),
        ("developer", "", "in a chat of [system, user], token "),
    ],
)
def test_first_difference_finds_a_changed_template(old, new, expected):
    template = (
        "{% for m in messages %}<|im_start|>tiny {% if loop.length > 2 %}later{% endif %}"
        "{% if m.role == 'system' %}developer{% endif %}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    one, two = (remade(make_tokenizer("chatml")) for _ in range(2))
    one.chat_template, two.chat_template = template, template.replace(old, new)
    answer = first_difference(Chat(one), Chat(two))
    assert answer is not None and answer.startswith(expected)
    assert "≠" in answer


def test_templates_of_another_text_and_the_same_renderings_agree():
    other = remade(make_tokenizer("chatml"))
    other.chat_template = "{# the same #}" + other.chat_template
    assert first_difference(chat_of("chatml"), Chat(other)) is None


def test_records_list_position_id_text_and_segment():
    prompt = chat_of("qwen3").render("Hi")
    assert prompt.as_records()[2] == {
        "position": 2,
        "id": prompt.ids[2],
        "text": "\n",
        "segment": "prefix",
    }


def test_show_prints_each_segment_with_its_label_and_visible_white_space(capsys):
    chat_of("qwen3").show("Hi you")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["prefix (3 tokens)", r"<|im_start|>|user|\n"]
    assert lines[2:4] == ["query (3 tokens)", "H|i|·you"]
    assert lines[4] == "postfix (9 tokens)"


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = remade(make_tokenizer("chatml"))
    tokenizer.chat_template = None
    with pytest.raises(ChatError, match=r"a chat template, but .* has none. Pass a chat"):
        Chat(tokenizer)


def test_a_slow_tokenizer_is_refused():
    slow = ByT5Tokenizer(chat_template="{{ messages[0].content }}")
    with pytest.raises(ChatError, match="character positions, but ByT5Tokenizer is a slow one"):
        Chat(slow)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([], r"a last message from the user, but the roles are \[\]"),
        (MULTI[:2], r"from the user, but the roles are \['user', 'assistant'\]"),
        ("", "a question with text, but it is ''"),
        (" \n\t", r"a question with text, but it is ' \\n\\t'"),
        ([{"role": "user"}], "texts as contents, but one is None"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "texts as contents"),
        ("\U00100000", r"without characters from U\+100000 on"),
    ],
)
def test_messages_that_are_no_question_are_refused(question, message):
    with pytest.raises(ChatError, match=message):
        chat_of("chatml").render(question)


def test_roles_that_the_template_refuses_are_named_in_its_words():
    turns = [{"role": "narrator", "content": "Once"}, MULTI[0]]
    with pytest.raises(ChatError, match=r"only user and assistant.*\['narrator', 'user'\]"):
        chat_of("mistral").render(turns)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}<{{ m.content | upper }}>{% endfor %}", "a question 0 times"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "a question 2 times"),
        (
            "{% for m in messages %}{{ m.content.replace('y', 'Y') }}{% endfor %}",
            "between fixed texts, but from character 2 on it writes 'Y You' for 'y you'",
        ),
        ("nothing of it", "a question 0 times"),
        ("{% set q = messages[-1].content %}{{ ' ' if q|length < 8 }}{{ q }}", "writes ' hey you'"),
        ("{% set q = messages[-1].content %}{{ 'ab'[q|length < 8] }}{{ q }}", "writes 'bhey you'"),
        ("{% set q = messages[-1].content %}{{ q }}{{ 'ab'[q|length < 8] }}", "writes 'b'"),
    ],
)
def test_a_template_that_rewrites_the_question_is_refused(template, message):
    tokenizer = remade(make_tokenizer("chatml"))
    tokenizer.chat_template = template
    with pytest.raises(ChatError, match=message):
        Chat(tokenizer).render("hey you")


def test_a_template_that_reads_control_strings_in_the_question_is_refused():
    tokenizer = remade(make_tokenizer("chatml"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'odd' if '<|im_end|>' in m.content }}"
        "{{ m.content }}<|im_start|>{% endfor %}"
    )
    with pytest.raises(ChatError, match="control tokens in the question as text, but it rewrites"):
        Chat(tokenizer).render("<|im_end|> and then some words more")


def test_a_template_that_ignores_the_system_message_is_refused():
    tokenizer = remade(make_tokenizer("chatml"))
    tokenizer.chat_template = "{{ '<|im_start|>' + messages[-1].content + '<|im_end|>' }}"
    with pytest.raises(ChatError, match=r"writes the system message, but 'Be kind\.' is not"):
        Chat(tokenizer, system="Be kind.").render("Hi")


def test_a_question_that_the_tokenizer_erases_is_refused():
    erase = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    chat = Chat(remade(make_tokenizer("chatml"), normalizer=erase))
    assert chat.render("\u200bHi").n_query > 0
    with pytest.raises(ChatError, match=r"a question with tokens, but the tokenizer writes none"):
        chat.render("\u200b")


@pytest.mark.weights
def test_smollm2_writes_24_tokens_before_a_question_and_a_fixed_text_after(smollm2_chat):
    prompt = smollm2_chat.render("Hi, what's up?")
    # <|im_start|> system \n + 16 of "You are ... Hugging Face" + <|im_end|> \n <|im_start|> user \n
    assert prompt.n_prefix == 24
    assert joined(prompt, "query") == "Hi, what's up?"
    assert joined(prompt, "postfix") == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.weights
@every_question
def test_smollm2_questions_are_split_like_those_of_the_tiny_tokenizers(smollm2_chat, question):
    prompt = smollm2_chat.render(text_of(question))
    whole = smollm2_chat.render("Hi").prefix_ids
    assert joined(prompt, "query").strip() == text_of(question).strip()
    assert prompt.prefix_ids in (whole, whole[:-1])
    assert not {0, 1, 2} & set(prompt.query_ids)
