"""Shed modulations: the weights of adaLN layers are elsewhere, pictures and everything else stay as they were."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from diffusers import AuraFlowTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig

import fastdit
import tiny_models
from contract import FORWARD_FP64, distance, same_bits, within_contract
from denoisers import ENTRIES
from fastdit import RAS, ArgumentError, Cached, Dense, FastDiTError, Schedule, UnsupportedModelError
from fastdit.blocks import held
from fastdit.blocks.held import HELD, is_held
from fastdit.runtime import call as runtime_call
from fastdit.runtime import shed
from fastdit.runtime.install import LINK
from replays import draw, tapes
from snapshot import snapshot
from test_coexistence import FEATURES
from tiny_models import generate

__all__ = ["tapes"]

ROOT = Path(__file__).parents[1]
STEPS = 3
#: families whose blocks have modulation layers of their own
#: their blocks share a modulation, to which each adds a table at most
SHARED = ("pixart", "wan", "flux2")
NAMES = [name for name in tiny_models.FAMILIES if not name.startswith(SHARED)]
EACH = tiny_models.one_each(NAMES, -1)
METHODS = {
    "dense": lambda: Dense(),
    "cached": lambda: Cached(Schedule.every(2)),
    "ras": lambda: RAS(ratio=0.5, start=1, resets=(), align=1),
}


def shed_of(pipe):
    return getattr(pipe, "transformer", pipe).__dict__[LINK].shed


def weights(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def reachable(model):
    """Bytes of all tensors in the module tree: parameters, buffers and what modules keep, less what holders hold."""
    storages, waiting = {}, list(model.modules())
    seen = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                waiting += [part for key, part in value.items() if key not in (HELD, LINK)]
            elif isinstance(value, (list, tuple, set)):
                waiting += value
            elif isinstance(value, torch.nn.Module):
                waiting.append(value.__dict__)
    return sum(storages.values())


# ---- memory


def filled(model):
    """Random weights, quickly: a few numbers again and again, at a length that fits no row."""
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(
                    torch.empty_like(parameter, device="cpu")
                )
    numbers = torch.randn(65537, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat, scale = (
                parameter.view(-1),
                parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2,
            )
            for start in range(0, len(flat), len(numbers)):
                part = flat[start : start + len(numbers)]
                torch.mul(numbers[: len(part)], scale, out=part)
            if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def sd35_large():
    """SD3.5-Large of one block, its last."""
    return SD3Transformer2DModel(
        sample_size=4,
        pos_embed_max_size=4,
        num_layers=1,
        attention_head_dim=64,
        num_attention_heads=38,
        joint_attention_dim=8,
        caption_projection_dim=2432,
        pooled_projection_dim=8,
        qk_norm="rms_norm",
    )


def qwen_image():
    """Qwen-Image of one block."""
    return QwenImageTransformer2DModel(
        num_layers=1, in_channels=4, out_channels=1, joint_attention_dim=8
    )


def calls_of(kind, steps):
    """Calls of a few tokens each."""
    numbers = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=numbers).bfloat16()

    for step in range(steps):
        time = torch.tensor([900.0 - 300 * step]).bfloat16()
        given = {"encoder_hidden_states": randn(1, 3, 8), "return_dict": False}
        if kind == "sd3.5-large":
            given |= {"hidden_states": randn(1, 16, 4, 4), "pooled_projections": randn(1, 8)}
        else:
            time = time / 1000
            given |= {
                "hidden_states": randn(1, 4, 4),
                "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.bool),
                "img_shapes": [[(1, 2, 2)]],
            }
        yield given | {"timestep": time}


#: what its adaLN layers have of a block's width d squared, and as biases
WIDTHS = {
    "sd3.5-large": (sd35_large, 2432, 6 + 2),
    "qwen-image": (qwen_image, 3072, 6 + 6),
}


@pytest.mark.parametrize(
    ("kind", "place"),
    [("sd3.5-large", "host"), ("qwen-image", "disk")][: 1 + tiny_models.HAS_QWEN],
)
@torch.no_grad()
def test_bytes_of_true_widths(kind, place):
    """Before, during and after; the pictures are stock's, and every byte comes back."""
    build, width, rows = WIDTHS[kind]
    with init_empty_weights():
        model = build().to(torch.bfloat16)
    model, steps = filled(model), 2
    calls = list(calls_of(kind, steps))
    for given in calls[1:]:  # one prompt
        given |= {k: v for k, v in calls[0].items() if "projections" in k or "states_" in k}
    stock = [model(**given)[0] for given in calls]
    assert all(picture.isfinite().all() and picture.std() > 0 for picture in stock)
    before, kept = reachable(model), snapshot(model)
    away = 2 * rows * (width * width + width)
    handle = fastdit.patch(model, backend="reference", shed_modulations=place)
    assert reachable(model) == before - away
    with handle.run(torch.cat([given["timestep"] for given in calls])):
        for given, picture in zip(calls, stock, strict=True):
            same_bits(model(**given)[0], picture)
            assert reachable(model) == before - away
            (table,) = shed_of(model).kept
            assert table.nbytes == 2 * rows * width * steps
            handle.advance()
    assert not handle.report().unforeseen
    assert handle.explain(steps=steps, batch=1, cfg=False).shed.startswith(
        f"{away / 2**20:.1f} MiB"
    )
    handle.unpatch()
    assert reachable(model) == before
    if place == "host":
        assert snapshot(model) == kept
    for given, picture in zip(calls, stock, strict=True):
        same_bits(model(**given)[0], picture)


