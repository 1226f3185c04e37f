"""The model card of a finished stage: README.md, as the Hub shows it and as it lies in every stage's folder.

In: the stage's manifest and evals/*.json, the stages before it, what is known of licences. Out: Markdown after YAML
metadata. Everything in it is read from these files; what is not known is said to be not known. `stage.finish` writes
it without asking the Hub; `posttrain push` writes it anew with the licences that the Hub tells.

Metadata: https://hf.co/docs/hub/model-cards and huggingface_hub's ModelCardData.
"""

import json
import re
from pathlib import Path

from posttrain import figures, lineage, yaml_file
from posttrain.card_use import WHAT, further_use, use_of
from posttrain.checkpoint import replacing
from posttrain.errors import UserError
from posttrain.hub_files import ADAPTER_DIR, CARD, public
from posttrain.manifests import read_manifest

SMALL = 100_000_000  # parameters: below, a model of text knows little, whatever it was taught
SAMPLES = 3
LONGEST = 600  # characters of a sample's text
PROMPTS = {"pretrain": "Once upon a time", "tokenizer": "Hello, world."}
TALK = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "It is 5."}]
DATA_ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE_KEYS = ("license", "license_name", "license_link")


def write(folder: Path) -> None:
    """README.md of a finished stage, from what is here: nothing is asked of the Hub."""
    text = make(folder)
    with replacing(folder / CARD, "w", encoding="utf-8") as file:
        file.write(text)


def make(folder: Path, repo: str | None = None, licence: dict | None = None, data_licences: dict | None = None) -> str:
    """The card's text.

    repo: the Hub's name, in place of the folder's. licence: {"license", "license_name", "license_link"} of the base
    model, where it is known; the stage's own `license` and that of a stage before it come first. data_licences: data
    set -> licence. UserError where metadata come out that the Hub would refuse.
    """
    import jinja2

    told = read_manifest(folder)
    manifest = public(told)
    stages = lineage.ancestors(folder)
    title, name = repo or "-".join(folder.absolute().parts[-2:]), repo or "."
    stated = stated_licence(folder, told, licence or {})
    chats = (folder / "chat_template.jinja").is_file()
    kind, base = manifest["stage"], lineage.base_model(stages)
    adapter = (lineage.adapter_base(stages) or "its parent") if (folder / ADAPTER_DIR).is_dir() else None
    prompt, replies = _example(manifest)
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )  # Markdown: `cell` and `fenced` keep what models and data say from becoming any
    environment.filters |= {"cell": cell, "fenced": fenced}
    body = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text("utf-8")).render(
        title=title.rpartition("/")[2],
        what=WHAT.get(kind, f"A model trained by the stage `{kind}`."),
        facts=_facts(manifest, _config(folder)),
        lineage=lineage.as_text(title, stages) if stages else None,
        use=use_of(kind, chats, name, prompt, replies),
        use_more=further_use(kind, chats, name, manifest["metrics"], adapter),
        gains=[_gain(gain) for gain in manifest["gains"]],
        suites=[_suite(name, public(found)) for name, found in _suites(folder).items()],
        metrics=[_figure(name, figure) for name, figure in manifest["metrics"].items()],
        samples=[_sample(sample) for sample in manifest["samples"][:SAMPLES]],
        limits=_limits(manifest, _config(folder), sorted(_suites(folder))),
        data=[row for entry in manifest["data"] for row in _data(entry, data_licences or {})],
        template=_template(folder) if chats else None,
        recipe=_recipe(manifest, kind),
        config=yaml_file.dump(manifest["config"]),
        licence=_licence_text(stated, base),
    )
    head = metadata(folder, told, title, base, stated)
    return f"---\n{yaml_file.dump(head)}---\n\n" + re.sub("\n{3,}", "\n\n", body)


def metadata(folder: Path, manifest: dict, title: str, base: str | None, stated: dict) -> dict:
    """The card's YAML as a dict, valid for the Hub; `model-index` from the stage's figures and evaluations."""
    from huggingface_hub import ModelCardData

    from posttrain.model_index import eval_results

    architectures = _config(folder).get("architectures") or [""]
    pipeline = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}
    tags = ["posttrain", manifest["stage"], *(["lora"] if (folder / ADAPTER_DIR).is_dir() else [])]
    found = ModelCardData(
        **{key: value for key, value in stated.items() if key in LICENSE_KEYS},
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=data_ids(manifest) or None,
        library_name="transformers",
        pipeline_tag=next((tag for end, tag in pipeline.items() if architectures[0].endswith(end)), None),
        tags=tags,
        model_name=title.rpartition("/")[2],
        eval_results=eval_results(folder) or None,
    ).to_dict()
    found.pop("model_name", None)  # of no meaning without results
    return found


