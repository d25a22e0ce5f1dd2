"""Take pictures of the pages of ``--report``: real runs on a tiny model, real pages, a real Chromium.

    python scripts/report_pictures.py --write        # into docs/pictures/reports
    python scripts/report_pictures.py --out pictures # somewhere else

It needs playwright, and a Chromium (CHROMIUM=PATH names one that is not in PATH). Times in the pictures are those of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures" / "reports"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
N_LAYERS = 24
N_COLOURS = 160
"""Colours of a picture: enough for both themes, and a quarter of the bytes."""


@dataclass(frozen=True)
class Picture:
    """One picture of a page."""

    name: str
    page: str
    theme: Literal["light", "dark"] = "light"
    width: int = 1080
    most: int = 1500
    """Most pixels of height; longer pages are cut."""

    opens: str = ""
    """A job of a batch that is opened before the picture is taken."""


ALL = (
    Picture("merge", "merge"),
    Picture("merge-dark", "merge", theme="dark"),
    Picture("merge-narrow", "merge", width=380, most=1900),
    Picture("verification-failed", "verification-failed"),
    Picture("merge-failed", "merge-failed"),
    Picture("inspection", "inspection"),
    Picture("batch", "batch", most=1900, opens="merged/support"),
)


def build(root: Path) -> None:
    """Write a tiny Llama, and a LoRA and a DoRA for it, whose changes grow from layer to layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> Any:
        torch.manual_seed(1)
        config = LlamaConfig(
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).to(torch.bfloat16)

    model().save_pretrained(root / "tiny-llama")
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name, rank, extra in (("support-lora", 16, {}), ("style-dora", 8, {"use_dora": True})):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(kinds), **extra)
        adapted = get_peft_model(model(), config)
        torch.manual_seed(3)
        for path, parameter in adapted.named_parameters():
            if "lora_B" in path:
                layer = int(path.partition("layers.")[2].partition(".")[0])
                kind = next(n for n, one in enumerate(kinds) if one in path)
                size = 1e-3 * (0.4 + (layer / N_LAYERS) ** 2) * (1.6, 1.2, 2.4, 1.0, 1.3, 1.4, 0.7)[kind]
                with torch.no_grad():
                    parameter.normal_(0, size)
        adapted.peft_config["default"].base_model_name_or_path = "tiny-llama"
        adapted.save_pretrained(root / name, save_embedding_layers=False)


def run(root: Path, *arguments: str) -> None:
    """Run the command in a directory; its exit code may be any that says what the page says."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "lora_merge", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 1:
        sys.exit(done.stderr)


def make_pages(root: Path) -> None:
    """Make the pages, each by the run that it shows. All paths are relative."""
    from safetensors.torch import load_file, save_file

    both = ("--base", "tiny-llama", "--adapter", "support-lora")
    run(root, "merge", *both, "--out", "merged/support", "--rounding", "adapter", "--report", "merge.html")
    shutil.copytree(root / "merged" / "support", root / "damaged")
    weights = root / "damaged" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.7.self_attn.v_proj.weight"][3:9] += 0.5
    tensors["model.layers.15.mlp.up_proj.weight"] *= 1.01
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    run(root, "verify", "damaged", *both, "--report", "verification-failed.html")
    run(root, "inspect", "support-lora", "--base", "tiny-llama", "--report", "inspection.html")
    shutil.copytree(root / "support-lora", root / "other-lora")
    weights = root / "other-lora" / "adapter_model.safetensors"
    tensors = {name.replace("o_proj", "out_proj"): one for name, one in load_file(weights).items()}
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    wrong = ("--base", "tiny-llama", "--adapter", "other-lora", "--out", "merged/other")
    run(root, "merge", *wrong, "--report", "merge-failed.html")
    jobs = [
        {"adapter": "support-lora", "out": "merged/support", "rounding": "adapter"},
        {"adapter": "support-lora", "out": "merged/support-half", "dtype": "float16"},
        {"adapter": "style-dora", "out": "merged/style"},
        {"adapter": "other-lora", "out": "merged/other"},
    ]
    (root / "merges.yaml").write_text(json.dumps({"defaults": {"base": "tiny-llama"}, "jobs": jobs}))
    run(root, "batch", "merges.yaml", "--keep-going", "--report", "batch.html")


def take(browser: Browser, root: Path, picture: Picture, out: Path) -> None:
    """Take one picture."""
    from PIL import Image

    page = browser.new_page(viewport={"width": picture.width, "height": 900}, color_scheme=picture.theme)
    page.goto((root / f"{picture.page}.html").as_uri())
    if picture.opens:
        page.locator("details.job", has_text=picture.opens).first.locator("> summary").click()
    height = min(page.evaluate("document.documentElement.scrollHeight"), picture.most)
    path = out / f"{picture.name}.png"
    page.screenshot(
        path=path, full_page=True, clip={"x": 0, "y": 0, "width": picture.width, "height": height}
    )
    page.close()
    Image.open(path).convert("RGB").quantize(N_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help=f"write into {PICTURES.relative_to(ROOT)}")
    parser.add_argument("--out", type=Path, help="write into this directory instead")
    arguments = parser.parse_args()
    out = PICTURES if arguments.write else arguments.out
    if out is None:
        parser.error("--write or --out DIR says where the pictures go")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit(f"no browser found (looked for {', '.join(BROWSERS)}; CHROMIUM=PATH names one)")
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build(root)
        make_pages(root)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
            for picture in ALL:
                take(browser, root, picture, out)
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