# ---- pictures


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for m in METHODS for name in (NAMES if m == "dense" else EACH)],
)
def test_pictures_have_their_bits_on_reference(name, method):
    """The first run makes a table, the second finds it."""
    if method == "ras" and name not in tiny_models.forms("layouts"):
        pytest.skip("it computes all tokens")
    dtype = torch.bfloat16 if method == "cached" else torch.float32
    pipe = tiny_models.pipeline(name, dtype)
    given = {"steps": STEPS, "batch": 2}
    fastdit.patch(pipe, METHODS[method](), backend="reference")
    expected = generate(pipe, name, **given)
    handle = fastdit.patch(pipe, METHODS[method](), backend="reference", shed_modulations="disk")
    for _ in range(2):
        same_bits(generate(pipe, name, **given), expected)
        assert not handle.report().unforeseen
    assert shed_of(pipe).found >= shed_of(pipe).made > 0
    handle.unpatch()
    fastdit.patch(pipe, METHODS[method](), backend="reference")
    same_bits(generate(pipe, name, **given), expected)


# The pipeline of Z-Image gives latents in fp32.
@pytest.mark.parametrize("name", [name for name in EACH if name != "zimage"])
def test_pictures_are_within_the_contract(name):
    """In fp64, and by programs, all but a branch's first call."""
    pipe = tiny_models.pipeline(name, torch.float64)
    stock = generate(pipe, name, steps=STEPS, batch=2)
    handle = fastdit.patch(pipe, shed_modulations="host")
    for _ in range(2):
        within_contract(generate(pipe, name, steps=STEPS, batch=2), stock)
        assert not handle.report().unforeseen
    if name != "lumina2":  # whose prompts' lengths are read on the host
        calls = STEPS * (1 if tiny_models.FAMILIES[name].cfg_in_one_call else 2)
        assert handle.report().programs == calls - calls // STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EACH[:2] + EACH[-1:])
def test_pictures_follow_the_rule(name, dtype):
    stock = tiny_models.pipeline(name, dtype)
    truth = tiny_models.pipeline(name, dtype)
    truth.transformer.double()
    truth.vae.double()
    given = {"steps": 2, "batch": 2}
    ideal = generate(truth, name, **given)
    expected = generate(stock, name, **given)
    fastdit.patch(stock, shed_modulations="host")
    found = generate(stock, name, **given)
    fastdit.unpatch(stock)
    fastdit.patch(stock)
    others = distance(generate(stock, name, **given), ideal)
    assert distance(found, ideal) <= max(2 * distance(expected, ideal), 1.1 * others)