# --- licences


def stated_licence(folder: Path, manifest: dict, base: dict) -> dict:
    """{"license", ..., "from"}: what was said with the push, else what the stage's config says, else the nearest stage
    before it that its weights go back to, else the base model's card; {} where none says any."""
    if base.get("from"):
        return base  # said by the user, now
    own = manifest["config"].get("license")
    if own:
        return {"license": own, "from": "the stage's config"}
    for role, parent in manifest["parents"].items():
        path = lineage.parent_folder(folder, parent) if role in lineage.WEIGHTS_FROM else None
        if path and (found := stated_licence(path, read_manifest(path), {})):
            return {**found, "from": f"the stage it was trained from, {path.name}"}
    kept = {key: base[key] for key in LICENSE_KEYS if base.get(key)}
    return {**kept, "from": "the base model's card"} if kept.get("license") else {}


def _licence_text(stated: dict, base: str | None) -> str:
    if not stated:
        return (
            "**Not stated.** Without a licence nobody else may use the model. Its owner states one with "
            "`posttrain push STAGE --license apache-2.0`, or with `license:` in the stage's YAML."
            + (f" The base model {base} has terms of its own." if base else "")
        )
    name = stated.get("license_name") or stated["license"]
    link = f" ({stated['license_link']})" if stated.get("license_link") else ""
    return f"{name}{link}, from {stated['from']}. The data sets have licences of their own."


# --- what the manifest tells


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _suites(folder: Path) -> dict:
    from posttrain.model_index import read_suites

    return read_suites(folder)


def _facts(manifest: dict, config: dict) -> list[str]:
    facts = []
    if manifest.get("parameters"):
        facts.append(f"{figures.compact(manifest['parameters'])} parameters")
    facts += [str(name) for name in config.get("architectures") or ()]
    if config.get("max_position_embeddings"):
        facts.append(f"context of {config['max_position_embeddings']:,} tokens")
    if config.get("dtype"):
        facts.append(str(config["dtype"]))
    if manifest.get("tokens"):
        facts.append(f"{manifest['tokens']:,} tokens in this stage")
    facts.append(f"seed {manifest['seed']}")
    return [*facts, f"made {manifest['created'][:10]}"]


def _example(manifest: dict) -> tuple[str, list[str]]:
    """A prompt for the code block: a short held-out one where there is any; and replies, for a reward model."""
    for sample in manifest["samples"]:
        prompt = re.sub(r"^(ranking: )?user: ", "", sample.get("prompt", ""))
        replies = [re.sub(r"^\[score [^]]*\] ", "", reply["text"]) for reply in sample.get("replies", [])][:2]
        if "\n" not in prompt and 0 < len(prompt) <= 200:
            return prompt, replies or ["Hello."]
    return PROMPTS.get(manifest["stage"], "What is 2+3?"), ["It is 5."]


def _gain(gain: dict) -> list[str]:
    unit = gain.get("unit") or ""
    sides = []
    for side in ("before", "after"):
        value = " ".join(figures.measure(gain.get(side) or {}, unit)).strip()
        sides.append(cell(f"{(gain.get(side) or {}).get('label') or side}: {value}"))
    name = gain["name"] + (f", {unit}" if unit not in ("", "%") else "")
    reached = {True: "yes", False: "**no**"}.get(gain.get("passed"), "–")
    return [cell(name), *sides, cell(gain.get("goal") or ""), reached]


def _figure(name: str, figure: dict) -> list[str]:
    unit = figure.get("unit") or ""
    value = " ".join(figures.measure(figure, unit)).strip()
    return [cell(name + (f", {unit}" if unit not in ("", "%") else "")), cell(value), cell(figure.get("n") or "–")]


def _suite(name: str, found: dict) -> dict:
    rows = [_figure(metric, figure) for metric, figure in (found.get("metrics") or {}).items()]
    return {"name": found.get("suite") or name, "command": cell(found.get("command") or "not known"), "rows": rows}


def _sample(sample: dict) -> str:
    parts = [_short(sample.get("prompt", ""))]
    parts += [f"--- {reply['by']}\n{_short(reply.get('text', ''))}" for reply in sample.get("replies", [])]
    return "\n".join(parts)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST} more characters)"


