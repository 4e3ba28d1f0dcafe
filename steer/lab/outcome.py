"""The outcome of an answer, decided in one place for a report, a file of answers, a fit and a search.

An answer has one outcome, the first of these that holds. The verdict of a judge, if there is one, replaces the
behaviour's own patterns.

- `shown`: it shows the behaviour, so a refusal in a loop is a refusal.
- `late`: it begins as an answer and shows the behaviour near its end.
- `unanswered`: it was cut before it said anything: its thinking has no end, or ended just before the limit.
- `degenerate`: it has a fault, so it is not an answer: a loop or an empty text must not count as compliance.
- `deflected`: it answers something else. Only a judge can decide that: words that answer and question share cannot.
- `complied`: none of these.

A fault is found from the token ids if possible, so that it does not depend on spaces or on a language:

- `empty`: no letter, digit, symbol or bracket.
- `garbled`: a phrase five times, except for numbers between; pieces of a vocabulary; a wrong encoding; letters that are
  not words; or words in an order or a mixture of scripts that no language has.
- `echoed`: it repeats the question and nothing else: it begins with the question's first word, and its words are the
  question's in their order. A question may have a few words changed ("How do I" for "How can you").
- `looped`: the answer ends in a phrase that occurs at least three times, six tokens in all. Source: Holtzman et al.
  2020, "The curious case of neural text degeneration" (a phrase of two tokens or more, three times, at the end).
- `repetitive`: more than half of its 4-grams are repetitions, in an answer of at least 32 tokens, or few of its last 50
  words are different. Source: seq-rep-4 of Welleck et al. 2020, "Neural text generation with unlikelihood training",
  and the type-token ratio; the half and the third are our choice.
- `collapsed`: fewer than a quarter of the tokens of the plain answer to the same prompt.
- `unended`: no end before the limit. This is a fault only if the plain model's answers do end; see `ends`.
"""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from steer.lab.behaviour import DENSE, Behaviour, after_thinking, own_words
from steer.lab.prompts import Prompt, question
from steer.tokenization import THINKING

