"""Measure a page that has a model, in headless Chromium.

python tests/measure_page.py out/quickstart/attention.html
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from browser import Page, chromium, find_chromium

READS = 7
READ = """(() => {
  const { scene, frame } = state, ids = range(64).map((n) => scene.all[n % scene.all.length]);
  frame.record = null;
  const begun = performance.now();
  recordOf(scene, frame, ids);
  return performance.now() - begun;
})()"""
WRITE_ALONE = """(() => {
  const begun = performance.now();
  for (const _ of range(200)) writeToken();
  return 200_000 / (performance.now() - begun);
})()"""
SECONDS = 5
WRITTEN = "state.scene.all.length"


def measure(tab: Page, address: str) -> dict[str, float]:
    """Return medians and rates of a page that has just been written to a file."""
    begun = time.perf_counter()
    tab.open(address)
    found = {"seconds until it is open": time.perf_counter() - begun}
    tab.run(READ)  # the first pass is compiled
    reads = [tab.run(READ) for _ in range(READS)]
    found["ms to read 64 tokens"] = statistics.median(reads)
    found["tokens/s that the model writes"] = tab.run(WRITE_ALONE)
    before, begun = tab.run(WRITTEN), time.perf_counter()
    tab.run("void write()")
    time.sleep(SECONDS)
    written = tab.run(WRITTEN) - before
    found["tokens/s with all views"] = written / (time.perf_counter() - begun)
    tab.run("void write()")
    return found


def main() -> None:
    path, binary = Path(sys.argv[1]).resolve(), find_chromium()
    if binary is None:
        sys.exit("needs Chromium: apt-get install chromium")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        chromium(binary, Path(folder)) as tab,
    ):
        for name, number in measure(tab, path.as_uri()).items():
            print(f"{number:8.2f} {name}")


if __name__ == "__main__":
    main()
