"""Run diffusers' own tests on patched pipelines and models, and compare with what they say of stock ones.

    python tools/peer_tests.py [--diffusers FOLDER_OR_URL] [--modes MODE...] [--suites SUITE...] [--keep MODE...]

A test that passes stock must pass with Dense. With a method that changes pictures it must pass, or

* fail with an error that fastdit raises on purpose, other than an op's about its arguments ("refused"), or
* fail where numbers are compared that a stock model computed once ("numbers"), or
* count the calls of what the method leaves out ("counts"; `COUNTERS` has them by name).

Anything else is a fault, and the exit status says whether there is one. What a test compares among the patched
pipeline's own pictures (batch with single, saved with loaded, tuple with dict) must hold with every method. "changed"
counts the tests that pass with other pictures than stock's, "patched" the pipelines or models that were patched.

The suite "classes" has no modes: it repeats tests/test_denoisers.py with diffusers' own tiny models and inputs, one of
each transformer, and says of each what became of it; see peer_denoisers.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peer_hub import write_hub

TOOLS = Path(__file__).resolve().parent
FOLDER = TOOLS.parent / ".venv" / "peers"
URL = "https://github.com/huggingface/diffusers"
STOCK, EXACT = "stock", "dense"
MODES = (STOCK, EXACT, "every2", "ras")

_PIPELINES = "tests/pipelines"
_MODELS = "tests/models/transformers"
#: suite -> what is patched in it, and its files
SUITES = {
    "flux": ("pipelines", [f"{_PIPELINES}/flux"]),
    "sd3": ("pipelines", [f"{_PIPELINES}/stable_diffusion_3"]),
    "pixart": ("pipelines", [f"{_PIPELINES}/pixart_alpha", f"{_PIPELINES}/pixart_sigma"]),
    "dit": ("pipelines", [f"{_PIPELINES}/dit"]),
    "lumina": ("pipelines", [f"{_PIPELINES}/lumina"]),
    "lumina2": ("pipelines", [f"{_PIPELINES}/lumina2"]),
    "wan": ("pipelines", [f"{_PIPELINES}/wan"]),
    "flux2": ("pipelines", [f"{_PIPELINES}/flux2"]),
    # Without those of the edit pipelines, which encode a megapixel in each test.
    "qwenimage": (
        "pipelines",
        [
            f"{_PIPELINES}/qwenimage/test_qwenimage{name}.py"
            for name in ("", "_controlnet", "_img2img", "_inpaint")
        ],
    ),
    "hunyuanvideo15": ("pipelines", [f"{_PIPELINES}/hunyuan_video1_5"]),
    "zimage": ("pipelines", [f"{_PIPELINES}/z_image"]),
    "pag": (
        "pipelines",
        [
            f"{_PIPELINES}/pag/test_pag_pixart_sigma.py",
            f"{_PIPELINES}/pag/test_pag_sd3.py",
            f"{_PIPELINES}/pag/test_pag_sd3_img2img.py",
        ],
    ),
    "controlnet": ("pipelines", [f"{_PIPELINES}/controlnet_flux", f"{_PIPELINES}/controlnet_sd3"]),
    "lora": (
        "pipelines",
        [
            f"tests/lora/test_lora_layers_{name}.py"
            for name in ("flux", "flux2", "lumina2", "qwenimage", "sd3")
        ],
    ),
    "models": (
        "models",
        [
            f"{_MODELS}/test_models_dit_transformer2d.py",
            f"{_MODELS}/test_models_pixart_transformer2d.py",
            f"{_MODELS}/test_models_transformer_flux.py",
            f"{_MODELS}/test_models_transformer_flux2.py",
            f"{_MODELS}/test_models_transformer_hunyuan_1_5.py",
            f"{_MODELS}/test_models_transformer_lumina.py",
            f"{_MODELS}/test_models_transformer_lumina2.py",
            f"{_MODELS}/test_models_transformer_qwenimage.py",
            f"{_MODELS}/test_models_transformer_sd3.py",
            f"{_MODELS}/test_models_transformer_wan.py",
            f"{_MODELS}/test_models_transformer_z_image.py",
        ],
    ),
}
CLASSES = "classes"
#: markers of tests that need packages or devices which are not here, or whole checkpoints
LEFT_OUT = (
    "compile",
    "context_parallel",
    "nightly",
    "quantization",
    "single_file",
    "slow",
    "tensor_parallel",
)
#: tests that count how often the hooks of diffusers' caches ran, in blocks that a lossy method leaves out
COUNTERS = (
    "test_faster_cache_state",
    "test_pyramid_attention_broadcast_layers",
)
#: how far an output may be from stock with Dense, and how far where weights have fewer than 32 bits
CLOSE, HALF = 1e-5, 0.1
COLUMNS = ("pass", "refused", "numbers", "counts", "fault")
Results = dict[str, dict[str, Any]]
#: what is wrong -> the tests
Faults = dict[str, list[str]]


def verdict(mode: str, stock: dict[str, Any], result: dict[str, Any] | None) -> str:
    """What a test's outcome in `mode` means: "pass", "refused", "numbers", "counts", "fault", or "unproved" where it
    does not pass stock."""
    if stock["outcome"] == "skipped":
        return "unproved"
    if result is None or result["outcome"] == "skipped":
        return "fault"
    proved = stock["outcome"] == "passed"
    if mode == EXACT:
        same = stock.get("error") == result.get("error") and apart(stock, result) is None
        return ("pass" if proved else "unproved") if same else "fault"
    if result["outcome"] == "passed" or not proved:
        return "pass" if proved else "unproved"
    if result.get("refusal"):
        return "refused"
    if result.get("assertion") and result["numbers"]:
        return "numbers"
    if result.get("assertion") and result["name"] in COUNTERS:
        return "counts"
    return "fault"


def apart(stock: dict[str, Any], result: dict[str, Any]) -> str | None:
    """How the outputs of two runs of a test differ, or None where they are close."""
    ours, theirs = result.get("outputs", []), stock.get("outputs", [])
    if len(ours) != len(theirs):
        return f"{len(ours)} outputs instead of {len(theirs)}"
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        limit = HALF if a["half"] else CLOSE
        if not (distance(a, b) <= limit):
            return f"output {index} is {distance(a, b):.2g} from stock, above {limit}"
    return None


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two outputs, against their largest element or 1; inf where shapes or NaNs differ."""
    pairs = list(zip(a["samples"], b["samples"], strict=False))
    if a["shape"] != b["shape"] or any((x != x) != (y != y) for x, y in pairs):
        return float("inf")
    scale = max((abs(y) for _, y in pairs if abs(y) < float("inf")), default=1.0)
    return max((abs(x - y) for x, y in pairs if x == x and x != y), default=0.0) / max(scale, 1.0)


