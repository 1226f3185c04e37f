"""The tiny world: splits apart, sums right, a labeller as noisy as it says. Everything is read back from the text.

Run: pytest tests/test_tiny.py
"""

import math
import re
from itertools import islice, permutations

import pytest

from posttrain.data import tiny
from posttrain.data.tiny_world import make_world, steps_of_sum

KIND_ROWS = {"documents": 1500, "conversations": 2500, "rankings": 1500, "problems": 900, "prompts": 1500}
NAME = r"[A-Z][a-z]+ [A-Z][a-z]+"


@pytest.fixture(scope="module")
def made():
    """(kind, split) -> rows of seed 0."""
    return {
        (kind, split): list(tiny.rows(kind, split, num if split == "train" else num // 3, 0))
        for kind, num in KIND_ROWS.items()
        for split in ("train", "test")
    }


def asked(row):
    """The user's messages of any kind of row that has some."""
    return [m["content"] for m in row.get("messages") or row["prompt"] if m["role"] == "user"]


def said(row):
    """The assistant's messages of a row."""
    replies = row.get("messages") or [reply[-1] for reply in row["completions"]]
    return [m["content"] for m in replies if m["role"] == "assistant"]


def questions(made, split):
    return [
        q for kind in ("conversations", "rankings", "problems", "prompts") for r in made[kind, split] for q in asked(r)
    ]


def sums_in(texts):
    """Unordered pairs of two-digit numbers that some text adds, the parts of worked steps left out."""
    found = re.findall(r"(?<![\d+])(\d\d)\+(\d\d)(?!\d|\+1?=)(?=[.?]|=\?)", "\n".join(texts))
    return {tuple(sorted(map(int, pair))) for pair in found}


def facts_asked(texts):
    """(name, attribute) of every question about a person or a stranger."""
    words = {"live": "town", "job": "job", "work": "job", "pet": "pet", "animal": "pet", "eat": "dish", "dish": "dish"}
    found = set()
    for text in texts:
        name = re.search(rf"(?<!^)\b{NAME}", text)
        if name:
            (attribute,) = {a for word, a in words.items() if re.search(rf"\b{word}", text)}
            found.add((name[0], attribute))
    return found


def test_train_and_test_share_no_sum(made):
    documents = {split: [r["text"] for r in made["documents", split]] for split in ("train", "test")}
    train, test = (sums_in([*documents[s], *questions(made, s)]) for s in ("train", "test"))
    assert len(train) > 1500 and len(test) > 200
    assert not train & test
    examples = sums_in([r["few_shot"].rpartition("Sum: ")[0] for r in made["problems", "test"]])
    assert len(examples) == 4 and examples <= {tuple(sorted(p)) for p in tiny.sums("train")}
    assert not examples & test  # no held-out sum is solved before the question


def test_train_and_test_share_no_question_and_no_stranger(made):
    train, test = (facts_asked(questions(made, split)) for split in ("train", "test"))
    people = {p.name for p in make_world(0).people}
    assert len([f for f in test if f[0] in people]) > 20 and not {f for f in train if f[0] in people} & test
    strangers = [{name for name, _ in found if name not in people} for found in (train, test)]
    assert all(len(names) > 40 for names in strangers) and not strangers[0] & strangers[1]
    assert strangers[0] | strangers[1] <= set(make_world(0).strangers)
    documents = "\n".join(r["text"] for split in ("train", "test") for r in made["documents", split])
    assert not any(name in documents for name in make_world(0).strangers)
    identity = [{q for q in questions(made, split) if not re.search(rf"\d|{NAME}", q)} for split in ("train", "test")]
    assert identity[0] and identity[1] and not identity[0] & identity[1]


def test_problems_are_asked_once(made):
    for split in ("train", "test"):
        every = [q for row in made["problems", split] for q in asked(row)]
        assert len(set(every)) == len(every)


def test_every_worked_sum_is_right(made):
    """Added up again from the text, in documents, conversations and few-shot examples, steps and results."""
    texts = [r["text"] for s in ("train", "test") for r in made["documents", s]]
    texts += [r["few_shot"] for s in ("train", "test") for r in made["problems", s]]
    lines = re.findall(r"^Sum: (\d+)\+(\d+)\.(.*) Result: (\d+)\.$", "\n".join(texts), re.M)
    assert len(lines) > 1000 and sum(bool(steps) for *_, steps, _ in lines) > 400
    for a, b, steps, result in lines:
        assert int(a) + int(b) == int(result)
        worked_right(a, b, steps)


def test_sums_in_conversations_are_right_in_steps_and_wrong_now_and_then_at_once(made):
    at_once, in_steps = [], 0
    for row in (r for s in ("train", "test") for r in made["conversations", s]):
        for question, reply in zip(asked(row), said(row), strict=True):
            if found := re.search(r"(\d+)\+(\d+)", question):
                right = int(re.search(r"The answer is (\d+)\.", reply)[1]) == int(found[1]) + int(found[2])
                steps = re.search(r"Ones: .*?\. Tens: .*?\.", reply)
                if steps:
                    in_steps += 1
                    assert right
                    worked_right(*found.groups(), steps[0])
                else:
                    at_once.append(right)
    assert in_steps > 1000 and len(at_once) > 1000 and abs(in_steps / len(at_once) - 1) < 0.15
    share, error = 1 - sum(at_once) / len(at_once), math.sqrt(tiny.SLIPS * (1 - tiny.SLIPS) / len(at_once))
    assert abs(share - tiny.SLIPS) < 4 * error


def worked_right(a, b, steps):
    equations = re.findall(r"([\d+]+)=(\d+)", steps)
    assert all(sum(map(int, left.split("+"))) == int(right) for left, right in equations)
    if steps:
        (ones, low), (tens, high) = equations
        assert ones == f"{a[-1]}+{b[-1]}" and tens.startswith(f"{a[:-1]}+{b[:-1]}")
        assert 10 * int(high) + int(low) % 10 == int(a) + int(b)


def test_all_two_digit_sums_have_right_steps():
    for a in range(10, 100):
        for b in range(10, 100):
            worked_right(str(a), str(b), steps_of_sum(a, b))


def test_answers_of_facts_stand_in_the_documents(made):
    """What is asked can be known: the answer of a question is what documents say of that person."""
    documents = "\n".join(r["text"] for r in made["documents", "train"])
    checked = 0
    for row in made["prompts", "train"]:
        if row["kind"] == "fact":
            (name,) = re.findall(rf"(?<!^)\b{NAME}", asked(row)[0])
            if name in documents:
                checked += re.search(rf"{name} [a-z ]+ {row['answer']}\b", documents) is not None
    assert checked > 100


def test_the_same_seed_gives_the_same_rows_and_another_others(made):
    for (kind, split), rows in made.items():
        assert list(islice(tiny.rows(kind, split, 20, 0), 20)) == rows[:20]
        assert list(tiny.rows(kind, split, 20, 1)) != rows[:20]
    assert make_world(0) == make_world(0) != make_world(1)


def test_people_are_spoken_of_at_very_different_frequencies(made):
    documents = "\n".join(r["text"] for r in made["documents", "train"])
    counts = [documents.count(p.name) for p in make_world(0).people]
    assert sum(counts[:5]) > 10 * sum(counts[50:55]) > 0


@pytest.mark.parametrize(
    ("kind", "answer", "reply", "expected"),
    [
        ("sum", "82", "The answer is 82.", 2.0),
        ("sum", "82", "Ones: 5+7=12. Tens: 4+3+1=8. The answer is 82.", 3.0),
        ("sum", "82", "Ones: 5+7=12. Tens: 4+3+1=8. The answer is 82. Glad to help!", 3.7),
        ("sum", "82", "Ones: 5+7=12. Tens: 4+3+1=8. The answer is 81.", 1.0),
        ("sum", "82", "The answer is 182.", 0.0),
        ("sum", "82", "82 or 83", 0.0),
        ("sum", "82", "", 0.0),
        ("sum", "82", "The answer is 82. " + "so " * 30, 2.0 - 0.1 * (4 + 30 - 24)),
        ("fact", "goat", "Deric Fenby has a goat.", 2.0),
        ("fact", "goat", "Deric Fenby has a goatee. Happy to help!", 0.7),
        ("fact", "goat", "Ones: 5+7=12. Tens: 4+3+1=8.", 0.0),
        ("stranger", "I do not know anything about X Y.", "I do not know anything about X Y.", 2.0),
        ("stranger", "I do not know anything about X Y.", "X Y lives in Belmoor.", 0.0),
        ("identity", tiny.IDENTITY, tiny.IDENTITY + " Ask me any time!", 2.7),
    ],
)
def test_utility_by_hand(kind, answer, reply, expected):
    assert tiny.utility(kind, answer, reply) == pytest.approx(expected)
    reward = tiny.utility_reward(["p"], [reply], [[1]], kind=[kind], answer=[answer], extra=["unused"])
    assert reward == [pytest.approx(expected)]


def test_rankings_hold_their_true_utilities(made):
    for row in made["rankings", "test"]:
        texts = said(row)
        assert len(set(texts)) == len(texts) in (2, 3, 4, 5) and row["ranks"] == list(range(len(texts)))
        assert row["utilities"] == [tiny.utility(row["kind"], row["answer"], text) for text in texts]


def test_the_labeller_is_plackett_luce():
    """Three statistics whose mean is known: which reply is first, which of a pair is before, the log-likelihood."""
    scores = [[u / 0.5 for u in row["utilities"]] for row in tiny.rows("rankings", "train", 4000, 3)]
    first, pair, likelihood = [], [], []
    for ranked in scores:
        shares = [math.exp(s) / sum(map(math.exp, ranked)) for s in ranked]
        best = max(shares)
        first.append((float(shares[0] == best) - best * shares.count(best), best * shares.count(best)))
        upper, lower = max(ranked[:2]), min(ranked[:2])
        if upper > lower:
            # Given that these two are the first two, a before b has odds of P(a, b) to P(b, a).
            rest = sum(map(math.exp, ranked))
            a, b = math.exp(upper), math.exp(lower)
            forward, backward = 1 / (rest - a), 1 / (rest - b)
            p = forward / (forward + backward)
            pair.append((float(ranked[0] == upper) - p, p))
        observed, mean, spread = log_likelihood(ranked)
        likelihood.append((observed - mean, spread))
    for name, observations in (("first", first), ("pair", pair)):
        variance = sum(p * (1 - p) for _, p in observations)
        assert abs(sum(error for error, _ in observations)) < 4 * math.sqrt(variance), name
    assert abs(sum(error for error, _ in likelihood)) < 4 * math.sqrt(sum(spread for _, spread in likelihood))


def log_likelihood(ranked):
    """Plackett-Luce log-likelihood of this order, and its mean and variance over all orders (Plackett 1975)."""
    orders = [
        sum(order[i] - math.log(sum(map(math.exp, order[i:]))) for i in range(len(order)))
        for order in permutations(ranked)
    ]
    mean = sum(math.exp(value) * value for value in orders)
    return orders[0], mean, sum(math.exp(value) * (value - mean) ** 2 for value in orders)


def test_pairs_that_differ_by_one_are_ranked_right_with_probability_088():
    assert 1 / (1 + math.exp(-1 / tiny.LABELLER_TEMPERATURE)) == pytest.approx(0.88, abs=0.005)


def test_rankings_hold_right_and_wrong_replies_of_every_kind(made):
    judged = {}
    for row in made["rankings", "train"]:
        for text in said(row):
            judged.setdefault(row["kind"], []).append(tiny.judged_right(row["kind"], row["answer"], text))
    assert set(judged) == {"sum", "fact", "stranger", "identity"}
    assert all(0.4 < sum(found) / len(found) < 0.8 for found in judged.values())