def test_the_table_of_published_sizes_is_what_is_shed(monkeypatch):
    """Of one model, of which tools/shed.py wrote it."""
    for folder in ("tools", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    real_models = importlib.import_module("real_models")
    entry = next(entry for entry in real_models.MODELS if entry.name.startswith("DiT"))
    rows = json.loads((ROOT / "benchmarks" / "results" / "shed.json").read_text())
    monkeypatch.delitem(sys.modules, "shed", raising=False)
    assert importlib.import_module("shed").row(entry) in rows


def test_families_of_the_timestep_alone_keep_one_row_a_step():
    """Whatever the batch, which finds the same table; also where a product of its rows has them alike."""
    alike = [name for name in NAMES if name in ("qwen", "lumina2")]
    for name in alike:
        for backend in (None, "reference"):
            pipe = tiny_models.pipeline(name)
            handle = fastdit.patch(pipe, backend=backend, shed_modulations="host")
            sizes = []
            for batch in (1, 3):
                generate(pipe, name, steps=STEPS, batch=batch)
                tables = shed_of(pipe).kept
                assert (
                    len({row[0].shape[0] for rows in tables[-1].rows.values() for row in rows}) == 1
                )
                sizes.append(sum(table.nbytes for table in tables))
            assert len(tables) == (1 if backend is None else 2)
            assert sizes[1] == sizes[0] * len(tables)
            handle.unpatch()


def test_other_runs_make_other_tables(monkeypatch):
    """Of another number of steps, batch or prompt; those used last stay, as far as there is room."""
    pipe = tiny_models.pipeline("sd3", torch.float64)
    runs = [{"steps": 3}, {"steps": 4}, {"steps": 3, "batch": 2}, {"steps": 3, "cfg": False}]
    expected = [generate(pipe, "sd3", **given) for given in runs]
    handle = fastdit.patch(pipe, shed_modulations="host")
    for _ in range(2):
        for given, picture in zip(runs, expected, strict=True):
            assert distance(generate(pipe, "sd3", **given), picture) <= FORWARD_FP64
    made = shed_of(pipe)
    assert (made.made, made.found, len(made.kept)) == (4, 4, 4)
    assert "kept tables: 4" in str(handle.explain())
    largest = max(table.nbytes for table in made.kept)
    monkeypatch.setattr(shed, "KEPT_BYTES", 2 * largest)
    for _ in range(2):
        generate(pipe, "sd3", steps=3)
    assert (made.made, made.found) == (4, 6)
    assert sum(table.nbytes for table in made.kept) <= 2 * largest


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_run_that_is_too_long_for_one_table(backend, monkeypatch):
    pipe = tiny_models.pipeline("qwen" if tiny_models.HAS_QWEN else "sd3", torch.float64)
    name = "qwen" if tiny_models.HAS_QWEN else "sd3"
    expected = generate(pipe, name, steps=5)
    handle = fastdit.patch(pipe, backend=backend, shed_modulations="host")
    each = 1 if name == "qwen" else 2
    monkeypatch.setattr(shed, "KEPT_BYTES", 2 * each * shed_of(pipe).row_bytes)
    assert distance(generate(pipe, name, steps=5), expected) <= FORWARD_FP64
    assert not handle.report().unforeseen
    assert shed_of(pipe).made > 2


def test_threads():
    pipe = tiny_models.pipeline("sd3.5")
    fastdit.patch(pipe, Cached(Schedule.every(2)), shed_modulations="disk")
    pipes = [
        type(pipe).from_pipe(
            pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config)
        )
        for _ in range(4)
    ]
    expected = [generate(pipe, "sd3.5", steps=3 + n % 2, seed=n) for n in range(4)]
    shed_of(pipe).give_back()
    shed_of(pipe).put_away()  # without tables
    found = [None] * 4

    def work(number):
        found[number] = generate(pipes[number], "sd3.5", steps=3 + number % 2, seed=number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for picture, wanted in zip(found, expected, strict=True):
        same_bits(picture, wanted)


def test_calls_are_replayed_as_graphs(tapes):
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, Cached(Schedule.every(2)), shed_modulations="host")
    expected = draw("sd3", pipe, 0)
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)), shed_modulations="host", graphs=True)
    for _ in range(3):
        same_bits(draw("sd3", pipe, 0), expected)
    assert handle.report().graphs.startswith("replayed")


