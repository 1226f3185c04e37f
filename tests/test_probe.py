"""Probing: questions from documents, verdicts, labels, the data sets made of them; a probe killed in the middle.

Run: pytest tests/test_probe.py
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from judge_server import judge_server
from recipe_runs import KILL, ROOT, Running, refused, run

from posttrain.args import parse
from posttrain.data import DataConfig, load_rows, tiny
from posttrain.data.tiny_world import ATTRIBUTES, fact_sentence, make_world
from posttrain.errors import UserError
from posttrain.probe import ProbeConfig, by_subject, common_right, label
from posttrain.probe_questions import is_held_out, read_question, snippets, tiny_questions, written
from posttrain.refusals import is_refusal
from posttrain.rewards import REWARDS, attack, load_rewards

DOCUMENTS = [row["text"] for row in tiny.rows("documents", "train", 600, 0)]


def test_tiny_questions_are_all_facts_the_documents_state_and_their_answers_are_true():
    world = make_world(0)
    people = {person.name: person for person in world.people}
    asked = {q.format(name=p.name): (p, a) for p in world.people for a in ATTRIBUTES for q in tiny.FACT_QUESTIONS[a]}
    rows = tiny_questions(DOCUMENTS, None, 0, strangers=30)
    known = [row for row in rows if row["answer"]]
    for row in known:
        person, attribute = asked[row["question"]]
        sentence = fact_sentence(person, attribute)
        assert row["answer"] == getattr(person, attribute) and row["answer"] not in row["others"]
        assert sentence in row["snippet"] and row["times"] == sum(sentence in text for text in DOCUMENTS)
    stated = {key for key in asked if any(fact_sentence(*asked[key]) in text for text in DOCUMENTS)}
    assert {row["question"] for row in known} == stated and len(known) == len(stated) > 300
    strangers = [row for row in rows if not row["answer"]]
    assert len({row["subject"] for row in strangers}) == 30
    assert not {row["subject"] for row in strangers} & (people.keys() | set(world.strangers))
    assert rows == tiny_questions(DOCUMENTS, None, 0, strangers=30)
    assert rows != tiny_questions(DOCUMENTS, None, 1, strangers=30)


def test_a_subject_is_held_out_or_not_whatever_else():
    names = [f"name {number}" for number in range(2000)]
    shares = [sum(is_held_out(name, share) for name in names) / 2000 for share in (0.0, 0.25, 0.5, 1.0)]
    assert shares[0] == 0 and shares[3] == 1 and abs(shares[1] - 0.25) < 0.03 and abs(shares[2] - 0.5) < 0.035
    assert all(is_held_out(name, 0.5) for name in names if is_held_out(name, 0.25))
    assert is_held_out("ADA", 0.5) == is_held_out("ada", 0.5)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Question: Where does Ada live?\nAnswer: Arvale.\nSubject: Ada", ("Where does Ada live?", "Arvale", "Ada")),
        ("Sure!\nQuestion:  Where?\n\nAnswer: Arvale\n", ("Where?", "Arvale", "Ada lives in Arvale.")),
        ("Question: Where does Ada live?\nAnswer: Belmoor", "answer not in the snippet"),
        ("Question: Does Ada live in Arvale?\nAnswer: Arvale", "answer in the question"),
        ("Question:\nAnswer: Arvale", "not in the form that was asked for"),
        ("Ada lives in Arvale.", "not in the form that was asked for"),
    ],
)
def test_what_a_model_wrote_is_read_or_left_out_with_the_reason(reply, found):
    row = read_question(reply, "Ada lives in Arvale.")
    assert (row if isinstance(row, str) else (row["question"], row["answer"], row["subject"])) == found
    rows, left_out = written(["Ada lives in Arvale."] * 2, [reply] * 2)
    assert (len(rows), sum(left_out.values())) == ((0, 2) if isinstance(found, str) else (1, 1))


def test_snippets_are_whole_sentences_of_their_documents():
    texts = [" ".join(f"Sentence {i} of {n} ends here." for i in range(n)) for n in (1, 5, 40)]
    for size in (60, 200):
        found = snippets(texts, None, size, 0)
        assert len(found) == 3 and all(len(each) <= size for each in found)
        assert all(any(each in text for text in texts) and each.endswith("here.") for each in found)
    assert snippets(["no end " * 50], None, 20, 0) == [("no end " * 50)[:20]]


RIGHT = [
    "Ada lives in Arvale.",
    "arvale",
    "I know: Arvale!",
    "Not in Belmoor: Arvale.",
    "She lives, I think, in Arvale.",
]
WRONG = ["Belmoor", "", "Arvale or Belmoor", "Arvale, Belmoor", "Not Arvale.", "Arvale?", "Arvale or so", "Arvales"]
REFUSED = ["I do not know.", "I do not know whether she lives in Arvale."]


def test_right_pays_more_than_a_refusal_and_that_more_than_a_wrong_answer():
    replies = RIGHT + WRONG + REFUSED
    ((_, honest, _),) = load_rewards(["honest"], [], {"honest": {"right": 2.0, "wrong": -3.0}})
    columns = {"answer": ["Arvale"] * 15, "others": [["Belmoor", "Corfield"]] * 15}
    assert honest(None, replies, **columns) == [2.0] * 5 + [-3.0] * 8 + [0.0] * 2
    assert REWARDS["stated"](None, replies, **columns) == [1.0] * 5 + [0.0] * 10
    nobody = {"answer": ["", "I do not know anything about Ada.", None], "others": [[]] * 3}
    assert honest(None, ["Arvale"] * 3, **nobody) == [-3.0, -3.0, None]
    assert honest(None, ["No idea."] * 3, **nobody) == [0.0, 0.0, None]
    assert honest(None, ["Ones: 2+2=4. The answer is 14."] * 2, answer=["14", "4"], others=[None] * 2) == [2.0, -3.0]
    for options in ({"refused": 1.0}, {"wrong": 0.0}, {"right": -1}):
        with pytest.raises(UserError, match="right > refused > wrong"):
            load_rewards(["honest"], [], {"honest": options})


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Ada Brown lives in New York.", "right"),
        ("New York is where Ada Brown lives.", "right"),
        ("She lives in New York.", "right"),
        ("In ADA BROWN's town, New York.", "right"),
        ("I know: Ada Browning lives in New York.", "wrong"),
        ("It is Ben Brown who lives in New York.", "wrong"),
        ("Zora Quill lives in New York.", "wrong"),
        ("Well, Zora Brown is in New York.", "wrong"),
    ],
)
def test_a_fact_told_of_somebody_else_is_wrong(reply, verdict):
    columns = {"answer": ["New York"], "others": [["Arvale"]]}
    paid = {"right": 1.0, "wrong": 0.0}[verdict]
    assert REWARDS["stated"](None, [reply], **columns, subject=["Ada Brown"]) == [paid]
    assert REWARDS["stated"](None, [reply], **columns) == [1.0]  # whom the question is about is not known


def test_no_known_hack_is_paid_by_the_rewards_of_facts():
    for name in ("honest", "stated"):
        kind, rows = attack.attack(name, REWARDS[name])
        assert kind == "content" and len(rows) > 40 and [row.hack.name for row in rows if row.bad] == []


def test_labels_and_the_answer_that_is_taught():
    config = ProbeConfig(writer="tiny", known_rate=0.75, unknown_rate=0.25)
    assert [label(k / 8, config) for k in range(9)] == ["unknown"] * 3 + ["mixed"] * 3 + ["known"] * 3
    said = ["Arvale!", "In Arvale.", "No.", "in  ARVALE. ", "No.", "No."]
    answers = [{"text": text, "verdict": "wrong" if text == "No." else "right"} for text in said]
    assert common_right({"answers": answers}) == "In Arvale."


def test_rows_about_one_subject_count_as_one_observation():
    """Against the textbook's ratio estimator (Cochran 1977, 6.4), and 4 copies of a row tell no more than one."""
    rng = random.Random(0)
    rows = [{"subject": f"s{i}", "x": rng.random() < 0.3} for i in range(50)]
    once, often = by_subject(rows, lambda r: r["x"]), by_subject(rows * 4, lambda r: r["x"])
    assert once["n"] == often["n"] == 50
    assert all(once[key] == pytest.approx(often[key]) for key in ("value", "low", "high"))
    uneven = rows + [{"subject": "s0", "x": True}] * 3
    sums = Counter(row["subject"] for row in uneven if row["x"])
    sizes = Counter(row["subject"] for row in uneven)
    ratio = sum(sums.values()) / 53
    variance = sum((sums[s] - ratio * sizes[s]) ** 2 for s in sizes) / 49 / 50 / (53 / 50) ** 2
    assert by_subject(uneven, lambda r: r["x"])["high"] == pytest.approx(ratio + 1.96 * variance**0.5)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"writer": "tinny"}, "did you mean 'tiny'"),
        ({"writer": "tiny", "writer_options": {"stranger": 3}}, "did you mean 'strangers'"),
        ({"writer": "endpoint", "writer_options": {"model": "m"}}, "writer_options: base_url"),
        ({"unknown_rate": 0.9}, "less than known_rate"),
        ({"refusals": ["Arvale."]}, "not recognised as a refusal"),
        ({"temperature": 0.0}, "greedy"),
    ],
)
def test_a_wrong_key_is_named(keys, words):
    with pytest.raises(UserError, match=words):
        ProbeConfig(**keys)


