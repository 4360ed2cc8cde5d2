"""The stock pipelines that are given videos or pictures and have no file of their own here: of Wan and of Z-Image."""

from __future__ import annotations

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import fastdit
import oracle
import tiny_models
from contract import distance, same_bits
from denoiser_runs import every_second, parts_of
from denoisers import ENTRIES
from fastdit import Cached, Schedule
from fastdit.adapters import find_adapter
from oracle import Oracle
from test_ras import Chosen, chosen  # noqa: F401
from tiny_models import LATENT, randomise

pytestmark = [
    pytest.mark.diffusers,
    pytest.mark.filterwarnings("ignore:.* has no adapter"),
]
STEPS = 5
FRAMES = 5
SIDE = 32


def pictures(count, mode="RGB", seed=0, width=SIDE):
    draw = np.random.default_rng(seed)
    shape = (SIDE, width) if mode == "L" else (SIDE, width, 3)
    return [
        PIL.Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8), mode)
        for _ in range(count)
    ]


def embedded(*shape, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw)


def videos(pipeline, transformer, scheduler=None, **more):
    """A pipeline of videos with four frames and 4 x 4 pixels to a latent one, as none else here has."""
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1] * LATENT,
        latents_std=[1.5] * LATENT,
        scale_factor_spatial=4,
    )
    made = getattr(diffusers, pipeline)(
        tokenizer=None,
        text_encoder=None,
        vae=randomise(vae, 1),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
        **more,
    )
    made.set_progress_bar_config(disable=True)
    return made


def of_class(name, **config):
    made = getattr(diffusers, name)(**ENTRIES[name].config | config)
    return randomise(made)


def video_to_video():
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = videos("WanVideoToVideoPipeline", tiny_models.wan(), UniPCMultistepScheduler(**flow))
    return pipe, {"video": pictures(FRAMES), "strength": 0.7, "num_inference_steps": 6}


def vace(dtype=torch.float32):
    """A video that is drawn where the mask says so, and a reference before it."""
    model = of_class("WanVACETransformer3DModel", text_dim=20, vace_in_channels=2 * LATENT + 16)
    masks = [mask.point(lambda v: 255 * (v > 127)) for mask in pictures(FRAMES, "L", 1)]
    given = {"video": pictures(FRAMES), "mask": masks, "reference_images": pictures(1, seed=2)}
    return videos("WanVACEPipeline", model.to(dtype)), given | {"num_frames": FRAMES}


def animation(mode="animate"):
    """Two segments, each of which goes over the scheduler's steps; the second begins with the end of the first."""
    model = of_class(
        "WanAnimateTransformer3DModel",
        in_channels=2 * LATENT + 4,
        latent_channels=LATENT,
        out_channels=LATENT,
        text_dim=20,
    )
    pipe = videos("WanAnimatePipeline", model, image_encoder=None, image_processor=None)
    pipe.encode_image = lambda image, device: embedded(1, 3, 12)
    (image,) = pictures(1, seed=4)
    given = {"image": image, "pose_video": pictures(FRAMES + 4), "face_video": pictures(FRAMES + 4)}
    if mode == "replace":
        given |= {
            "background_video": pictures(FRAMES + 4, seed=5),
            "mask_video": pictures(FRAMES + 4, "L", 6),
        }
    return pipe, given | {"segment_frame_length": FRAMES, "mode": mode, "guidance_scale": 3.0}


def lucy():
    """The video that is edited lies behind the latents, in their channels."""
    pipe = videos("LucyEditPipeline", tiny_models.wan(in_channels=2 * LATENT, out_channels=LATENT))
    return pipe, {"video": pictures(FRAMES), "num_frames": FRAMES}


def zimage(kind, transformer=None, **more):
    pipe = tiny_models.pipeline("zimage")
    parts = pipe.components | more | ({} if transformer is None else {"transformer": transformer})
    made = getattr(diffusers, f"ZImage{kind}Pipeline")(**parts)
    made.set_progress_bar_config(disable=True)
    prompts = {"prompt_embeds": [embedded(5, 20)], "negative_prompt_embeds": [embedded(3, 20)]}
    return made, prompts | {"width": 48, "guidance_scale": 3.0}


def inpainted():
    pipe, given = zimage("Inpaint")
    (image,), (mask,) = pictures(1, width=48), pictures(1, "L", 1, 48)
    return pipe, given | {"image": image, "mask_image": mask, "strength": 1.0}