def fetch(source: str, tag: str, folder: Path) -> None:
    """Put the `tests` folder of diffusers into `folder`: without its source, so that the installed one is tested."""
    if Path(source).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(Path(source) / "tests", folder / "tests")
    elif not (folder / ".git").exists() or _git(folder, "describe", "--tags") != tag:
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--quiet", "--depth=1", "--filter=blob:none", "--sparse", f"--branch={tag}"]
        _git(None, "-c", "advice.detachedHead=false", "clone", *options, source, str(folder))
        _git(folder, "sparse-checkout", "set", "tests")
    # Without a file of its own, pytest takes the settings of a folder above.
    (folder / "pytest.ini").write_text("[pytest]\n")


def _git(folder: Path | None, *command: str) -> str:
    where = [] if folder is None else ["-C", str(folder)]
    done = subprocess.run(["git", *where, *command], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def run_suite(suite: str, mode: str, folder: Path, out: Path, arguments: list[str]) -> Results:
    """Run one suite in one mode in a process of its own, and return what its plugin recorded."""
    target, paths = SUITES[suite]
    result = out / f"{suite}.{mode}.json"
    result.unlink(missing_ok=True)
    here = [path for path in paths if (folder / path).exists()]
    if not here:
        return {}
    command = [sys.executable, "-m", "pytest", "-p", "peer_plugin", "-p", "no:cacheprovider", "-q"]
    command += ["-m", f"not ({' or '.join(LEFT_OUT)})", "--timeout=300", *arguments, *here]
    environment = os.environ | {
        "HF_HUB_CACHE": str(out / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PEER_MODE": mode,
        "PEER_RESULT": str(result),
        "PEER_TARGET": target,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")])),
    }
    with (out / f"{suite}.{mode}.log").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=False)
    return load(suite, mode, out)


def run_classes(folder: Path, out: Path, arguments: list[str]) -> dict[str, str]:
    """What becomes of each transformer with diffusers' own configurations, by class and configuration."""
    report = out / f"{CLASSES}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-c", "pytest.ini"]
    command += ["--rootdir=.", "--timeout=600", f"--junitxml={report}", *arguments]
    command += [str(TOOLS / "peer_denoisers.py")]
    environment = os.environ | {"PEER_TESTS": str(folder)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (out / f"{CLASSES}.log").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=False)
    return read_classes(report) if report.exists() else {}


