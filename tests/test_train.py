"""Training routers: the loss, its gradients, what moves and what does not, lambda, checkpoints, several processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fastdit
import harmonica_oracle
import tiny_models
from contract import same_bits
from fastdit.account.cost import Cost
from fastdit.blocks.nodes import Nodes
from fastdit.train import HarmoniCa, proxy
from fastdit.train.blending import COMPUTE, STOCK, Blending
from fastdit.train.ddim import ListedDDIM
from fastdit.train.pair import Pair
from fastdit.train.student import Trainee
from snapshot import snapshot
from trainings import GUIDANCE, STEPS, restated, table, training

# ---- one epoch is what the paper says


@pytest.mark.parametrize("keep", ["blended", "fresh"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_epochs_equal_the_plain_restatement(scheduler, keep):
    """Losses, and logits after two epochs; a multistep scheduler keeps its history on the student's trajectory."""
    pipe = tiny_models.pipeline("dit", torch.float64, scheduler=scheduler())
    made = training(pipe=pipe, lambda_form=None, tau=0.4, keep=keep, lr=0.5)
    made.weights = torch.rand(STEPS)
    pipe.transformer.requires_grad_(False)
    logits = [torch.nn.Parameter(row.detach().clone()) for row in made.logits]
    optimizer = torch.optim.AdamW(logits[1:], lr=0.5, weight_decay=0)
    for _ in range(2):
        expected = harmonica_oracle.train(
            *restated(made), logits, optimizer, made.weights.tolist(), 1e-3
        )
        losses, _ = made.train_epoch()
        torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(table(made), torch.stack([r.detach() for r in logits]))
    assert (table(made)[1:] < -0.4).any(), "every slot was renewed: the case tests little"


