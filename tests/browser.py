"""Opens each tab of TensorBoard on runs of the demo in a real browser, and checks what is on it.

    python -m tests.browser FOLDER [--pictures OUT]       from the checkout's folder

FOLDER gets two runs, where it has none yet: the demo, and twenty steps of it with another learning rate (some
minutes). TensorBoard serves them, and a Chromium without a window (Debian: `apt-get install chromium`) opens
them; it is driven over its debugging pipe, so nothing else has to be installed. The status is 1 if anything
is not on its page. `--pictures` also writes the pages as they look, those that README shows among them.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard import program

from act24.recipes.load import load_recipe
from act24.recipes.schema import Recipe
from act24.tools.run.train import train

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1200, 860)
PATIENCE = 60  # seconds until a page shows what is expected

#: All text of a page, of open shadow roots too, which older tabs consist of.
TEXT = """(() => {
  const found = []
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) { if (node.data.trim()) found.push(node.data.trim()); return }
    if (['STYLE', 'SCRIPT', 'NOSCRIPT', 'TEMPLATE'].includes(node.tagName)) return
    if (node.shadowRoot) walk(node.shadowRoot)
    node.childNodes.forEach(walk)
  }
  walk(document.body)
  return found.join('\\n')
})()"""
#: Of each picture on the page: its width in pixels, as shown and in the file, and how many colours it has.
PICTURES = """(() => {
  const found = []
  const walk = node => {
    if (node.tagName === 'IMG' && node.complete && node.naturalWidth > 300) {
      const canvas = document.createElement('canvas')
      canvas.width = node.naturalWidth; canvas.height = node.naturalHeight
      const context = canvas.getContext('2d')
      context.drawImage(node, 0, 0)
      const data = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer)
      found.push([node.getBoundingClientRect().width, node.naturalWidth, new Set(data).size])
    }
    if (node.shadowRoot) walk(node.shadowRoot)
    node.childNodes.forEach(walk)
  }
  walk(document.body)
  return found
})()"""


class Browser:
    """One page of a Chromium without a window."""

    def __init__(self) -> None:
        chromium = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if chromium is None:
            sys.exit("needs a Chromium: apt-get install chromium")
        self._profile = tempfile.TemporaryDirectory()
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [chromium, "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]
        command += ["--disable-dev-shm-usage", f"--user-data-dir={self._profile.name}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium has not for root

        def give_pipes() -> None:  # it reads 3 and writes 4
            low, high = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(low, 3)
            os.dup2(high, 4)

        self._process = subprocess.Popen(
            [*command, "about:blank"],
            preexec_fn=give_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._left, self._ids, self._session = b"", itertools.count(1), {}
        pages = [one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        width, height = SIZE
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, url: str) -> None:
        """Load a page anew, also where only what stands behind `#` differs."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def picture(self) -> Image.Image:
        """What is to be seen now."""
        return Image.open(io.BytesIO(base64.b64decode(self._call("Page.captureScreenshot")["data"])))

    def close(self) -> None:
        self._call("Browser.close")
        self._process.wait(30)
        self._profile.cleanup()

    def _call(self, method: str, **options: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": options, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                read = os.read(self._from, 1 << 16)
                if not read:
                    sys.exit("the browser ended")
                self._left += read
            raw, _, self._left = self._left.partition(b"\0")
            answer = json.loads(raw)
            if answer.get("id") == number:  # the others are events
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]


def in_order(*parts: str) -> Callable[[Browser], str | None]:
    """A check: these lines are on the page, in this order."""

    def check(browser: Browser) -> str | None:
        lines, at = browser.evaluate(TEXT).splitlines(), 0
        for part in parts:
            found = [n for n, line in enumerate(lines[at:], at) if line.startswith(part)]
            if not found:
                return f"there is no {part!r} behind {parts[: parts.index(part)]}"
            at = found[0] + 1
        return None

    return check


def pictures_legible(browser: Browser) -> str | None:
    """Heatmaps are there, show more than one colour, and are not shrunk beyond what their letters bear."""
    found = browser.evaluate(PICTURES)
    if not found:
        return "there is no heatmap"
    wrong = [one for one in found if one[2] < 8 or one[0] * 2.2 < one[1]]
    return f"heatmaps (shown width, width, colours): {wrong}" if wrong else None


#: Bring the charts of a group into view, on the page of Custom Scalars.
SCROLL = """(() => {
  let found = null
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE && node.data.trim() === 'sparsity_relu') found = node.parentElement
    if (node.shadowRoot) walk(node.shadowRoot)
    node.childNodes.forEach(walk)
  }
  walk(document.body)
  found.scrollIntoView()
})()"""

#: What each tab has to show. The landing page, Time Series, first.
TABS: dict[str, tuple[Callable[[Browser], str | None], ...]] = {
    "timeseries": (in_order("demo", "variant", "Pinned", "loss", "loss", "/train", "loss", "/val", "optim"),),
    "scalars": (in_order("loss", "loss/train", "optim", "perf", "sparsity_relu"),),
    "custom_scalars": (
        in_order("loss", "train and held-out", "Matches (4)", "rates", "learning rate", "gradient norm"),
        in_order("rates", "sparsity_relu", "sparsity_dropped_energy"),
    ),
    "images": (in_order("sparsity_crowded_groups", "sparsity_crowded_groups/heatmap"), pictures_legible),
    # It opens on two groups, here `alarms` and `plan`; the others are closed.
    "text": (in_order("plan", "plan/path/text_summary", "path: ", "plan/text_summary", "pass", "recipe"),),
    "hparams": (in_order("Trial ID", "optimizer.lr", "loss/train"),),
}


def recipes() -> dict[str, Recipe]:
    """The runs that are looked at, by the names of their folders."""
    variant = ("train.steps=20", "optimizer.lr=5e-4")
    return {"demo": load_recipe("demo"), "variant": load_recipe("demo", variant, scale_steps=True)}


def checked(browser: Browser, url: str, pictures: Path | None) -> list[str]:
    """What is wrong, a line a fault."""
    faults = []
    for tab, checks in TABS.items():
        browser.open(f"{url}#{tab}")
        until = time.monotonic() + PATIENCE
        wrong = ["nothing was looked at"]
        while wrong and time.monotonic() < until:
            time.sleep(0.5)
            wrong = [fault for check in checks if (fault := check(browser))]
        faults += [f"{tab}: {fault}" for fault in wrong]
        print(f"{tab}: {'; '.join(wrong) or 'as it should be'}", flush=True)
        if pictures:
            if tab == "custom_scalars":
                browser.evaluate(SCROLL)
            time.sleep(3)  # charts are drawn after their titles
            pictures.mkdir(parents=True, exist_ok=True)
            browser.picture().convert("RGB").quantize(128).save(
                pictures / f"tensorboard-{tab}.png", optimize=True
            )
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=Path, help="write what each tab looks like into this folder")
    given = parser.parse_args()
    for name, recipe in recipes().items():
        # One that was stopped goes on to its end; one that is there is left as it is.
        train(recipe, given.folder / name, resume="auto")
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(given.folder), "--port", "0", "--host", "127.0.0.1"])
    browser = Browser()
    try:
        faults = checked(browser, board.launch(), given.pictures)
    finally:
        browser.close()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