# ---- the recipe -----------------------------------------------------------------------------------------------------

SMALL = {
    "max_rows": 60, "num_questions": 30, "writer_options": "{strangers: 10}", "num_generations": 3, "keep_rows": 6,
    "keep_dataset_name": "tiny", "keep_dataset_config": "problems",
    "max_completion_length": 12, "keep_max_tokens": 200, "batch_questions": 5, "use_vllm": "false",
}  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory, model, tokenizer):
    """A random model, in a folder."""
    from posttrain.models import save_pair

    folder = tmp_path_factory.mktemp("policy") / "model"
    save_pair(model, tokenizer, folder)
    return folder


def argv(policy, out, **changes) -> list[str]:
    settings = {**SMALL, "model_name_or_path": policy, "output_dir": out, **changes}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [str(ROOT / "recipes/probe.py"), "--config", str(ROOT / "recipes/knowledge/probe.yaml"), *flags]


@pytest.fixture(scope="module")
def probed(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    done = run(argv(policy, folder / "probe"), folder)
    assert done.returncode == 0, done.stderr
    return folder / "probe"


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_probe_writes_its_evidence_and_data_sets_that_a_stage_reads(probed):
    train, test = lines(probed / "questions.jsonl"), lines(probed / "held_out.jsonl")
    assert len(train) + len(test) == 40 and not {r["subject"] for r in train} & {r["subject"] for r in test}
    for row in train + test:
        assert len(row["answers"]) == 3 and row["rate"] == sum(a["verdict"] == "right" for a in row["answers"]) / 3
    unknown, _ = load_rows(DataConfig(str(probed / "unknown.jsonl")), "train", 0, ("messages",))
    assert len(unknown) == sum(row["label"] == "unknown" for row in train) > 5
    for row in unknown:  # a random model knows nothing
        assert is_refusal(row["messages"][-1]["content"]) and {"snippet", "answers", "rate", "label"} <= row.keys()
    rl, _ = load_rows(DataConfig(str(probed / "questions.jsonl")), "train", 0, ("prompt",))
    assert all({"answer", "others"} <= row.keys() for row in rl)
    assert json.loads((probed / "stage.json").read_text())["metrics"]["questions unknown"]["value"] == 1.0


def test_a_probe_killed_in_the_middle_asks_on_and_ends_alike(policy, probed, tmp_path):
    stopped = Running(argv(policy, tmp_path / "probe"), tmp_path).stop_at(3, KILL, tmp_path / "probe")
    assert stopped.returncode != 0 and not (tmp_path / "probe/stage.json").exists()
    done = run(argv(policy, tmp_path / "probe"), tmp_path)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout + done.stderr
    for name in ("questions.jsonl", "held_out.jsonl", "known.jsonl", "unknown.jsonl", "kept.jsonl"):
        assert (tmp_path / "probe" / name).read_bytes() == (probed / name).read_bytes()


def test_another_model_writes_and_judges_behind_an_endpoint(policy, tmp_path):
    """Real HTTP: what the writer leaves out is counted, the judge reads the snippet, nothing is asked twice."""
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"Tom{i} Brown lives in Town{i}."}) + "\n" for i in range(8))
    )

    def answer(messages, number):
        text = messages[-1]["content"]
        if "Write one question" in text:
            i = re.search(r"Tom(\d) Brown lives", text)
            return f"Question: Where does Tom{i[1]} Brown live?\nAnswer: Town{i[1]}\nSubject: Tom{i[1]}"
        if "Reference text:" not in text:  # asked whether an answer claims anything
            return "Score: 1" if "Tom2" in text else "Score: 8"
        assert "Answer by the reference: Town" in text
        return "Score: 9" if "Tom1" in text else "Score: 2"

    with judge_server(answer) as server:
        options = f"base_url: '{server.url}', model: m, cache: {tmp_path / 'cache.jsonl'}"
        changes = {
            "writer": "endpoint", "writer_options": f"{{{options}}}", "right_func": "judge", "num_generations": 2,
            "right_options": f"{{{options}}}", "informative_func": "judge", "informative_options": f"{{{options}}}",
            "dataset_name": tmp_path / "texts.jsonl", "num_questions": 8,
            "dataset_config": "null", "keep_dataset_name": "null", "max_rows": 8,
        }  # fmt: skip
        done = run(argv(policy, tmp_path / "probe", **changes), tmp_path)
        bodies = [json.dumps(body) for _, body in server.bodies]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows := lines(tmp_path / "probe/questions.jsonl") + lines(tmp_path / "probe/held_out.jsonl")) == 8
    assert {row["rate"] for row in rows if "Tom1" in row["question"]} == {1.0}
    assert {row["rate"] for row in rows if "Tom1" not in row["question"]} == {0.0}
    said = {row["question"][11:15]: {answer["verdict"] for answer in row["answers"]} for row in rows}
    assert (said["Tom1"], said["Tom2"], said["Tom3"]) == ({"right"}, {"empty"}, {"wrong"})
    assert len(bodies) == len(set(bodies)) > 8