# A run for each of hundreds of logits: these have between them all forms of guidance and of blocks.
@pytest.mark.parametrize("name", ["dit", "sd3.5", "flux", "pixart-sigma"])
def test_the_gradient_of_every_logit_is_that_of_finite_differences(name):
    """Of what `update` minimises, in fp64; guidance, dropped channels and two calls in a step are inside."""
    made = training(name, dtype=torch.float64, lambda_form=None, steps=3)
    made.logits = [torch.nn.Parameter(row.detach().double()) for row in made.logits]
    made.weights = torch.tensor([0.0, 0.7, 0.9])
    seen = {}

    def update(step, loss, ratios):
        minimised = made.weight(step) * loss.double() + made.settings.beta * ratios.sum()
        seen[step] = float(minimised.detach()), torch.autograd.grad(minimised, made.logits[step])[0]
        return seen[step][0]

    made.update = update
    state = made.generator.get_state()

    def epoch():
        made.generator.set_state(state)
        made.train_epoch()
        return dict(seen)

    first = epoch()
    count = len(made.trainee.places)
    for entry in range(1, count, count // 3):
        ends = {}
        for steps in (2, 1, -1, -2):
            with torch.no_grad():
                made.logits[2][entry] += steps * 2e-2
            ends[steps] = epoch()[2][0]
            with torch.no_grad():
                made.logits[2][entry] -= steps * 2e-2
        # Four points, since parts of the pipelines compute in fp32 and a small step would show that.
        measured = (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * 2e-2)
        assert measured == pytest.approx(float(first[2][1][entry]), rel=1e-4, abs=1e-7)


def test_only_the_logits_of_the_running_step_move():
    made = training(lambda_form=None)
    before, moved = table(made), []
    original = made.update

    def update(step, loss, ratios):
        result = original(step, loss, ratios)
        moved.append((step, (table(made) != before).any(dim=1).nonzero().flatten().tolist()))
        assert [row.grad is not None for row in made.logits] == [s == step for s in range(STEPS)]
        return result

    made.update = update
    made.train_epoch()
    assert moved == [(1, [1]), (2, [1, 2]), (3, [1, 2, 3])]
    assert not any(p.requires_grad for p in [made.logits[0]])
    assert (made.logits[0] == 5).all()


@pytest.mark.parametrize(("beta", "bound"), [(1e3, -5), (-1e3, 5)])
def test_logits_stay_within_their_bounds(beta, bound):
    made = training(lambda_form=None, lr=4.0)
    made.beta = beta
    for _ in range(3):
        made.train_epoch()
    assert (table(made)[1:] == bound).all()


def test_the_clamp_does_not_reach_what_inference_computes():
    """At logits of 5 the schedule computes everything: a trained table is never worse than its bounds allow."""
    made = training(spread=0.0)
    with torch.no_grad():
        for row in made.logits:
            row.fill_(5.0)
    assert made.router().schedule().reuse_share == 0


@pytest.mark.parametrize("name", tiny_models.one_each(tiny_models.forms()))
def test_every_family_trains(name):
    """Against a strong penalty every logit falls, and the file that comes out runs."""
    made = training(name, beta=1e3, lambda_form=None)
    before = table(made)
    found = made.fit()
    assert (table(made)[1:] < before[1:]).all()
    pipe = made.trainee.pipeline
    handle = fastdit.patch(pipe, fastdit.HarmoniCa(found, tau=0.5))
    tiny_models.generate(pipe, name)
    assert handle.report().reuse_share == pytest.approx(
        handle.explain(**tiny_models.asked(name), text_tokens=tiny_models.TEXT).reuse_share
    )


def test_heun_has_a_row_for_every_call():
    pipe = tiny_models.pipeline("sd3", scheduler=FlowMatchHeunDiscreteScheduler())
    made = training("sd3", pipe=pipe, lambda_form=None)
    made.train_epoch()
    assert made.router().steps == len(pipe.scheduler.timesteps) == 2 * STEPS - 1


# ---- the student


def student_call(row, slots, keep="blended", tau=0.4, t=500):
    """(output, call) of a tiny DiT's student; and the stock output."""
    pipe = tiny_models.pipeline("dit", torch.float64)
    trainee = Trainee(pipe, blending=Blending(tau, keep))
    found = {}

    class Once:
        def call(self, step, branch, forward):
            found["stock"] = forward(None)
            found["student"] = trainee.blend(row, slots)
            found["output"] = forward(found["student"])
            return found["output"]

        def step(self, step, prediction):
            return prediction

        def stepped(self, step, latents):
            return True

    with torch.no_grad(), trainee:
        noise = torch.Generator().manual_seed(1)
        trainee.run(Once(), {"class_labels": [3], "num_inference_steps": 2, "generator": noise})
    return found, pipe, trainee


def random_slots(trainee, like, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: Nodes((-1,), (torch.randn(like.shape, generator=generator, dtype=like.dtype),))
        for key in trainee.places
    }


@pytest.mark.parametrize("keep", ["blended", "fresh"])
def test_a_slot_is_renewed_where_the_ratio_exceeds_tau(keep):
    row = torch.tensor([0.9, 0.1, 0.41, 0.4, 0.0, 1.0])
    filled, _, trainee = student_call(COMPUTE, {})
    fresh = filled["student"].written
    assert set(fresh) == set(trainee.places)
    slots = random_slots(trainee, next(iter(fresh.values())).values[0])
    held = dict(slots)
    found, _, _ = student_call(row, slots, keep)
    written = found["student"].written
    assert {trainee.places[key] for key in written} == {0, 2, 5}
    assert slots == held, "what was handed in is the caller's"
    # the first component's input does not depend on any blend
    first = next(key for key, place in trainee.places.items() if place == 0)
    (kept,), (own,), (found,) = (each[first].values for each in (held, fresh, written))
    expected = 0.9 * own + 0.1 * kept if keep == "blended" else own
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_teacher_is_stock_and_touches_no_slot():
    """Run between the student's calls, it changes nothing that they read."""
    filled, _pipe, trainee = student_call(COMPUTE, {})
    same_bits(filled["output"], filled["stock"])
    slots = random_slots(trainee, next(iter(filled["student"].written.values())).values[0])
    before = {key: held.values[0].clone() for key, held in slots.items()}
    found, _, _ = student_call(torch.full((6,), 0.5), slots)
    for key, value in before.items():
        same_bits(slots[key].values[0], value)
    same_bits(found["stock"], filled["stock"])


def test_a_reused_component_goes_through_the_current_gate():
    """With r = 0 a block is h + gate_msa(t) C_attn + gate_mlp(t) C_ff, at each t."""
    pipe = tiny_models.pipeline("dit", torch.float64)
    trainee = Trainee(pipe)
    block = trainee.blocks[0]
    generator = torch.Generator().manual_seed(3)
    h, attn, ff = (
        torch.randn(2, 8, 24, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    slots = {(0, "attn1"): Nodes((0,), (attn,)), (0, "ff"): Nodes((0,), (ff,))}
    outputs = []
    for t in (100, 700):
        given = {"timestep": torch.tensor([t, t]), "class_labels": torch.tensor([1, 2])}
        student = trainee.blend(torch.zeros(len(trainee.places)), slots)
        student.start_block(0)
        with torch.no_grad():
            out = trainee.adapter.forwards["transformer_blocks"](block, student, h, **given)
            _, gate, _, _, gate_mlp = block.norm1(h, **given, hidden_dtype=h.dtype)
        expected = h + gate[:, None] * attn + gate_mlp[:, None] * ff
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        outputs.append(out)
    assert not torch.allclose(*outputs)


# ---- lambda


def rows_of(made, spread, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.sigmoid(spread * torch.randn(row.shape, generator=generator)) for row in made.logits
    ]


@pytest.mark.parametrize("form", ["released", "published"])
def test_lambda_equals_whole_runs(form):
    """Sharing prefixes is exact, for a sampler with a history too, and takes T (T + 1) / 2 forwards for T^2."""
    pipe = tiny_models.pipeline("dit", torch.float64, scheduler=DPMSolverMultistepScheduler())
    made = training(pipe=pipe)
    rows = rows_of(made, 2.0)
    model, scheduler, x, labels, guidance = restated(made)
    calls = []
    handle = pipe.transformer.transformer_blocks[1].norm3.register_forward_hook(
        lambda *_: calls.append(1)
    )
    with made.trainee:
        found = proxy.estimate(form, made.trainee, rows, made.draw())
    handle.remove()
    assert len(calls) == STEPS * (STEPS + 1) // 2
    plain = {
        "released": lambda *given: harmonica_oracle.released_lambda(*given)[0],
        "published": harmonica_oracle.published_lambda,
    }[form](model, scheduler, x, labels, guidance, rows)
    np.testing.assert_allclose(found.numpy(), np.array(plain, np.float32), rtol=1e-6)


def test_the_sensitivity_does_not_depend_on_how_much_is_cached():
    """Where little is cached it is the same to first order, as the released form falls with the square."""
    pipe = tiny_models.pipeline("dit", torch.float64)
    made = training(pipe=pipe, keep="fresh")
    arguments, found = made.draw(), {}
    for form in ("released", "sensitivity"):
        for logit in (5.0, 4.0):
            rows = [torch.sigmoid(torch.full_like(row, logit)) for row in made.logits]
            with made.trainee:
                found[form, logit] = proxy.estimate(form, made.trainee, rows, arguments)[1:]
    less, more = ((1 - torch.sigmoid(torch.tensor(logit))) ** 2 for logit in (5.0, 4.0))
    np.testing.assert_allclose(
        found["released", 4.0] / found["released", 5.0], more / less, rtol=0.2
    )
    np.testing.assert_allclose(found["sensitivity", 4.0], found["sensitivity", 5.0], rtol=0.1)


def test_lambda_of_the_last_step_is_the_schedulers_own_factor():
    """After it no model runs: Euler moves the latents by dt times the prediction."""
    pipe = tiny_models.pipeline("sd3", torch.float64)
    made = training("sd3", pipe=pipe, dtype=torch.float64, keep="fresh")
    rows = rows_of(made, 2.0)
    with made.trainee:
        found = proxy.estimate("sensitivity", made.trainee, rows, made.draw())
    sigmas = pipe.scheduler.sigmas
    assert float(found[-1]) == pytest.approx(float(sigmas[-1] - sigmas[-2]) ** 2, rel=1e-4)


def test_the_changes_of_the_latents_add_up():
    """Along the released chain, from everything computed to everything cached."""
    pipe = tiny_models.pipeline("dit", torch.float64)
    made = training(pipe=pipe)
    rows = rows_of(made, 2.0)
    given = restated(made)
    weights, runs = harmonica_oracle.released_lambda(*given, rows)
    dense = harmonica_oracle.sample(*given, [None] * STEPS)
    cached = harmonica_oracle.sample(*given, [None, *rows[1:]])
    total = sum(after - before for before, after in itertools.pairwise(runs))
    torch.testing.assert_close(total, cached - dense)
    with made.trainee:
        found = proxy.estimate("released", made.trainee, rows, made.draw())
    np.testing.assert_allclose(found.numpy(), np.array(weights, np.float32), rtol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "flux"])  # guided by one call and by two
def test_lambda_is_near_zero_where_everything_computes_and_positive_where_it_does_not(name):
    made = training(name)
    full = [torch.full_like(row, 5.0) for row in made.logits]
    rows = [torch.sigmoid(row) for row in full]
    arguments = made.draw()
    with made.trainee:
        near = proxy.estimate("released", made.trainee, rows, arguments)
        rows[2] = torch.sigmoid(-full[2])
        far = proxy.estimate("released", made.trainee, rows, arguments)
    assert near[0] == 0
    assert (near[1:] > 0).all(), "1 - r is 0.0067, not 0"
    assert far[2] > 100 * near[2]
    assert far[1] == near[1]


def test_lambda_of_one_is_the_unweighted_loss():
    losses, weighted = training(lambda_form=None, beta=0.0).train_epoch()
    assert torch.equal(losses, weighted)
    made = training(normalise=True, beta=0.0)
    losses, weighted = made.train_epoch()
    mean = made.weights[1:].mean()
    torch.testing.assert_close(weighted[1:], losses[1:] * made.weights[1:] / mean)


def test_a_target_steers_beta_and_weighs_the_penalty_by_arithmetic():
    """Beta moves by e^(target - what 1 - r spares); a term of the penalty counts as its component's arithmetic does."""
    made = training("sd3", target=0.6, lambda_form=None, spread=1.0)
    transformer, image = made.trainee.transformer, made.conditions.image_tokens
    cost = Cost.of(transformer, image, tiny_models.TEXT)
    macs = np.array([c.macs for c in cost.components], float)
    table_of = torch.sigmoid(torch.stack([row.detach() for row in made.logits[1:]])).numpy()
    spared = ((1 - table_of) * macs).sum() / (STEPS * macs.sum())
    assert made.spared() == pytest.approx(spared, rel=1e-5)
    made.train_epoch()
    assert made.beta == pytest.approx(made.settings.beta * np.exp(0.6 - made.spared()))
    ratios = torch.sigmoid(made.logits[1])
    made.update(1, torch.zeros(()), ratios)
    row = torch.sigmoid(made.logits[1].detach())
    slope = made.beta * torch.tensor(macs / macs.mean()) * row * (1 - row)
    # what the step before the last update had; a step of lr moved the logits a little
    torch.testing.assert_close(made.logits[1].grad.double(), slope, rtol=0.2, atol=0)


def test_whole_steps_have_one_logit():
    """It goes the way of the sum of what the components' logits would go."""
    still = {"lambda_form": None, "spread": 0.0, "lr": 0.0}
    made, apart = (training(whole_steps=whole, **still) for whole in (True, False))
    for each in (made, apart):
        each.train_epoch()
    same_bits(made.logits[-1].grad, apart.logits[-1].grad.sum().expand_as(made.logits[-1]))
    made = training(whole_steps=True, lambda_form=None, spread=0.0)
    made.train_epoch()
    assert (table(made) == table(made)[:, :1]).all()
    drawn = training(whole_steps=True, spread=1.0)
    assert (table(drawn) == table(drawn)[:, :1]).all()
    assert len(table(drawn)[:, 0].unique()) == STEPS


def test_pairs_train_every_second_step_on_the_teachers_latents():
    """Learning-to-Cache: slots are one step old and fresh, and no error of an earlier step is in the latents."""
    pipe = tiny_models.pipeline("dit", torch.float64)
    made = training(pipe=pipe, lambda_form=None, pairs=True, keep="fresh")
    model, scheduler, x, labels, guidance = restated(made)
    before = [row.detach().clone() for row in made.logits]
    expected = [0.0] * STEPS
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            with model.blended(None) if step % 2 == 0 else contextlib.nullcontext():
                target = model.predict(x, t, labels, guidance)
            if step % 2:
                with model.blended(torch.sigmoid(before[step])):
                    found = model.predict(x, t, labels, guidance)
                expected[step] = float((found - target).square().mean())
            x = scheduler.step(target, t, x).prev_sample
    losses, _ = made.train_epoch()
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=0)
    moved = [
        (row.detach() != old).any().item() for row, old in zip(made.logits, before, strict=True)
    ]
    assert moved == [False, True, False, True]
    assert made.router().schedule().layers["transformer_blocks"].bits[::2].all()


# ---- what it costs, and what it leaves behind


class Flops(TorchDispatchMode):
    """Floating point operations by torch's own formulas, backward passes included."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("name", ["dit", "sd3"])  # blocks of one stream, and of two
def test_an_iteration_costs_about_three_forwards(name):
    """Teacher, student, and a backward pass that reaches no weight."""
    made = training(name, lambda_form=None, batch=4)
    with sdpa_kernel(SDPBackend.MATH):  # products that torch has formulas for
        with made.trainee, Flops() as dense:
            proxy.Sampling(made.trainee, [STOCK] * STEPS).run(made.draw()())
        with Flops() as counter:
            made.train_epoch()
    one = dense.total / STEPS
    iteration = (counter.total - one) / (STEPS - 1)
    assert 2 * one < iteration <= 3.2 * one


def test_checkpointed_blocks_train_alike():
    plain, saved = (training("sd3.5", lambda_form=None, checkpointing=c) for c in (False, True))
    for made in (plain, saved):
        made.train_epoch()
    same_bits(table(saved), table(plain))


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_is_left_as_it_was(fails):
    pipe = tiny_models.pipeline("sd3")
    pipe.transformer.train()
    before, scheduler = snapshot(pipe.transformer), set(vars(pipe.scheduler))
    made = training("sd3", pipe=pipe)
    if fails:
        made.update = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            made.train_epoch()
    else:
        made.train_epoch()
    assert snapshot(pipe.transformer) == before
    assert "step" not in vars(pipe.scheduler)
    assert scheduler <= set(vars(pipe.scheduler))
    assert pipe.transformer.training
    assert all(p.requires_grad and p.grad is None for p in pipe.transformer.parameters())


def test_draws_are_private():
    """Neither reads torch's global generator nor moves it."""
    first, second = training(), training()
    state = torch.get_rng_state()
    first.train_epoch()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    second.train_epoch()
    same_bits(table(first), table(second))


# ---- a pair


def test_a_pair_is_two_computations():
    student = torch.randn(4, 2, requires_grad=True)
    teacher = torch.randn(4, 2)

    def combine(x):
        first, second = x.chunk(2)
        x = torch.cat([second + 3 * (first - second)] * 2)
        return (x.to(torch.float64) / x.std()).sum(dim=1)[1:]

    with torch.no_grad():
        pair = combine(Pair.of(student, teacher))
    assert pair.shape == (3,)
    assert pair.dtype is torch.float64
    same_bits(pair.__dict__["student"].detach(), combine(student).detach())
    same_bits(pair.__dict__["teacher"], combine(teacher))
    (found,) = torch.autograd.grad(pair.__dict__["student"].sum(), student)
    (expected,) = torch.autograd.grad(combine(student).sum(), student)
    same_bits(found, expected)


# ---- checkpoints and processes


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [2, 3])
def test_a_killed_training_goes_on_to_the_same_logits(tmp_path, at):
    """Killed at a checkpoint, and after one: what came after it is done again."""
    options = {"epochs": 4, "lambda_every": 2, "save_every": 2, "lr": 0.3, "target": 0.5}
    whole = training(**options)
    whole.fit()

    def kill(progress):
        if progress.epoch == at:
            raise Killed

    with pytest.raises(Killed):
        training(folder=tmp_path, report=kill, **options).fit()
    resumed = training(folder=tmp_path, **options)
    resumed.fit()
    assert resumed.epoch == 4
    same_bits(table(resumed), table(whole))
    same_bits(resumed.weights, whole.weights)
    assert resumed.beta == whole.beta
    longer = training(folder=tmp_path, **(options | {"epochs": 5}))
    longer.fit()
    assert longer.epoch == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_guidance_scale_must_be_finite(value):
    pipe = tiny_models.pipeline("dit")
    with pytest.raises(fastdit.ArgumentError, match="guidance_scale"):
        HarmoniCa(pipe, steps=3, prompts=[3], arguments={"guidance_scale": value})


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fastdit.ArgumentError, match="folder must be a folder"):
        training(folder=tmp_path / "file")


