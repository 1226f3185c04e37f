"""Stage 0, clean text: web pages or raw rows in, FineWeb's steps on datatrove, rows of text out. Runs on CPUs.

accelerate launch recipes/clean.py --config recipes/web/clean.yaml [--input 'crawl/*.warc.gz' --workers 8]"""

from posttrain import stage
from posttrain.args import parse, resolved
from posttrain.data import web, web_labels, web_stats
from posttrain.data.web_config import StepsConfig, WebConfig
from posttrain.errors import entry
from posttrain.stage import StageConfig

ARGS = (StageConfig, WebConfig, StepsConfig)


def check(argv, planned=()) -> dict:
    configs = _, config, _ = parse(ARGS, argv)
    web.check(config)
    return resolved(*configs)


def main() -> None:
    configs = _, config, steps = parse(ARGS, description=__doc__)
    kind, paths = web.check(config)
    run = stage.start("clean", configs, parents={}, data=[web.describe(config, kind, paths)])
    cleaning = web.clean(run, config, steps, kind, paths)
    metrics, gains = web_labels.measure(config, steps, cleaning)
    run.data[0] |= web_stats.left_out(cleaning)
    run.finish(lambda to: web.write_clean(run.output_dir, to), metrics=metrics, gains=gains, cleaning=cleaning)
    web.remove_work(run.output_dir)


if __name__ == "__main__":
    entry(main)