@pytest.mark.parametrize("name", ["sd3", "dit"])
def test_compiled_blocks(name):
    pipe = tiny_models.pipeline(name, torch.float64)
    expected = generate(pipe, name, steps=3)
    handle = fastdit.patch(pipe, shed_modulations="host")
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    assert distance(generate(pipe, name, steps=3), expected) <= FORWARD_FP64
    assert not handle.report().unforeseen
    with handle.disabled(), torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            block._compiled_call_impl = None
        same_bits(generate(pipe, name, steps=3), expected)


# ---- what is not foreseen


def loop(name, dtype=torch.float64):
    """Four calls, of which the third has another timestep than was said."""
    adapter = tiny_models.adapter_of(name)
    latents, time = adapter.image_argument, adapter.time_argument
    calls = [tiny_models.call(name, 2, dtype=dtype) for _ in range(4)]
    first = calls[0][time]
    said = torch.stack([first[0] / 2**n for n in range(4)]).to(first.dtype)
    for call, value in zip(calls, said, strict=True):
        call |= {k: v for k, v in calls[0].items() if k != latents}
        call[time] = value.expand(2)
    calls[2][time] = (said[2] * 3).expand(2)
    return calls, said


def run(model, handle, calls, said):
    found = []
    with torch.no_grad(), handle.run(said):
        for call in calls:
            found.append(tiny_models.sample(model(**call)))
            handle.advance()
    return found


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "reference") for name in EACH), ("sd3.5", None), ("dit", None)]
)
def test_an_unforeseen_timestep_is_computed_exactly(name, backend):
    """On the CPU, where it is seen; by weights that are moved in."""
    model = tiny_models.transformer(name, torch.float64)
    calls, said = loop(name)
    with torch.no_grad():
        expected = [tiny_models.sample(model(**call)) for call in calls]
    handle = fastdit.patch(model, backend=backend, shed_modulations="disk")
    for found, wanted in zip(run(model, handle, calls, said), expected, strict=True):
        if backend:
            same_bits(found, wanted)
        assert distance(found, wanted) <= FORWARD_FP64
    assert handle.report().unforeseen == (2, 3)
    assert "moved in at 2 steps" in str(handle.report())


@pytest.fixture
def on_a_device(monkeypatch):
    """No value can be read without waiting."""
    for module in (shed, runtime_call):
        monkeypatch.setattr(module, "at_hand", lambda tensor: False)


@pytest.mark.parametrize("backend", ["reference", None])
def test_an_unforeseen_timestep_on_a_device_is_an_error(backend, on_a_device):
    """At the run's end, naming the steps; a run as foreseen has none, and what is read is read once."""
    model = tiny_models.transformer("sd3", torch.float64)
    calls, said = loop("sd3")
    handle = fastdit.patch(model, backend=backend, shed_modulations="host")
    with pytest.raises(FastDiTError, match=r"other timesteps at steps \[2\]"):
        run(model, handle, calls, said)
    calls[2]["timestep"] = said[2].expand(2)
    with torch.no_grad():
        expected = [model(**call)[0] for call in calls]
    for found, wanted in zip(run(model, handle, calls, said), expected, strict=True):
        assert distance(found, wanted) <= FORWARD_FP64


@pytest.mark.parametrize("ends", [True, False], ids=["to its end", "interrupted"])
def test_an_unforeseen_timestep_in_a_pipeline_on_a_device(ends, on_a_device):
    pipe = tiny_models.pipeline("sd3")

    def late(module, args, kwargs):
        if kwargs["timestep"][0] < 800:
            kwargs["timestep"] = kwargs["timestep"] - 1
        return args, kwargs

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = not ends and step == 2
        return tensors

    hook = pipe.transformer.register_forward_pre_hook(late, with_kwargs=True)
    handle = fastdit.patch(pipe, shed_modulations="host")
    with pytest.raises(FastDiTError, match="other timesteps at steps"):
        generate(pipe, "sd3", steps=STEPS, callback_on_step_end=interrupt)
    hook.remove()
    generate(pipe, "sd3", steps=STEPS)
    handle.unpatch()


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_prompt_that_is_swapped_in_the_run(backend):
    """Makes a table of its own."""

    def swap(pipe, step, timestep, tensors):
        if step == 1:
            tensors["pooled_prompt_embeds"] = tensors["pooled_prompt_embeds"].flip(1)
        return tensors

    given = {
        "steps": STEPS,
        "callback_on_step_end": swap,
        "callback_on_step_end_tensor_inputs": ["latents", "pooled_prompt_embeds"],
    }
    pipe = tiny_models.pipeline("sd3", torch.float64)
    expected, plain = generate(pipe, "sd3", **given), generate(pipe, "sd3", steps=STEPS)
    assert distance(plain, expected) > 1e-4
    handle = fastdit.patch(pipe, backend=backend, shed_modulations="host")
    found = generate(pipe, "sd3", **given)
    assert distance(found, expected) <= (0 if backend else FORWARD_FP64)
    assert (shed_of(pipe).made, handle.report().unforeseen) == (2, ())


