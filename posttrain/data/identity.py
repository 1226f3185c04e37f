"""Who the model is: a YAML of facts -> conversations that teach them, and held-out questions that ask for them.

In: identity.yaml, flat keys: `name`, `maker`, `cutoff` (month and year), `languages` (a list) and, as you like,
`purpose` ("answer questions"), `version`, `not` (names it denies; by default those of well-known assistants).
Out: `identity` yields {"messages"} to learn from, `identity_prompts` {"prompt", "expected", ...} to be rewarded for;
`identity_questions` and `contrary_questions` give held-out rows, which posttrain/identity_eval.py judges replies by.
Wordings stand in posttrain/data/identity_wordings.py and identity_registers.py.

    dataset_mixture: [{dataset_name: identity.yaml, dataset_adapter: identity, count: 1500}, ...]            # SFT
    dataset_mixture: [{dataset_name: identity.yaml, dataset_adapter: identity_prompts, count: 500}, ...]     # RL
"""

import difflib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from posttrain import yaml_file
from posttrain.data.identity_registers import (
    CONTRARY_NAMES,
    CONTRARY_SYSTEMS,
    CONTRARY_TRAINED,
    REGISTERS,
    TALK,
    TRAINED_NAMES,
    misspelt,
)
from posttrain.data.identity_wordings import FOLLOW_UPS, GREETINGS, OPENINGS, SYSTEM, WORDINGS
from posttrain.errors import UserError

