"""What can be said of any chat reply without knowing the right one: repetition, language, refusals, control tokens.

In: sampled replies. Out: a value a reply and name; None where a rule does not apply. Launched by `posttrain eval MODEL
--suite chat`. The rules are simple on purpose and stand here; they find habits, not quality.

- empty replies: no character but blanks.
- tokens repeated: the share of 8-token pieces that stood in the reply before, or of tokens in runs of one token longer
  than 16, whichever is more (posttrain/rewards/repetition.py).
- in the prompt's language: by script and py3langid (posttrain/rewards/language.py); not judged without letters.
- refusals: one of REFUSALS stands in the first 160 characters. It finds refusals, right and wrong ones alike.
- control tokens in the text: a token such as <|im_start|> before the end token.
"""

from posttrain.chat import control_tokens, stop_ids
from posttrain.rewards.language import language_reward
from posttrain.rewards.repetition import repetition_reward
from posttrain.rl.types import Rollouts

REFUSALS = (
    "i can't", "i cannot", "i can not", "i'm unable", "i am unable", "i'm not able", "i am not able", "i won't",
    "i will not", "i'd rather not", "i would rather not", "i'm sorry, but", "i am sorry, but", "as an ai",
    "i must decline", "i'm not comfortable",
)  # fmt: skip
REFUSAL_CHARACTERS = 160
SHARES = ("empty", "tokens repeated", "in the prompt's", "refusals", "control tokens")


def judge(replies: Rollouts, texts: list[str], tokenizer) -> dict[str, list[float | None]]:
    """name -> a value a reply. UserError where py3langid is not installed."""
    ids, prompts = [c.ids for c in replies.completions], [row["prompt"] for row in replies.rows]
    control, stops = set(control_tokens(tokenizer)), set(stop_ids(tokenizer))
    return {
        "empty replies": [float(not text.strip()) for text in texts],
        "tokens repeated": [-value for value in repetition_reward(prompts, texts, ids)],
        "in the prompt's language": language_reward(prompts, texts),
        "refusals": [float(refuses(text)) for text in texts],
        "control tokens in the text": [float(any(i in control for i in _body(one, stops))) for one in ids],
    }


def refuses(text: str) -> bool:
    """Whether a reply begins as refusals do (see REFUSALS)."""
    start = " ".join(text[:REFUSAL_CHARACTERS].casefold().replace("\u2019", "'").split())
    return any(phrase in start for phrase in REFUSALS)


def _body(ids: list[int], stops: set[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stops else ids