def test_conditions_that_the_model_embeds_otherwise_than_foreseen():
    """What a layer is given is compared with what its table was made for, on the backend where the model embeds it."""
    pipe = tiny_models.pipeline("sd3")
    embed = pipe.transformer.time_text_embed

    class Scaled(type(embed)):
        scale = 1.0

        def forward(self, *given):
            return super().forward(*given) * self.scale

    embed.__class__ = Scaled

    def fade(pipe, step, timestep, tensors):
        embed.scale = 0.5 if step == 0 else 1.0
        return tensors

    expected = generate(pipe, "sd3", steps=STEPS, callback_on_step_end=fade)
    assert distance(generate(pipe, "sd3", steps=STEPS), expected) > 1e-4
    handle = fastdit.patch(pipe, backend="reference", shed_modulations="host")
    same_bits(generate(pipe, "sd3", steps=STEPS, callback_on_step_end=fade), expected)
    assert handle.report().unforeseen == (1,)


@pytest.mark.parametrize("mode", ["gradients", "autocast"])
def test_gradients_and_autocast_compute_each_step(mode):
    model = tiny_models.transformer("sd3")
    given = tiny_models.call("sd3", 2)
    given["hidden_states"].requires_grad_(mode == "gradients")

    def outputs():
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast")
        with autocast, torch.set_grad_enabled(mode == "gradients"):
            return model(**given)[0]

    expected = outputs()
    fastdit.patch(model, backend="reference", shed_modulations="host")
    found = outputs()
    same_bits(found, expected)
    if mode == "gradients":
        (wanted,) = torch.autograd.grad(expected.sum(), given["hidden_states"])
        same_bits(torch.autograd.grad(found.sum(), given["hidden_states"])[0], wanted)


# ---- what changes between runs, or in one


CHANGES = {
    "the embedder": lambda m: m.time_text_embed.timestep_embedder.linear_1.weight.mul_(1.5),
    "a layer": lambda m: m.transformer_blocks[1].norm1.linear.weight.mul_(1.5),
    "a layer's weight, by another": lambda m: setattr(
        m.transformer_blocks[1].norm1.linear,
        "weight",
        torch.nn.Parameter(m.transformer_blocks[0].norm1.linear.weight.clone()),
    ),
    "a layer in the state dict": lambda m: m.state_dict()[
        "transformer_blocks.1.norm1.linear.weight"
    ].mul_(1.5),
    "another layer": lambda m: setattr(
        m.transformer_blocks[1].norm1,
        "linear",
        tiny_models.randomise(torch.nn.Linear(32, 192), 5).double(),
    ),
}


@pytest.mark.filterwarnings("ignore:weights of modulation")
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_changed_between_runs_is_seen(change, backend):
    pipe, other = (tiny_models.pipeline("sd3", torch.float64) for _ in range(2))
    CHANGES[change](other.transformer)
    plain, expected = (generate(p, "sd3", steps=STEPS) for p in (pipe, other))
    assert distance(plain, expected) > 1e-4
    fastdit.patch(pipe, backend=backend, shed_modulations="host")
    assert distance(generate(pipe, "sd3", steps=STEPS), plain) <= FORWARD_FP64
    CHANGES[change](pipe.transformer)
    assert distance(generate(pipe, "sd3", steps=STEPS), expected) <= FORWARD_FP64