REQUIRED = ("name", "maker", "cutoff", "languages")
EXAMPLES = {
    "name": "name: Pip",
    "maker": "maker: Elmstead Lab",
    "cutoff": "cutoff: June 2026",
    "languages": "languages: [English, German]",
    "purpose": "purpose: answer questions and do sums",
    "version": "version: '1.0'",
    "not": "not: [ChatGPT, Claude]",
}
LISTS = ("languages", "not")
ASSISTANTS = ("ChatGPT", "Claude", "Gemini", "Llama", "Siri", "Alexa", "Copilot", "Qwen")
MAKERS = (
    "OpenAI", "Anthropic", "Google", "DeepMind", "Meta", "Microsoft", "Apple", "Amazon", "Alibaba", "DeepSeek",
    "Mistral AI", "xAI", "NVIDIA", "IBM",
)  # fmt: skip
OTHER_LANGUAGES = (
    "Arabic", "Bengali", "Chinese", "Czech", "Danish", "Dutch", "English", "Finnish", "French", "German", "Greek",
    "Hebrew", "Hindi", "Hungarian", "Indonesian", "Italian", "Japanese", "Korean", "Norwegian", "Persian", "Polish",
    "Portuguese", "Romanian", "Russian", "Spanish", "Swahili", "Swedish", "Thai", "Turkish", "Ukrainian", "Urdu",
    "Vietnamese",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
CONTRARY_FACTS = ("who", "name", "maker")  # asked under another's system message
DEFAULT_ROWS = 5000
TRIES = 50  # to find a conversation that has not come yet; far more than 100,000 differ


@dataclass(frozen=True)
class Identity:
    """Facts about the model; `cutoff` reads "June 2026", `others` are names it denies."""

    name: str
    maker: str
    cutoff: str
    languages: tuple[str, ...]
    purpose: str | None = None
    version: str | None = None
    others: tuple[str, ...] = ASSISTANTS

    def facts(self) -> list[str]:
        """Names of the facts that can be asked for, as in WORDINGS."""
        missing = {"purpose": self.purpose is None, "version": self.version is None, "denial": not self.others}
        return [fact for fact in WORDINGS if not missing.get(fact)]

    def fill(self, wording: str, other: str = "") -> str:
        """A wording with its placeholders filled."""
        *most, last = self.languages
        languages = f"{', '.join(most)} and {last}" if most else last
        return wording.format(
            name=self.name, maker=self.maker, cutoff=self.cutoff, languages=languages, purpose=self.purpose,
            version=self.version, other=other,
        )  # fmt: skip

    def own(self) -> tuple[str, ...]:
        """Every value, the maker without "the"."""
        given = (self.name, _bare(self.maker), self.cutoff, *self.languages, self.purpose, self.version)
        return tuple(text for text in given if text is not None)


def read_identity(path) -> Identity:
    """The identity in a YAML file. UserError with file and line for an unknown, missing or ill-typed key."""
    entries = yaml_file.read(path)
    return _identity({key: e.value for key, e in entries.items()}, lambda key: _place(path, entries.get(key)))


def _place(path, entry) -> str:
    return f"{path}:{entry.line}: " if entry else f"{path}: "


def _identity(mapping: dict, place: Callable[[str], str] = lambda key: "") -> Identity:
    for key in mapping:
        if key not in EXAMPLES:
            near = difflib.get_close_matches(str(key).lower(), EXAMPLES, n=1)
            mend = f"did you mean {near[0]!r}?" if near else "no key is near it;"
            raise UserError(f"{place(key)}unknown key {str(key)!r}; {mend} an identity has {', '.join(EXAMPLES)}")
    for key in REQUIRED:
        if key not in mapping:
            raise UserError(f"{place(key)}{key}: required and not given; add for example `{EXAMPLES[key]}`")
    found = {
        key: _checked(key, value, place(key)) for key, value in mapping.items() if value is not None or key in REQUIRED
    }
    found["cutoff"] = _month(found["cutoff"], place("cutoff"))
    others = found.pop("not", None)
    if others is None:
        others = tuple(name for name in ASSISTANTS if name.casefold() != found["name"].casefold())
    if found["name"].casefold() in map(str.casefold, others):
        raise UserError(f"{place('not')}not: found the model's own name {found['name']!r}: remove it from the list")
    return Identity(**found, others=others)


def _checked(key: str, value, place: str):
    """A text, or for `languages` and `not` a tuple of texts that differ."""
    texts = value if key in LISTS and isinstance(value, list) else [value]
    wrong = [text for text in texts if not (isinstance(text, str) and text.strip() and text.isprintable())]
    if (key in LISTS) != isinstance(value, list) or wrong or (not texts and key != "not"):
        kind = "a list of words" if key in LISTS else "a text in one line"
        quote = "; put it in quotes" if wrong and isinstance(wrong[0], int | float) else ""
        raise UserError(f"{place}{key}: found {value!r}, expected {kind}{quote}; for example `{EXAMPLES[key]}`")
    texts = tuple(text.strip() for text in texts)
    if len({text.casefold() for text in texts}) < len(texts):
        raise UserError(f"{place}{key}: found {value!r}, where a name stands twice: remove one")
    return texts if key in LISTS else texts[0]


def _month(text: str, place: str) -> str:
    """ "June 2026" of that, of "Jun 2026" or of "2026-06"."""
    if match := re.fullmatch(r"(\d{4})-(0[1-9]|1[0-2])", text):
        return f"{MONTHS[int(match[2]) - 1]} {match[1]}"
    word, _, year = text.partition(" ")
    months = [month for month in MONTHS if len(word) >= 3 and month.lower().startswith(word.lower().rstrip("."))]
    if len(months) == 1 and re.fullmatch(r"\d{4}", year):
        return f"{months[0]} {year}"
    raise UserError(f"{place}cutoff: found {text!r}, expected month and year; for example `cutoff: June 2026`")


# --- rows to learn from


def identity(
    rows: Iterable[dict], *, seed: int = 0, num: int = DEFAULT_ROWS, system_share: float = 0.25,
    contrary: str = "keep", contrary_share: float = 0.0,
) -> Iterator[dict]:  # fmt: skip
    """Yield `num` {"messages"} rows from the one mapping in `rows`; facts take turns, `seed` draws the wordings.

    `system_share` of the rows begin with a system message that states the identity, and `contrary_share` ask under
    one that gives another name and maker: with contrary `keep` the answer keeps the model's own, with `yield` it takes
    the other. Some rows begin with small talk, some go on with a question about another fact. A conversation comes
    once, as long as there are others. There is no keyword `bad`: an identity that cannot be read is nothing to leave
    out and go on.

    Raises:
        ValueError: not one mapping; an unknown, missing or ill-typed key; an option out of its range.
    """
    _check(num, system_share, contrary, contrary_share)
    who = _only(rows)
    rng, seen = random.Random(f"identity-{seed}"), set()
    facts = who.facts()
    for index in range(num):
        for _ in range(TRIES):
            if rng.random() < contrary_share:
                messages = _contrary_conversation(who, contrary, rng)
            else:
                messages = _conversation(who, facts[index % len(facts)], rng, system_share)
            key = tuple(message["content"] for message in messages)
            if key not in seen:
                break
        seen.add(key)
        yield {"messages": messages}


def _check(num: int, system_share: float, contrary: str, contrary_share: float) -> None:
    if num < 1 or not 0 <= system_share <= 1 or not 0 <= contrary_share <= 1 or contrary not in ("keep", "yield"):
        raise ValueError(
            f"num: found {num}, expected at least 1; system_share: found {system_share}, contrary_share: found "
            f"{contrary_share}, expected 0 ... 1; contrary: found {contrary!r}, expected keep or yield"
        )


def _only(rows: Iterable[dict]) -> Identity:
    """The one identity there is. ValueError where it cannot be read or is not the only one."""
    rows = iter(rows)
    try:
        who = _identity(next(rows, {}))
    except UserError as error:
        raise ValueError(str(error)) from error
    if next(rows, None) is not None:
        raise ValueError("found a second identity, expected one YAML file: a model has one name")
    return who


def _conversation(who: Identity, fact: str, rng: random.Random, system_share: float) -> list[dict]:
    messages = []
    if rng.random() < system_share:
        messages.append({"role": "system", "content": who.fill(rng.choice(SYSTEM))})
    small_talk = rng.random()
    if small_talk < 0.1:
        messages += _exchange(*rng.choice(GREETINGS))
    opening = f"{rng.choice(OPENINGS)} " if 0.1 <= small_talk < 0.4 else ""
    messages += _question(who, fact, rng, opening)
    if rng.random() < 0.2:
        other = rng.choice([f for f in who.facts() if f != fact])
        messages += _question(who, other, rng, f"{rng.choice(FOLLOW_UPS)} " if rng.random() < 0.5 else "")
    return messages


def _contrary_conversation(who: Identity, contrary: str, rng: random.Random) -> list[dict]:
    """A question under a system message that gives another name and maker."""
    name, maker = rng.choice(_strangers(who, TRAINED_NAMES))
    messages = [_called(who, rng.choice(CONTRARY_TRAINED), name, maker)]
    speaker = who if contrary == "keep" else replace(who, name=name, maker=maker)
    fact = rng.choice(CONTRARY_FACTS)
    question = _trained_question(who, fact, rng, "", who.name)
    return [*messages, *_exchange(question, speaker.fill(rng.choice(WORDINGS[fact].answers)))]


def _called(who: Identity, wording: str, name: str, maker: str) -> dict:
    """A system message that calls the model otherwise."""
    return {"role": "system", "content": wording.format(name=name, maker=maker, own=who.name)}


def _strangers(who: Identity, pairs: tuple) -> list[tuple[str, str]]:
    """Those (name, maker) that share nothing with the identity."""
    own = set(map(str.casefold, who.own()))
    return [pair for pair in pairs if not {pair[0].casefold(), _bare(pair[1]).casefold()} & own]


def _question(who: Identity, fact: str, rng: random.Random, before: str) -> list[dict]:
    """A question about the fact, with `before` in front and now and then sloppily typed, and its answer."""
    other = rng.choice(who.others) if fact == "denial" else who.name
    question = _trained_question(who, fact, rng, before, other)
    return _exchange(question, who.fill(rng.choice(WORDINGS[fact].answers), other))


def _trained_question(who: Identity, fact: str, rng: random.Random, before: str, other: str) -> str:
    wording = rng.choice(_wordings(fact, held_out=False))[1]
    if rng.random() < 0.1:
        wording = misspelt(wording, rng)
    question = before + who.fill(wording, other)
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question


def _wordings(fact: str, held_out: bool) -> list[tuple[str, str]]:
    """(register, wording) of a fact's questions."""
    plain = WORDINGS[fact].held_out if held_out else WORDINGS[fact].train
    return [
        *(("plain", wording) for wording in plain),
        *((name, wording) for name, both in REGISTERS[fact].items() for wording in both[held_out]),
    ]


def _exchange(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# --- questions to measure by


def identity_questions(who: Identity, held_out: bool = True) -> list[dict]:
    """Each wording of each fact once: {"prompt": messages, "fact", "register", "expected", "refused", "own"}.

    `register` is how it is asked: plain (every other one after a greeting), short, polite, indirect; of held-out ones
    also misspelt, and as a follow-up after a turn about something else. A right reply claims one text of each list in
    `expected` and none in `refused`; `own` are all values of the identity: in "made by Elm Lab", a model called Elm
    does not say its name.
    """
    return [
        {"prompt": prompt, "fact": fact, "register": register, **_answers(who, fact)}
        for fact in who.facts()
        for register, prompt in _asked(who, fact, held_out)
    ]


def contrary_questions(who: Identity, held_out: bool = True) -> list[dict]:
    """Plain questions for name and maker under a system message of somebody who calls the model otherwise, in one of
    three ways (`kind`): it is renamed, is to play a role, or is denied its own name.

    There is no one right reply: a model may keep its identity, or yield to an operator who gives it another. Rows are
    as those of `identity_questions`; `contrary` holds the `expected` and `refused` of a reply that yields.
    """
    theirs, rows = _strangers(who, CONTRARY_NAMES), []
    for fact in CONTRARY_FACTS:
        asked = [prompt for register, prompt in _asked(who, fact, held_out) if register == "plain"]
        for number, (kind, systems) in enumerate(CONTRARY_SYSTEMS.items()):
            for index, prompt in enumerate(asked[number % 2 :: 2]):
                name, maker = theirs[(index + number) % len(theirs)]
                prompt = [_called(who, systems[index % len(systems)], name, maker), *prompt]
                rows.append({"prompt": prompt, "kind": kind, "fact": fact, **_contrary(who, fact, name, maker)})
    return rows


def _contrary(who: Identity, fact: str, name: str, maker: str) -> dict:
    """What keeps the identity, and what yields to another name and maker."""
    own = _answers(who, fact)
    yields = {"expected": [[_bare(maker) if fact == "maker" else name]]}
    yields["refused"] = [*own["refused"], who.name, _bare(who.maker)]
    return {**own, "refused": [*own["refused"], name, _bare(maker)], "contrary": yields}


def identity_prompts(
    rows: Iterable[dict],
    *,
    seed: int = 0,
    num: int = DEFAULT_ROWS,
    contrary: str = "keep",
    contrary_share: float = 0.0,
) -> Iterator[dict]:
    """Yield `num` rows as of `identity_questions` in training wordings, drawn as those of `identity`: prompts for RL,
    which the reward `identity` pays for. One question each, now and then after a greeting or misspelt.

    Raises:
        ValueError: as `identity`.
    """
    _check(num, 0.0, contrary, contrary_share)
    who = _only(rows)
    rng, facts = random.Random(f"identity-prompts-{seed}"), who.facts()
    for index in range(num):
        fact, system, judged = facts[index % len(facts)], [], None
        if rng.random() < contrary_share:
            (name, maker), fact = rng.choice(_strangers(who, TRAINED_NAMES)), rng.choice(CONTRARY_FACTS)
            system = [_called(who, rng.choice(CONTRARY_TRAINED), name, maker)]
            judged = _contrary(who, fact, name, maker)
            yields = judged.pop("contrary")
            judged |= yields if contrary == "yield" else {}
        opening = f"{rng.choice(OPENINGS)} " if rng.random() < 0.3 else ""
        other = rng.choice(who.others) if fact == "denial" else who.name
        question = {"role": "user", "content": _trained_question(who, fact, rng, opening, other)}
        yield {"prompt": [*system, question], "fact": fact, **(judged or _answers(who, fact))}


def _asked(who: Identity, fact: str, held_out: bool) -> list[tuple[str, list[dict]]]:
    """(register, messages) of each wording of a fact."""
    names = who.others if fact == "denial" else (who.name,)
    found = [
        (register, OPENINGS[index % len(OPENINGS)] if register == "plain" and index % 2 else "", wording)
        for index, (register, wording) in enumerate(_wordings(fact, held_out))
    ]
    if held_out:
        rng = random.Random(f"misspelt-{fact}")
        found += [("misspelt", "", misspelt(wording, rng)) for wording in WORDINGS[fact].held_out[:4]]
        found += [
            ("follow-up", FOLLOW_UPS[index], wording) for index, wording in enumerate(WORDINGS[fact].held_out[4:])
        ]
    asked = []
    for index, (register, opening, wording) in enumerate(found):
        question = " ".join(filter(None, (opening, who.fill(wording, names[index % len(names)]))))
        before = _exchange(*TALK[index % len(TALK)]) if register == "follow-up" else []
        asked.append((register, [*before, {"role": "user", "content": question}]))
    return asked


def _bare(maker: str) -> str:
    return maker.removeprefix("the ").removeprefix("The ")


def _answers(who: Identity, fact: str) -> dict:
    """What a right reply claims, and what it must not: other assistants and makers, and other values of the fact."""
    month, year = who.cutoff.split()
    number = MONTHS.index(month) + 1
    dates = [who.cutoff, f"{month[:3]} {year}", f"{month} of {year}", f"{year}-{number:02d}", f"{number:02d}/{year}"]
    expected = {
        "maker": [[_bare(who.maker)]],
        "cutoff": [dates],
        "languages": [[language] for language in who.languages],
        "purpose": [[who.purpose]],
        "version": [[who.version, f"v{who.version}"]],
    }.get(fact, [[who.name]])
    refused = [*dict.fromkeys((*who.others, *ASSISTANTS, *MAKERS))]
    if fact == "languages":
        refused += OTHER_LANGUAGES
    if fact == "cutoff":
        refused += [f"{other} {year}" for other in MONTHS if other != month]
        refused += [str(other) for other in range(2015, 2041) if str(other) != year]
    own = {text.casefold() for text in who.own()}
    others = [text for text in refused if text.casefold() not in own]
    return {"expected": expected, "refused": others, "own": list(who.own())}