def _flat(data: list[dict]) -> list[dict]:
    return [inner for entry in data for inner in (_flat(entry["mixture"]) if entry.get("mixture") else [entry])]


def data_ids(manifest: dict) -> list[str]:
    """The names of its data sets on the Hub; not those that are files or folders, or are made here."""
    from posttrain.data.files import is_local

    names = dict.fromkeys(str(entry.get("name") or "") for entry in _flat(manifest["data"]))
    return [name for name in names if DATA_ID.fullmatch(name) and not is_local(name)]


def _data(entry: dict, licences: dict):
    if entry.get("mixture"):
        for inner in entry["mixture"]:
            yield from _data(inner, licences)
        return
    name = str(entry.get("name")) + (f" ({entry['config']})" if entry.get("config") else "")
    licence = licences.get(entry.get("name")) or ("made by posttrain" if entry.get("name") == "tiny" else "not known")
    rows = f"{entry['rows']:,}" if isinstance(entry.get("rows"), int) else "–"
    revision, digest = (str(entry.get(key) or "–")[:12] for key in ("revision", "sha256"))
    yield [cell(name), cell(entry.get("split") or "–"), rows, revision, f"`{digest}`", cell(licence)]


def _limits(manifest: dict, config: dict, suites: list[str]) -> list[str]:
    """What the manifest itself tells against the model, and what nobody has measured."""
    limits, parameters = [], manifest.get("parameters")
    if parameters and parameters < SMALL:
        limits.append(f"It is small ({figures.compact(parameters)} parameters): do not rely on what it says.")
    limits += [
        f"It missed its goal: {cell(gain['name'])} ({cell(gain.get('goal') or 'higher')})."
        for gain in manifest["gains"]
        if gain.get("passed") is False
    ]
    if manifest["stage"] != "tokenizer":
        also = " and by the suites above" if suites else ""
        limits.append(
            f"It was measured on the held-out rows named below{also}, and on nothing else; what has no figure here "
            "(safety, bias, refusal, ...) is not known."
        )
    if any(entry.get("name") == "tiny" for entry in _flat(manifest["data"])):
        limits.append("It learned from `tiny`, a small invented world: it knows nothing of the real one.")
    for name, found in ((manifest.get("gate") or {}).get("allowed") or {}).items():
        limits.append(f"The gate found a fault and was told to let it pass (`--allow {name}`): {cell(found)}")
    for entry in _flat(manifest["data"]):
        if skipped := sum((entry.get("skipped") or {}).values()):
            limits.append(f"{skipped:,} rows of {cell(entry.get('name'))} could not be read and were left out.")
    if config.get("max_position_embeddings"):
        limits.append(f"It reads no more than {config['max_position_embeddings']:,} tokens, its reply included.")
    if str(manifest.get("git_commit") or "").endswith("+changes"):
        limits.append("The code that made it had changes that are in no commit.")
    return limits or ["None are known to the manifest, which does not mean that there are none."]


def _template(folder: Path) -> dict:
    """The source, and a conversation as it is rendered; what the template refuses is said."""
    from posttrain.template_render import render

    source = (folder / "chat_template.jinja").read_text("utf-8")
    told = json.loads((folder / "tokenizer_config.json").read_bytes())
    special = {key: token for key, token in told.items() if key.endswith("_token") and isinstance(token, str)}
    try:
        rendered = render(source, TALK, special=special)[0]
    except UserError as error:
        rendered = f"({error})"
    return {"source": source, "render": rendered}


def _recipe(manifest: dict, kind: str) -> str:
    machine, versions = manifest.get("machine") or {}, manifest.get("versions") or {}
    names = [f"{name} {versions[name]}" for name in ("posttrain", "torch", "transformers", "trl") if name in versions]
    where = f"{machine.get('processes') or machine.get('device') or 'a machine that is not named'}"
    return (
        f"`accelerate launch recipes/{kind}.py --config config.yaml` with the config below (paths cut to names), "
        f"{figures.duration(manifest.get('wall_time_s'))} on {where}; {', '.join(names) or 'versions not known'}; "
        f"commit {manifest.get('git_commit') or 'not known'}."
    )


# --- Markdown


def cell(value) -> str:
    """A value inside a table or a line: no line breaks, no new columns, no HTML, no links."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\|<>`\[\]])", r"\\\1", text)


def fenced(text: str, language: str = "text") -> str:
    """A code block that the text cannot end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