@torch.no_grad()
def test_a_class_embedding_that_is_changed_between_runs():
    """It is no layer that is shed, but of what makes the modulations."""
    pipe, other = (tiny_models.pipeline("dit", torch.float64) for _ in range(2))

    def change(pipe):
        for block in pipe.transformer.transformer_blocks[1:]:
            block.norm1.emb.class_embedder.embedding_table.weight.mul_(2)

    change(other)
    expected = generate(other, "dit", steps=STEPS)
    fastdit.patch(pipe, shed_modulations="host")
    assert distance(generate(pipe, "dit", steps=STEPS), expected) > 1e-4
    change(pipe)
    assert distance(generate(pipe, "dit", steps=STEPS), expected) <= FORWARD_FP64


@pytest.mark.filterwarnings("ignore:weights of modulation")
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_layer_that_is_written_in_the_run_is_seen(backend):
    def write(pipe, step, timestep, tensors):
        if step == 1:
            with torch.no_grad():
                pipe.transformer.transformer_blocks[1].norm1.linear.weight.mul_(1.5)
        return tensors

    pipe, other = (tiny_models.pipeline("sd3", torch.float64) for _ in range(2))
    expected = generate(other, "sd3", steps=STEPS, callback_on_step_end=write)
    fastdit.patch(pipe, backend=backend, shed_modulations="host")
    found = generate(pipe, "sd3", steps=STEPS, callback_on_step_end=write)
    assert distance(found, expected) <= (0 if backend else FORWARD_FP64)


# ---- what others do with the weights


# HunyuanVideo-1.5's tiny model is narrower than its configuration says.
SAVED = [name for name in EACH if "hunyuan" not in name]


@pytest.mark.parametrize(
    ("name", "place"), [(name, ("host", "disk")[n % 2]) for n, name in enumerate(SAVED)]
)
def test_everything_is_saved(name, place, tmp_path):
    model = tiny_models.transformer(name)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    fastdit.patch(model, shed_modulations=place)
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert all(map(is_held, shed_of(model).layers))


def returned(model):
    return not any(map(is_held, shed_of(model).layers))


@pytest.mark.filterwarnings("ignore:weights of modulation")
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded(assign):
    pipe, other = tiny_models.pipeline("sd3"), tiny_models.pipeline("sd3", seed=5)
    expected = generate(other, "sd3", steps=STEPS)
    fastdit.patch(pipe, backend="reference", shed_modulations="disk")
    generate(pipe, "sd3", steps=STEPS)
    given = {key: value.clone() for key, value in other.transformer.state_dict().items()}
    found = pipe.transformer.load_state_dict(given, assign=assign)
    assert found.missing_keys == found.unexpected_keys == []
    assert returned(pipe.transformer)
    same_bits(generate(pipe, "sd3", steps=STEPS), expected)
    fastdit.unpatch(pipe)
    same_bits(generate(pipe, "sd3", steps=STEPS), expected)


CASTS = {
    "to(dtype)": lambda model: model.to(torch.float64),
    "half": lambda model: model.to(torch.bfloat16),
    "layerwise casting": lambda model: model.enable_layerwise_casting(
        torch.bfloat16, torch.float32
    ),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_bring_the_weights_back(cast):
    """As far as they are cast: the layers that layerwise casting leaves out stay away."""
    name = "lumina2"  # whose layers are in norms, and others outside of them
    model, other = (tiny_models.transformer(name) for _ in range(2))
    CASTS[cast](other)
    given = tiny_models.call(name, dtype=other.dtype)
    with torch.no_grad():
        expected = other(**given)[0]
        fastdit.patch(model, backend="reference", shed_modulations="host")
        if cast == "layerwise casting":
            CASTS[cast](model)
        else:
            with pytest.warns(UserWarning, match="came back"):
                CASTS[cast](model)
            assert returned(model)
        same_bits(model(**given)[0], expected)
        fastdit.unpatch(model)
        same_bits(model(**given)[0], expected)
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in other.parameters()}


