# SPDX-License-Identifier: Apache-2.0
"""Makes the pictures of docs/images/ that show what notebooks and terminals show.

Two instances in this process have pools, caches, a link and some transfers. Their HTML is taken by
a headless Chromium, on a light and on a dark page; ``top`` and ``doctor`` are drawn by rich.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageChops
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType
from rich.text import Text

import llm_datadist_torch as ld
from llm_datadist_torch.cli import doctor, report, top

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}
"""Background and text, as notebooks and GitHub have them."""

WIDTH, HEIGHT, MARGIN = 660, 2000, 12
LAYERS, BLOCKS, SHAPE = 8, 256, (16, 2, 64)


def main() -> int:
    """Write all pictures; returns the exit status."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.stderr.write("screenshots: there is no Chromium here: apt-get install chromium\n")
        return 2
    with service() as (node, cache):
        before = node.stats()
        transfer(node, cache)
        terminal("top", top.render(node.stats(), before), 116)
        for name, shown in (("node", node), ("cache", cache)):
            for theme in PAGES:
                html = shown._repr_html_()
                photograph(browser, html, theme, IMAGES / f"{name}_{theme}.png")
    text = report.as_text(doctor.examine()).replace(str(ROOT), "/home/user/llm_datadist_torch")
    terminal("doctor", Text(text.rstrip()), 116)
    return 0


@contextmanager
def service() -> Iterator[tuple[ld.Node, ld.Cache]]:
    """An instance that pulls from another one, and its cache."""
    config = {"pool_bytes": 64 << 20, "device": "cpu"}
    with (
        ld.open(cluster_id=1, listen="127.0.0.1:0", **config) as prefill,
        ld.open(cluster_id=2, listen="127.0.0.1:0", **config) as decode,
    ):
        prefill.allocate(layers=LAYERS, blocks=BLOCKS, shape=SHAPE, name="kv")
        cache = decode.allocate(layers=LAYERS, blocks=BLOCKS, shape=SHAPE, name="kv")
        decode.allocate(layers=1, blocks=64, shape=SHAPE, name="draft")
        decode.connect(prefill.address or "")
        transfer(decode, cache)
        yield decode, cache


def transfer(node: ld.Node, cache: ld.Cache) -> None:
    """Pulls and pushes of many sizes."""
    peer = node.peer(1)
    for count in (1, 2, 4, 8, 16, 32, 64, 128) * 3:
        blocks = torch.randperm(BLOCKS)[:count].tolist()
        peer.pull("kv", cache, blocks, blocks)
        peer.push("kv", cache, blocks, blocks)


def photograph(browser: str, html: str, theme: str, path: Path) -> None:
    """Have a browser draw it, and cut off what is empty."""
    background, text = PAGES[theme]
    style = f"margin:{MARGIN}px;background:{background};color:{text};color-scheme:{theme}"
    page = f'<!doctype html><meta charset="utf-8"><body style="{style}">{html}</body>'
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(page, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}"]
        command += [f"--screenshot={folder}/page.png", f"file://{folder}/page.html"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(f"{folder}/page.png") as taken:
            picture = taken.convert("RGB")
    empty = Image.new("RGB", picture.size, background)
    bounds = ImageChops.difference(picture, empty).getbbox()
    if bounds is None:
        raise RuntimeError(f"the browser drew nothing for {path.name}")
    picture = picture.crop((0, 0, bounds[2] + MARGIN, bounds[3] + MARGIN))
    picture.quantize(128).save(path, optimize=True)


def terminal(name: str, shown: RenderableType, width: int) -> None:
    """Draw what a terminal shows."""
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(shown)
    # Without the fonts that it would fetch from elsewhere.
    drawing = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    title = f"python -m llm_datadist_torch {name}"
    (IMAGES / f"{name}.svg").write_text(
        console.export_svg(title=title, code_format=drawing, unique_id=name), encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
