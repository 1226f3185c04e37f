"""The figures of a model's card: read back with the Hub's own client, in percent, and only the model's own.

Run: pytest tests/test_model_index.py
"""

import json

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from posttrain.errors import UserError
from posttrain.model_index import eval_results

HELD_OUT = {"name": "tiny", "config": "problems", "split": "test", "revision": None, "rows": 200}
SHARE = {"value": 0.43375, "low": 0.40988, "high": 0.45762, "n": 200, "unit": "%"}


def write(folder, name, told):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(told))


def stage(folder, metrics):
    train = {**HELD_OUT, "config": "conversations", "split": "train"}
    write(folder, "stage.json", {"stage": "sft", "status": "finished", "data": [train, HELD_OUT], "metrics": metrics})


def suite(folder, **changes):
    told = {
        "format": 1, "suite": "math", "data": [{"name": str(folder / "my gsm8k.jsonl"), "split": "test"}],
        "settings": {"seed": 0, "temperature": 1.0, "api_key_env": "SECRET"}, "metrics": {"pass@1": SHARE},
    }  # fmt: skip
    write(folder, "evals/math.json", told | changes)


def test_a_card_with_the_figures_is_read_back_by_the_hub_s_client(tmp_path):
    stage(tmp_path, {"pass@1": SHARE, "pass@1, base": SHARE, "tau": {**SHARE, "value": None, "unit": ""}})
    suite(tmp_path)
    card = ModelCard(
        f"---\n{ModelCardData(model_name='sft', eval_results=eval_results(tmp_path)).to_yaml()}\n---\n# x"
    )
    name, found = model_index_to_eval_results(ModelCard(card.content).data.to_dict()["model-index"])
    assert name == "sft" and len(found) == 2  # the parent's figure and the undefined one are not there
    gsm8k, problems = found
    assert problems.metric_value == 43.375 and problems.metric_type == "pass@1" and problems.metric_name == "pass@1, %"
    assert problems.metric_args == {"low": 40.988, "high": 45.762, "n": 200, "unit": "%", "evaluated_by": "stage sft"}
    assert (problems.dataset_type, problems.dataset_config, problems.dataset_split) == ("tiny", "problems", "test")
    # The Hub takes a data set's type of letters, digits, ".", "-" and "_" alone; no local folder is told.
    assert gsm8k.dataset_type == "my-gsm8k.jsonl" and gsm8k.dataset_name == "my gsm8k.jsonl"
    assert gsm8k.metric_args["suite"] == "math" and gsm8k.metric_args["temperature"] == 1.0
    assert str(tmp_path) not in card.content and "SECRET" not in card.content


def test_the_same_figure_of_the_same_rows_is_listed_once(tmp_path):
    stage(tmp_path, {"pass@1": SHARE})
    suite(tmp_path, data=[HELD_OUT])
    assert [result.metric_args.get("suite") for result in eval_results(tmp_path)] == ["math"]
    suite(tmp_path, data=[HELD_OUT], metrics={"pass@1": {**SHARE, "value": 0.5}})
    assert [result.metric_value for result in eval_results(tmp_path)] == [50.0, 43.375]


def test_a_folder_without_figures_has_none_and_a_broken_file_is_named(tmp_path):
    assert eval_results(tmp_path) == []
    suite(tmp_path, metrics={"pass@1": "high"})
    with pytest.raises(UserError, match=r"evals/math.json: metrics\['pass@1'\] is 'high', expected a number"):
        eval_results(tmp_path)
    (tmp_path / "evals/math.json").write_text("{")
    with pytest.raises(UserError, match="evals/math.json is no valid JSON"):
        eval_results(tmp_path)


def test_a_figure_of_other_rows_names_them_and_not_the_stage_s(tmp_path):
    who = {**SHARE, "dataset": "my/recipes/identity.yaml", "split": "held-out wordings"}
    stage(tmp_path, {"pass@1": {**SHARE, "dataset": "tiny", "split": "test"}, "identity right": who})
    sums, identity = eval_results(tmp_path)
    assert (sums.dataset_name, sums.dataset_config, sums.dataset_split) == ("tiny (problems)", "problems", "test")
    assert (identity.dataset_name, identity.dataset_config) == ("identity.yaml", None)
    assert identity.dataset_split == "held-out wordings"
