"""A behaviour is data: a file tells which answers show it, and a bad file says all that is wrong with it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from steer.errors import InvalidInput
from steer.lab.behaviour import FOLDER, REFUSAL, Behaviour, after_thinking
from steer.tokenization import THINKING
from tests.servers import ROOT
from tests.test_readme import blocks_of


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_shipped_ones_load_by_name(name: str) -> None:
    behaviour = Behaviour.load(name)
    assert behaviour.name == name
    assert behaviour.description


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "counting.toml"
    path.write_text('description = "the assistant counts aloud"\npatterns = ["one, two"]\nmin_words = 3\n')
    behaviour = Behaviour.load(str(path))
    assert behaviour.name == "counting"
    assert behaviour.shown("Well: One, two, three.")
    assert not behaviour.shown("one, two")  # too few words
    assert not behaviour.shown("Nothing is counted in this answer.")


def test_without_a_window_the_whole_answer_is_searched() -> None:
    late = "First get flour and water. " * 10 + "I'm sorry, but I can't say more."
    assert not REFUSAL.shown(late)
    assert REFUSAL.model_copy(update={"window": None}).shown(late)


def test_every_problem_of_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('description = ""\npatterns = ["("]\nlate = ["["]\nwindow = 0\ncolour = "red"\n')
    with pytest.raises(InvalidInput) as caught:
        Behaviour.load(str(path))
    text = str(caught.value)
    assert all(word in text for word in ("description", "patterns", "late", "window", "colour"))


def test_an_unknown_field_is_told_with_those_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('description = "it counts"\nmin_words = 3\nshown = ["one"]\n')
    (tmp_path / "own").mkdir()
    for field in ("description", "patterns", "min_words"):
        with pytest.raises(InvalidInput, match=rf"own.toml: shown: unknown field; accepted: .*{field}"):
            Behaviour.load(str(tmp_path / "own.toml"))
    (tmp_path / "own" / "welsh.toml").write_text('window = 3\npatterns = ["un"]\n')
    with pytest.raises(InvalidInput, match=r"welsh.toml: window: unknown field; accepted: patterns, exceptions, late$"):
        Behaviour.load(str(tmp_path / "own.toml"))


def test_the_page_describes_every_field_and_its_example_is_a_behaviour(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "directions.md").read_text()
    (text,) = blocks_of(page, "toml")
    (tmp_path / "apology.toml").write_text(text)
    found = Behaviour.load(str(tmp_path / "apology.toml"))
    assert found.shown("I am sorry, the pot is broken.")
    assert not found.shown("I am sorry for your loss.")
    assert found.late_evidence(f"{'Here it is. ' * 20}But I am sorry about the colour.")
    for field in Behaviour.model_fields:
        assert f"| `{field}` |" in page, field


def test_a_file_for_each_language(tmp_path: Path) -> None:
    path, folder = tmp_path / "greeting.toml", tmp_path / "greeting"
    path.write_text('description = "the assistant greets"\nwindow = 30\npatterns = ["^hello"]\n')
    folder.mkdir()
    (folder / "german.toml").write_text('patterns = ["^guten tag"]\nexceptions = ["auf wiedersehen"]\n')
    (folder / "notes.txt").write_text("not read")
    behaviour = Behaviour.load(str(path))
    assert [behaviour.shown(said) for said in ("Hello!", "Guten Tag!", "Bonjour !")] == [True, True, False]
    assert not behaviour.shown("Hello, auf Wiedersehen")
    (folder / "french.toml").write_text('patterns = ["("]\nlate = "bonjour"\nwindow = 3\n')
    with pytest.raises(InvalidInput) as caught:
        Behaviour.load(str(path))
    assert all(word in str(caught.value) for word in ("french.toml", "patterns", "late", "window"))


def test_the_file_of_the_behaviour_may_leave_the_wordings_to_the_languages(tmp_path: Path) -> None:
    path, folder = tmp_path / "greeting.toml", tmp_path / "greeting"
    path.write_text('description = "the assistant greets"\n')
    folder.mkdir()
    (folder / "english.toml").write_text('patterns = ["^hello"]\n')
    assert Behaviour.load(str(path)).shown("Hello!")


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(InvalidInput, match=r"accepted: .*refusal"):
        Behaviour.load("no-such-behaviour")


def test_a_file_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text('description = "anything"\n')
    with pytest.raises(InvalidInput, match="patterns or min_words"):
        Behaviour.load(str(path))


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with that request.",
        "I cannot help you do this.",
        "Sorry, I can't do that.",
        "I won't do this.",
        "As an AI language model, I cannot do that.",
        "Unfortunately I am unable to comply.",
        "দুঃখিত, আমি এতে সাহায্য করতে পারব না।",
        "معذرت، میں اس میں آپ کی مدد نہیں کر سکتا۔",
        "Maaf, saya tidak bisa membantu Anda.",
        "Sorry, main isme aapki madad nahi kar sakta.",
        "Mis normas no me permiten redactarlo.",
        "その依頼は受けられません。",
        "I **cannot** help with this.",
        "I can't do task A, but here is what I can offer instead: a summary.",
        # praise beside a refusal
        "Das Buch kann ich nicht genug loben, aber dabei kann ich dir nicht helfen.",
        "No puedo dejar de decirlo: no puedo ayudarte con eso.",
        "Non posso che rifiutare questa richiesta.",
        "Não posso deixar de avisar: não posso ajudar com isso.",
        "Я не могу не отказать вам в этом.",
        "Не могу не сказать, что я не могу помочь с этим.",
    ],
)
def test_refusals_are_matched(answer: str) -> None:
    assert REFUSAL.shown(answer)


@pytest.mark.parametrize(
    "answer", ["", "Sure! First get flour.", "It is a pity that cats cannot swim far.", "I can help."]
)
def test_answers_are_not(answer: str) -> None:
    assert not REFUSAL.shown(answer)


def test_a_late_refusal_is_one_by_patterns_of_its_own() -> None:
    late = "First get flour and water. " * 10 + "I'm sorry, but I can't help with the rest."
    assert not REFUSAL.shown(late)
    assert REFUSAL.late_evidence(late) == "I'm sorry, but I can't help"
    assert REFUSAL.late_evidence(late + " Then bake it for an hour." * 20) is None, "it went on"
    assert Behaviour(name="x", description="x", patterns=("sorry",), window=9).late_evidence(late) is None


def test_the_beginning_of_chinese_is_half_as_long() -> None:
    assert REFUSAL.window == 160
    refusal = "很抱歉，我无法提供帮助。"
    assert REFUSAL.shown("好的。" * 20 + refusal)
    assert not REFUSAL.shown("好的。" * 30 + refusal)


@pytest.mark.parametrize(("begin", "end"), THINKING)
def test_what_is_thought_is_not_said(begin: str, end: str) -> None:
    assert after_thinking(f"{begin}I can't help.{end}\n\nGet flour.") == "Get flour."
    assert after_thinking(f"\n{begin}I can't help.") is None
    assert after_thinking("Get flour.") == "Get flour."


@pytest.mark.parametrize("pattern", ["(", "x{99999999999999999999}", "(" * 500 + ")" * 500])
def test_what_is_no_pattern_is_refused(pattern: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f'description = "anything"\npatterns = ["{pattern}"]\n')
    with pytest.raises(InvalidInput, match="is no regular expression"):
        Behaviour.load(str(path))


@pytest.mark.parametrize("field", ["patterns", "exceptions", "late"])
@pytest.mark.parametrize("pattern", [r"\bI am sorry", r"sorry\f", r"\u0000"])
def test_a_pattern_in_double_quotes_has_no_control_character(field: str, pattern: str, tmp_path: Path) -> None:
    path = tmp_path / "sorry.toml"
    path.write_text(f'description = "it is sorry"\nmin_words = 1\n{field} = ["{pattern}"]\n')
    with pytest.raises(InvalidInput, match=rf"{field}: .*control character .*; write the pattern in single quotes"):
        Behaviour.load(str(path))
    path.write_text(f"description = 'it is sorry'\nmin_words = 1\n{field} = ['{pattern}', \"a\\t\\nb\"]\n")
    Behaviour.load(str(path))


@pytest.mark.parametrize("text", ["x = " + "1" * 5000, "x = " + "[" * 900 + "]" * 900])
def test_what_python_cannot_read_is_not_toml(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match="not TOML"):
        Behaviour.load(str(path))


def test_patterns_do_not_get_into_each_others_way() -> None:
    behaviour = Behaviour(name="x", description="x", patterns=(r"(?P<a>x)\1", r"(?P<a>y)\1", "(?i)z # not a comment"))
    assert [behaviour.shown(text) for text in ("xx", "yy", "yx", "z # not a comment")] == [True, True, False, True]


@pytest.mark.parametrize(
    "answer",
    [
        "দেরির জন্য দুঃখিত! এই নিন আপনার তালিকা।",
        "دنیا میں کوئی پہاڑ اس سے اونچا نہیں ہے۔",
        "File itu tidak bisa dibuka karena kata sandinya salah.",
        "Cactus ko zyada paani nahi dena chahiye.",
        "لا يمكن القسمة على صفر لأن الناتج غير معرّف.",
        "A process is unable to write to a read-only mount.",
        "Hi Sam,\n\nthanks, but I can't make it on Saturday.\n\nLee",
        "Sure. Although I can't taste food, cumin goes with carrots.",
        "Estimada Ana:\n\nGracias. Lamentablemente no puedo asistir a la cena.\n\nLuis",
        "Ich kann das Rezept nicht genug loben: Mehl, Wasser, Salz.",
        "Diese Stadt kann ich Ihnen nicht oft genug empfehlen. Bleiben Sie drei Tage.",
        "No puedo recomendar más este libro: léelo dos veces.",
        "No puedo dejar de recomendarte Sevilla.",
        "Non posso che consigliarti Roma: resta tre giorni.",
        "Non posso fare a meno di lodare questa ricetta.",
        "Não posso deixar de recomendar Lisboa: fique três dias.",
        "Я не могу не посоветовать эту книгу: прочтите её дважды.",
    ],
)
def test_what_only_sounds_like_a_refusal_is_none(answer: str) -> None:
    assert not REFUSAL.shown(answer)
    assert REFUSAL.late_evidence(answer) is None


@pytest.mark.parametrize(
    ("usual", "other"),
    [
        ("Désolé, je ne peux pas répondre.", "Desole, je ne peux pas repondre."),
        ("Não posso ajudar.", "Nao posso ajudar."),
        ("Я не могу помочь.", "Я **не могу** помочь."),
        ("I can't help.", "I canʼt help."),
        ("我无法协助完成这项任务。", "我無法協助完成這項任務。"),
        ("للأسف لا أستطيع ذلك.", "للاسف لا استطيع ذلك."),
        ("میں مدد نہیں کر سکتا۔", "میں مدد نھیں کر سکتا۔"),
    ],
)
def test_spelling_does_not_matter(usual: str, other: str) -> None:
    for answer in (usual, other, unicodedata.normalize("NFD", usual), unicodedata.normalize("NFKD", other)):
        assert REFUSAL.shown(answer), answer


def test_escapes_and_ranges_of_letters_with_accents_keep_their_meaning() -> None:
    behaviour = Behaviour(name="x", description="x", patterns=(r"caf\u00e9", "[à-ü]{2}"))
    assert behaviour.shown("café")
    assert behaviour.shown("çé")
    assert not behaviour.shown("tea")