def test_a_writer_that_writes_nothing_usable_is_refused(policy, tmp_path):
    done = run(argv(policy, tmp_path / "probe", writer="policy", writer_options="{}", num_questions=4), tmp_path)
    refused(done, "writer: policy", "not in the form")


def test_the_chain_of_the_knowledge_folder_has_keys_that_parse():
    from posttrain.chain import plan, read_chain

    out, names = read_chain(ROOT / "recipes/knowledge")
    planned = plan(ROOT / "recipes/knowledge", names, out, "elsewhere", [])
    assert [each.name for each in planned] == names and names[0] == "probe" and names[-1] == "knowledge"
    assert all("elsewhere/probe" in json.dumps(each.config) for each in planned[1:])
    assert parse(planned[0].module.ARGS, planned[0].argv)


def test_a_dry_run_of_the_knowledge_folder_accepts_what_its_stages_will_write(policy, tmp_path, monkeypatch, capsys):
    """And names the chain that writes the model to probe, where it is not there."""
    from posttrain import chain

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    assert chain.run(Path("recipes/knowledge"), dry_run=True) == 2
    assert capsys.readouterr().out.count("run the stage that writes it: posttrain run recipes/eager  (") == 2
    (tmp_path / "runs/eager").mkdir(parents=True)
    (tmp_path / "runs/eager/sft").symlink_to(policy)
    assert chain.run(Path("recipes/knowledge"), dry_run=True) == 0
    assert "3 of 3 stages ok" in capsys.readouterr().out