def read_classes(report: Path) -> dict[str, str]:
    """The table in a report of pytest; what failed begins with "fault"."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = (case.get("name") or "").partition("[")[2].rstrip("]").replace("-", ", ")
        said = {p.get("name"): p.get("value") or "" for p in case.iter("property")}
        skipped, failed = case.find("skipped"), case.find("failure")
        failed = case.find("error") if failed is None else failed
        if failed is not None:
            found[name] = "fault: " + " ".join((failed.get("message") or "").split())[:200]
        elif skipped is not None:
            found[name] = "unproved: " + (skipped.get("message") or "")[:200]
        else:
            found[name] = said.get("became", "")
    return found


def load(suite: str, mode: str, out: Path) -> Results:
    """What a run of a suite left; nothing where it broke down."""
    path = out / f"{suite}.{mode}.json"
    results: Results = json.loads(path.read_text()) if path.exists() else {}
    for name, result in results.items():
        result["name"] = name.split("::")[-1].split("[")[0]
    return results


def compare(suite: str, mode: str, stock: Results, results: Results) -> tuple[list[int], Faults]:
    """A row of the table, and what is wrong with which tests."""
    verdicts = {name: verdict(mode, was, results.get(name)) for name, was in stock.items()}
    counts = Counter(verdicts.values())
    patched = sum(result.get("patched", 0) for result in results.values())
    common = [(was, results[name]) for name, was in stock.items() if name in results]
    changed = sum(
        result["outcome"] == "passed" and apart(was, result) is not None for was, result in common
    )
    faults: Faults = {}
    for name in (name for name, word in verdicts.items() if word == "fault"):
        result = results.get(name, {"outcome": "missing"})
        why = f"{result.get('error', result['outcome'])}: {result.get('message', '')}"
        if mode == EXACT and result["outcome"] == stock[name]["outcome"]:
            why = f"{why}; {apart(stock[name], result)}"
        faults.setdefault(f"{mode}: {why}", []).append(name)
    if not patched and not counts["refused"]:
        faults[f"{mode}: nothing was patched"] = [suite]
    return [*(counts[column] for column in COLUMNS), changed, patched], faults


def refusals(results: Results) -> Counter[str]:
    """What fastdit said where it refused."""
    return Counter(
        f"{result['error']}: {result['message'][:120]}"
        for result in results.values()
        if result.get("refusal")
    )


def _print_row(suite: str, mode: str, row: Sequence[object], end: str = "") -> None:
    print(f"{suite:12}{mode:8}" + "".join(f"{cell:>9}" for cell in row) + end, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="diffusers' own tests, stock and patched")
    parser.add_argument("--diffusers", default=URL, help="a checkout of diffusers, or a git URL")
    parser.add_argument("--tag", default=f"v{metadata.version('diffusers')}", help="of the URL")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--suites", nargs="+", choices=[*SUITES, CLASSES], default=[*SUITES, CLASSES]
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="where tests and results lie")
    parser.add_argument(
        "--keep", nargs="*", choices=MODES, default=[], help="modes whose old results will do"
    )
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="for pytest")
    options = parser.parse_args()
    out = options.out.resolve()
    folder = out / "diffusers"
    out.mkdir(parents=True, exist_ok=True)
    fetch(options.diffusers, options.tag, folder)
    write_hub(out / "hub")

    faults: Faults = {}
    said: Counter[str] = Counter()
    fastdit = find_spec("fastdit")
    print(f"diffusers {metadata.version('diffusers')}, fastdit of {fastdit and fastdit.origin}")
    total = {mode: [0] * (len(COLUMNS) + 2) for mode in options.modes if mode != STOCK}
    _print_row("suite", "mode", [*COLUMNS, "changed", "patched"])
    for suite in (suite for suite in options.suites if suite != CLASSES):
        stock: Results = {}
        for mode in (STOCK, *total):
            start = time.monotonic()
            results = load(suite, mode, out) if mode in options.keep else {}
            results = results or run_suite(suite, mode, folder, out, options.arguments)
            if mode == STOCK:
                stock = results
                counts = Counter(result["outcome"] for result in stock.values())
                row = [counts["passed"]]
                end = f"  {counts['failed']} fail, {counts['skipped']} are skipped"
                found = {} if row[0] else {"stock: nothing passes": [suite]}
            else:
                row, found = compare(suite, mode, stock, results)
                total[mode] = [sum(pair) for pair in zip(total[mode], row, strict=True)]
                said += refusals(results)
                end = ""
            for why, names in found.items():
                faults.setdefault(why, []).extend(names)
            _print_row(suite, mode, row, f"{end}  {time.monotonic() - start:.0f} s")
    for mode, row in total.items():
        _print_row("all", mode, row)
    if CLASSES in options.suites:
        became = run_classes(folder, out, options.arguments)
        print("\nclasses:", *(f"{name}: {what}" for name, what in became.items()), sep="\n  ")
        for name, what in became.items():
            if what.startswith("fault"):
                faults.setdefault(f"{CLASSES}: {what}", []).append(name)
        if not became:
            faults[f"{CLASSES}: nothing ran"] = [CLASSES]
    print("\nrefused:", *(f"{count:4} {text}" for text, count in said.most_common()), sep="\n  ")
    print("\nfaults:", *("\n    ".join([why, *names]) for why, names in faults.items()), sep="\n  ")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
