"""A probe of what a chat model knows: pretraining documents in, questions with the model's own answers and labels out,
and from them conversations that teach it to answer what it knows and to say "I do not know" to the rest.

accelerate launch recipes/probe.py --config recipes/knowledge/probe.yaml [--known_rate 0.8 --num_generations 16]
No gain of its own: recipes/sft.py learns from its files, recipes/knowledge.py measures before and after.
"""

from posttrain import data, stage
from posttrain.args import parse, resolved
from posttrain.chat import stop_ids
from posttrain.data import DataConfig, load_rows
from posttrain.errors import entry
from posttrain.models import ModelConfig, load_pair
from posttrain.probe import ProbeConfig, Prober, keep_data, load_engine, load_judges
from posttrain.rl.rollout import EngineConfig
from posttrain.stage import StageConfig

ARGS = (StageConfig, ModelConfig, DataConfig, ProbeConfig, EngineConfig)


def check(argv, planned=()) -> dict:
    configs = own, base, source, config, _ = parse(ARGS, argv)
    stage.describe_parents({"policy": base.model_name_or_path}, planned)
    data.check(source, source.dataset_train_split, own.seed, ("text",))
    if (keep := keep_data(config, source)) is not None:
        data.check(keep, "train", own.seed, ("prompt",))
    load_judges(config)
    return resolved(*configs)


def main() -> None:
    configs = own, base, source, config, engines = parse(ARGS, description=__doc__)
    rows, described = load_rows(source, source.dataset_train_split, own.seed, ("text",))
    keep, sources = [], [described]
    if (kept := keep_data(config, source)) is not None:
        keep, described = load_rows(kept, "train", own.seed, ("prompt",))
        sources.append(described)
    judges = load_judges(config)
    run = stage.start("probe", configs, parents={"policy": base.model_name_or_path}, data=sources)
    accelerator = stage.accelerator(bf16=False)
    policy, tokenizer = load_pair(base, accelerator.device)
    engine, keep = load_engine(engines, accelerator, policy, tokenizer, keep, config, run)
    world = own.seed if source.dataset_seed is None else source.dataset_seed
    prober = Prober(run, config, engine, tokenizer, stop_ids(tokenizer, policy), judges, keep, world)
    prober.probe([row["text"] for row in rows])
    run.finish(
        prober.write, metrics=prober.metrics(), samples=prober.samples(), tokens=prober.tokens, engine=engine.name,
    )  # fmt: skip


if __name__ == "__main__":
    entry(main)
