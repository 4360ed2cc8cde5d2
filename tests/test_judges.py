"""Judges on random weights beside other implementations of the same formulas, and what each refuses by its own name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdit.errors import ArgumentError
from fastdit.evaluate import judges
from saved_clip import save_clip

PROMPTS = ["a red circle", "a green square", "a blue star"]


def pictures(seed: int, *more: int, side: int = 48) -> np.ndarray:
    shape = (3, *more, side, side, 3)
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", judges.JUDGES)
def test_each_judge_is_refused_by_its_own_name(name, tmp_path):
    missing = ", ".join(judges.FILES[name])
    with pytest.raises(ArgumentError, match=f"^judge '{name}': .* has no {missing}; nothing is do"):
        judges.make_judge(name, tmp_path)
    with pytest.raises(ArgumentError, match=f"^judge '{name}': .* is not a folder"):
        judges.make_judge(name, tmp_path / "nowhere")
    if name in ("fid", "kid"):
        pytest.importorskip("torch_fidelity", reason="torch-fidelity reads the file")
    for file in judges.FILES[name]:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ArgumentError, match=f"^judge '{name}': .* does not hold the released we"):
        judges.make_judge(name, tmp_path)


def alexnet() -> nn.Sequential:
    """The layers of torchvision's AlexNet, numbered as there."""
    pool = nn.MaxPool2d(3, 2)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ).double()


def lpips(net: nn.Sequential, heads: list[torch.Tensor], one: np.ndarray, two: np.ndarray) -> float:
    """Zhang et al.'s eq. 1 place by place, after the five rectifiers."""
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    x, y = (torch.tensor((2.0 * p - 1 - shift) / scale).permute(2, 0, 1)[None] for p in (one, two))
    found, at = 0.0, iter(heads)
    for layer in net:
        x, y = layer(x), layer(y)
        if isinstance(layer, nn.ReLU):
            a, b = (F.normalize(each, dim=1, eps=1e-10)[0] for each in (x, y))
            found += float(torch.einsum("c,chw->hw", next(at), (a - b) ** 2).mean())
    return found


@torch.no_grad()
def test_lpips_is_its_formula(tmp_path):
    torch.manual_seed(0)
    net = alexnet()
    heads = [torch.rand(width).double() for width in (64, 192, 384, 256, 256)]
    torch.save(
        {f"features.{n}": w.float() for n, w in net.state_dict().items()}, tmp_path / judges.ALEXNET
    )
    rows = {f"lin{i}.model.1.weight": h.float().view(1, -1, 1, 1) for i, h in enumerate(heads)}
    torch.save(rows, tmp_path / judges.HEADS)
    judge = judges.make_judge("lpips", tmp_path)
    one, two = pictures(0, 2), pictures(1, 2)
    wanted = [
        [lpips(net, heads, *pair) for pair in zip(*each, strict=True)]
        for each in zip(one, two, strict=True)
    ]
    assert np.mean(wanted) > 0.01
    assert judge(one[:, 0], PROMPTS, two[:, 0])["value"] == pytest.approx(
        np.mean(wanted, 0)[0], rel=1e-4
    )
    # A video has the mean of its frames, and the interval is over videos.
    found = judge(one, PROMPTS, two)
    assert found["value"] == pytest.approx(np.mean(wanted), rel=1e-4)
    means = np.mean(wanted, 1)
    assert min(means) * 0.999 <= found["low"] <= found["high"] <= max(means) * 1.001


@torch.no_grad()
def test_clip_hps_and_cmmd_see_what_transformers_sees(tmp_path):
    from safetensors.torch import load_file, save_file

    model, words, shown = save_clip(tmp_path)

    def embedded(images: np.ndarray) -> np.ndarray:
        pixels = [
            torch.tensor(np.array(each["pixel_values"]))
            for each in (shown(images=[(image * 255).round().astype(np.uint8)]) for image in images)
        ]
        ids = words(PROMPTS[0], return_tensors="pt")["input_ids"]
        rows = [
            model(pixel_values=p.view(1, 3, 32, 32), input_ids=ids).image_embeds[0] for p in pixels
        ]
        return torch.stack(rows).double().numpy()

    def told(prompt: str) -> np.ndarray:
        ids = words(prompt, return_tensors="pt")["input_ids"]
        pixels = torch.zeros(1, 3, 32, 32)
        return model(pixel_values=pixels, input_ids=ids).text_embeds[0].double().numpy()

    videos, others = pictures(0, 2), pictures(1, 2)
    cosines = []
    for video, prompt in zip(videos, PROMPTS, strict=True):
        text = told(prompt)
        rows = embedded(video)
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(text)
        cosines.append(np.mean(rows @ text / lengths))
    for name in ("clip", "hps"):
        found = judges.make_judge(name, tmp_path)(videos, PROMPTS, others)
        assert found["value"] == pytest.approx(np.mean(cosines), abs=1e-6)
        assert min(cosines) - 1e-6 <= found["low"] <= found["high"] <= max(cosines) + 1e-6
    x, y = (embedded(each.reshape(-1, 48, 48, 3)) for each in (videos, others))
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))

    def kernel(a, b):
        return np.mean([np.exp(-((p - q) ** 2).sum() / 200) for p in a for q in b])

    wanted = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    found = judges.make_judge("cmmd", tmp_path)(videos, PROMPTS, others)
    assert found == {"value": pytest.approx(wanted, rel=1e-3), "pictures": 6}

    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match=r"^judge 'hps': .*lack visual_projection\.weight"):
        judges.make_judge("hps", tmp_path)
