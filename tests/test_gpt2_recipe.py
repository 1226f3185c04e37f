"""recipes/gpt2-124m: the published shape and schedule, the same steps on one GPU and eight, the forecast by hand."""

from pathlib import Path

import pytest
import torch

from posttrain import args, chain, forecast, shapes
from posttrain.training import schedule

FOLDER = Path(__file__).parents[1] / "recipes" / "gpt2-124m"
FILES = [FOLDER / "pretrain_1gpu.yaml", FOLDER / "pretrain_8gpu.yaml"]
PUBLISHED, VOCABULARY, PADDED = 124_439_808, 50_257, 50_304


@pytest.fixture(scope="module")
def gpt2_tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer of as many tokens as GPT-2's."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"<|endoftext|>": VOCABULARY - 1}
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def parsed(file: Path) -> tuple:
    return chain.import_recipe(FOLDER.parent / "pretrain.py").parsed(["--config", str(file)])


def test_the_files_differ_in_their_folder_alone():
    one, eight = (args.resolved(*parsed(file)) for file in FILES)
    assert {key for key in one if one[key] != eight[key]} == {"output_dir"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shape_and_steps_are_the_published_ones(file, gpt2_tokenizer):
    from posttrain.models import load_tokenizer

    *_, shape, config, optim = parsed(file)
    with torch.device("meta"):
        model = shapes.make_model(shape, load_tokenizer(str(gpt2_tokenizer)))
    assert model.num_parameters() == PUBLISHED + (PADDED - VOCABULARY) * 768
    assert model.config.vocab_size == PADDED
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head, model.config.n_positions) == (
        12,
        768,
        12,
        1024,
    )
    assert config.batch_size * config.sequence_length == 2**19
    assert config.max_steps == 10_000_000_000 // 2**19
    assert optim.warmup_steps == 375_000_000 // 2**19  # GPT-3's 375 M tokens of warm-up
    for processes in (1, 8):
        assert config.batch_size % (processes * config.micro_batch_size) == 0
    factor = schedule("cosine", config.max_steps, config.max_steps, optim.warmup_steps, min_ratio=optim.min_lr_ratio)
    assert factor == pytest.approx(0.1)


def test_the_forecast_of_hours_and_dollars_by_hand(gpt2_tokenizer, capsys):
    overrides = ["--tokenizer_path", str(gpt2_tokenizer)]
    found = forecast.run(
        str(FILES[1]), overrides, measure=False, device="H100", mfu=0.4, gpus=8, price=2.5, device_memory="80GB"
    )
    multiplying = 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + PADDED * 768  # layers with biases, last norm, tied head
    flops = 2**19 * (6 * multiplying + 3 * 2 * 1024 * 12 * 768)
    assert found["seconds_a_step"] == pytest.approx(flops / (989e12 * 0.4 * 8), rel=1e-3)
    assert found["hours"] == pytest.approx(found["seconds_a_step"] * 19_073 / 3600)
    assert found["cost"] == found["hours"] * 8 * 2.5
    assert found["memory"]["weights"] == 4 * found["parameters"]
    assert found["fits"] and found["memory_total"] < 0.9 * 80e9
    assert "NOT measured" in capsys.readouterr().out
    shards = forecast.run(
        str(FILES[1]), overrides, measure=False, accelerate_config=str(FOLDER.parent / "accelerate/fsdp2.yaml")
    )
    assert shards["gpus"] == 8 and shards["memory"]["optimizer"] == found["memory"]["optimizer"] / 8
    small = forecast.run(str(FILES[1]), overrides, measure=False, gpus=8, device_memory="32GB")
    assert small["fits"] and small["memory"]["activations"] < found["memory"]["activations"] / 3
    assert "gradient checkpointing, which `auto` therefore turns on" in capsys.readouterr().out


def test_what_the_readme_launches_is_there():
    text = (FOLDER / "README.md").read_text()
    named = {word for word in text.replace("`", " ").split() if word.startswith("recipes/")}
    assert {str(file.relative_to(FOLDER.parents[1])) for file in FILES} <= named
    assert all((FOLDER.parents[1] / name).exists() for name in named)