def controlled(kind="ControlNet"):
    """The ControlNet has some of the transformer's own modules, and blocks."""
    channels = LATENT if kind == "ControlNet" else 2 * LATENT + 1
    net = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0, 1],
        control_in_dim=channels,
        dim=32,
        n_heads=2,
        n_kv_heads=2,
    )
    pipe, given = zimage(kind, controlnet=randomise(net, 2))
    (control,) = pictures(1, seed=7, width=48)
    given |= {"control_image": control, "controlnet_conditioning_scale": 0.8}
    if kind != "ControlNet":
        (image,), (mask,) = pictures(1, width=48), pictures(1, "L", 1, 48)
        given |= {"image": image, "mask_image": mask}
    return pipe, given


def omni():
    """A picture beside the prompt, as latents and as SigLIP sees it."""
    config = {name: value for name, value in tiny_models.zimage().config.items() if name[0] != "_"}
    model = randomise(type(tiny_models.zimage())(**config | {"siglip_feat_dim": 12}))
    pipe, given = zimage("Omni", model, siglip=None, siglip_processor=None)
    pipe.prepare_image_latents = lambda images, batch_size, device, dtype: [
        [embedded(LATENT, 1, 8, 8)]
    ]
    pipe.prepare_siglip_embeds = lambda images, batch_size, device, dtype: [[embedded(2, 3, 12)]]
    texts = {"prompt_embeds": [[embedded(5, 20), embedded(3, 20), embedded(1, 20)]]}
    texts["negative_prompt_embeds"] = [[embedded(4, 20), embedded(3, 20), embedded(1, 20)]]
    return pipe, given | texts


CASES = {
    "video to video": ("WanVideoToVideoPipeline", video_to_video),
    "VACE": ("WanVACEPipeline", vace),
    "animation": ("WanAnimatePipeline", animation),
    "replacement": ("WanAnimatePipeline", lambda: animation("replace")),
    "edited video": ("LucyEditPipeline", lucy),
    "inpainted": ("ZImageInpaintPipeline", inpainted),
    "controlled": ("ZImageControlNetPipeline", controlled),
    "controlled and inpainted": (
        "ZImageControlNetInpaintPipeline",
        lambda: controlled("ControlNetInpaint"),
    ),
    "a picture beside the prompt": ("ZImageOmniPipeline", omni),
}
#: those that the installed diffusers has
CASES = {
    case: make
    for case, (name, make) in CASES.items()
    if hasattr(diffusers, name) and (tiny_models.HAS_ZIMAGE or "ZImage" not in name)
}


def drawn(pipe, given):
    more = {
        "prompt_embeds": embedded(1, 5, 20),
        "negative_prompt_embeds": embedded(1, 5, 20, seed=4),
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(1),
    }
    output = pipe(**more | given)
    return output.frames if hasattr(output, "frames") else output.images


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_stocks_and_a_plain_cache(case, monkeypatch):
    pipe, given = CASES[case]()
    model, stock = pipe.transformer, drawn(pipe, given)
    name = type(model).__name__
    parts = parts_of(name, model, ENTRIES[name])
    monkeypatch.setitem(oracle.MODULES, name, parts)
    calls = 1 if name.startswith("ZImage") else 2
    passes = 2 if "segment_frame_length" in given else 1
    bits = every_second(model, parts, STEPS)
    bits = {kind: np.concatenate([each] * passes) for kind, each in bits.items()}
    with Oracle(model, bits, calls_per_step=calls).installed() as plain:
        expected = drawn(pipe, given)
    assert plain.reused
    assert distance(expected, stock) > 1e-3
    if find_adapter(model, "components").restates:
        fastdit.patch(pipe, backend="reference")
        same_bits(drawn(pipe, given), stock)
    handle = fastdit.patch(pipe, Cached(Schedule.every(2)), backend="reference")
    for _ in range(2):
        same_bits(drawn(pipe, given), expected)
    assert handle.report().reused * passes == plain.reused
    fastdit.patch(pipe, Cached(Schedule.every(2)))
    for _ in range(2):
        assert distance(drawn(pipe, given), expected) < 1e-4
    fastdit.unpatch(pipe)
    same_bits(drawn(pipe, given), stock)


@pytest.mark.parametrize(
    "case",
    sorted({"video to video", "VACE", "edited video", "inpainted", "controlled"} & CASES.keys()),
)
def test_all_tokens_in_another_order(case, chosen):  # noqa: F811
    pipe, given = CASES[case]()
    stock = drawn(pipe, given)
    handle = fastdit.patch(pipe)
    drawn(pipe, given)
    (tokens,) = set(handle.report().tokens_per_step)

    def permuted(step, velocity, sigmas):
        return torch.randperm(tokens, generator=torch.Generator().manual_seed(step))[None]

    handle = fastdit.patch(pipe, Chosen(permuted, dict.fromkeys(range(1, STEPS), tokens)))
    assert distance(drawn(pipe, given), stock) < 1e-4
    assert handle.report().active