def test_a_folder_with_another_training_is_refused(tmp_path):
    training(folder=tmp_path).fit()
    with pytest.raises(fastdit.ArgumentError, match="other beta, seed"):
        training(folder=tmp_path, beta=1.0, seed=4).fit()
    with pytest.raises(fastdit.ArgumentError, match="other timesteps"):
        training(
            folder=tmp_path,
            pipe=tiny_models.pipeline("dit", scheduler=DDIMScheduler(timestep_spacing="trailing")),
        ).fit()


PROCESS = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import test_train
made = test_train.training(epochs=2, batch=4, lambda_every=1, lambda_form="sensitivity")
made.fit()
if made.ranks.rank == 0:
    torch.save({{"table": test_train.table(made), "weights": made.weights}}, {out!r})
made.ranks.wait()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Each with half of the batch; lambda and gradients are those of the whole, to rounding."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    package, tests = Path(fastdit.__file__).parents[1], Path(__file__).parent
    out = tmp_path / "two.pt"
    code = PROCESS.format(paths=[str(tests), str(package)], out=str(out))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **address, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
    together = torch.load(out, weights_only=True)
    alone = training(epochs=2, batch=4, lambda_every=1, lambda_form="sensitivity")
    alone.fit()
    torch.testing.assert_close(together["weights"], alone.weights, rtol=1e-4, atol=0)
    torch.testing.assert_close(together["table"], table(alone), rtol=0, atol=2e-3)