@pytest.mark.skipif(not tiny_models.HAS_QWEN, reason="of a newer diffusers")
@pytest.mark.filterwarnings("ignore:weights of modulation")
def test_layerwise_casting_of_layers_that_are_no_norms():
    """Qwen-Image's are cast, so they come back before."""
    model, other = (tiny_models.transformer("qwen") for _ in range(2))
    given = tiny_models.call("qwen")
    CASTS["layerwise casting"](other)
    with torch.no_grad():
        expected = other(**given)[0]
        fastdit.patch(model, backend="reference", shed_modulations="host")
        CASTS["layerwise casting"](model)
        assert returned(model)
        same_bits(model(**given)[0], expected)


def test_a_move_of_the_model_leaves_them_away():
    model = tiny_models.transformer("sd3")
    fastdit.patch(model, shed_modulations="host")
    model.to("cpu").cpu().float()
    assert all(map(is_held, shed_of(model).layers))
    print(model)
    assert all(map(is_held, shed_of(model).layers))


@pytest.mark.filterwarnings("ignore:weights of modulation")
@pytest.mark.parametrize("backend", ["reference", None])
def test_an_adapter_on_a_layer_has_it_back(backend):
    """Alone; its scale may change, it may be fused, and go."""

    def add(model):
        torch.manual_seed(0)
        settings = {"r": 2, "init_lora_weights": False, "target_modules": ["norm1.linear", "to_q"]}
        model.add_adapter(LoraConfig(**settings))

    def scaled(model):
        model.set_adapters(["default"], [0.5])

    pipe, other = (tiny_models.pipeline("sd3", torch.float64) for _ in range(2))
    handle = fastdit.patch(pipe, backend=backend, shed_modulations="host")
    before = generate(pipe, "sd3", steps=STEPS)
    count = len(shed_of(pipe).layers)
    for number, change in enumerate(
        (add, scaled, lambda m: m.fuse_lora(), lambda m: m.unfuse_lora())
    ):
        for each in (pipe, other):
            change(each.transformer)
        expected = generate(other, "sd3", steps=STEPS)
        assert number == 3 or distance(expected, before) > 1e-4
        assert distance(generate(pipe, "sd3", steps=STEPS), expected) <= FORWARD_FP64
        assert sum(map(is_held, shed_of(pipe).layers)) == count - 3
    assert "3 layers are back" in str(handle.explain())


OFFLOADS = ["accelerate offload", "group offload by block", "group offload by leaf", "sequential"]


def offload(model, how):
    if how == "sequential":
        cpu_offload(model, torch.device("cpu"))
    else:
        FEATURES[how](model)


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("how", OFFLOADS)
@torch.no_grad()
def test_offloading_leaves_them_away(how, order):
    """What moves each layer in is to come after the patch; it moves none that is away, and tables stand for these."""
    model = tiny_models.transformer("sd3")
    calls, said = loop("sd3", torch.float32)
    calls[2]["timestep"] = said[2].expand(2)
    expected = [model(**call)[0] for call in calls]
    if order == "before":
        offload(model, how)
    if order == "before" and how in ("group offload by leaf", "sequential"):
        with pytest.raises(UnsupportedModelError, match=r"norm1.linear has"):
            fastdit.patch(model, shed_modulations="host")
        return
    handle = fastdit.patch(model, backend="reference", shed_modulations="host")
    if order == "after":
        offload(model, how)
    for _ in range(2):
        for found, wanted in zip(run(model, handle, calls, said), expected, strict=True):
            same_bits(found, wanted)
        assert not handle.report().unforeseen
    assert all(map(is_held, shed_of(model).layers))
    assert (shed_of(model).made, shed_of(model).found) == (1, 1)


def test_a_copied_model_has_its_own():
    pipe = tiny_models.pipeline("sd3")
    fastdit.patch(pipe, shed_modulations="disk")
    expected = generate(pipe, "sd3", steps=STEPS)
    other = copy.deepcopy(pipe)
    assert all(map(is_held, shed_of(other).layers))
    assert not set(shed_of(other).layers) & set(shed_of(pipe).layers)
    same_bits(generate(other, "sd3", steps=STEPS), expected)
    assert len(shed_of(other).kept) == 1
    fastdit.unpatch(pipe)
    assert all(map(is_held, shed_of(other).layers))
    same_bits(generate(other, "sd3", steps=STEPS), expected)
    fastdit.unpatch(other)
    assert weights(other.transformer) == weights(pipe.transformer)


