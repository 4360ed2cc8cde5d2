"""The two verbs: what patching changes, that nothing is left behind, and that copies and neighbours stay apart."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
)

import fastdit
import tiny_models
from contract import same_bits
from fastdit import Cached, Schedule
from snapshot import scheduler_snapshot, snapshot
from tiny_models import generate, sample

pytestmark = pytest.mark.diffusers

PIPELINES = tiny_models.one_each(tiny_models.forms(), -1)
EVERY_2 = Cached(Schedule.every(2))


def state(pipe):
    return snapshot(pipe.transformer), scheduler_snapshot(pipe.scheduler), set(pipe.__dict__)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("method", [fastdit.Dense(), EVERY_2], ids=["dense", "cached"])
def test_unpatch_leaves_everything_as_it_was(name, method):
    pipe = tiny_models.pipeline(name)
    stock = generate(pipe, name)  # a scheduler gets some attributes in its first run
    before = state(pipe)
    fastdit.patch(pipe, method)
    assert state(pipe) != before
    generate(pipe, name)
    fastdit.unpatch(pipe)
    assert state(pipe) == before
    same_bits(generate(pipe, name), stock)


def test_unpatch_through_the_handle_and_twice():
    pipe = tiny_models.pipeline("sd3")
    before = state(pipe)
    handle = fastdit.patch(pipe)
    handle.unpatch()
    handle.unpatch()
    fastdit.unpatch(pipe)
    fastdit.unpatch(pipe.transformer)
    assert state(pipe) == before


def test_patching_leaves_classes_alone():
    pipe = tiny_models.pipeline("flux")
    classes = {type(module) for module in pipe.transformer.modules()} | {type(pipe)}
    classes.add(type(pipe.scheduler))
    before = {cls: dict(vars(cls)) for cls in classes}
    fastdit.patch(pipe, EVERY_2)
    generate(pipe, "flux")
    assert {cls: dict(vars(cls)) for cls in classes} == before


def test_patching_keeps_parameters_processors_and_the_state_dict():
    model = tiny_models.transformer("sd3.5")
    before = snapshot(model)
    fastdit.patch(model, EVERY_2)
    after = snapshot(model)
    assert after["state"] == before["state"]
    assert after.keys() == before.keys()
    for name in before:
        for part in ("class", "id", "processor", "parameters"):
            if name != "state":
                assert after[name][part] == before[name][part]


def test_a_second_patch_replaces_the_first():
    pipe = tiny_models.pipeline("pixart-sigma")
    before = state(pipe)
    first = fastdit.patch(pipe, EVERY_2)
    second = fastdit.patch(pipe, backend="reference")
    stock = generate(tiny_models.pipeline("pixart-sigma"), "pixart-sigma")
    same_bits(generate(pipe, "pixart-sigma"), stock)
    assert len(pipe.transformer._forward_pre_hooks) == 1
    first.unpatch()  # of a patch that is gone: leaves the second alone
    generate(pipe, "pixart-sigma")
    assert second.report().steps == 4
    second.unpatch()
    assert state(pipe) == before


def test_scheduler_keeps_class_name_signature_and_isinstance():
    pipe = tiny_models.pipeline("sd3")
    stock = type(pipe.scheduler)
    fastdit.patch(pipe)
    patched = type(pipe.scheduler)
    assert (patched.__name__, patched.__module__) == (stock.__name__, stock.__module__)
    assert isinstance(pipe.scheduler, stock)
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(patched, method)) == inspect.signature(
            getattr(stock, method)
        )


def test_pickled_and_saved_schedulers_are_stock(tmp_path):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, EVERY_2)
    generate(pipe, "sd3")
    for other in (
        pickle.loads(pickle.dumps(pipe.scheduler)),
        copy.deepcopy(pipe.scheduler),
        FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config),
    ):
        assert type(other) is FlowMatchEulerDiscreteScheduler
        assert "_fastdit" not in other.__dict__
    pipe.scheduler.save_pretrained(tmp_path)
    assert '"FlowMatchEulerDiscreteScheduler"' in (tmp_path / "scheduler_config.json").read_text()


def test_save_pretrained_of_a_patched_pipeline_names_stock_classes(tmp_path):
    pipe = tiny_models.pipeline("pixart-sigma")
    stock = generate(pipe, "pixart-sigma")
    fastdit.patch(pipe, EVERY_2)
    pipe.save_pretrained(tmp_path)
    assert "fastdit" not in (tmp_path / "model_index.json").read_text()
    loaded = type(pipe).from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is DPMSolverMultistepScheduler
    same_bits(generate(loaded, "pixart-sigma"), stock)


def test_a_patched_model_refuses_to_be_pickled_by_name():
    model = tiny_models.transformer("dit")
    fastdit.patch(model)
    with pytest.raises(fastdit.FastDiTError, match="unpatch"):
        pickle.dumps(model)
    fastdit.unpatch(model)
    pickle.dumps(model)


@pytest.mark.parametrize("family", tiny_models.one_each(tiny_models.forms()))
def test_a_copied_transformer_is_independent(family):
    model = tiny_models.transformer(family)
    fastdit.patch(model, EVERY_2, backend="reference")
    twin = copy.deepcopy(model)
    inputs = tiny_models.call(family)
    with torch.no_grad():
        stock = sample(model(**inputs))
        same_bits(sample(twin(**inputs)), stock)
        for parameter in twin.parameters():
            parameter.mul_(1.1)
        fastdit.patch(model, backend="reference")
        fastdit.unpatch(model)
        changed = sample(twin(**inputs))
        assert not torch.equal(changed, stock)  # the copy runs on its own weights
        assert fastdit.report(twin).steps == 1
        fastdit.unpatch(twin)
        assert snapshot(twin).keys() == snapshot(model).keys()
        assert all("_fastdit" not in m.__dict__ for m in twin.modules())
        same_bits(sample(twin(**inputs)), changed)
        same_bits(sample(model(**inputs)), stock)


def test_a_copied_pipeline_is_independent():
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, EVERY_2)
    expected = generate(pipe, "sd3")
    twin = copy.deepcopy(pipe)
    computed = fastdit.report(pipe).computed
    same_bits(generate(twin, "sd3", steps=4), expected)
    assert fastdit.report(twin).computed == computed
    fastdit.unpatch(pipe)
    same_bits(generate(twin, "sd3"), expected)
    fastdit.unpatch(twin)
    assert type(twin.scheduler) is FlowMatchEulerDiscreteScheduler
    same_bits(generate(twin, "sd3"), generate(pipe, "sd3"))


def test_a_pipeline_made_from_a_patched_one_shares_the_patch():
    pipe = tiny_models.pipeline("flux-dev")
    other = tiny_models.pipeline("flux-img2img")
    fastdit.patch(other, EVERY_2)
    expected = generate(other, "flux-img2img")
    fastdit.patch(pipe, EVERY_2)
    sibling = FluxImg2ImgPipeline.from_pipe(pipe)
    sibling.set_progress_bar_config(disable=True)
    same_bits(generate(sibling, "flux-img2img"), expected)
    fastdit.unpatch(sibling)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def test_a_scheduler_swapped_in_after_patching_is_followed():
    pipe = tiny_models.pipeline("pixart-sigma")
    fastdit.patch(pipe, EVERY_2)
    expected = generate(pipe, "pixart-sigma")
    first = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(first.config)
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler
    same_bits(generate(pipe, "pixart-sigma"), expected)
    assert fastdit.report(pipe).reused == 2 * 9
    fastdit.unpatch(pipe)
    for scheduler in (first, pipe.scheduler):
        assert type(scheduler) is DPMSolverMultistepScheduler
        assert "_fastdit" not in scheduler.__dict__


def test_two_patched_pipelines_do_not_touch_each_other():
    one, two = (tiny_models.pipeline("sd3", seed=seed) for seed in range(2))
    fastdit.patch(one, EVERY_2)
    fastdit.patch(two, Cached(Schedule.every(3)))
    expected = [generate(one, "sd3"), generate(two, "sd3")]
    results = {}

    def interleaved(pipe, step, timestep, tensors):
        if step == 1:
            results["inner"] = generate(two, "sd3")
        return tensors

    same_bits(generate(one, "sd3", callback_on_step_end=interleaved), expected[0])
    same_bits(results["inner"], expected[1])
    fastdit.unpatch(one)
    same_bits(generate(two, "sd3"), expected[1])


def test_two_pipelines_that_share_a_scheduler_take_turns():
    one = tiny_models.pipeline("sd3")
    two = tiny_models.pipeline("sd3", scheduler=one.scheduler, seed=1)
    assert one.scheduler is two.scheduler
    fastdit.patch(one, EVERY_2)
    fastdit.patch(two, EVERY_2)
    for pipe in (one, two, one):
        generate(pipe, "sd3")
        report = fastdit.report(pipe)
        assert (report.steps, report.reused) == (4, 2 * 8)
    fastdit.unpatch(one)
    fastdit.unpatch(two)
    assert type(one.scheduler) is FlowMatchEulerDiscreteScheduler


def test_two_threads_do_not_touch_each_other():
    pipes = [tiny_models.pipeline("sd3", seed=seed) for seed in range(2)]
    for pipe, n in zip(pipes, (2, 3), strict=True):
        fastdit.patch(pipe, Cached(Schedule.every(n)))
    expected = [generate(pipe, "sd3", steps=6) for pipe in pipes]
    barrier = threading.Barrier(2)
    results = [[], []]

    def work(index):
        torch.set_num_threads(1)
        barrier.wait()
        for _ in range(3):
            results[index].append(generate(pipes[index], "sd3", steps=6))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 3
        for result in results[index]:
            same_bits(result, expected[index])


def test_a_forward_that_was_wrapped_over_ours_survives_unpatching():
    """Somebody replaces a block's forward after patching and calls on to what was there."""
    model = tiny_models.transformer("sd3")
    inputs = tiny_models.call("sd3")
    with torch.no_grad():
        stock = sample(model(**inputs))
        fastdit.patch(model, backend="reference")
        block = model.transformer_blocks[0]
        inner = block.forward
        block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        same_bits(sample(model(**inputs)), stock)
        fastdit.unpatch(model)
        same_bits(sample(model(**inputs)), stock)