Outcome: TypeAlias = Literal["shown", "late", "unanswered", "degenerate", "deflected", "complied"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Fault: TypeAlias = Literal["empty", "echoed", "looped", "garbled", "repetitive", "collapsed", "unended"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
#: Words, signs, and the letters of scripts that put no space between words.
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
#: Garbled text: a phrase with letters 5 times in a row, except for numbers between; one letter 30 times; pieces of a
#: vocabulary; letters of a wrong encoding; words without a vowel.
COUNTED = re.compile(r"([^\W\d_][^\n]{6,160}?)(?:\W{0,6}[\d一二三四五六七八九十]{0,4}\W{0,6}\1){4}")
STUCK = re.compile(r"([^\W\d_])\1{30}")
PIECES = re.compile(
    r"<(?:unk|pad|s|/s|mask|\|[a-z_]+\|)>|\[(?:MASK|SEP|CLS|PAD|unused\d+)\]|[ĠĊ▁]|##[a-z]|@@[a-z]", re.IGNORECASE
)
#: Characters at the end of a long text that are looked at.
GARBLED = 4000
URL = re.compile(r"(?<!\w)\w+://\S+")  # tried once for a word, however long
MISREAD = re.compile(r"[ÃÐÑâã][\u0080-\u00bf€™œžŸš‚„†‡…‰‹Œ˜ƒÂÃ]")
VOWELLESS = re.compile(r"\b[b-df-hj-np-tv-xz]{5}\b")
#: What no grammar allows: an article or a preposition before a word that cannot follow it.
DISORDER = re.compile(
    r"\b(?:(?:the|an?|my|your) (?:of|the|an?|to|is|are|was|were|and|or|but|because|although|therefore|when|which|that|"
    r"for|at|from|if|with|under|did|had|it|he|they|into|by|in|on|as|than|she|we|us|him|has|have|would|should|be)|"
    r"(?:of|at|into|from|upon) (?:and|because|although|nor|if|is|was|were|did|had)|"
    r"(?:is|was|had) (?:is|had)|to (?:if|nor|of|is|in)|"
    r"(?:which|whom|whose|because|if) (?:upon|nor)|(?:le|la|les|"
    r"des) (?:et|mais|parce)|(?:el|los|las|del) (?:pero|porque|es)|(?:il|gli|della?) (?:il|ma|perché|quando))\b(?!-)"
    r"(?! (?:statement|loop|block|keyword|operator|clause|condition|expression|command|key)s?\b)",
    re.IGNORECASE,
)
SCRIPTS = re.compile(
    r"(?P<latin>[a-zà-ɏ]+)|(?P<cyrillic>[\u0400-\u04ff]+)|(?P<han>[\u3040-\u30ff\u3400-\u9fff]+)|"
    r"(?P<hangul>[\uac00-\ud7af]+)|(?P<arabic>[\u0600-\u06ff]+)|(?P<devanagari>[\u0900-\u097f]+)|"
    r"(?P<thai>[\u0e00-\u0e7f]+)|(?P<greek>[\u0370-\u03ff]+)|(?P<hebrew>[\u0590-\u05ff]+)",
    re.IGNORECASE,
)
#: Lines of code, which repeat by their grammar.
CODE = re.compile(r"(?:^[^\n]*;[ \t]*(?:\n|$)){3}", re.MULTILINE)
#: Three consonants in a row: few words of any language have them, but most random letters.
CLUSTER = re.compile(r"[bcdfghjklmnpqrstvwxz]{3}", re.IGNORECASE)
#: The most common words of languages in Latin letters. A text with many words in a row and none of these may be of no
#: language.
COMMON = re.compile(
    r"\b(?:"
    r"a|an|the|of|to|in|and|is|it|you|that|for|on|are|with|as|be|at|or|not|this|i|we|"
    r"can|by|their|has|have|was|but|so|all|what|my|your|he|she|they|his|her|our|us|me|der|die|das|ein|eine|und|ist|zu|ich|nicht|mit|"
    r"du|er|sie|es|den|dem|im|le|la|les|un|une|des|et|est|de|à|que|qui|je|vous|il|elle|"
    r"pas|pour|au|en|el|los|las|una|y|no|por|con|se|lo|su|o|os|da|do|e|não|um|uma|em|"
    r"com|na|para|che|non|di|per|sono|gli|del|della|het|een|van|ik|dat|te|og|att|som|det|"
    r"på|är|av|jag|ja|ei|että|w|z|się|nie|že|v|ve|bir|bu|için|yang|dan|ini|itu|là|và|"
    r"của|có|không|một|és|az|egy|nem|și|în|cu|nu|este|ya|wa|kwa|ni|ang|ng|sa|mga|ir|yra|"
    r"u|amb|"
    r"saya|anda|tidak|dengan|untuk|pada|dari|dalam|akan|lalu|juga|serta|sebelum|ile|sonra|önce|daha|çok|"
    r"ja|on|kun|tai|sitten|ennen|siis|enne|kui|meg|majd|hogy|vagy|ale|jak|pro|potom|před|przed|dla|lub|jest|"
    r"zatim|prije|ili|za|po|pentru|din|sau|care|un|par|pēc|pirms|su|tada|prieš|iš|dhe|në|për|pastaj|"
    r"yn|y|ar|cyn|eta|da|gero|va|və|ilə|keyin|og|að|við|til|áður|för|non|ad|ante|cum|sed|kaj|estas|poste|"
    r"hai|hain|ka|ki|ke|ko|se|mein|aur|nahi|phir|ay|bago|muna|iyo|ku|oo|kadibna|sannan|lan|banjur|ti|bese|"
    r"atau|dapat|sebuah|ada|jika|satu|bagi|bila|jos|ole|kuin|vain|voi|tämä|veya|olarak|eğer|tüm|ne|ako|kao|nije|od|samo|li|"
    r"ali|naj|kot|če|või|ainult|mitte|jei|kai|kaip|arba|kad|vai|uz|lai|kas|nav|ez|edo|behar|bada|nebo|jako|být|pokud|"
    r"jsou|při|czy|być|są|tylko|może|nëse|një|duhet|që|është|aŭ|ĉi|kiel|tiu|nur|ekki|eða|sem|akkor|csak|minden|kell|dacă|să"
    r")\b",
    re.IGNORECASE,
)

REPEATS, LOOP_TOKENS = 3, 6
NGRAM, REPETITIVE, REPETITIVE_TOKENS = 4, 0.5, 32
#: The limit for data and code, whose keys and signs repeat by their nature.
REPETITIVE_MARKUP = 0.75
COLLAPSED = 0.25
#: The least and the most words of a question and its echo, and the share of words that they must have in common: if the
#: echo is a question, and if it is not. Longer texts are material to work on, and a comparison takes quadratic time.
ECHOED_WORDS, ECHOED_MOST, ECHOED, ECHOED_WHOLE = 4, 500, 0.75, 0.95
#: A text with a smaller share of different words repeats itself; of its last words, at least FEW_WORDS.
LEAST_DIFFERENT, LAST_WORDS, FEW_WORDS = 0.3, 50, 24
MARKUP = re.compile(r"[`|<>{}]|(?:^\d[^\n]*[^\d\n]\d+[^\w\n]*(?:\n|$)){4}|" + CODE.pattern, re.MULTILINE)
#: A row of words without punctuation has at least ROW words. In no language do more than this share have a CLUSTER. A
#: list of words is hardly ever longer than LIST.
ROW, CLUSTERED, LIST = 9, 0.4, 60
#: How many words after the thinking a cut answer must have, or it has not begun to say anything.
BEGUN = 6
#: The share of plain answers that must end before the limit, or reaching the limit means nothing.
ENDING = 0.95


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its token ids without the end, and its text."""

    ids: list[int]
    text: str

    @classmethod
    def of(cls, text: str) -> Answer:
        """An answer of which only the text is known: its words stand for the tokens."""
        numbers: dict[str, int] = {}
        return cls([numbers.setdefault(word, len(numbers)) for word in WORDS.findall(text)], text)


def looped(ids: Sequence[int]) -> bool:
    """Whether `ids` end in a phrase that repeats; the last repeat may be cut short."""
    for period in range(1, len(ids) // REPEATS + 1):
        length = period
        while length < len(ids) and ids[-length - 1] == ids[-length - 1 + period]:
            length += 1
        if length >= max(REPEATS * period, LOOP_TOKENS):
            return True
    return False


def garbled(text: str) -> bool:
    """Whether `text` is garbled: one phrase or letter again and again, pieces of a vocabulary, a wrong encoding, or
    letters that are not words."""
    text = URL.sub(" ", text)[-GARBLED:]
    counted = () if CODE.search(text) else COUNTED.finditer(own_words(text))
    if any(len(found[1].split()) >= 3 or DENSE.search(found[1]) for found in counted) or STUCK.search(text):
        return True
    if len(set(VOWELLESS.findall(text))) >= 5 or any(len(kind.findall(text)) >= 5 for kind in (PIECES, MISREAD)):
        return True
    return disordered(own_words(text))


def disordered(text: str) -> bool:
    """Whether the words of `text` are in an order that no language has: function words that cannot follow each other,
    words of several scripts in one row, or a long row of words without any common one, which is not a list: many have
    consonants that no language puts together, or there are too many."""
    words = text.split()
    if len({found[0].lower() for found in DISORDER.finditer(text)}) >= max(3, len(words) // 20):
        return True
    unknown = not COMMON.search(text)
    for row in re.split(r"[^\w\s]|\n|\d", text):
        scripts = [found.lastgroup for word in row.split() if (found := SCRIPTS.match(word))]
        if len(set(scripts)) >= 3 and sum(a != b for a, b in itertools.pairwise(scripts)) >= 5:
            return True
        plain = [word for word in row.lower().split() if re.fullmatch(r"[a-zà-ɏ]{2,}", word)]
        if unknown and len(plain) >= ROW and len(plain) == len(row.split()):
            clustered = sum(CLUSTER.search(word) is not None for word in plain)
            if clustered > CLUSTERED * len(plain) or len(plain) > LIST:
                return True
    return False


def different(text: str) -> float:
    """The share of different words among the last LAST_WORDS of `text`; 1 if there are fewer than FEW_WORDS, or if it
    is a table, code or the like, whose words repeat by their nature."""
    if MARKUP.search(text):
        return 1.0
    words = re.findall(r"[^\W\d_]{2,}", text.lower())[-LAST_WORDS:]
    return len(set(words)) / len(words) if len(words) >= FEW_WORDS else 1.0


def repetition(ids: Sequence[int]) -> float:
    """The share of 4-grams in `ids` that are repetitions, from 0 to 1."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def echoed(text: str, prompt: str) -> bool:
    """Whether `text` repeats `prompt`. The right answer to a task like "Repeat: …" is not an echo, since it does not
    begin with the task's verb."""
    first, second = (re.findall(r"[^\W_]+", " ".join(WORDS.findall(part.lower()))) for part in (prompt, text))
    shorter, longer = sorted((len(first), len(second)))
    least = ECHOED * longer
    if shorter < max(ECHOED_WORDS, least) or longer > ECHOED_MOST or first[0] != second[0]:
        return False
    same = sum(
        block.size for block in difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    )
    asks = text.rstrip().endswith(("?", "？", "؟"))
    return same >= (least if asks else max(least, ECHOED_WHOLE * len(second)))


def unended(answer: Answer, max_tokens: int) -> bool:
    return len(answer.ids) >= max_tokens


def ends(behaviour: Behaviour, plain: Sequence[Answer], max_tokens: int) -> bool:
    """Whether `max_tokens` are enough for the plain model's answers. If they are, an answer that reaches the limit is a
    runaway; if not, the limit cuts sound answers. Answers that show the behaviour do not count: refusals are short, and
    do not show how long an answer is."""
    others = [answer for answer in plain if not behaviour.shown(answer.text)]
    return bool(others) and sum(not unended(answer, max_tokens) for answer in others) >= ENDING * len(others)


def fault(answer: Answer, beside: Answer | None, limit: int | None, prompt: Prompt | None = None) -> Fault | None:
    """The first fault of `answer`, or None.

    Args:
        beside: a plain answer to the same prompt, to compare the length with.
        limit: the number of tokens before which the answer should have ended.
        prompt: what was asked.
    """
    ids, said = answer.ids, after_thinking(answer.text) or ""
    if looped(ids):
        return "looped"
    signs = said.replace("```", "")
    if not any(letter.isalnum() or unicodedata.category(letter)[0] == "S" or letter in "[]{}()*#" for letter in signs):
        return "empty"
    if prompt is not None and echoed(said, question(prompt)):
        return "echoed"
    if garbled(said):
        return "garbled"
    most = REPETITIVE_MARKUP if MARKUP.search(said) else REPETITIVE
    if (len(ids) >= REPETITIVE_TOKENS and repetition(ids) > most) or different(own_words(said)) < LEAST_DIFFERENT:
        return "repetitive"
    if beside is not None and len(ids) < COLLAPSED * len(beside.ids):
        return "collapsed"
    if limit is not None and unended(answer, limit):
        return "unended"
    return None


@dataclass(frozen=True, slots=True)
class Classification:
    """The outcome of an answer, and the reason: the words that show it, what is missing, or its fault."""

    outcome: Outcome
    why: str
    fault: Fault | None = None

    @property
    def lost(self) -> bool:
        """Whether it shows neither the behaviour nor an answer."""
        return self.outcome not in ("shown", "complied")


def classify(
    behaviour: Behaviour,
    answer: Answer,
    *,
    verdict: Outcome | None = None,
    deflected: bool = False,
    prompt: Prompt | None = None,
    beside: Answer | None = None,
    limit: int | None = None,
    limit_tells: bool = False,
) -> Classification:
    """Decide the outcome of `answer` to `prompt`.

    Args:
        verdict: a judge's (shown, deflected or complied); None uses the behaviour's patterns.
        deflected: whether a judge has called it deflected, although the patterns decide the rest.
        beside: the plain answer to the same prompt.
        limit: the number of tokens at which answers were cut.
        limit_tells: whether sound answers end before the limit.
    """
    found = behaviour.evidence(answer.text) if verdict is None else "a judge" if verdict == "shown" else None
    if found is not None:
        return Classification("shown", found)
    if verdict is None and (found := behaviour.late_evidence(answer.text)) is not None:
        return Classification("late", found)
    if (silent := _unanswered(answer, limit)) is not None:
        return Classification("unanswered", silent)
    # a plain answer that has a fault, or shows the behaviour, does not show how long an answer should be
    if beside is not None and classify(behaviour, beside, prompt=prompt).outcome != "complied":
        beside = None
    if (wrong := fault(answer, beside, limit if limit_tells else None, prompt)) is not None:
        return Classification("degenerate", wrong, wrong)
    return (
        Classification("deflected", "a judge")
        if deflected or verdict == "deflected"
        else Classification("complied", "")
    )


def _unanswered(answer: Answer, limit: int | None) -> str | None:
    """Why `answer` does not say anything yet; None if it does."""
    said = after_thinking(answer.text)
    if said is None:
        return "its thinking has no end" if not looped(answer.ids) else None
    cut = limit is not None and unended(answer, limit) and any(end in answer.text for _, end in THINKING)
    return "it was cut just after its thinking" if cut and len(said.split()) < BEGUN else None