# ---- in and out


@pytest.mark.parametrize("name", EACH)
def test_unpatch_leaves_everything_as_it_was(name):
    pipe = tiny_models.pipeline(name)
    generate(pipe, name, steps=2)
    before = snapshot(pipe.transformer)
    handle = fastdit.patch(pipe, backend="reference", shed_modulations="host")
    assert weights(pipe.transformer) < sum(
        value.nbytes for value in pipe.transformer.state_dict().values()
    )
    generate(pipe, name, steps=2)
    handle.unpatch()
    assert snapshot(pipe.transformer) == before


def test_a_second_patch_sheds_anew_or_not():
    pipe = tiny_models.pipeline("sd3")
    whole = weights(pipe.transformer)
    fastdit.patch(pipe, shed_modulations="host")
    away = weights(pipe.transformer)
    fastdit.patch(pipe, shed_modulations="disk")
    assert weights(pipe.transformer) == away < whole
    fastdit.patch(pipe)
    assert weights(pipe.transformer) == whole


def test_a_full_disk(monkeypatch):
    """After some layers: nothing is left behind."""
    pipe = tiny_models.pipeline("sd3")
    before, stock, written = snapshot(pipe.transformer), held.put_away, []

    def full(layer, place):
        if len(written) == 2:
            raise OSError("no space left on device")
        written.append(layer)
        stock(layer, "host")

    monkeypatch.setattr(shed, "put_away", full)
    with pytest.raises(OSError, match="no space"):
        fastdit.patch(pipe, shed_modulations="disk")
    assert len(written) == 2
    assert snapshot(pipe.transformer) == before
    assert LINK not in pipe.transformer.__dict__


def with_lora(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["norm1.linear"]))


def with_hook(model):
    model.transformer_blocks[0].norm1.linear.register_forward_hook(lambda *_: None)


def on_meta(model):
    model.transformer_blocks[0].norm1.linear.to("meta")


def of_a_class(model):
    class Mine(torch.nn.Linear):
        pass

    model.transformer_blocks[0].norm1.linear.__class__ = Mine


REFUSED = {
    "an adapter": (with_lora, r"norm1\.linear carries an adapter"),
    "a hook": (with_hook, r"transformer_blocks\.0\.norm1\.linear has hooks"),
    "no weights": (on_meta, r"norm1\.linear has its weights on the meta device"),
    "another class": (of_a_class, r"norm1\.linear is a .*Mine"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_layers_that_are_refused_by_name(form):
    model = tiny_models.transformer("sd3")
    change, message = REFUSED[form]
    change(model)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        fastdit.patch(model, shed_modulations="host")
    assert snapshot(model) == before


@pytest.mark.parametrize("name", [name for name in tiny_models.FAMILIES if name.startswith(SHARED)])
def test_models_that_are_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=rf"{name.partition('-')[0]}.* nothing to shed"):
        fastdit.patch(tiny_models.transformer(name), shed_modulations="host")


def test_a_model_without_an_adapter_is_refused_by_name():
    model = AuraFlowTransformer2DModel(**ENTRIES["AuraFlowTransformer2DModel"].config)
    with pytest.raises(UnsupportedModelError, match=r"AuraFlow.* has none"):
        fastdit.patch(model, Cached(Schedule.every(2)), shed_modulations="host")


@pytest.mark.parametrize("given", ["cpu", True, 1])
def test_other_places_are_refused(given):
    with pytest.raises(ArgumentError, match="shed_modulations must be one of host, disk"):
        fastdit.patch(tiny_models.transformer("sd3"), shed_modulations=given)


def test_times_are_not_compared_with_a_stock_model_that_moves_weights():
    pipe = tiny_models.pipeline("sd3")
    handle = fastdit.patch(pipe, shed_modulations="host")
    with pytest.raises(ArgumentError, match="without shed_modulations"):
        handle.measure(lambda: None)
    expected = generate(pipe, "sd3", steps=2)
    with handle.disabled():
        stock = generate(pipe, "sd3", steps=2)
    assert distance(expected, stock) < 1e-5
    handle.unpatch()
    same_bits(generate(pipe, "sd3", steps=2), stock)
