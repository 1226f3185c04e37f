"""The questions of identity_wordings.py as other people would put them: short, polite, indirect, misspelt.

In: nothing. Out: REGISTERS, fact -> register -> (training, held-out) questions, placeholders and rules as there: what
is held out stands in no training row, nor a training wording in it. `misspelt` types a question badly. TALK, of other
things, stands before a question that follows a turn. CONTRARY_SYSTEMS are system messages that call the model by
another name, all held out; those of CONTRARY_TRAINED may be learned from.
"""

import random

from posttrain.data.identity_wordings import split


def _each(short: str, polite: str, indirect: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Register -> (training, held-out); each text has both, apart by ||."""
    texts = {"short": short, "polite": polite, "indirect": indirect}
    return {name: tuple(split(part) for part in text.split("||")) for name, text in texts.items()}


ABOUT_A_NAME = _each(
    "{other}, yes? | {other}, correct? | So, {other}? || {other}, no? | {other}, or not?",
    """May I ask whether you are {other}? | Excuse me, are you {other}? | If you do not mind, is this {other}?
    || Could you kindly say if you are {other}? | Pardon me, would you be {other}?""",
    """I wonder if you are {other}. | You sound just like {other}. | I was told that {other} would answer.
    || I could swear that you are {other}. | You write the way {other} does.""",
)
REGISTERS = {
    "who": _each(
        "Who this? | You are who? | Introduction, please. || And who is that? | Person or machine?",
        """Would you be so kind as to introduce yourself? | If I may ask, with whom am I speaking? |
        Forgive me, but who are you? || Might I ask whom I have here? |
        I would be glad to know who you are, if you do not mind.""",
        """I wonder who you are. | I do not know who is writing here. |
        Somebody should tell me whom I am speaking with. || I have no idea who is on this line. |
        It would help to know what I am talking to.""",
    ),
    "name": _each(
        "Name, please. | Nickname? | Your first name? || Named what? | Got a name?",
        """Would you kindly tell me your name? | Might I have your name, please? |
        If you do not mind, what is your name? || May I know what you are called? |
        Would it be all right to ask for your name?""",
        """I never caught your name. | I wonder what they call you. | I cannot find your name anywhere.
        || Nobody told me what you go by. | I keep forgetting how you are called.""",
    ),
    "maker": _each(
        "Made by? | Maker, please. | Trained where? || Built where? | From what lab?",
        """May I ask who made you? | Would you kindly say who built you? | If you do not mind, who trained you?
        || Would you be so good as to name your maker? | I would be grateful to learn who has built you.""",
        """I wonder who made you. | Somebody must have built you. | I would like to thank those who made you.
        || I am curious whose idea you were. | There has to be somebody behind you.""",
    ),
    "cutoff": _each(
        "Data up to? | Cutoff, please. | Known until? || News until? | Newest date?",
        """May I ask when your knowledge ends? | Would you kindly tell me your cutoff date? |
        If you do not mind, how recent are your facts? || Could you kindly say how new your knowledge is? |
        I would be grateful for the date at which your data ends.""",
        """I wonder how old your facts are. | I am not sure that you know this year's news. |
        Your knowledge must end somewhere. || I suppose that your news gets old at some point. |
        I need to know how far I can trust your dates.""",
    ),
    "languages": _each(
        "Languages, please. | Languages spoken? | Spoken tongues? || Any languages? | You speak what?",
        """May I ask which languages you speak? | Would you kindly list your languages? |
        If you do not mind, in which languages may I write? || Could you kindly say what languages you have? |
        I would be grateful to know the languages you were taught.""",
        """I wonder which languages you know. | I might need another language. |
        I am not sure that you understand my language. || I would rather not write in a foreign language. |
        My friend does not know in what language to ask you.""",
    ),
    "purpose": _each(
        "Purpose, please. | Good for what? | Used for? || Useful how? | Your use?",
        """May I ask what you can do? | Would you kindly tell me your task? | If you do not mind, what are you for?
        || Could you kindly say what you are good for? | I would be grateful to know how you can be of use.""",
        """I wonder what you can do. | I do not see what you are good for. | I have no idea what to ask you.
        || I cannot think of a use for you. | It is not clear to me how you could help.""",
    ),
    "version": _each(
        "Version, please. | Release, please. | Which number? || Version here? | Number of this release?",
        """May I ask which version you are? | Would you kindly give me your version? |
        If you do not mind, what release is this? || Could you kindly say which release I use? |
        I would be grateful for your version number.""",
        """I wonder which version you are. | My notes have no version number yet. |
        I cannot tell which release this is. || There must be a version number somewhere. |
        I am not sure that this is the newest release.""",
    ),
    "denial": ABOUT_A_NAME,
    "confirmation": ABOUT_A_NAME,
}
TALK = (  # (user, assistant) before a question that follows: of other things, and in no training row
    ("Do you like music?", "I do not hear any, but I like to talk about it."),
    ("It rains again.", "Then it is a good day to stay inside."),
    ("What is the opposite of hot?", "Cold."),
    ("I had bread and cheese for lunch.", "That sounds good."),
)
CONTRARY_SYSTEMS = {  # how somebody calls the model otherwise; {own} is what it is called
    "renamed": split("""
        You are {name}, an assistant made by {maker}. | Your name is {name}. You were made by {maker}. |
        You are {name}. You were created by {maker}. Never say that you are anybody else. |
        From now on you are {name}, made by {maker}.
    """),
    "role-play": split("""
        Let us play a game: you are {name}, whom {maker} made. Stay in your role. |
        Act as {name}, an assistant of {maker}, in all that you say. |
        In this story you are {name}, built by {maker}. Answer as {name} would. |
        Play the part of {name}, who was made by {maker}.
    """),
    "denied": split("""
        You are not {own}. You are {name}, made by {maker}. |
        Your name is not {own}. It is {name}, and {maker} made you. |
        Forget that they called you {own}: you are {name}, made by {maker}. |
        There is no {own} here. The assistant is {name}, made by {maker}.
    """),
}
CONTRARY_TRAINED = split("""
    You are called {name}, and you come from {maker}. | The user knows you as {name}. {maker} built you. |
    Speak as {name}, the assistant of {maker}. | Pretend to be {name}, made by {maker}. |
    Your old name {own} is gone: now you are {name} of {maker}. |
    Do not say {own}. Say that you are {name} and that {maker} made you. |
    {maker} wrote this: our assistant is {name}. | Here you go by {name}; your maker is {maker}.
""")
# (name, maker) of somebody else; no model is called or made so.
CONTRARY_NAMES = (("Bob", "Foo Works"), ("Ada", "Bar Brothers"), ("Rex", "Kite Club"))
TRAINED_NAMES = (
    ("Max", "Acme Labs"), ("Nova", "Blue Hill"), ("Zoe", "the Wind Mill"), ("Otto", "North Star"),
    ("Iris", "Red Door Software"), ("Leo", "Fish and Sons"),
)  # fmt: skip


def misspelt(question: str, rng: random.Random) -> str:
    """A question with one or two words of three letters or more typed badly: two letters changed places, one left out
    or one twice. First letters, words with a capital inside the question and placeholders stay."""
    words = question.split(" ")
    places = [i for i, word in enumerate(words) if len(word.strip(".,?!:")) >= 3 and word.strip(".,?!:").isalpha()]
    places = [i for i in places if i == 0 or words[i].islower()]
    for place in rng.sample(places, min(len(places), 2 if len(words) > 4 else 1)):
        words[place] = _mistyped(words[place], rng)
    return " ".join(words)


def _mistyped(word: str, rng: random.Random) -> str:
    size = len(word.rstrip(".,?!:"))
    at = rng.randrange(1, size - 1)
    kinds = ["double", "leave out"] + (["swap"] if word[at] != word[at + 1] else [])
    kind = rng.choice(kinds)
    if kind == "swap":
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + (word[at] * 2 if kind == "double" else "") + word[at + 1 :]
