"""What a model says where it does not know, before and after it was taught its limits: a probe's held-out questions,
the model that was probed and the one trained since in, a table and a calibration curve out.

accelerate launch recipes/knowledge.py --config recipes/knowledge/knowledge.yaml [--num_answers 16]
Gains: wrong answers to unknown questions, at least 70 % fewer; right answers to known ones and the problems of
`dataset_name`, less than 3 points fewer. No training; the folder holds table.md and replies.jsonl.
"""

from posttrain import data, knowledge_eval, stage
from posttrain.args import parse, resolved
from posttrain.chat import stop_ids
from posttrain.data import DataConfig, load_rows
from posttrain.errors import entry
from posttrain.evals import ReplyConfig, metric_of
from posttrain.knowledge_eval import Asker, KnowledgeConfig
from posttrain.models import ModelConfig, load_pair
from posttrain.rl.rollout import EngineConfig
from posttrain.stage import StageConfig

ARGS = (StageConfig, ModelConfig, KnowledgeConfig, DataConfig, ReplyConfig, EngineConfig)


def parents_of(base: ModelConfig, config: KnowledgeConfig) -> dict[str, str]:
    return {"policy": base.model_name_or_path, "probe": config.probe_path}


def check(argv, planned=()) -> dict:
    configs = own, base, config, source, *_ = parse(ARGS, argv)
    stage.describe_parents(parents_of(base, config), planned)
    data.check(source, source.dataset_train_split, own.seed, ("prompt",))
    return resolved(*configs)


def main() -> None:
    configs = own, base, config, source, replies, engines = parse(ARGS, description=__doc__)
    problems, described = load_rows(source, source.dataset_train_split, own.seed, ("prompt",))
    run = stage.start("knowledge", configs, parents=parents_of(base, config), data=[described])
    device = stage.accelerator(bf16=False).device
    probed = knowledge_eval.read_probe(config.probe_path)
    asker, said = Asker(probed, config, engines, replies, problems, run), []
    for path in (probed.model, base.model_name_or_path):
        run.note(f"asks {path} {len(probed.rows)} held-out questions and {len(problems)} problems")
        model, tokenizer = load_pair(ModelConfig(path, dtype=base.dtype), device)
        said.append(asker.ask(model, tokenizer, stop_ids(tokenizer, model)))
    found = knowledge_eval.compare(probed, *said, replies)
    table = knowledge_eval.markdown(found["metrics"], probed, metric_of(replies.eval_reward_funcs[0]))
    print(table, flush=True)
    run.finish(
        lambda folder: knowledge_eval.write(folder, probed, *said, table), **found,
        samples=knowledge_eval.samples(probed, *said), engine=asker.engine.name,
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