def test_it_needs_no_accelerate():
    code = (
        "import sys; sys.modules['accelerate'] = None; import fastdit.train; "
        "print(fastdit.train.HarmoniCa.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "HarmoniCa", done.stderr


def test_a_file_says_what_it_was_trained_for():
    made = training("sd3", lambda_form=None)
    found = made.fit()
    assert found.family == "sd3"
    assert found.conditions.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert found.conditions.image_tokens == tiny_models.HEIGHT * tiny_models.WIDTH // 4
    assert found.conditions.guidance == GUIDANCE
    assert found.conditions.timesteps == tuple(made.trainee.pipeline.scheduler.timesteps.tolist())
    assert json.loads(json.dumps(dict(found.provenance)))["training"]["beta"] == 1e-3
    # the last block has no ff_context
    assert np.isinf(found.logits["transformer_blocks"][:, -1, 3]).all()


# ---- the sampler of the published routers


def test_listed_ddim_is_the_closed_form_on_its_list():
    """T = 10 on 0, 111, ..., 999; a linear model of the noise has a closed form."""
    scheduler = ListedDDIM(timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    betas = np.linspace(1e-4, 2e-2, 1000)
    alphas = np.cumprod(1 - betas)
    x = torch.tensor([1.5, -0.3], dtype=torch.float64)
    plain = x.numpy().copy()
    listed = [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    for t, later in zip(listed, [*listed[1:], None], strict=True):
        noise = 0.3 * plain + t / 1000
        start = (plain - np.sqrt(1 - alphas[t]) * noise) / np.sqrt(alphas[t])
        there = 1.0 if later is None else alphas[later]
        plain = np.sqrt(there) * start + np.sqrt(1 - there) * noise
        x = scheduler.step(0.3 * x + t / 1000, torch.tensor(t), x).prev_sample
    np.testing.assert_allclose(x.numpy(), plain, rtol=1e-5)


def test_stock_ddim_pairs_other_steps_on_such_a_list():
    """Why there is one of our own: 999 goes to 899, not to 888; on "leading" lists both agree."""
    noise = torch.tensor([0.4, -0.2], dtype=torch.float64)
    x = torch.tensor([1.5, -0.3], dtype=torch.float64)
    for spacing, equal in (("linspace", False), ("leading", True)):
        options = {"timestep_spacing": spacing, "clip_sample": False, "steps_offset": 0}
        ours, stock = ListedDDIM(**options), DDIMScheduler(**options)
        for scheduler in (ours, stock):
            scheduler.set_timesteps(10)
        t = ours.timesteps[0]
        pair = [scheduler.step(noise, t, x).prev_sample for scheduler in (ours, stock)]
        assert torch.allclose(*pair) == equal


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1}, "steps must be a whole number of at least 2, got 1"),
        ({"beta": -1.0}, "beta must be a number of at least 0"),
        ({"target": 1.0}, r"target must be a number in \(0, 1\), got 1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"batch": 0}, "batch must be"),
        (
            {"lambda_form": "paper"},
            "lambda_form must be one of released, published, sensitivity, None",
        ),
        ({"keep": "both"}, "keep must be one of blended, fresh"),
        ({"loss": "all"}, "loss must be one of guided, released"),
        ({"arguments": {"generator": None}}, "arguments must not hold .*, got generator"),
        ({"tau": 1}, "tau must be"),
        ({"seed": -1}, "seed must be"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    with pytest.raises(fastdit.ArgumentError, match=message):
        training(**changes)


def test_what_cannot_be_trained_is_refused():
    pipe = tiny_models.pipeline("dit")
    with pytest.raises(fastdit.ArgumentError, match="prompts must be a sequence"):
        HarmoniCa(pipe, steps=4, prompts="a red circle")
    with pytest.raises(fastdit.ArgumentError, match="prompts must be all texts"):
        HarmoniCa(pipe, steps=4, prompts=["a", 3])
    with pytest.raises(fastdit.ArgumentError, match="pipeline must be a diffusers pipeline"):
        HarmoniCa(pipe.transformer, steps=4, prompts=[1])
    pipe.transformer.enable_gradient_checkpointing()
    with pytest.raises(fastdit.ArgumentError, match="checkpointing=True"):
        HarmoniCa(pipe, steps=4, prompts=[1])
    pipe.transformer.disable_gradient_checkpointing()
    fastdit.patch(pipe)
    with pytest.raises(fastdit.ArgumentError, match="unpatch before"):
        HarmoniCa(pipe, steps=4, prompts=[1])
