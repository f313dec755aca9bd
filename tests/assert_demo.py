"""Checks what ``mlakit demo`` wrote, not only that it ended: python assert_demo.py FOLDER."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Raises AssertionError naming the first thing that is not as promised."""
    found = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    exact, compressed = found["equal_cache"], found["compressed"]
    assert exact["result_bytes"] == exact["source_bytes"], "equal-cache changed the cache bytes"
    assert exact["kl_mean"] < 1e-3, f"equal-cache KL is {exact['kl_mean']}"
    assert exact["top1"] > 0.98, f"equal-cache top-1 agreement is {exact['top1']}"

    share = compressed["result"]["percent_of_own"]
    assert abs(share - 50) < 1, f"compressed cache is {share} % of the source's"
    kl = compressed["quality"]["agreement"]["kl_mean"]["value"]
    assert math.isfinite(kl) and 0 < kl < 0.5, f"compressed KL is {kl}"
    memory = compressed["memory"]["result"]
    assert memory["measured_bytes"] == memory["accounted_bytes"], "cache bytes are not as counted"
    texts = [text for s in compressed["samples"] for text in (s["source"], s["result"])]
    assert len(texts) == 6 and all(len(text.split()) > 5 for text in texts), "a sample is empty"
    recalled = [s["source"].strip().startswith("1184") for s in compressed["samples"]]
    assert recalled[-1], "the source did not look up the code"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page or "data:image/png" in page, "the report has no pictures"
    print(f"demo: equal-cache KL {exact['kl_mean']:.1e}; {share:.0f} % of the cache, KL {kl:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
